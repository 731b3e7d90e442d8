"""syscall.py: what is asked of bpf(2), and what its refusals become."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import time
from contextlib import ExitStack

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg
from fastlb.kernel.ebpf.syscall import SCHED_CLS, HashMap, SharedValue, Value
from tests.ebpf_machine import BpfKernel

UPDATE, LOAD = 2, 5


def code() -> bytes:
    a = Assembler()
    a.alu(Reg.R0, "=", 7)
    a.exit()
    return a.assemble()


def test_a_name_that_the_kernel_would_cut_is_refused(bpf_kernel: BpfKernel) -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        HashMap("sixteen_letters_", 4, 4, 1)


def test_entries_come_and_go(bpf_kernel: BpfKernel) -> None:
    table = HashMap("table", 4, 2, 2)
    table.put(b"aaaa", b"11")
    table.put(b"bbbb", b"22")
    table.put(b"aaaa", b"33")
    table.delete(b"bbbb")
    table.delete(b"cccc")  # was never there
    assert bpf_kernel.map_named("table").entries == {b"aaaa": b"33"}
    with pytest.raises(ValueError, match="3 bytes for a field of 4"):
        table.put(b"aaa", b"11")
    table.close()


def test_a_full_map_says_its_limit(bpf_kernel: BpfKernel) -> None:
    table = HashMap("table", 1, 1, 2)
    table.put(b"a", b"1")
    table.put(b"b", b"1")
    with pytest.raises(KernelError, match="the map table is full: its limit is 2"):
        table.put(b"c", b"1")
    table.close()


def test_memory_that_comes_a_little_later(bpf_kernel: BpfKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.1 and later refill their store of entries in the background: that is worth a wait, of a second or so."""
    table, pauses = HashMap("table", 1, 1, 2), []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            bpf_kernel.refused.clear()

    monkeypatch.setattr(time, "sleep", sleep)
    bpf_kernel.refused[UPDATE] = errno.ENOMEM
    table.put(b"a", b"1")
    assert (len(pauses), pauses) == (2, sorted(pauses))
    pauses += [0.0] * 2
    bpf_kernel.refused[UPDATE] = errno.ENOMEM
    with pytest.raises(KernelError, match=r"cannot write to the map table: .*free some memory"):
        table.put(b"b", b"1")
    assert sum(pauses) < 5
    table.close()


def test_values(bpf_kernel: BpfKernel) -> None:
    value = Value("value", 8)
    assert value.read() == bytes(8)
    value.write(b"12345678")
    assert value.read() == b"12345678"
    value.close()


def test_a_shared_value_is_memory_of_both(bpf_kernel: BpfKernel) -> None:
    value = SharedValue("value", 128)
    view = value.view(64, 4)
    view[:] = b"abcd"
    assert value.read() == bytes(64) + b"abcd" + bytes(60)
    value.write(b"x" * 128)
    assert bytes(view) == b"xxxx"
    value.close()
    assert bytes(view) == b"xxxx", "it stays while it is in use"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (errno.EPERM, "cannot load the program name: Operation not permitted .this needs root, or CAP_BPF"),
        (errno.EINVAL, "cannot load the program name: Invalid argument$"),
        (errno.ENOSYS, "CONFIG_BPF_SYSCALL"),
    ],
)
def test_refusals_say_what_would_help(bpf_kernel: BpfKernel, refused: int, message: str) -> None:
    bpf_kernel.refused[LOAD] = refused
    with pytest.raises(KernelError, match=message):
        syscall.load_program(SCHED_CLS, code(), "name")


def test_what_the_verifier_refuses_to_all_but_root(bpf_kernel: BpfKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = b"0: R3 tried to add, pointer arithmetic with it prohibited for !root\nprocessed 9 insns\n"

    def refuse(command: int, attr: bytes | bytearray) -> int:
        size, log = struct.unpack_from("=4xIQ", attr, 24)
        if log:
            ctypes.memmove(log, words, min(size, len(words) + 1))
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(syscall, "bpf", refuse)
    says = r"Permission denied \(this needs root, or CAP_PERFMON\); the verifier says: 0: R3"
    with pytest.raises(KernelError, match=says):
        syscall.load_program(SCHED_CLS, code(), "name")


def test_a_signal_while_a_program_is_verified(bpf_kernel: BpfKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier gives up with EAGAIN then, and is asked again."""
    asked = []

    def interrupted(command: int, attr: bytes | bytearray) -> int:
        asked.append(command)
        if len(asked) < 4:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return bpf_kernel(command, attr)

    monkeypatch.setattr(syscall, "bpf", interrupted)
    fd = syscall.load_program(SCHED_CLS, code(), "name")
    assert (asked, bpf_kernel.programs[fd].name) == ([LOAD] * 4, "name")
    os.close(fd)


def test_a_program_is_held_by_a_stack(bpf_kernel: BpfKernel) -> None:
    with ExitStack() as undo:
        fd = syscall.hold_program(undo, SCHED_CLS, code(), "name")
        assert bpf_kernel.programs[fd].code == code()
        os.fstat(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_first_at_egress(bpf_kernel: BpfKernel) -> None:
    fd = syscall.load_program(SCHED_CLS, code(), "name")
    assert syscall.first_at_egress(3) == 0
    links = [syscall.link_to_egress(fd, 3)]
    assert syscall.first_at_egress(3) == syscall.program_id(fd)
    for each in (fd, *links):
        os.close(each)


def test_a_machine_without_ebpf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(KernelError, match="no eBPF on vax; supported are x86_64, aarch64"):
        HashMap("table", 1, 1, 1)
