"""Counters of what the guard leaves to the host though it was sent to a VIP, by the names of `reasons.pxd`.

Only what is seldom, and odd at a VIP, is looked at so closely. Whether an address is a VIP is asked by the key of later
fragments, which every service has (classification.py). The guard alone counts, and so each packet once.
"""

from __future__ import annotations

from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import (
    DESTINATION,
    ETH_8021AD,
    ETH_8021Q,
    ETH_HEADER,
    IPV4_AT,
    IPV4_HEADER,
    IPV6_AT,
    IPV6_HEADER,
    R1,
    R2,
    R6,
    R7,
    R8,
    R9,
    SKB_PROTOCOL,
    TCP,
    UDP,
    VLAN_TAG,
    Lookup,
    complete_key,
    if_found,
    if_masked,
    load_bytes,
    load_version,
    widen_destination,
)
from fastlb.model.match import LATER

REASONS = ("not_tcp_udp", "extension_headers", "icmp_quote", "icmp_fragment")  # labels of the classification, too
COUNTER_SIZE = 8  # bytes


def count_host_packets(a: Assembler, vips: Lookup, counters_fd: int) -> None:
    """Place the labels in REASONS, with the frame's context in R6, and fall through to what is not ours."""
    for number, reason in enumerate(REASONS):
        a.label(reason)
        a.alu(R8, "=", number)
        a.jump("to_host")
    a.label("to_host")
    _load_destination(a)
    a.alu(R7, "=", R8)
    for protocol in (TCP, UDP):
        a.alu(R8, "=", LATER | protocol)
        a.alu(R1, "=", 0)
        complete_key(a, DESTINATION, R1)
        if_found(a, vips.map, DESTINATION, "count")
        if_masked(a, vips, DESTINATION, "count", f"to_host_{protocol}")
    a.jump("not_ours")
    a.label("count")
    a.map_value(R1, counters_fd)
    a.alu(R7, "*", COUNTER_SIZE)
    a.alu(R1, "+", R7)
    a.alu(R2, "=", 1)
    a.atomic_add(R1, 0, R2)


def _load_destination(a: Assembler) -> None:
    """Put the destination in its place again, where what a packet quotes may be by now. R9 becomes the family."""
    a.alu(R7, "=", ETH_HEADER)
    a.load(R1, R6, SKB_PROTOCOL, Size.U32)
    for kind in (ETH_8021Q, ETH_8021AD):
        a.jump_if(R1, "==", kind, "to_host_tag")
    a.jump("to_host_network")
    a.label("to_host_tag")
    a.alu(R7, "+", VLAN_TAG)
    a.label("to_host_network")
    load_bytes(a, IPV4_AT, IPV4_HEADER)
    load_version(a, IPV4_AT)
    a.alu(R9, "=", 6)
    a.jump_if(R1, "!=", 4, "to_host_ipv6")
    a.alu(R9, "=", 4)
    widen_destination(a)
    a.jump("to_host_destination")
    a.label("to_host_ipv6")
    load_bytes(a, IPV6_AT, IPV6_HEADER)
    a.label("to_host_destination")
