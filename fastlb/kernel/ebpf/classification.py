"""The eBPF programs of classifier.py, as code: one classification, and what each does with what is ours.

The rules, in order:

    not PACKET_HOST (another host's, broadcast, outgoing)              not ours
    not IPv4 or IPv6, with at most one inline 802.1Q/802.1ad tag       not ours
    cut before the ports; an ICMP fragment                             not ours
    a fragment of IPv6 with more headers before its ports           not ours
    a fragment without ports, of a datagram in ``datagrams``           not ours
    another one: is asked about by its addresses alone, as protocol + LATER with port 0, and with several workers
                                                 goes to the one of the client's address
    an ICMP error about a TCP or UDP packet      is asked about as that packet's answer would be: the quoted
                                                 addresses and ports, the other way round
    an echo request to an address of ``vips``    ours
    other protocols than TCP and UDP                                   not ours
    (destination, port) in ``vips``, whole or in one of its masks     ours
    (source, port) in ``full_replies``, likewise, and the destination
    a source address of full NAT and one of its ports                  ours
    destination in ``locals``, the host's own addresses                not ours
    (source, port) in ``replies``, likewise                            ours
    anything else                                                      not ours

``locals`` stands between so that the answers to the host's own connections to a backend (health checks)
stay with the host; the program asks it last, after a hit in ``replies``, which comes to the same and is
cheaper. Lookups are most of what the program costs. Entries of prefixes, of port ranges and of any port look at some
bits only (masks.py); each mask in use costs another lookup, and has a slot in a table that all programs read. Without
masks a frame of a VIP costs one lookup, one that is not ours two, a backend's reply three. An address that answers
echo requests is an entry with protocol 0 and port 0.

All run after the kernel has taken the outer VLAN tag out of the frame. All but the steering see the frame from its
Ethernet header on: the socket must be SOCK_RAW, the device an Ethernet one. A fanout group is asked before the header
is put back: it sees the frame from the network header, or the inline tag, on.

``datagrams`` has those of which the host got the first fragment, though the later ones, by their addresses, would be
ours (datagrams.py): the first fragment of a datagram decides for all of it.

The ports of a header with a lying length field may be read from padding: such a frame is "ours", and the
pipeline, which parses with care, drops and counts it.

A key is 20 bytes, on the wire's order: address (IPv4: 12 zero bytes, then 4), port, protocol, and the family with the
number of the key's mask above it (0: whole address and port). The program builds keys in place (scratch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from socket import htons
from typing import NamedTuple, TypeAlias

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.fragments import ask_of_fragment, jump_if_first, settle_first
from fastlb.kernel.ebpf.frame import (
    DESTINATION,
    ETH_HEADER,
    KEY_PORT,
    KEY_PROTOCOL,
    NUMBER,
    PORTS,
    SOURCE,
    TCP,
    UDP,
    VLAN_TAG,
    Lookup,
    complete_key,
    if_found,
    if_masked,
    load_bytes,
    widen_addresses,
)
from fastlb.kernel.ebpf.host_counters import PASSED, count_passed
from fastlb.model.match import LATER
from fastlb.model.names import SHARDS

Emit: TypeAlias = Callable[[Assembler], None]  # adds instructions to a program

ACT_SHOT = 2  # what the guard returns for a frame that is ours
CACHE_LINE = 64

R0, R1, R2, R3, R4, _, R6, R7, R8, R9, FP = Reg

_SKB_PKT_TYPE, _SKB_PROTOCOL = 4, 16  # offsets in struct __sk_buff
_PACKET_HOST = 0
_WHOLE_FRAME, _NOTHING = 0x7FFFFFFF, 0  # a socket filter returns how many bytes to keep
_ACT_UNSPEC = -1  # unlike OK, lets the filters after ours have their say

_FROM_ETHERNET, _FROM_NETWORK = ETH_HEADER, 0  # where a program finds the network header
_ETH_IPV4, _ETH_IPV6, _ETH_8021Q, _ETH_8021AD = map(htons, (0x0800, 0x86DD, 0x8100, 0x88A8))
_IPV4_PLAIN = 0x45  # version 4, no options
_IPV4_FRAGMENT = htons(0x3FFF)  # more fragments, or an offset
_ICMP, _ICMPV6 = 1, 58
_ICMP_HEADER = 8
_ECHO, _ECHO6 = 8, 128
_ERRORS = (3, 11, 12)  # destination unreachable, time exceeded, parameter problem (RFC 792)
_ERRORS6 = (1, 2, 3, 4)  # with packet too big (RFC 4443)
_IPV4_OFFSET = htons(0x1FFF)  # a fragment that is not the first
_AUTHENTICATION, _FRAGMENT = 51, 44
_IPV6_OFFSET, _IPV6_MORE = htons(0xFFF8), htons(1)
_EXTENSIONS = (0, 43, 60, _AUTHENTICATION)  # hop-by-hop, routing, destination options
_MAX_EXTENSIONS = 6
_SHARD_FACTOR = 0x9E3779B1 - (1 << 32)  # an immediate is signed; the lower 32 bits of a product do not care
_SHARD_BITS = 6


class Maps(NamedTuple):
    """What the program asks; and what is known before there are any packets."""

    vips: Lookup
    replies: Lookup
    full_replies: Lookup
    sources: int
    locals: int
    datagrams: int
    source_ports: tuple[int, int] | None  # the range; None: there are no sources


# --- the programs ---------------------------------------------------------------------------------------------------


def filter_program(maps: Maps) -> bytes:
    """The socket filter of a ring: the whole of what is ours, nothing of the rest."""
    return _classification(maps, _FROM_ETHERNET, _return(_WHOLE_FRAME), _NOTHING)


def guard_program(maps: Maps, counters_fd: int) -> bytes:
    """cls_bpf at ingress: ACT_SHOT for what is ours; counts what is not, though it looks so."""
    return _classification(maps, _FROM_ETHERNET, _return(ACT_SHOT), _ACT_UNSPEC, counters_fd=counters_fd)


def steering_program(maps: Maps, owners_fd: int) -> bytes:
    """Of a fanout group: member 0 gets what is not ours, member 1 + n is worker n. ``owners_fd``: a worker a shard."""
    return _classification(maps, _FROM_NETWORK, _steer(owners_fd), _NOTHING)


def bell_program(maps: Maps, worker: int, asleep_fd: int, owners_fd: int | None) -> bytes:
    """A doorbell: a byte of the first frame that is the worker's after its word at ``asleep_fd`` became 1.

    ``owners_fd``: None with a single worker, whose everything is.
    """
    asleep = _unless_asleep(worker, asleep_fd)
    return _classification(maps, _FROM_ETHERNET, _bell(worker, asleep_fd, owners_fd), _NOTHING, asleep)


def constant_program(result: int) -> bytes:
    """A program that returns the same for every frame."""
    a = Assembler()
    a.alu(R0, "=", result)
    a.exit()
    return a.assemble()


def nothing_program() -> bytes:
    """A socket filter that keeps nothing."""
    return constant_program(_NOTHING)


def everything_program() -> bytes:
    """A socket filter that keeps every frame whole."""
    return constant_program(_WHOLE_FRAME)


# --- their code -----------------------------------------------------------------------------------------------------


def _classification(
    maps: Maps, network: int, ours: Emit, not_ours: int, first: Emit | None = None, counters_fd: int | None = None
) -> bytes:
    """The program: ``first``, then the question what is ours; what is not, or is broken, returns ``not_ours``.

    ``network``: offset of the network header. ``ours`` emits the end: a backend's reply falls into its first
    instruction, a frame to a VIP jumps to the label "to_vip", which it has to place, an answer in full NAT to the label
    "to_source". It finds the source address at fp-40 (to a VIP) or the destination at fp-24 (a reply), 16 bytes as in a
    key, and both ports in R7. ``counters_fd``: of what is not ours (passed.py).

    R6 the frame's context, R7 offset of the next header (later: the ports), R8 protocol (above it what is said of
    fragments), R9 family.
    """
    a = Assembler()
    if first is not None:
        first(a)
    _link_layer(a, network)
    _ipv6(a)
    _ipv4(a)
    ask_of_fragment(a, maps.datagrams)
    _lookups(a, maps)
    ours(a)
    _icmp(a, maps)
    _icmpv6(a)
    _last_header(a)
    if counters_fd is not None:
        count_passed(a, maps.vips, counters_fd)
    else:
        for reason in PASSED:
            a.label(reason)
    a.label("not_ours")
    a.alu(R0, "=", not_ours)
    a.exit()
    return a.assemble()


def _link_layer(a: Assembler, network: int) -> None:
    """Falls through to IPv6; other traffic (ARP, frames for other hosts) leaves after a few instructions."""
    a.alu(R6, "=", R1)
    a.load(R0, R6, _SKB_PKT_TYPE, Size.U32)
    a.jump_if(R0, "!=", _PACKET_HOST, "not_ours")
    a.alu(R7, "=", network)
    a.load(R8, R6, _SKB_PROTOCOL, Size.U32)
    a.jump_if(R8, "==", _ETH_IPV4, "ipv4")
    a.jump_if(R8, "==", _ETH_IPV6, "ipv6")
    a.jump_if(R8, "==", _ETH_8021Q, "tag")
    a.jump_if(R8, "!=", _ETH_8021AD, "not_ours")
    a.label("tag")
    load_bytes(a, PORTS, VLAN_TAG)
    a.load(R8, FP, PORTS + 2, Size.U16)
    a.alu(R7, "+", VLAN_TAG)
    a.jump_if(R8, "==", _ETH_IPV4, "ipv4")
    a.jump_if(R8, "!=", _ETH_IPV6, "not_ours")


def _ipv6(a: Assembler) -> None:
    """RFC 8200, section 4: walk the extension headers; what follows the Fragment header of a later one is no header."""
    header = -48
    a.label("ipv6")
    load_bytes(a, header, 44)
    a.load(R1, FP, header, Size.U8)
    a.alu(R1, ">>", 4)
    a.jump_if(R1, "!=", 6, "not_ours")
    a.load(R8, FP, header + 6, Size.U8)
    a.alu(R9, "=", 6)
    a.jump_if(R8, "==", TCP, "ports")
    a.jump_if(R8, "==", UDP, "ports")
    a.jump_if(R8, "==", _ICMPV6, "icmpv6")
    a.alu(R7, "+", 40)
    for number in range(_MAX_EXTENSIONS):
        _skip_extension(a, f"{number}")
        a.jump_if(R8, "==", TCP, "load_ports")
        a.jump_if(R8, "==", UDP, "load_ports")
    a.jump("last_header")


def _skip_extension(a: Assembler, suffix: str) -> None:
    """Length: 8-byte units beyond the first 8 (RFC 8200), or 4-byte units minus 2 for AH (RFC 4302, 2.2)."""
    for extension in _EXTENSIONS:
        a.jump_if(R8, "==", extension, "extension" + suffix)
    a.jump_if(R8, "!=", _FRAGMENT, "not_tcp_udp")
    load_bytes(a, PORTS, 8)
    a.alu(R7, "+", 8)
    a.load(R8, FP, PORTS, Size.U8)
    a.load(R1, FP, PORTS + 2, Size.U16)
    a.jump_if(R1, "&", _IPV6_OFFSET, "later")
    a.jump_if(R1, "&", _IPV6_MORE, "first")
    a.jump("skipped" + suffix)
    a.label("extension" + suffix)
    load_bytes(a, PORTS, 2)
    a.load(R1, FP, PORTS + 1, Size.U8)
    a.alu(R1, "+", 1)
    a.alu(R1, "<<", 3)
    a.jump_if(R8, "!=", _AUTHENTICATION, "measured" + suffix)
    a.alu(R1, ">>", 1)
    a.alu(R1, "+", 4)
    a.label("measured" + suffix)
    a.alu(R7, "+", R1)
    a.load(R8, FP, PORTS, Size.U8)
    a.label("skipped" + suffix)


def _last_header(a: Assembler) -> None:
    """Neither TCP nor UDP where the walk ends; perhaps one more that could be stepped over."""
    a.label("last_header")
    for extension in (*_EXTENSIONS, _FRAGMENT):
        a.jump_if(R8, "==", extension, "extension_headers")
    a.jump("not_tcp_udp")


def _ipv4(a: Assembler) -> None:
    """Falls through to the ports; without options they have come with the header."""
    header = -28
    a.label("ipv4")
    load_bytes(a, header, 24, otherwise="short")
    a.load(R3, FP, header + 6, Size.U16)
    a.load(R8, FP, header + 9, Size.U8)
    a.jump_if(R8, "==", TCP, "transport")
    a.jump_if(R8, "==", _ICMP, "icmp")
    a.jump_if(R8, "!=", UDP, "not_tcp_udp")
    a.label("transport")
    a.load(R1, FP, header, Size.U8)
    a.load(R2, FP, header + 12, Size.U32)
    a.load(R4, FP, header + 4, Size.U16)
    widen_addresses(a, R2)
    a.alu(R9, "=", 4)
    a.jump_if(R3, "&", _IPV4_FRAGMENT, "fragment4")
    a.jump_if(R1, "==", _IPV4_PLAIN, "ports")
    _add_ipv4_header(a)
    a.jump("load_ports")
    a.label("short")  # the last fragment may have a single byte
    load_bytes(a, header, 20)
    a.load(R3, FP, header + 6, Size.U16)
    a.jump_if(R3, "&", _IPV4_OFFSET, "short_fragment")
    a.jump("not_ours")
    a.label("short_fragment")
    a.load(R8, FP, header + 9, Size.U8)
    a.load(R1, FP, header, Size.U8)
    a.load(R2, FP, header + 12, Size.U32)
    a.load(R4, FP, header + 4, Size.U16)
    widen_addresses(a, R2)
    a.alu(R9, "=", 4)
    a.label("fragment4")
    a.store(FP, NUMBER, R4, Size.U32)
    _add_ipv4_header(a)
    a.jump_if(R3, "&", _IPV4_OFFSET, "later")


def _icmp(a: Assembler, maps: Maps) -> None:
    """RFC 792. The outer header is at fp-28; what is quoted gets there too, and then to where `_lookups` wants it."""
    header = -28
    a.label("icmp")
    a.jump_if(R3, "&", _IPV4_FRAGMENT, "icmp_fragment")
    _skip_ipv4_header(a, header)
    a.load(R2, FP, header + 12, Size.U32)
    widen_addresses(a, R2)
    a.alu(R9, "=", 4)
    load_bytes(a, PORTS, 4)
    a.load(R1, FP, PORTS, Size.U8)
    a.jump_if(R1, "==", _ECHO, "echo")
    for kind in _ERRORS:
        a.jump_if(R1, "==", kind, "quoted")
    a.jump("not_ours")
    a.label("quoted")
    a.alu(R7, "+", _ICMP_HEADER)
    load_bytes(a, header, 20, otherwise="icmp_quote")
    a.load(R1, FP, header + 6, Size.U16)
    a.jump_if(R1, "&", _IPV4_OFFSET, "icmp_quote")
    a.load(R8, FP, header + 9, Size.U8)
    _skip_ipv4_header(a, header, otherwise="icmp_quote")
    a.load(R2, FP, header + 16, Size.U32)
    a.load(R1, FP, header + 12, Size.U32)
    a.store(FP, header + 16, R1, Size.U32)
    widen_addresses(a, R2)
    load_bytes(a, PORTS, 4, otherwise="icmp_quote")
    a.label("quoted_ports")
    a.jump_if(R8, "==", TCP, "swap")
    a.jump_if(R8, "!=", UDP, "icmp_quote")
    a.label("swap")
    a.load(R1, FP, PORTS, Size.U16)
    a.load(R2, FP, PORTS + 2, Size.U16)
    a.store(FP, PORTS, R2, Size.U16)
    a.store(FP, PORTS + 2, R1, Size.U16)
    a.jump("ports")
    a.label("echo")
    a.alu(R1, "=", 0)
    a.alu(R7, "=", 0)
    a.alu(R8, "=", 0)
    complete_key(a, DESTINATION, R1)
    if_found(a, maps.vips.map, DESTINATION, "to_vip")
    if_masked(a, maps.vips, DESTINATION, "to_vip", "echo")
    a.jump("not_ours")


def _icmpv6(a: Assembler) -> None:
    """RFC 4443, right behind the IPv6 header; what is quoted is a whole packet without extension headers, or the first
    fragment of one: that of a big datagram for which a link was too narrow."""
    header = -48
    a.label("icmpv6")
    a.load(R1, FP, PORTS, Size.U8)
    a.jump_if(R1, "==", _ECHO6, "echo")
    for kind in _ERRORS6:
        a.jump_if(R1, "==", kind, "quoted6")
    a.jump("not_ours")
    a.label("quoted6")
    a.alu(R7, "+", 40 + _ICMP_HEADER)
    load_bytes(a, header, 44, otherwise="icmp_quote")
    a.load(R8, FP, header + 6, Size.U8)
    a.jump_if(R8, "!=", _FRAGMENT, "quoted6_whole")
    a.alu(R7, "+", 40)
    load_bytes(a, PORTS, 8, otherwise="icmp_quote")
    a.load(R8, FP, PORTS, Size.U8)
    a.load(R1, FP, PORTS + 2, Size.U16)
    a.jump_if(R1, "&", _IPV6_OFFSET, "icmp_quote")
    a.alu(R7, "+", 8)
    load_bytes(a, PORTS, 4, otherwise="icmp_quote")
    a.label("quoted6_whole")
    for at in (0, 8):
        a.load(R1, FP, SOURCE + at, Size.U64)
        a.load(R2, FP, DESTINATION + at, Size.U64)
        a.store(FP, SOURCE + at, R2, Size.U64)
        a.store(FP, DESTINATION + at, R1, Size.U64)
    a.jump("quoted_ports")


def _skip_ipv4_header(a: Assembler, header: int, otherwise: str = "not_ours") -> None:
    a.load(R1, FP, header, Size.U8)
    _add_ipv4_header(a, otherwise)


def _add_ipv4_header(a: Assembler, otherwise: str = "not_ours") -> None:
    """R7 += the length of the IPv4 header whose first byte is in R1; one that cannot be: go to ``otherwise``."""
    a.alu(R2, "=", R1)
    a.alu(R2, ">>", 4)
    a.jump_if(R2, "!=", 4, otherwise)
    a.alu(R1, "&", 15)
    a.jump_if(R1, "<", 5, otherwise)
    a.alu(R1, "<<", 2)
    a.alu(R7, "+", R1)


def _lookups(a: Assembler, maps: Maps) -> None:
    """Falls through for a reply. Ports and addresses stay in network order, as in the keys."""
    a.label("load_ports")
    load_bytes(a, PORTS, 4)
    a.label("ports")
    a.load(R7, FP, PORTS, Size.U32)  # the source port in its lower half, the destination port in its upper
    a.load(R1, FP, PORTS + 2, Size.U16)
    a.label("asked")
    complete_key(a, DESTINATION, R1)
    if_found(a, maps.vips.map, DESTINATION, "vip")
    if_masked(a, maps.vips, DESTINATION, "vip", "vip")
    if maps.source_ports is not None:
        _full_replies(a, maps, *maps.source_ports)
    a.load(R6, FP, DESTINATION, Size.U32)  # what the end of the other key is going to overwrite
    complete_key(a, SOURCE, R7)
    if_found(a, maps.replies.map, SOURCE, "reply")
    if_masked(a, maps.replies, SOURCE, "reply", "reply")
    a.label("nobody")
    jump_if_first(a, "nobody")
    a.jump("not_ours")

    elsewhere = {"vip": "to_vip"} | ({"source": "to_source"} if maps.source_ports is not None else {})
    for answer, onwards in elsewhere.items():
        a.label(answer)
        jump_if_first(a, answer)
        a.jump(onwards)
    settle_first(a, maps.datagrams, elsewhere | {"reply": "to_client"})

    a.label("reply")
    a.store(FP, DESTINATION, R6, Size.U32)
    a.store(FP, DESTINATION + KEY_PORT, 0, Size.U16)
    a.store(FP, DESTINATION + KEY_PROTOCOL, 0, Size.U8)
    if_found(a, maps.locals, DESTINATION, "nobody")
    jump_if_first(a, "reply")
    a.label("to_client")


def _full_replies(a: Assembler, maps: Maps, first: int, last: int) -> None:
    """An answer in full NAT goes to "source"; everything else falls through, both keys as they were."""
    a.alu(R1, "=", R7)
    a.alu(R1, ">>", 16)
    a.alu(R1, "&", 0xFF)
    a.alu(R1, "<<", 8)
    a.alu(R2, "=", R7)
    a.alu(R2, ">>", 24)
    a.alu(R1, "|", R2)  # the destination port in host order
    a.jump_if(R8, "&", LATER, "any_source_port")
    a.jump_if(R1, "<", first, "not_full")
    a.jump_if(R1, ">", last, "not_full")
    a.label("any_source_port")
    a.store(FP, DESTINATION + KEY_PORT, 0, Size.U16)
    a.store(FP, DESTINATION + KEY_PROTOCOL, 0, Size.U8)
    if_found(a, maps.sources, DESTINATION, "own_source")
    a.jump("not_full")
    a.label("own_source")
    a.load(R6, FP, DESTINATION, Size.U32)
    complete_key(a, SOURCE, R7)
    if_found(a, maps.full_replies.map, SOURCE, "source")
    if_masked(a, maps.full_replies, SOURCE, "source", "full")
    a.store(FP, DESTINATION, R6, Size.U32)
    a.label("not_full")


def _return(result: int) -> Emit:
    def emit(a: Assembler) -> None:
        a.label("to_vip")
        a.label("to_source")
        a.alu(R0, "=", result)
        a.exit()

    return emit


def _steer(owners_fd: int) -> Emit:
    """A fanout group's program: member 0 gets what is not ours, member 1 + n is worker n."""

    def emit(a: Assembler) -> None:
        _worker_of_client(a, owners_fd)
        a.alu(R0, "+", 1)
        a.exit()

    return emit


