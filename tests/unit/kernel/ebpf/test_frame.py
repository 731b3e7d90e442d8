"""frame.py: each step over headers alone, run over literal bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from socket import htons

import pytest

from fastlb.kernel.ebpf import frame
from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import FP, R0, R1, R2, R7, R8
from tests.ebpf_machine import BpfKernel

FRAME = bytes(12) + struct.pack("!H", 0x0800) + bytes(range(20))


def result(kernel: BpfKernel, emit: Callable[[Assembler], None], of: bytes = FRAME) -> int:
    """What a program returns that begins a frame, does ``emit``, and has "not_ours" return -1."""
    a = Assembler()
    frame.begin_frame(a, frame.ETH_HEADER)
    emit(a)
    a.exit()
    a.label("not_ours")
    a.alu(R0, "=", -1)
    a.exit()
    return kernel.run(a.assemble(), of)


def returns(a: Assembler, register: object) -> None:
    a.alu(R0, "=", register)  # type: ignore[arg-type]


def test_a_frame_begins(bpf_kernel: BpfKernel) -> None:
    assert result(bpf_kernel, lambda a: returns(a, R7)) == 14
    assert result(bpf_kernel, lambda a: returns(a, R8)) == htons(0x0800)
    assert result(bpf_kernel, lambda a: returns(a, R7), b"\2" + FRAME[1:]) == -1, "for another host"


@pytest.mark.parametrize(("length", "expected"), [(4, 0x03020100), (20, 0x03020100), (21, -1)])
def test_bytes_are_there_or_it_is_not_ours(bpf_kernel: BpfKernel, length: int, expected: int) -> None:
    def emit(a: Assembler) -> None:
        frame.load_bytes(a, -32, length)
        a.load(R0, FP, -32, Size.U32)

    assert result(bpf_kernel, emit) == expected


@pytest.mark.parametrize(
    ("first", "length"), [(0x45, 20), (0x46, 24), (0x4F, 60), (0x44, None), (0x40, None), (0x65, None), (0x05, None)]
)
def test_an_ipv4_header_is_stepped_over(bpf_kernel: BpfKernel, first: int, length: int | None) -> None:
    def emit(a: Assembler) -> None:
        a.alu(R1, "=", first)
        frame.skip_ipv4_header(a)
        returns(a, R7)

    assert result(bpf_kernel, emit) == (-1 if length is None else 14 + length)


@pytest.mark.parametrize(("length", "in_bytes"), [(0, 8), (1, 16), (255, 2048)])
def test_an_extension_header_s_length(bpf_kernel: BpfKernel, length: int, in_bytes: int) -> None:
    def emit(a: Assembler) -> None:
        a.alu(R1, "=", length)
        frame.extension_bytes(a)
        returns(a, R1)

    assert result(bpf_kernel, emit) == in_bytes


def test_addresses_are_widened(bpf_kernel: BpfKernel) -> None:
    """Both of an IPv4 header: bytes 12 to 15 and 16 to 19 of it, behind 12 bytes of zeros each."""

    def emit(a: Assembler, at: int) -> None:
        frame.load_bytes(a, frame.IPV4_AT, frame.IPV4_HEADER)
        a.load(R2, FP, frame.IPV4_AT + 12, Size.U32)
        frame.widen_addresses(a, R2)
        a.load(R0, FP, at, Size.U32)

    for key, address in ((frame.SOURCE, 0x0F0E0D0C), (frame.DESTINATION, 0x13121110)):
        words = [result(bpf_kernel, lambda a, at=key + word: emit(a, at)) for word in range(0, 16, 4)]  # type: ignore[misc]
        assert words == [0, 0, 0, address]


def test_versions(bpf_kernel: BpfKernel) -> None:
    def emit(a: Assembler) -> None:
        frame.load_bytes(a, -32, 1)
        frame.load_version(a, -32)
        returns(a, R1)

    for first, version in ((0x45, 4), (0x60, 6), (0x0F, 0)):
        assert result(bpf_kernel, emit, FRAME[:14] + bytes([first])) == version
