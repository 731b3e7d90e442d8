"""tunnel_program.py: the outer headers go out and come back in the same place, with the flags of their tunnel."""

from __future__ import annotations

import struct

import pytest

from fastlb.kernel.ebpf.assembler import Assembler
from fastlb.kernel.ebpf.tunnel_program import describing_program
from fastlb.model.names import OFFLOAD_TYPE
from tests.ebpf_machine import STACK, BpfKernel, Run

NEXT, DROP = -1, 2  # TCX_*
FIXED_GSO, ENCAP4, ENCAP6, ENCAP_GRE, ENCAP_UDP, DECAP4, DECAP6 = 1, 2, 4, 8, 16, 128, 256
MACS = bytes(range(12))


def outer(version: int, protocol: int, behind: bytes) -> bytes:
    if version == 4:
        return b"\x45" + bytes(8) + bytes([protocol]) + bytes(10) + behind
    return b"\x60" + bytes(5) + bytes([protocol]) + bytes(33) + behind


def inner(version: int) -> bytes:
    return bytes([version << 4]) + bytes(range(1, 60))


# outer version, protocol, what is between the IP headers, inner version: flags for out, flags for in
TUNNELS = [
    (4, 4, b"", 4, FIXED_GSO | DECAP4, FIXED_GSO | ENCAP4),
    (4, 41, b"", 6, FIXED_GSO | DECAP6, FIXED_GSO | ENCAP4),
    (6, 4, b"", 4, FIXED_GSO | DECAP4, FIXED_GSO | ENCAP6),
    (6, 41, b"", 6, FIXED_GSO | DECAP6, FIXED_GSO | ENCAP6),
    (4, 47, b"\0\0\x08\0", 4, FIXED_GSO | DECAP4, FIXED_GSO | ENCAP4 | ENCAP_GRE),
    (6, 47, b"\x20\0\x86\xdd\0\0\0\x07", 6, FIXED_GSO | DECAP6, FIXED_GSO | ENCAP6 | ENCAP_GRE),
    (4, 17, bytes(12), 6, FIXED_GSO | DECAP6, FIXED_GSO | ENCAP4 | ENCAP_UDP),
    (6, 17, bytes(12), 4, FIXED_GSO | DECAP4, FIXED_GSO | ENCAP6 | ENCAP_UDP),
]


@pytest.mark.parametrize(("version", "protocol", "between", "within", "out", "back"), TUNNELS)
def test_a_tunnel_is_described(
    bpf_kernel: BpfKernel, version: int, protocol: int, between: bytes, within: int, out: int, back: int
) -> None:
    """The frame is as before, but for the EtherType."""
    headers = outer(version, protocol, between)
    kind = {4: 0x0800, 6: 0x86DD}[version]
    packet = headers + inner(within)
    run = Run(bpf_kernel, describing_program(), MACS + struct.pack("!H", OFFLOAD_TYPE) + packet, told=kind)
    assert run.result() == NEXT
    assert bpf_kernel.room == [(-len(headers), out), (len(headers), back)]
    assert bytes(run.frame) == MACS + struct.pack("!H", kind) + packet


PACKET = outer(4, 4, inner(4))
OTHERS = [
    ("another type", 0x0800, 0x0800, NEXT),
    ("its type, told as itself", OFFLOAD_TYPE, OFFLOAD_TYPE, NEXT),
    ("another type, told as IPv6", 0x86DD, 0x86DD, NEXT),
]


@pytest.mark.parametrize(("kind", "told", "result"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_frames_of_others_pass_as_they_are(bpf_kernel: BpfKernel, kind: int, told: int, result: int) -> None:
    frame = MACS + struct.pack("!H", kind) + PACKET
    run = Run(bpf_kernel, describing_program(), frame, told=told)
    assert (run.result(), bytes(run.frame), bpf_kernel.room) == (result, frame, [])


def test_what_is_cut_short_is_dropped(bpf_kernel: BpfKernel) -> None:
    """It could not be sent as a tunnel; the program reads as much as the longest headers take."""
    frame = MACS + struct.pack("!H", OFFLOAD_TYPE) + PACKET
    assert Run(bpf_kernel, describing_program(), frame[: 14 + 51], told=0x0800).result() == DROP


def test_the_machine_refuses_what_nobody_wrote(bpf_kernel: BpfKernel) -> None:
    """So that the tests above show what they seem to show."""
    a = Assembler()
    a.exit()
    with pytest.raises(AssertionError, match="r0 has no value"):
        bpf_kernel.run(a.assemble(), MACS + bytes(2))
    run = Run(bpf_kernel, a.assemble(), MACS + bytes(2))
    with pytest.raises(AssertionError, match="nobody wrote what lies at fp-512"):
        run.bytes_at(STACK, 1)
