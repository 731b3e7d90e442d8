"""The walk over a frame's headers, in the classification: down to the ports of TCP or UDP, and both addresses.

Each step falls through to the next or jumps to a label. Those that other modules place:

    ports, load_ports     the ports are on the stack; or they are at R7
    first, later          a fragment, the first of its datagram or another one (fragments.py)
    icmp, icmpv6          (icmp_quotes.py)
    not_tcp_udp, extension_headers, icmp_fragment     not ours, though it may look so (host_counters.py)
    not_ours
"""

from __future__ import annotations

from socket import htons

from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import (
    DESTINATION_OPTIONS,
    ETH_8021AD,
    ETH_8021Q,
    ETH_IPV4,
    ETH_IPV6,
    FP,
    IPV4_AT,
    IPV4_FRAGMENT,
    IPV4_HEADER,
    IPV6_AT,
    IPV6_HEADER,
    NUMBER,
    PORTS,
    R1,
    R2,
    R3,
    R4,
    R7,
    R8,
    R9,
    TCP,
    UDP,
    VLAN_TAG,
    begin_frame,
    extension_bytes,
    load_bytes,
    load_version,
    skip_ipv4_header,
    widen_addresses,
)

IPV4_OFFSET, IPV6_OFFSET = htons(0x1FFF), htons(0xFFF8)  # bits of a fragment that is not the first
FRAGMENT = 44  # the header of IPv6

_ICMP, _ICMPV6 = 1, 58
_IPV4_PLAIN = 0x45  # version 4, no options
_IPV6_MORE = htons(1)
_AUTHENTICATION = 51
_EXTENSIONS = (0, 43, DESTINATION_OPTIONS, _AUTHENTICATION)  # 0 and 43: hop-by-hop options, routing
_MAX_EXTENSIONS = 6


def link_layer(a: Assembler, network: int) -> None:
    """Fall through to IPv6; other traffic (ARP, frames for other hosts) leaves after a few instructions.

    ``network``: offset of the network header, or of the one tag that may be in front of it.
    """
    begin_frame(a, network)
    a.jump_if(R8, "==", ETH_IPV4, "ipv4")
    a.jump_if(R8, "==", ETH_IPV6, "ipv6")
    a.jump_if(R8, "==", ETH_8021Q, "tag")
    a.jump_if(R8, "!=", ETH_8021AD, "not_ours")
    a.label("tag")
    load_bytes(a, PORTS, VLAN_TAG)
    a.load(R8, FP, PORTS + 2, Size.U16)
    a.alu(R7, "+", VLAN_TAG)
    a.jump_if(R8, "==", ETH_IPV4, "ipv4")
    a.jump_if(R8, "!=", ETH_IPV6, "not_ours")


def ipv6(a: Assembler) -> None:
    """Walk the extension headers (RFC 8200, section 4); a later fragment has none behind its Fragment header."""
    a.label("ipv6")
    load_bytes(a, IPV6_AT, IPV6_HEADER + 4)
    load_version(a, IPV6_AT)
    a.jump_if(R1, "!=", 6, "not_ours")
    a.load(R8, FP, IPV6_AT + 6, Size.U8)
    a.alu(R9, "=", 6)
    a.jump_if(R8, "==", TCP, "ports")
    a.jump_if(R8, "==", UDP, "ports")
    a.jump_if(R8, "==", _ICMPV6, "icmpv6")
    a.alu(R7, "+", IPV6_HEADER)
    for number in range(_MAX_EXTENSIONS):
        _skip_extension(a, f"{number}")
        a.jump_if(R8, "==", TCP, "load_ports")
        a.jump_if(R8, "==", UDP, "load_ports")
    a.jump("last_header")


def _skip_extension(a: Assembler, suffix: str) -> None:
    """Step over one extension header; that of AH counts units of 4 bytes, minus 2 (RFC 4302, section 2.2)."""
    for extension in _EXTENSIONS:
        a.jump_if(R8, "==", extension, "extension" + suffix)
    a.jump_if(R8, "!=", FRAGMENT, "not_tcp_udp")
    load_bytes(a, PORTS, 8)
    a.alu(R7, "+", 8)
    a.load(R8, FP, PORTS, Size.U8)
    a.load(R1, FP, PORTS + 2, Size.U16)
    a.jump_if(R1, "&", IPV6_OFFSET, "later")
    a.jump_if(R1, "&", _IPV6_MORE, "first")
    a.jump("skipped" + suffix)
    a.label("extension" + suffix)
    load_bytes(a, PORTS, 2)
    a.load(R1, FP, PORTS + 1, Size.U8)
    extension_bytes(a)
    a.jump_if(R8, "!=", _AUTHENTICATION, "measured" + suffix)
    a.alu(R1, ">>", 1)
    a.alu(R1, "+", 4)
    a.label("measured" + suffix)
    a.alu(R7, "+", R1)
    a.load(R8, FP, PORTS, Size.U8)
    a.label("skipped" + suffix)


def last_header(a: Assembler) -> None:
    """Say why the walk ends at neither TCP nor UDP: with one more header that could be stepped over, or another one."""
    a.label("last_header")
    for extension in (*_EXTENSIONS, FRAGMENT):
        a.jump_if(R8, "==", extension, "extension_headers")
    a.jump("not_tcp_udp")


def ipv4(a: Assembler) -> None:
    """Go to the ports, which come with a header without options; a first fragment falls through."""
    a.label("ipv4")
    load_bytes(a, IPV4_AT, IPV4_HEADER + 4, otherwise="short")
    a.load(R3, FP, IPV4_AT + 6, Size.U16)
    a.load(R8, FP, IPV4_AT + 9, Size.U8)
    a.jump_if(R8, "==", TCP, "transport")
    a.jump_if(R8, "==", _ICMP, "icmp")
    a.jump_if(R8, "!=", UDP, "not_tcp_udp")
    a.label("transport")
    _take_addresses(a)
    a.jump_if(R3, "&", IPV4_FRAGMENT, "fragment4")
    a.jump_if(R1, "==", _IPV4_PLAIN, "ports")
    skip_ipv4_header(a)
    a.jump("load_ports")
    a.label("short")  # the last fragment may have a single byte
    load_bytes(a, IPV4_AT, IPV4_HEADER)
    a.load(R3, FP, IPV4_AT + 6, Size.U16)
    a.jump_if(R3, "&", IPV4_OFFSET, "short_fragment")
    a.jump("not_ours")
    a.label("short_fragment")
    a.load(R8, FP, IPV4_AT + 9, Size.U8)
    _take_addresses(a)
    a.label("fragment4")
    a.store(FP, NUMBER, R4, Size.U32)
    skip_ipv4_header(a)
    a.jump_if(R3, "&", IPV4_OFFSET, "later")


def _take_addresses(a: Assembler) -> None:
    """Widen both addresses; R1 becomes the header's first byte, R4 the datagram's number, R9 the family."""
    a.load(R1, FP, IPV4_AT, Size.U8)
    a.load(R2, FP, IPV4_AT + 12, Size.U32)
    a.load(R4, FP, IPV4_AT + 4, Size.U16)
    widen_addresses(a, R2)
    a.alu(R9, "=", 4)
