"""Maps and programs in the kernel that runs the tests."""

from __future__ import annotations

import os

import pytest

from fastlb import bpf
from fastlb.bpf import Assembler, HashMap, Reg, Size, Word
from fastlb.errors import KernelError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes eBPF maps and programs")

SCHED_CLS = 3
FRAME = bytes(60)


def program(emit_result: Assembler) -> int:
    """Load "r0 = ..., exit" as a tc classifier."""
    emit_result.exit()
    return bpf.load_program(SCHED_CLS, emit_result.assemble(), "bpf_test", "Apache-2.0")


def test_a_hash_map_holds_what_was_put_until_it_is_deleted() -> None:
    table = HashMap("bpf_test", 4, 4, 3)
    try:
        for key in (b"aaaa", b"bbbb", b"cccc", b"bbbb"):
            table.put(key, b"\1\0\0\0")
        assert sorted(table.keys()) == [b"aaaa", b"bbbb", b"cccc"]
        with pytest.raises(KernelError, match="the map bpf_test is full: its limit is 3"):
            table.put(b"dddd", b"\1\0\0\0")
        table.delete(b"bbbb")
        table.delete(b"zzzz")
        assert sorted(table.keys()) == [b"aaaa", b"cccc"]
        with pytest.raises(ValueError, match="3 bytes for a field of 4"):
            table.put(b"aaa", b"\1\0\0\0")
    finally:
        table.close()


def test_a_program_reads_the_word_as_it_is_now() -> None:
    word, code = Word("bpf_test"), Assembler()
    code.map_value(Reg.R1, word.fd)
    code.load(Reg.R0, Reg.R1, 0, Size.U32)
    fd = program(code)
    try:
        seen = []
        for number in (0, 7, 0xFFFF_FFFF, 1):
            word.set(number)
            seen.append(bpf.run_program(fd, FRAME)[0])
        assert seen == [0, 7, 0xFFFF_FFFF, 1]
    finally:
        os.close(fd)
        word.close()


def test_what_is_loaded_is_listed_by_name() -> None:
    table, code = HashMap("bpf_listed_map", 4, 4, 1), Assembler()
    code.alu(Reg.R0, "=", 0)
    fd = program(code)
    try:
        assert "bpf_listed_map" in bpf.maps().values()
        assert "bpf_test" in bpf.programs().values()
    finally:
        os.close(fd)
        table.close()


def test_the_verifiers_objection_is_in_the_error() -> None:
    with pytest.raises(
        KernelError, match=r"cannot load the program bpf_test: .*; the verifier says: R0 !read_ok"
    ):
        program(Assembler())
