"""Maps and programs in the kernel that runs the tests."""

from __future__ import annotations

import os
import sys

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.syscall import SCHED_CLS, HashMap, RecentMap, SharedValue, Value
from tests import ebpf

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes eBPF maps and programs")

FRAME = bytes(60)


def program(emit_result: Assembler) -> int:
    """Load "r0 = ..., exit" as a tc classifier."""
    emit_result.exit()
    return syscall.load_program(SCHED_CLS, emit_result.assemble(), "bpf_test")


def test_a_hash_map_holds_what_was_put_until_it_is_deleted() -> None:
    table = HashMap("bpf_test", 4, 4, 3)
    try:
        for key in (b"aaaa", b"bbbb", b"cccc", b"bbbb"):
            table.put(key, b"\1\0\0\0")
        assert sorted(ebpf.keys(table, 4)) == [b"aaaa", b"bbbb", b"cccc"]
        with pytest.raises(KernelError, match="the map bpf_test is full: its limit is 3"):
            table.put(b"dddd", b"\1\0\0\0")
        table.delete(b"bbbb")
        table.delete(b"zzzz")
        assert sorted(ebpf.keys(table, 4)) == [b"aaaa", b"cccc"]
        with pytest.raises(ValueError, match="3 bytes for a field of 4"):
            table.put(b"aaa", b"\1\0\0\0")
    finally:
        table.close()


def test_a_program_reads_the_word_as_it_is_now() -> None:
    word, code = ebpf.Word("bpf_test"), Assembler()
    code.map_value(Reg.R1, word.fd)
    code.load(Reg.R0, Reg.R1, 0, Size.U32)
    fd = program(code)
    try:
        seen = []
        for number in (0, 7, 0xFFFF_FFFF, 1):
            word.set(number)
            seen.append(syscall.run_program(fd, FRAME)[0])
        assert seen == [0, 7, 0xFFFF_FFFF, 1]
    finally:
        os.close(fd)
        word.close()


def test_a_program_adds_to_a_value_that_can_be_read() -> None:
    value, code = Value("bpf_test", 16), Assembler()
    code.map_value(Reg.R1, value.fd)
    code.alu(Reg.R2, "=", 3)
    code.atomic_add(Reg.R1, 8, Reg.R2)
    code.alu(Reg.R0, "=", 0)
    fd = program(code)
    try:
        value.write((5).to_bytes(8, sys.byteorder) + (1 << 32).to_bytes(8, sys.byteorder))
        syscall.run_program(fd, FRAME, repeat=4)
        words = memoryview(value.read()).cast("Q")
        assert list(words) == [5, (1 << 32) + 12]
    finally:
        os.close(fd)
        value.close()


def test_a_full_map_of_the_recent_gives_up_others() -> None:
    table = RecentMap("bpf_test", 4, 4, 64)
    try:
        for number in range(1000):
            table.put(number.to_bytes(4, "big"), bytes(4))
        held = sorted(ebpf.keys(table, 4))
        assert 0 < len(held) <= 64
        assert held[-1] == (999).to_bytes(4, "big")
    finally:
        table.close()


def test_a_program_reads_a_value_at_an_offset() -> None:
    value, code = Value("bpf_test", 256), Assembler()
    code.map_value(Reg.R1, value.fd, 64)
    code.load(Reg.R0, Reg.R1, 8, Size.U32)
    fd = program(code)
    try:
        value.write(b"".join(number.to_bytes(4, sys.byteorder) for number in range(64)))
        assert syscall.run_program(fd, FRAME)[0] == 18
        with pytest.raises(ValueError, match="4 bytes for a field of 256"):
            value.write(bytes(4))
    finally:
        os.close(fd)
        value.close()


def test_a_program_and_this_process_share_a_value() -> None:
    shared, code = SharedValue("bpf_test", 128), Assembler()
    code.map_value(Reg.R1, shared.fd, 64)
    code.load(Reg.R0, Reg.R1, 0, Size.U32)
    code.store(Reg.R1, 0, 9, Size.U32)
    fd, view = program(code), shared.view(64, 4)
    try:
        view[:] = b"\5\0\0\0"
        assert syscall.run_program(fd, FRAME)[0] == 5
        assert bytes(view) == b"\x09\0\0\0"
        shared.write(bytes(64) + b"\7" + bytes(63))
        assert bytes(view) == b"\7\0\0\0"
    finally:
        os.close(fd)
        shared.close()


def test_shared_memory_stays_until_its_last_view_has_gone() -> None:
    before = os.listdir("/proc/self/fd")
    shared = SharedValue("bpf_shared", 64)
    view = shared.view(0, 4)
    shared.close()
    with pytest.raises(ValueError, match="released"):
        shared.view(0, 4)
    view[0] = 3
    assert (view[0], "bpf_shared" in ebpf.maps().values()) == (3, True)
    view.release()
    assert os.listdir("/proc/self/fd") == before


def test_what_is_loaded_is_listed_by_name() -> None:
    table, code = HashMap("bpf_listed_map", 4, 4, 1), Assembler()
    code.alu(Reg.R0, "=", 0)
    fd = program(code)
    try:
        assert "bpf_listed_map" in ebpf.maps().values()
        assert "bpf_test" in ebpf.programs().values()
    finally:
        os.close(fd)
        table.close()


def test_the_verifiers_objection_is_in_the_error() -> None:
    with pytest.raises(
        KernelError, match=r"cannot load the program bpf_test: .*; the verifier says: R0 !read_ok"
    ):
        program(Assembler())
