"""The program that tells the kernel where the inner packet of a tunnel begins (see tunnel_offload.py), as code.

    R6 the frame's context    R7 length of the outer headers    R8, R9 flags for taking them out and putting them in
"""

from __future__ import annotations

from socket import htons

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import (
    ETH_HEADER,
    ETH_IPV4,
    ETH_IPV6,
    FP,
    GRE,
    IPV4_HEADER,
    IPV6_HEADER,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    SKB_PROTOCOL,
    UDP,
    load_bytes,
    load_version,
)
from fastlb.model.names import OFFLOAD_TYPE

_SKB_STORE_BYTES, _SKB_ADJUST_ROOM = 9, 50  # helpers
_ROOM_MAC = 1  # BPF_ADJ_ROOM_MAC: room behind the Ethernet header
_FIXED_GSO, _ENCAP_IP4, _ENCAP_IP6, _ENCAP_GRE, _ENCAP_UDP = 1, 2, 4, 8, 16  # BPF_F_ADJ_ROOM_*
_DECAP_IP4, _DECAP_IP6 = 128, 256
_NEXT, _DROP = -1, 2  # TCX_NEXT, TCX_DROP
_ETH_TYPE = 12  # offset in a frame
_OFFLOAD = htons(OFFLOAD_TYPE)
_GRE_HEADER, _GRE_KEY, _UDP_GUE = 4, 4, 12  # bytes
_MAX_OUTER = IPV6_HEADER + _UDP_GUE
_GRE_HAS_KEY = 0x20  # in the first byte
_OUTER, _TYPE, _VERSION = -64, -72, -80  # on the stack: the outer headers, the EtherType, the inner packet's first byte


def describing_program() -> bytes:
    """Return the program: it takes the outer headers out, and puts them in again as those of a tunnel."""
    a = Assembler()
    a.alu(R6, "=", R1)
    _keep_ours(a)
    load_bytes(a, _OUTER, _MAX_OUTER, "lost", at=ETH_HEADER)
    _outer_ip(a)
    _behind_ip(a)
    _inner_ip(a)
    a.alu(R2, "=", 0)
    a.alu(R2, "-", R7)
    _adjust_room(a, R8)
    a.alu(R2, "=", R7)
    _adjust_room(a, R9)
    _store(a, ETH_HEADER, _OUTER, R7)
    _store(a, _ETH_TYPE, _TYPE, 2)
    a.label("others")
    a.alu(R0, "=", _NEXT)
    a.exit()
    a.label("lost")
    a.alu(R0, "=", _DROP)
    a.exit()
    return a.assemble()


def _keep_ours(a: Assembler) -> None:
    """Go on with frames of OFFLOAD_TYPE whose sender says that they are IP, as only a packet socket can.

    R8 and the stack get the EtherType of that IP version.
    """
    a.load(R7, R6, SKB_PROTOCOL, Size.U32)  # what the packet socket was told
    a.jump_if(R7, "==", ETH_IPV4, "ip")
    a.jump_if(R7, "!=", ETH_IPV6, "others")
    a.label("ip")
    load_bytes(a, _TYPE, 2, "others", at=_ETH_TYPE)
    a.load(R1, FP, _TYPE, Size.U16)
    a.jump_if(R1, "!=", _OFFLOAD, "others")
    a.store(FP, _TYPE, R7, Size.U16)
    a.alu(R8, "=", R7)


def _outer_ip(a: Assembler) -> None:
    """Set R7 and R9 to length and flag of the outer IP header, R1 to the protocol of what follows."""
    a.alu(R7, "=", IPV4_HEADER)
    a.alu(R9, "=", _FIXED_GSO | _ENCAP_IP4)
    a.load(R1, FP, _OUTER + 9, Size.U8)
    a.jump_if(R8, "==", ETH_IPV4, "behind_ip")
    a.alu(R7, "=", IPV6_HEADER)
    a.alu(R9, "=", _FIXED_GSO | _ENCAP_IP6)
    a.load(R1, FP, _OUTER + 6, Size.U8)


def _behind_ip(a: Assembler) -> None:
    """Add what is behind the outer IP header: gue's headers, gre's with a key or without, or nothing."""
    a.label("behind_ip")
    a.jump_if(R1, "==", UDP, "udp")
    a.jump_if(R1, "!=", GRE, "inner_ip")
    a.alu(R9, "|", _ENCAP_GRE)
    a.alu(R1, "=", FP)
    a.alu(R1, "+", R7)
    a.load(R1, R1, _OUTER, Size.U8)
    a.alu(R7, "+", _GRE_HEADER)
    a.jump_if(R1, "!=", _GRE_HAS_KEY, "inner_ip")
    a.alu(R7, "+", _GRE_KEY)
    a.jump("inner_ip")
    a.label("udp")
    a.alu(R9, "|", _ENCAP_UDP)
    a.alu(R7, "+", _UDP_GUE)


def _inner_ip(a: Assembler) -> None:
    """Set R8 to the flag of the inner packet's IP version."""
    a.label("inner_ip")
    a.alu(R2, "=", R7)
    a.alu(R2, "+", ETH_HEADER)
    load_bytes(a, _VERSION, 1, "lost", at=R2)
    load_version(a, _VERSION)
    a.alu(R8, "=", _FIXED_GSO | _DECAP_IP6)
    a.jump_if(R1, "==", 6, "described")
    a.alu(R8, "=", _FIXED_GSO | _DECAP_IP4)
    a.label("described")


def _adjust_room(a: Assembler, flags: Reg) -> None:
    """Make R2 bytes of room behind the Ethernet header; fewer than 0 take bytes away."""
    a.alu(R1, "=", R6)
    a.alu(R3, "=", _ROOM_MAC)
    a.alu(R4, "=", flags)
    a.call(_SKB_ADJUST_ROOM)
    a.jump_if(R0, "!=", 0, "lost")


def _store(a: Assembler, offset: int, stack: int, length: Reg | int) -> None:
    """Copy from the stack to an offset in the frame."""
    a.alu(R1, "=", R6)
    a.alu(R2, "=", offset)
    a.alu(R3, "=", FP)
    a.alu(R3, "+", stack)
    a.alu(R4, "=", length)
    a.alu(R5, "=", 0)
    a.call(_SKB_STORE_BYTES)
    a.jump_if(R0, "!=", 0, "lost")
