"""What the guard leaves to the host though it was sent to a VIP: counted by the names that parse.pxd has for it.

Only what is seldom, and odd at a VIP, is looked at so closely. Whether an address is a VIP is asked by the key of later
fragments, which every service has (programs.py). The guard alone counts, and so each packet once.
"""

from __future__ import annotations

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import (
    DESTINATION,
    ETH_HEADER,
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
from fastlb.model.match import LATER

_, R1, R2, _, _, _, R6, R7, R8, R9, FP = Reg

PASSED = ("not_tcp_udp", "extension_headers", "icmp_quote", "icmp_fragment")  # names of reasons.pxd; labels of the code
COUNTER_SIZE = 8

_SKB_VLAN_TYPES = (0x0081, 0xA888)  # 802.1Q and 802.1ad, on the wire's order


def count_passed(a: Assembler, vips: Lookup, counters_fd: int) -> None:
    """Places the labels in PASSED, with the frame's context in R6, and falls through to what is not ours."""
    for number, reason in enumerate(PASSED):
        a.label(reason)
        a.alu(R8, "=", number)
        a.jump("passed")
    a.label("passed")
    _load_destination(a)
    a.alu(R7, "=", R8)
    for protocol in (TCP, UDP):
        a.alu(R8, "=", LATER | protocol)
        a.alu(R1, "=", 0)
        complete_key(a, DESTINATION, R1)
        if_found(a, vips.map, DESTINATION, "count")
        if_masked(a, vips, DESTINATION, "count", f"passed_{protocol}")
    a.jump("not_ours")
    a.label("count")
    a.map_value(R1, counters_fd)
    a.alu(R7, "*", COUNTER_SIZE)
    a.alu(R1, "+", R7)
    a.alu(R2, "=", 1)
    a.atomic_add(R1, 0, R2)


def _load_destination(a: Assembler) -> None:
    """Once more, as what a packet quotes may be in its place by now. R9 becomes the family."""
    a.alu(R7, "=", ETH_HEADER)
    a.load(R1, R6, 16, Size.U32)  # protocol in struct __sk_buff
    for kind in _SKB_VLAN_TYPES:
        a.jump_if(R1, "==", kind, "passed_tag")
    a.jump("passed_network")
    a.label("passed_tag")
    a.alu(R7, "+", VLAN_TAG)
    a.label("passed_network")
    load_bytes(a, -28, 20)
    a.load(R1, FP, -28, Size.U8)
    a.load(R2, FP, -16, Size.U32)
    a.alu(R1, ">>", 4)
    a.alu(R9, "=", 6)
    a.jump_if(R1, "!=", 4, "passed_ipv6")
    a.alu(R9, "=", 4)
    widen_addresses(a, R2)
    a.jump("passed_destination")
    a.label("passed_ipv6")
    load_bytes(a, -48, 40)
    a.label("passed_destination")
