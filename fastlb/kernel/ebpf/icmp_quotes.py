"""ICMP in the classification: an error is asked about as the answer to the packet that it quotes would be.

So the quoted addresses and ports are put where `headers` puts those of a packet, the other way round. An echo request
is ours when its destination is in ``vips``.
"""

from __future__ import annotations

from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import (
    DESTINATION,
    FP,
    IPV4_AT,
    IPV4_FRAGMENT,
    IPV4_HEADER,
    IPV6_AT,
    IPV6_HEADER,
    PORTS,
    R1,
    R2,
    R3,
    R7,
    R8,
    R9,
    SOURCE,
    TCP,
    UDP,
    Lookup,
    complete_key,
    if_found,
    if_masked,
    load_bytes,
    skip_ipv4_header,
    widen_addresses,
)
from fastlb.kernel.ebpf.headers import FRAGMENT, IPV4_OFFSET, IPV6_OFFSET

_ICMP_HEADER = 8  # bytes
_ECHO, _ECHO6 = 8, 128
_ERRORS = (3, 11, 12)  # destination unreachable, time exceeded, parameter problem (RFC 792)
_ERRORS6 = (1, 2, 3, 4)  # with packet too big (RFC 4443)


def icmp(a: Assembler, vips: Lookup) -> None:
    """Take an ICMP error or an echo request (RFC 792); R3 has the outer header's fragment bits."""
    a.label("icmp")
    a.jump_if(R3, "&", IPV4_FRAGMENT, "icmp_fragment")
    a.load(R1, FP, IPV4_AT, Size.U8)
    skip_ipv4_header(a)
    a.load(R2, FP, IPV4_AT + 12, Size.U32)
    widen_addresses(a, R2)
    a.alu(R9, "=", 4)
    load_bytes(a, PORTS, 4)
    a.load(R1, FP, PORTS, Size.U8)
    a.jump_if(R1, "==", _ECHO, "echo")
    for kind in _ERRORS:
        a.jump_if(R1, "==", kind, "quoted")
    a.jump("not_ours")
    _quoted(a)
    _swap_ports(a)
    _echo(a, vips)


def _quoted(a: Assembler) -> None:
    """Put the quoted IPv4 header in the outer one's place, with its addresses exchanged."""
    a.label("quoted")
    a.alu(R7, "+", _ICMP_HEADER)
    load_bytes(a, IPV4_AT, IPV4_HEADER, otherwise="icmp_quote")
    a.load(R1, FP, IPV4_AT + 6, Size.U16)
    a.jump_if(R1, "&", IPV4_OFFSET, "icmp_quote")
    a.load(R8, FP, IPV4_AT + 9, Size.U8)
    a.load(R1, FP, IPV4_AT, Size.U8)
    skip_ipv4_header(a, otherwise="icmp_quote")
    a.load(R2, FP, IPV4_AT + 16, Size.U32)
    a.load(R1, FP, IPV4_AT + 12, Size.U32)
    a.store(FP, IPV4_AT + 16, R1, Size.U32)
    widen_addresses(a, R2)
    load_bytes(a, PORTS, 4, otherwise="icmp_quote")


def _swap_ports(a: Assembler) -> None:
    """Go on with the quoted ports exchanged."""
    a.label("quoted_ports")
    a.jump_if(R8, "==", TCP, "swap")
    a.jump_if(R8, "!=", UDP, "icmp_quote")
    a.label("swap")
    a.load(R1, FP, PORTS, Size.U16)
    a.load(R2, FP, PORTS + 2, Size.U16)
    a.store(FP, PORTS, R2, Size.U16)
    a.store(FP, PORTS + 2, R1, Size.U16)
    a.jump("ports")


def _echo(a: Assembler, vips: Lookup) -> None:
    """Ask for the destination with protocol 0 and port 0."""
    a.label("echo")
    a.alu(R1, "=", 0)
    a.alu(R7, "=", 0)
    a.alu(R8, "=", 0)
    complete_key(a, DESTINATION, R1)
    if_found(a, vips.map, DESTINATION, "to_vip")
    if_masked(a, vips, DESTINATION, "to_vip", "echo")
    a.jump("not_ours")


def icmpv6(a: Assembler) -> None:
    """Take an ICMPv6 error or an echo request, right behind the IPv6 header (RFC 4443).

    What an error quotes is a whole packet without extension headers, or the first fragment of one: that of a big
    datagram for which a link was too narrow.
    """
    a.label("icmpv6")
    a.load(R1, FP, PORTS, Size.U8)
    a.jump_if(R1, "==", _ECHO6, "echo")
    for kind in _ERRORS6:
        a.jump_if(R1, "==", kind, "quoted6")
    a.jump("not_ours")
    a.label("quoted6")
    a.alu(R7, "+", IPV6_HEADER + _ICMP_HEADER)
    load_bytes(a, IPV6_AT, IPV6_HEADER + 4, otherwise="icmp_quote")
    a.load(R8, FP, IPV6_AT + 6, Size.U8)
    a.jump_if(R8, "!=", FRAGMENT, "quoted6_whole")
    a.alu(R7, "+", IPV6_HEADER)
    load_bytes(a, PORTS, 8, otherwise="icmp_quote")
    a.load(R8, FP, PORTS, Size.U8)
    a.load(R1, FP, PORTS + 2, Size.U16)
    a.jump_if(R1, "&", IPV6_OFFSET, "icmp_quote")
    a.alu(R7, "+", 8)
    load_bytes(a, PORTS, 4, otherwise="icmp_quote")
    a.label("quoted6_whole")
    for at in (0, 8):
        a.load(R1, FP, SOURCE + at, Size.U64)
        a.load(R2, FP, DESTINATION + at, Size.U64)
        a.store(FP, SOURCE + at, R2, Size.U64)
        a.store(FP, DESTINATION + at, R1, Size.U64)
    a.jump("quoted_ports")