def _bell(worker: int, asleep_fd: int, owners_fd: int | None) -> Emit:
    """A doorbell; ``owners_fd``: None with a single worker, whose everything is."""

    def emit(a: Assembler) -> None:
        if owners_fd is None:
            a.label("to_vip")
            a.label("to_source")
        else:
            _worker_of_client(a, owners_fd)
            a.jump_if(R0, "!=", worker, "not_ours")
        a.map_value(R1, asleep_fd, worker * CACHE_LINE)
        a.store(R1, 0, 0, Size.U32)
        a.alu(R0, "=", 1)
        a.exit()

    return emit


def _unless_asleep(worker: int, asleep_fd: int) -> Emit:
    """Before everything else, so that the bell of a busy worker costs next to nothing."""

    def emit(a: Assembler) -> None:
        a.map_value(R2, asleep_fd, worker * CACHE_LINE)
        a.load(R0, R2, 0, Size.U32)
        a.jump_if(R0, "!=", 0, "asleep")
        a.exit()
        a.label("asleep")

    return emit


def _worker_of_client(a: Assembler, owners_fd: int) -> None:
    """R0 = the worker that owns the client's shard: ``shard_of`` of flowhash.pxd, on either leg; or a source port's."""
    _load_address(a, DESTINATION)
    a.alu(R7, ">>", 16)
    a.jump("shard")
    a.label("to_vip")
    _load_address(a, SOURCE)
    a.alu(R7, "&", 0xFFFF)
    a.label("shard")
    a.alu(R1, "^", R2)
    a.alu(R2, "=", R1)
    a.alu(R2, ">>", 32)
    a.alu(R1, "^", R2)
    a.alu(R1, "^", R7)
    a.alu(R1, "*", _SHARD_FACTOR)
    a.alu(R1, "<<", 32)  # what is above 32 bits goes
    a.alu(R1, ">>", 64 - _SHARD_BITS)
    a.label("owner")
    a.alu(R1, "<<", 2)
    a.map_value(R2, owners_fd)
    a.alu(R2, "+", R1)
    a.load(R0, R2, 0, Size.U32)
    a.jump("owned")
    if a.is_wanted("to_source"):
        a.label("to_source")
        a.alu(R1, "=", R7)
        a.alu(R1, ">>", 24)  # the lower byte of the destination port
        a.alu(R1, "&", SHARDS - 1)
        a.jump("owner")
    a.label("owned")


def _load_address(a: Assembler, key: int) -> None:
    a.load(R1, FP, key, Size.U64)
    a.load(R2, FP, key + 8, Size.U64)
