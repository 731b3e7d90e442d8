"""The eBPF programs of classifier.py, as code: one classification, and what each does with what is ours.

The rules, in order:

    not PACKET_HOST (another host's, broadcast, outgoing)              not ours
    not IPv4 or IPv6, with at most one inline 802.1Q/802.1ad tag       not ours
    cut before the ports; an ICMP fragment                             not ours
    a fragment of IPv6 with more headers before its ports              not ours
    a fragment without ports, of a datagram in ``datagrams``           not ours
    another one: is asked about by its addresses alone, as protocol + LATER with port 0, and with several workers
                                                 goes to the one of the client's address
    an ICMP error about a TCP or UDP packet      is asked about as that packet's answer would be: the quoted
                                                 addresses and ports, the other way round
    an echo request to an address of ``vips``    ours
    other protocols than TCP and UDP                                   not ours
    (destination, port) in ``vips``, whole or under one of its masks   ours
    (source, port) in ``full_replies``, likewise, and the destination
    a source address of full NAT and one of its ports                  ours
    destination in ``locals``, the host's own addresses                not ours
    (source, port) in ``replies``, likewise                            ours
    anything else                                                      not ours

``locals`` stands between so that the answers to the host's own connections to a backend (health checks)
stay with the host; the program asks it last, after a hit in ``replies``, which comes to the same and is
cheaper. Lookups are most of what the program costs. Entries of prefixes, of port ranges and of any port look at some
bits only (fastlb/model/match.py); each mask in use costs another lookup, and has a slot in a table that all programs
read. Without masks a frame of a VIP costs one lookup, one that is not ours two, a backend's reply three. An address
that answers echo requests is an entry with protocol 0 and port 0.

All run after the kernel has taken the outer VLAN tag out of the frame. All but the steering see the frame from its
Ethernet header on: the socket must be SOCK_RAW, the device an Ethernet one. A fanout group is asked before the header
is put back: it sees the frame from the network header, or the inline tag, on.

``datagrams`` has those of which the host got the first fragment, though the later ones, by their addresses, would be
ours (fragments.py): the first fragment of a datagram decides for all of it.

The ports of a header with a lying length field may be read from padding: such a frame is "ours", and the
pipeline, which parses with care, drops and counts it.

A key is 20 bytes, on the wire's order: address (IPv4: 12 zero bytes, then 4), port, protocol, and the family with the
number of the key's mask above it (0: whole address and port). The program builds keys in place (frame.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from fastlb.kernel.ebpf import headers, icmp_quotes
from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.fragments import ask_of_fragment, jump_if_first, settle_first
from fastlb.kernel.ebpf.frame import (
    ACT_SHOT,
    ACT_UNSPEC,
    DESTINATION,
    ETH_HEADER,
    FP,
    KEY_PORT,
    KEY_PROTOCOL,
    NOTHING,
    PORTS,
    R0,
    R1,
    R2,
    R6,
    R7,
    R8,
    SOURCE,
    WHOLE_FRAME,
    Lookup,
    complete_key,
    if_found,
    if_masked,
    load_bytes,
)
from fastlb.kernel.ebpf.host_counters import REASONS, count_host_packets
from fastlb.model.match import LATER
from fastlb.model.names import SHARDS

Emit: TypeAlias = Callable[[Assembler], None]  # adds instructions to a program

CACHE_LINE = 64

_FROM_ETHERNET, _FROM_NETWORK = ETH_HEADER, 0  # where a program finds the network header
_SHARD_FACTOR = 0x9E3779B1 - (1 << 32)  # of flowhash.pxd; an immediate is signed: a product's lower 32 bits do not care
_SHARD_BITS = SHARDS.bit_length() - 1


class Maps(NamedTuple):
    """File descriptors of the maps that the programs ask; and what is known before there are any packets."""

    vips: Lookup
    replies: Lookup
    full_replies: Lookup
    sources: int
    locals: int
    datagrams: int
    source_ports: tuple[int, int] | None  # the range; None: there are no sources


# --- the programs ---------------------------------------------------------------------------------------------------


def filter_program(maps: Maps) -> bytes:
    """Return the socket filter of a ring: it keeps the whole of what is ours, and nothing of the rest."""
    return _classification(maps, _FROM_ETHERNET, _return(WHOLE_FRAME), NOTHING)


def guard_program(maps: Maps, counters_fd: int) -> bytes:
    """Return the guard, for cls_bpf at ingress: it drops what is ours, and counts what is not though it looks so."""
    return _classification(maps, _FROM_ETHERNET, _return(ACT_SHOT), ACT_UNSPEC, counters_fd=counters_fd)


def steering_program(maps: Maps, owners_fd: int) -> bytes:
    """Return the program of a fanout group: member 0 gets what is not ours, member 1 + n is worker n.

    ``owners_fd``: a map with the worker of each shard.
    """
    return _classification(maps, _FROM_NETWORK, _steer(owners_fd), NOTHING)


def bell_program(maps: Maps, worker: int, asleep_fd: int, owners_fd: int | None) -> bytes:
    """Return a doorbell: it keeps a byte of the first frame that is the worker's after its word in ``asleep_fd`` is 1.

    ``owners_fd``: as for the steering; None with a single worker, which owns every shard.
    """
    asleep = _unless_asleep(worker, asleep_fd)
    return _classification(maps, _FROM_ETHERNET, _bell(worker, asleep_fd, owners_fd), NOTHING, asleep)


def constant_program(result: int) -> bytes:
    """Return a program that gives the same result for every frame: as a socket filter, NOTHING or WHOLE_FRAME."""
    a = Assembler()
    a.alu(R0, "=", result)
    a.exit()
    return a.assemble()


# --- their code -----------------------------------------------------------------------------------------------------


def _classification(
    maps: Maps, network: int, ours: Emit, not_ours: int, first: Emit | None = None, counters_fd: int | None = None
) -> bytes:
    """Assemble ``first``, then the question what is ours; what is not, or is broken, returns ``not_ours``.

    ``network``: offset of the network header. ``ours`` emits the end: a backend's reply falls into its first
    instruction, a frame to a VIP jumps to the label "to_vip", which it has to place, an answer in full NAT to the label
    "to_source". It finds the source address at fp-40 (to a VIP) or the destination at fp-24 (a reply), 16 bytes as in a
    key, and both ports in R7. ``counters_fd``: of what is not ours (host_counters.py).

    R6 the frame's context, R7 offset of the next header (later: the ports), R8 protocol (above it what is said of
    fragments), R9 family.
    """
    a = Assembler()
    if first is not None:
        first(a)
    headers.link_layer(a, network)
    headers.ipv6(a)
    headers.ipv4(a)
    ask_of_fragment(a, maps.datagrams)
    _lookups(a, maps)
    ours(a)
    icmp_quotes.icmp(a, maps.vips)
    icmp_quotes.icmpv6(a)
    headers.last_header(a)
    if counters_fd is not None:
        count_host_packets(a, maps.vips, counters_fd)
    else:
        for reason in REASONS:
            a.label(reason)
    a.label("not_ours")
    a.alu(R0, "=", not_ours)
    a.exit()
    return a.assemble()


def _lookups(a: Assembler, maps: Maps) -> None:
    """Ask whose the frame is; a reply falls through. Ports and addresses stay in network order, as in the keys."""
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
    """Send an answer in full NAT to "source"; everything else falls through, both keys as they were."""
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
    """Make the end of a program that does the same with all that is ours."""

    def emit(a: Assembler) -> None:
        a.label("to_vip")
        a.label("to_source")
        a.alu(R0, "=", result)
        a.exit()

    return emit


def _steer(owners_fd: int) -> Emit:
    """Make the end of the steering: one more than the worker's number."""

    def emit(a: Assembler) -> None:
        _worker_of_client(a, owners_fd)
        a.alu(R0, "+", 1)
        a.exit()

    return emit


def _bell(worker: int, asleep_fd: int, owners_fd: int | None) -> Emit:
    """Make the end of a doorbell: if the frame is the worker's, put its word back to 0, and keep a byte."""

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
    """Make the beginning of a doorbell: that of a busy worker ends here, so that it costs next to nothing."""

    def emit(a: Assembler) -> None:
        a.map_value(R2, asleep_fd, worker * CACHE_LINE)
        a.load(R0, R2, 0, Size.U32)
        a.jump_if(R0, "!=", 0, "asleep")
        a.exit()
        a.label("asleep")

    return emit


def _worker_of_client(a: Assembler, owners_fd: int) -> None:
    """Set R0 to the worker of the client's shard (`shard_of` of flowhash.pxd), on either leg; or of a source port's."""
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
    """Load the 16 bytes of an address into R1 and R2."""
    a.load(R1, FP, key, Size.U64)
    a.load(R2, FP, key + 8, Size.U64)
