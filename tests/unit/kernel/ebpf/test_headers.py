"""headers.py: where the walk over literal frames ends, and with what ports."""

from __future__ import annotations

import struct

import pytest

from fastlb.kernel.ebpf import headers
from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import ETH_HEADER, FP, PORTS, R0, load_bytes
from tests.ebpf_machine import BpfKernel
from tests.netns.test_classifier import (
    CLIENT,
    CLIENT6,
    HOST,
    OTHER_HOST,
    SCTP,
    TCP,
    UDP,
    VIP,
    VIP6,
    ethernet,
    icmp,
    ipv4,
    ipv6,
    part,
)

ENDS = (
    "fell_through", "later", "first", "icmp", "icmpv6", "not_tcp_udp", "extension_headers", "icmp_fragment", "not_ours",
)  # fmt: skip
PORTS_OF = 1000  # added to the number of the label


def walk() -> bytes:
    """A program that returns the destination port behind PORTS_OF, or the number of the label where the walk ends."""
    a = Assembler()
    headers.link_layer(a, ETH_HEADER)
    headers.ipv6(a)
    headers.ipv4(a)
    a.jump("fell_through")
    a.label("load_ports")
    load_bytes(a, PORTS, 4)
    a.label("ports")
    a.load(R0, FP, PORTS + 3, Size.U8)  # the lower byte of the destination port
    a.alu(R0, "+", PORTS_OF)
    a.exit()
    headers.last_header(a)
    for number, label in enumerate(ENDS):
        a.label(label)
        a.alu(R0, "=", number)
        a.exit()
    return a.assemble()


FRAMES: list[tuple[str, bytes, str | int]] = [
    ("tcp", ipv4(CLIENT, 1, VIP, 80), 80),
    ("udp, options", ipv4(CLIENT, 1, VIP, 53, UDP, ihl=15), 53),
    ("ipv6", ipv6(CLIENT6, 1, VIP6, 80), 80),
    ("ipv6, extensions", ipv6(CLIENT6, 1, VIP6, 80, UDP, ((0, 0), (43, 2), (60, 1), (51, 4))), 80),
    ("a tag", ipv4(CLIENT, 1, VIP, 80, tags=(0x8100,)), 80),
    ("a service tag, ipv6", ipv6(CLIENT6, 1, VIP6, 80, tags=(0x88A8,)), 80),
    ("two tags", ipv4(CLIENT, 1, VIP, 80, tags=(0x88A8, 0x8100)), "not_ours"),
    ("six extensions", ipv6(CLIENT6, 1, VIP6, 80, TCP, ((60, 0),) * 6), 80),
    ("seven extensions", ipv6(CLIENT6, 1, VIP6, 80, TCP, ((60, 0),) * 7), "extension_headers"),
    ("another protocol", ipv4(CLIENT, 1, VIP, 80, SCTP), "not_tcp_udp"),
    ("another protocol, ipv6", ipv6(CLIENT6, 1, VIP6, 80, SCTP), "not_tcp_udp"),
    ("another protocol behind an extension", ipv6(CLIENT6, 1, VIP6, 80, SCTP, ((0, 0),)), "not_tcp_udp"),
    ("icmp", icmp(CLIENT, VIP, 8), "icmp"),
    ("icmpv6", icmp(CLIENT6, VIP6, 128), "icmpv6"),
    ("first", part(CLIENT, 1, VIP, 80, TCP, "first", 1), "fell_through"),
    ("later", part(CLIENT, 1, VIP, 80, TCP, "last", 1), "later"),
    ("later, of one byte", part(CLIENT, 1, VIP, 80, TCP, "last", 1)[:35], "later"),
    ("first, ipv6", part(CLIENT6, 1, VIP6, 80, TCP, "first", 1), "first"),
    ("later, ipv6", part(CLIENT6, 1, VIP6, 80, TCP, "middle", 1), "later"),
    ("version 6 under the type of IPv4", ipv4(CLIENT, 1, VIP, 80, version=6), "not_ours"),
    ("version 4 under the type of IPv6", ipv6(CLIENT6, 1, VIP6, 80, version=4), "not_ours"),
    ("a header of 16 bytes", ipv4(CLIENT, 1, VIP, 80, ihl=4), "not_ours"),
    ("cut in the ports", ipv4(CLIENT, 1, VIP, 80)[: 14 + 23], "not_ours"),
    ("cut in the header", ipv6(CLIENT6, 1, VIP6, 80)[: 14 + 39], "not_ours"),
    ("cut in an extension", ipv6(CLIENT6, 1, VIP6, 80, TCP, ((0, 0),))[: 14 + 41], "not_ours"),
    ("arp", ethernet(bytes(28), 0x0806), "not_ours"),
    ("for another host", ipv4(CLIENT, 1, VIP, 80, mac=OTHER_HOST), "not_ours"),
]


@pytest.mark.parametrize(("frame", "end"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
def test_the_walk(bpf_kernel: BpfKernel, frame: bytes, end: str | int) -> None:
    expected = ENDS.index(end) if isinstance(end, str) else PORTS_OF + end
    assert bpf_kernel.run(walk(), frame) == expected


def test_a_frame_may_end_anywhere(bpf_kernel: BpfKernel) -> None:
    """Whatever is cut off, the program ends, and reads nothing that is not there."""
    extended = ipv6(CLIENT6, 1, VIP6, 80, TCP, ((0, 1), (44, 0), (51, 4)))
    for whole in (extended, part(CLIENT, 1, VIP, 80, UDP, "last", 1)):
        for length in range(14, len(whole)):
            assert bpf_kernel.run(walk(), whole[:length]) in range(PORTS_OF + 256)


def test_bits_are_those_of_the_headers() -> None:
    assert struct.pack("=HH", headers.IPV4_OFFSET, headers.IPV6_OFFSET) == b"\x1f\xff\xff\xf8"
    assert bytes(6) == HOST
