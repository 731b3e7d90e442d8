"""The classification, run by the kernel over literal frames in each of its programs, and the maps that it reads.

The kernel's test run plays a frame as received by the loopback device: a destination MAC of zeros is
PACKET_HOST, and a tag in the frame stands for the inner one of two (the outer is out of the frame by then).
A socket filter's test run begins at the network header, as a fanout group's program does.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb import Config, Datapath, Verdict
from fastlb.errors import KernelError
from fastlb.kernel.ebpf import fragments, syscall, tables
from fastlb.kernel.ebpf.classifier import Classifier, Sources
from fastlb.model.match import LATER, Key, Keys, blocks_of
from fastlb.model.names import SHARDS
from tests import ebpf
from tests.ebpf import is_taken

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loads eBPF programs")

TCP, UDP, ICMP, ICMP6, SCTP = 6, 17, 1, 58, 132
HOST, OTHER_HOST, BROADCAST = bytes(6), bytes.fromhex("020000000001"), b"\xff" * 6
DF, MF = 0x4000, 0x2000

CLIENT, VIP, VIP_ANY, OWN, ELSEWHERE = "192.0.2.1", "203.0.113.10", "203.0.113.20", "10.2.0.2", "192.0.2.77"
BACKEND, BACKEND_ANY = "10.3.0.11", "10.3.0.12"
CLIENT6, VIP6, VIP6_ANY, OWN6 = "fd00:1::2", "2001:db8:cafe::10", "2001:db8:cafe::20", "fd00:2::2"
BACKEND6, BACKEND6_ANY, ELSEWHERE6 = "fd00:3::11", "fd00:3::12", "fd00:1::77"

VIPS = [
    (VIP, 80, TCP),
    (VIP, 5000, UDP),
    (VIP_ANY, 0, TCP),
    (VIP6, 80, TCP),
    (VIP6_ANY, 0, UDP),
    (OWN, 81, TCP),
    (VIP, 0, 0),  # echo requests
    (VIP6, 0, 0),
]
REPLIES = [(BACKEND, 8080, TCP), (BACKEND_ANY, 0, UDP), (BACKEND6, 8080, TCP), (BACKEND6_ANY, 0, UDP)]
LOCALS = [OWN, OWN6]


def ethernet(payload: bytes, kind: int, mac: bytes = HOST, tags: tuple[int, ...] = ()) -> bytes:
    """``tags``: the tag protocols in front of ``kind``, outermost first."""
    tagged = b"".join(struct.pack("!HH", tag, 7) for tag in tags)
    return mac + bytes(6) + tagged + struct.pack("!H", kind) + payload


def ipv4(
    source: str, sport: int, target: str, dport: int, protocol: int = TCP, *, ihl: int = 5, version: int = 4,
    fragment: int = DF, number: int = 1, **link: Any,
) -> bytes:  # fmt: skip
    """An IPv4 frame; ``ihl`` below 5 only lies, above 5 adds options. ``fragment``: flags, and the offset in units."""
    options, rest = bytes(4 * max(ihl - 5, 0)), struct.pack("!HH", sport, dport) + bytes(16)
    header = struct.pack("!BBHHHBBH", version << 4 | ihl, 0, 40 + len(options), number, fragment, 64, protocol, 0)
    addresses = ip_address(source).packed + ip_address(target).packed
    return ethernet(header + addresses + options + rest, 0x0800, **link)


def ipv6(
    source: str, sport: int, target: str, dport: int, protocol: int = TCP,
    extensions: tuple[tuple[int, int], ...] = (), *, version: int = 6, **link: Any,
) -> bytes:  # fmt: skip
    """An IPv6 frame; ``extensions``: (header type, its length byte), in order."""
    types = [each for each, _ in extensions] + [protocol]
    chain = b"".join(
        bytes([following, length]) + bytes(length * 4 + 6 if kind == 51 else length * 8 + 6)
        for (kind, length), following in zip(extensions, types[1:], strict=True)
    )
    rest = chain + struct.pack("!HH", sport, dport) + bytes(16)
    header = struct.pack("!IHBB", version << 28, len(rest), types[0], 64)
    return ethernet(header + ip_address(source).packed + ip_address(target).packed + rest, 0x86DD, **link)


def later6(source: str, target: str, protocol: int) -> bytes:
    """A fragment of IPv6 from 8 bytes on; what lies where ports would be is none."""
    return part6(source, 40000, target, 80, protocol, 8, 7)


def part6(
    source: str, sport: int, target: str, dport: int, protocol: int, field: int, number: int, *, before: int = 0,
    **link: Any,
) -> bytes:  # fmt: skip
    """A fragment of IPv6; ``field``: offset in bytes, and 1 if there are more; ``before``: hop-by-hop headers."""
    kinds = [0] * before + [44]
    chain = b"".join(bytes([following]) + bytes(7) for following in kinds[1:])
    rest = chain + struct.pack("!BBHIHH", protocol, 0, field, number, sport, dport) + bytes(16)
    header = struct.pack("!IHBB", 6 << 28, len(rest), kinds[0], 64)
    return ethernet(header + ip_address(source).packed + ip_address(target).packed + rest, 0x86DD, **link)


def part(
    source: str, sport: int, target: str, dport: int, protocol: int, which: str, number: int, **link: Any
) -> bytes:
    """A fragment of either version: the first, a middle one, or the last."""
    offset, more = {"first": (0, True), "middle": (8, True), "last": (1480, False)}[which]
    if ":" in target:
        return part6(source, sport, target, dport, protocol, offset | more, number, **link)
    return ipv4(
        source, sport, target, dport, protocol, fragment=(MF if more else 0) | offset // 8, number=number, **link
    )


def icmp(
    source: str, target: str, kind: int, quoted: bytes = b"", *, ihl: int = 5, fragment: int = DF, **link: Any
) -> bytes:
    """An ICMP or ICMPv6 frame of a type; ``quoted``: the frame whose packet it quotes."""
    body = struct.pack("!BBHI", kind, 0, 0, 0) + quoted[14:]
    if ":" in target:
        header = struct.pack("!IHBB", 6 << 28, len(body), ICMP6, 64)
        return ethernet(header + ip_address(source).packed + ip_address(target).packed + body, 0x86DD, **link)
    header = struct.pack("!BBHHHBBH", 4 << 4 | ihl, 0, ihl * 4 + len(body), 1, fragment, 64, ICMP, 0)
    addresses = ip_address(source).packed + ip_address(target).packed
    return ethernet(header + addresses + bytes(4 * (ihl - 5)) + body, 0x0800, **link)


FRAMES: list[tuple[str, bytes, bool]] = [
    # the four tables of a service: IPv4 and IPv6, TCP and UDP, port and any port
    ("vip", ipv4(CLIENT, 40000, VIP, 80), True),
    ("vip, other port", ipv4(CLIENT, 40000, VIP, 81), False),
    ("vip, other protocol", ipv4(CLIENT, 40000, VIP, 80, UDP), False),
    ("vip udp", ipv4(CLIENT, 40000, VIP, 5000, UDP), True),
    ("vip icmp", ipv4(CLIENT, 40000, VIP, 80, ICMP), False),
    ("vip sctp", ipv4(CLIENT, 40000, VIP, 80, SCTP), False),
    ("vip as source", ipv4(VIP, 80, CLIENT, 40000), False),
    ("ports the wrong way round", ipv4(CLIENT, 80, VIP, 40000), False),
    ("any port, low", ipv4(CLIENT, 40000, VIP_ANY, 1), True),
    ("any port, high", ipv4(CLIENT, 40000, VIP_ANY, 65535), True),
    ("any port, other protocol", ipv4(CLIENT, 40000, VIP_ANY, 1, UDP), False),
    ("any port is not port 0 of another", ipv4(CLIENT, 40000, VIP, 0), False),
    ("vip6", ipv6(CLIENT6, 40000, VIP6, 80), True),
    ("vip6, other port", ipv6(CLIENT6, 40000, VIP6, 81), False),
    ("vip6 icmp", ipv6(CLIENT6, 40000, VIP6, 80, ICMP6), False),
    ("any port, ipv6", ipv6(CLIENT6, 40000, VIP6_ANY, 443, UDP), True),
    ("any port, ipv6, other protocol", ipv6(CLIENT6, 40000, VIP6_ANY, 443), False),
    ("ipv4 vip in an ipv6 address", ipv6(CLIENT6, 40000, f"::{VIP}", 80), False),
    # the host's own addresses, and replies of backends
    ("host's own ssh", ipv4(CLIENT, 40000, OWN, 22), False),
    ("host's own address as a vip", ipv4(CLIENT, 40000, OWN, 81), True),
    ("host's own, ipv6", ipv6(CLIENT6, 40000, OWN6, 22), False),
    ("reply", ipv4(BACKEND, 8080, CLIENT, 40000), True),
    ("reply, other port", ipv4(BACKEND, 8081, CLIENT, 40000), False),
    ("reply, other protocol", ipv4(BACKEND, 8080, CLIENT, 40000, UDP), False),
    ("reply, any port", ipv4(BACKEND_ANY, 1234, CLIENT, 40000, UDP), True),
    ("reply, any port, other protocol", ipv4(BACKEND_ANY, 1234, CLIENT, 40000), False),
    ("health check's answer", ipv4(BACKEND, 8080, OWN, 40000), False),
    ("health check's answer, any port", ipv4(BACKEND_ANY, 1234, OWN, 40000, UDP), False),
    ("backend is a client of the vip", ipv4(BACKEND, 8080, VIP, 80), True),
    ("reply, ipv6", ipv6(BACKEND6, 8080, CLIENT6, 40000), True),
    ("reply, ipv6, any port", ipv6(BACKEND6_ANY, 1234, CLIENT6, 40000, UDP), True),
    ("health check's answer, ipv6", ipv6(BACKEND6, 8080, OWN6, 40000), False),
    ("forwarded by the host", ipv4(CLIENT, 40000, ELSEWHERE, 80), False),
    ("forwarded by the host, ipv6", ipv6(CLIENT6, 40000, ELSEWHERE6, 80), False),
    # IPv4 headers
    ("one option", ipv4(CLIENT, 40000, VIP, 80, ihl=6), True),
    ("ten options", ipv4(CLIENT, 40000, VIP, 80, ihl=15), True),
    ("ten options, other port", ipv4(CLIENT, 40000, VIP, 81, ihl=15), False),
    ("ihl 4, which would find ports in the address", ipv4(CLIENT, 40000, VIP_ANY, 80, ihl=4), False),
    ("ihl 0", ipv4(CLIENT, 40000, VIP_ANY, 80, ihl=0), False),
    ("version 6 under the type of ipv4", ipv4(CLIENT, 40000, VIP, 80, version=6), False),
    ("may be fragmented", ipv4(CLIENT, 40000, VIP, 80, fragment=0), True),
    ("first fragment", ipv4(CLIENT, 40000, VIP, 80, fragment=MF), True),
    ("first fragment, other port", ipv4(CLIENT, 40000, VIP, 81, fragment=MF, number=2), False),
    ("middle fragment", ipv4(CLIENT, 1, VIP, 2, fragment=MF | 185), True),
    ("last fragment", ipv4(CLIENT, 1, VIP, 2, UDP, fragment=0x1FFF), True),
    ("last fragment, options", ipv4(CLIENT, 1, VIP, 2, UDP, fragment=0x1FFF, ihl=9), True),
    ("last fragment, ihl 4", ipv4(CLIENT, 1, VIP, 2, UDP, fragment=0x1FFF, ihl=4), False),
    ("last fragment, other protocol", ipv4(CLIENT, 1, VIP_ANY, 2, UDP, fragment=1), False),
    ("last fragment of sctp", ipv4(CLIENT, 1, VIP, 2, SCTP, fragment=1), False),
    ("last fragment to the host", ipv4(CLIENT, 1, ELSEWHERE, 80, fragment=1), False),
    ("last fragment of a reply", ipv4(BACKEND, 1, CLIENT, 2, fragment=1), True),
    ("last fragment of a backend's answer to the host", ipv4(BACKEND_ANY, 8, OWN, 2, UDP, fragment=1), False),
    ("last fragment of another protocol of a backend", ipv4(BACKEND, 8080, CLIENT, 2, UDP, fragment=1), False),
    # IPv6 headers: (type, length byte)
    ("version 4 under the type of ipv6", ipv6(CLIENT6, 40000, VIP6, 80, version=4), False),
    ("hop-by-hop", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((0, 0),)), True),
    ("routing, 24 bytes", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((43, 2),)), True),
    ("destination options, 2048 bytes", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((60, 255),)), True),
    ("authentication, 24 bytes", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((51, 4),)), True),
    ("extension, other port", ipv6(CLIENT6, 40000, VIP6, 81, TCP, ((0, 0),)), False),
    (
        "udp behind all four",
        ipv6(CLIENT6, 40000, VIP6_ANY, 9, UDP, ((0, 1), (60, 0), (43, 3), (51, 4))),
        True,
    ),
    ("six extensions", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((60, 0),) * 6), True),
    ("seven extensions", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((60, 0),) * 7), False),
    ("fragment header", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((44, 0),)), True),
    ("fragment header, other port", ipv6(CLIENT6, 40000, VIP6, 81, TCP, ((44, 0),)), False),
    ("fragment header behind another", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((0, 0), (44, 0))), True),
    ("fragment header before another", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((44, 0), (60, 0))), True),
    ("first fragment before another header", part6(CLIENT6, 40000, VIP6, 80, 60, 1, 7), False),
    ("later fragment before another header", later6(CLIENT6, VIP6, 60), False),
    ("later fragment, ipv6", later6(CLIENT6, VIP6, TCP), True),
    ("later fragment, ipv6, other protocol", later6(CLIENT6, VIP6, UDP), False),
    ("later fragment of icmp, ipv6", later6(CLIENT6, VIP6, ICMP6), False),
    ("later fragment of a reply, ipv6", later6(BACKEND6, CLIENT6, TCP), True),
    ("later fragment for the host, ipv6", later6(BACKEND6, OWN6, TCP), False),
    ("fragment of icmp, ipv6", ipv6(CLIENT6, 40000, VIP6, 80, ICMP6, ((44, 0),)), False),
    ("icmp behind an extension", ipv6(CLIENT6, 40000, VIP6, 80, ICMP6, ((0, 0),)), False),
    ("no next header", ipv6(CLIENT6, 40000, VIP6, 80, 59), False),
    ("reply with an extension", ipv6(BACKEND6, 8080, CLIENT6, 40000, TCP, ((0, 0),)), True),
    # ICMP: errors belong to the flow that they quote, echo requests to the VIP
    *(
        (f"error {kind} about a reply", icmp(ELSEWHERE, VIP, kind, ipv4(VIP, 80, CLIENT, 40000)), kind in (3, 11, 12))
        for kind in (0, 3, 4, 5, 11, 12, 13)
    ),
    *(
        (f"error {kind} about a packet to a backend, ipv6",
         icmp(ELSEWHERE6, CLIENT6, kind, ipv6(CLIENT6, 40000, BACKEND6, 8080)), kind in (1, 2, 3, 4))
        for kind in (0, 1, 2, 3, 4, 5, 127, 129)
    ),
    ("error, any port", icmp(ELSEWHERE, VIP_ANY, 3, ipv4(VIP_ANY, 9, CLIENT, 40000)), True),
    ("error, other port", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 81, CLIENT, 40000)), False),
    ("error, other protocol", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, UDP)), False),
    ("error about sctp", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, SCTP)), False),
    ("error about a packet to a backend", icmp(BACKEND, CLIENT, 3, ipv4(CLIENT, 40000, BACKEND, 8080)), True),
    ("error about a health check", icmp(BACKEND, OWN, 3, ipv4(OWN, 40000, BACKEND, 8080)), False),
    ("error about a client's packet elsewhere", icmp(ELSEWHERE, CLIENT, 3, ipv4(CLIENT, 1, ELSEWHERE, 80)), False),
    ("error, options outside", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000), ihl=15), True),
    ("error, options inside", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, ihl=15)), True),
    ("error, ihl 4 inside", icmp(ELSEWHERE, VIP_ANY, 3, ipv4(VIP_ANY, 80, CLIENT, 1, ihl=4)), False),
    ("error, version 6 inside", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, version=6)), False),
    ("error about a first fragment", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, fragment=MF)), True),
    ("error about a later fragment", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, fragment=1)), False),
    ("error in a fragment", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000), fragment=MF), False),
    ("error about an error", icmp(ELSEWHERE, VIP, 3, icmp(VIP, CLIENT, 3, ipv4(CLIENT, 1, VIP, 80))), False),
    ("error about an extension", icmp(ELSEWHERE6, VIP6, 1, ipv6(VIP6, 80, CLIENT6, 9, TCP, ((0, 0),))), False),
    ("error about a first fragment, ipv6",
     icmp(ELSEWHERE6, VIP6, 2, ipv6(VIP6, 80, CLIENT6, 40000, TCP, ((44, 0),))), True),
    ("error about a first fragment, ipv6, other port",
     icmp(ELSEWHERE6, VIP6, 2, ipv6(VIP6, 81, CLIENT6, 40000, TCP, ((44, 0),))), False),
    ("error about a first fragment of icmp, ipv6",
     icmp(ELSEWHERE6, VIP6, 2, ipv6(VIP6, 80, CLIENT6, 40000, ICMP6, ((44, 0),))), False),
    ("error about a first fragment and another extension",
     icmp(ELSEWHERE6, VIP6, 2, ipv6(VIP6, 80, CLIENT6, 40000, TCP, ((44, 0), (60, 0)))), False),
    ("error about a later fragment, ipv6", icmp(ELSEWHERE6, VIP6, 2, later6(VIP6, CLIENT6, TCP)), False),
    ("error about a reply, ipv6", icmp(ELSEWHERE6, VIP6, 2, ipv6(VIP6, 80, CLIENT6, 40000)), True),
    ("error, tag", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000), tags=(0x8100,)), True),
    ("echo request", icmp(CLIENT, VIP, 8, bytes(30)), True),
    ("echo request, options", icmp(CLIENT, VIP, 8, bytes(30), ihl=7), True),
    ("echo request, ipv6", icmp(CLIENT6, VIP6, 128, bytes(30)), True),
    ("echo request to a VIP that does not answer", icmp(CLIENT, VIP_ANY, 8, bytes(30)), False),
    ("echo request to the host", icmp(CLIENT, OWN, 8, bytes(30)), False),
    ("echo reply", icmp(CLIENT, VIP, 0, bytes(30)), False),
    ("neighbour solicitation", icmp(CLIENT6, VIP6, 135, bytes(30)), False),
    ("echo, fragment", icmp(CLIENT, VIP, 8, bytes(30), fragment=MF), False),
    # link layer
    ("802.1Q", ipv4(CLIENT, 40000, VIP, 80, tags=(0x8100,)), True),
    ("802.1ad", ipv4(CLIENT, 40000, VIP, 80, tags=(0x88A8,)), True),
    ("802.1Q, ipv6", ipv6(CLIENT6, 40000, VIP6, 80, tags=(0x8100,)), True),
    ("802.1Q, options", ipv4(CLIENT, 40000, VIP, 80, ihl=7, tags=(0x8100,)), True),
    ("802.1Q, extension", ipv6(CLIENT6, 40000, VIP6, 80, TCP, ((0, 0),), tags=(0x8100,)), True),
    ("802.1Q, other port", ipv4(CLIENT, 40000, VIP, 81, tags=(0x8100,)), False),
    ("802.1Q, reply", ipv4(BACKEND, 8080, CLIENT, 40000, tags=(0x8100,)), True),
    ("two inline tags", ipv4(CLIENT, 40000, VIP, 80, tags=(0x88A8, 0x8100)), False),
    ("802.1Q, arp", ethernet(bytes(46), 0x0806, tags=(0x8100,)), False),
    ("arp", ethernet(bytes(46), 0x0806), False),
    ("lldp", ethernet(bytes(46), 0x88CC), False),
    ("802.3 length", ethernet(bytes(46), 46), False),
    ("ipv4 under the type of ipv6", ipv4(CLIENT, 40000, VIP, 80)[:12] + b"\x86\xdd" + bytes(60), False),
    # packet type
    ("for another host", ipv4(CLIENT, 40000, VIP, 80, mac=OTHER_HOST), False),
    ("for another host, ipv6", ipv6(CLIENT6, 40000, VIP6, 80, mac=OTHER_HOST), False),
    ("broadcast", ipv4(CLIENT, 40000, VIP, 80, mac=BROADCAST), False),
    ("multicast", ipv4(CLIENT, 40000, VIP, 80, mac=bytes.fromhex("01005e000001")), False),
]

SHORT_FRAMES: list[tuple[str, bytes, bool]] = [
    ("last fragment of one byte", ipv4(CLIENT, 1, VIP, 2, UDP, fragment=0x1FFF)[:35], True),
    ("last fragment of one byte, other protocol", ipv4(CLIENT, 1, VIP_ANY, 2, UDP, fragment=0x1FFF)[:35], False),
    ("cut short, and no fragment", ipv4(CLIENT, 40000, VIP, 80)[:37], False),
]

# With SHAPED: prefixes, ranges of ports and what lies within them.
SHAPED = {
    Key(ip_address("198.51.100.0"), 80, TCP, 24),
    Key(ip_address("198.51.100.16"), 0, UDP, 28),
    Key(ip_address("198.51.100.0"), 0, 0, 24, 16),  # echo
    *(Key(ip_address(VIP), block.port, TCP, None, block.bits) for block in blocks_of(8000, 8099)),
    Key(ip_address("2001:db8:5::"), 443, TCP, 64),
}
SHAPED_REPLIES = {Key(ip_address(BACKEND), block.port, TCP, None, block.bits) for block in blocks_of(9000, 9001)}
SHAPED_FRAMES: list[tuple[str, bytes, bool]] = [
    ("prefix, first address", ipv4(CLIENT, 40000, "198.51.100.0", 80), True),
    ("prefix, last address", ipv4(CLIENT, 40000, "198.51.100.255", 80), True),
    ("beside the prefix", ipv4(CLIENT, 40000, "198.51.101.0", 80), False),
    ("prefix, other port", ipv4(CLIENT, 40000, "198.51.100.1", 81), False),
    ("prefix, other protocol", ipv4(CLIENT, 40000, "198.51.100.1", 80, UDP), False),
    ("prefix and any port", ipv4(CLIENT, 40000, "198.51.100.31", 1, UDP), True),
    ("beside that", ipv4(CLIENT, 40000, "198.51.100.32", 1, UDP), False),
    ("range, first port", ipv4(CLIENT, 40000, VIP, 8000), True),
    ("range, last port", ipv4(CLIENT, 40000, VIP, 8099), True),
    ("below the range", ipv4(CLIENT, 40000, VIP, 7999), False),
    ("above the range", ipv4(CLIENT, 40000, VIP, 8100), False),
    ("range, other address", ipv4(CLIENT, 40000, "203.0.113.99", 8000), False),
    ("prefix, ipv6", ipv6(CLIENT6, 40000, "2001:db8:5::ffff:1", 443), True),
    ("beside the prefix, ipv6", ipv6(CLIENT6, 40000, "2001:db8:5:1::", 443), False),
    ("a prefix's number is not a whole address", ipv4(CLIENT, 40000, "198.51.0.0", 80), False),
    ("reply from a range", ipv4(BACKEND, 9001, CLIENT, 40000), True),
    ("reply from above the range", ipv4(BACKEND, 9002, CLIENT, 40000), False),
    ("echo to a prefix", icmp(CLIENT, "198.51.100.7", 8, bytes(30)), True),
    ("echo beside a prefix", icmp(CLIENT, "198.51.101.7", 8, bytes(30)), False),
    ("error about such a reply", icmp(ELSEWHERE, "198.51.100.7", 3, ipv4("198.51.100.7", 80, CLIENT, 1)), True),
]

# With SOURCES: the answers of FULL_REPLIES to a source port. SNAT is the host's own address, and SNAT6 is not.
SNAT, SNAT6 = OWN, "fd00:3::5"
SOURCES = Sources(frozenset(map(ip_address, (SNAT, SNAT6))), 1024, 32767)
FULL, FULL_ANY, FULL6 = "10.3.0.41", "10.3.0.42", "fd00:3::41"
FULL_REPLIES = [(FULL, 8080, TCP), (FULL_ANY, 0, UDP), (FULL6, 8080, TCP), (BACKEND, 8080, TCP)]
FULL_FRAMES: list[tuple[str, bytes, bool]] = [
    ("answer", ipv4(FULL, 8080, SNAT, 1024), True),
    ("answer, last port", ipv4(FULL, 8080, SNAT, 32767), True),
    ("answer, ipv6", ipv6(FULL6, 8080, SNAT6, 5000), True),
    ("answer, any port", ipv4(FULL_ANY, 99, SNAT, 5000, UDP), True),
    ("answer with options and a tag", ipv4(FULL, 8080, SNAT, 5000, ihl=9, tags=(0x8100,)), True),
    ("answer with an extension", ipv6(FULL6, 8080, SNAT6, 5000, TCP, ((0, 0),)), True),
    ("answer of a backend of nat and fullnat", ipv4(BACKEND, 8080, SNAT, 5000), True),
    ("reply of that backend in nat", ipv4(BACKEND, 8080, CLIENT, 5000), True),
    ("below the range", ipv4(FULL, 8080, SNAT, 1023), False),
    ("above the range: a socket of the host", ipv4(FULL, 8080, SNAT, 32768), False),
    ("health check's answer of a backend of nat and fullnat", ipv4(BACKEND, 8080, SNAT, 40000), False),
    ("from another port", ipv4(FULL, 8081, SNAT, 5000), False),
    ("from another protocol", ipv4(FULL, 8080, SNAT, 5000, UDP), False),
    ("from any port, another protocol", ipv4(FULL_ANY, 99, SNAT, 5000), False),
    ("to another of the host's addresses", ipv6(FULL6, 8080, OWN6, 5000), False),
    ("to a client", ipv4(FULL, 8080, CLIENT, 5000), False),
    ("from a stranger: a service of the host", ipv4(CLIENT, 40000, SNAT, 5000), False),
    ("a backend of nat alone", ipv4(BACKEND_ANY, 99, SNAT, 5000, UDP), False),
    ("error about a packet to a backend", icmp(ELSEWHERE, SNAT, 3, ipv4(SNAT, 5000, FULL, 8080)), True),
    ("error about a packet to a backend, ipv6", icmp(ELSEWHERE6, SNAT6, 2, ipv6(SNAT6, 5000, FULL6, 8080)), True),
    ("error about a packet of the host", icmp(ELSEWHERE, SNAT, 3, ipv4(SNAT, 40000, FULL, 8080)), False),
]

# The frame, and the length at which its ports are complete. Tagged, because the kernel's test run refuses
# frames of IP itself that are shorter than its header.
WHOLE: list[tuple[str, bytes, int]] = [
    ("ipv4", ipv4(CLIENT, 40000, VIP, 80, tags=(0x8100,)), 14 + 4 + 20 + 4),
    ("ipv4, options", ipv4(CLIENT, 40000, VIP, 80, ihl=8, tags=(0x8100,)), 14 + 4 + 32 + 4),
    ("ipv6", ipv6(CLIENT6, 40000, VIP6, 80, tags=(0x8100,)), 14 + 4 + 40 + 4),
    (
        "extensions",
        ipv6(CLIENT6, 1, VIP6, 80, TCP, ((0, 1), (51, 4)), tags=(0x8100,)),
        14 + 4 + 40 + 16 + 24 + 4,
    ),
]


def keys(rows: list[tuple[str, int, int]]) -> set[Key]:
    """With those of the fragments that have no ports."""
    ported = {Key(ip_address(address), port, protocol) for address, port, protocol in rows}
    return ported | {Key(key.address, 0, LATER | key.protocol) for key in ported if key.protocol}


WORKERS = 3
OWNERS = [shard * 7 % WORKERS for shard in range(SHARDS)]
BELL_ASLEEP, BELL_AWAKE = b"\1\0\0\0", bytes(4)


def shard_of(client: str, port: int) -> int:
    """Of the flow table: the four 32-bit words of the address, and the port, as they lie in the frame."""
    words = struct.unpack("=4I", ip_address(client).packed.rjust(16, b"\0"))
    mixed = int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)
    for word in words:
        mixed ^= word
    return (mixed * 0x9E3779B1 & 0xFFFFFFFF) >> 26


def run(program_fd: int, frame: bytes, ethernet_header: bytes = b"") -> int:
    result, _duration = syscall.run_program(program_fd, ethernet_header + frame)
    return result


def rings(classified: Classifier, worker: int, frame: bytes, before: bytes = BELL_ASLEEP) -> bool:
    """Whether a worker's bell keeps a byte of the frame; the word is 0 after that, and as it was otherwise."""
    word, fd = classified.asleep(worker), classified.bell_fd(worker)
    assert word is not None
    assert fd is not None
    word[:] = before
    kept = run(fd, frame, frame[:14])
    assert (kept, bytes(word)) in ((0, before), (1, BELL_AWAKE))
    return bool(kept)


def bells(classified: Classifier, frame: bytes) -> list[int]:
    """The workers whose bell rings when all are asleep."""
    return [worker for worker in range(classified.workers) if rings(classified, worker, frame)]


def takers(classified: Classifier, frame: bytes) -> dict[str, bool]:
    """What each of the programs makes of a frame."""
    return {
        "guard": is_taken(classified, frame),
        "filter": run(classified.filter_fd, frame, frame[:14]) > 0,
        "steering": run(classified.steer_fd, frame) > 0,
        "bell": len(bells(classified, frame)) == 1,
    }


def all_say(ours: bool) -> dict[str, bool]:
    return dict.fromkeys(("guard", "filter", "steering", "bell"), ours)


def fill(classified: Classifier) -> None:
    classified.replace(Keys(keys(VIPS), keys(REPLIES)), map(ip_address, LOCALS))


@pytest.fixture(scope="module")
def filled() -> Iterator[Classifier]:
    with Classifier(WORKERS) as classified:
        fill(classified)
        classified.set_workers(OWNERS)
        yield classified


ALL_FRAMES = FRAMES + SHORT_FRAMES


@pytest.mark.parametrize(("frame", "ours"), [row[1:] for row in ALL_FRAMES], ids=[row[0] for row in ALL_FRAMES])
def test_frame(filled: Classifier, frame: bytes, ours: bool) -> None:
    assert takers(filled, frame) == all_say(ours)


@pytest.fixture(scope="module")
def with_masks() -> Iterator[Classifier]:
    with Classifier(WORKERS) as classified:
        classified.replace(Keys(keys(VIPS) | SHAPED, keys(REPLIES) | SHAPED_REPLIES), map(ip_address, LOCALS))
        classified.set_workers(OWNERS)
        yield classified


@pytest.mark.parametrize(
    ("frame", "ours"), [row[1:] for row in SHAPED_FRAMES + FRAMES], ids=[row[0] for row in SHAPED_FRAMES + FRAMES]
)
def test_frame_with_masks(with_masks: Classifier, frame: bytes, ours: bool) -> None:
    assert takers(with_masks, frame) == all_say(ours)


def test_masks_come_and_go() -> None:
    """Numbers are used again, and never by two masks at once."""
    rng = random.Random(4)
    with Classifier() as classified:
        for _ in range(20):
            lengths = rng.sample(range(8, 31), 15)
            wanted = {Key(ip_address(f"{2 * length}.0.0.0"), 80, TCP, length) for length in lengths}
            classified.replace(Keys(wanted))
            for length in range(8, 31):
                inside = f"{2 * length}.0.0.1"
                outside = str(ip_address(f"{2 * length}.0.0.0") + (1 << 32 - length))
                assert is_taken(classified, ipv4(CLIENT, 1, inside, 80)) is (length in lengths)
                assert not is_taken(classified, ipv4(CLIENT, 1, outside, 80))


def test_more_masks_than_numbers_are_refused_and_change_nothing() -> None:
    few = {Key(ip_address("10.0.0.0"), 80, TCP, length) for length in range(8, 31)}
    more = {Key(ip_address("2001:db8::"), 80, TCP, length) for length in range(32, 64)}
    with Classifier() as classified:
        classified.replace(Keys(few))
        with pytest.raises(KernelError, match=r"fastlb_vips would have to hold 55 kinds of prefixes and port ranges"):
            classified.replace(Keys(more))
        assert is_taken(classified, ipv4(CLIENT, 1, "10.0.0.1", 80))
        assert not is_taken(classified, ipv6(CLIENT6, 1, "2001:db8::1", 80))


@pytest.fixture(scope="module")
def with_sources() -> Iterator[Classifier]:
    with Classifier(WORKERS, SOURCES) as classified:
        classified.replace(Keys(keys(VIPS), keys(REPLIES), keys(FULL_REPLIES)), map(ip_address, LOCALS))
        classified.set_workers(OWNERS)
        yield classified


@pytest.mark.parametrize(("frame", "ours"), [row[1:] for row in FULL_FRAMES], ids=[row[0] for row in FULL_FRAMES])
def test_frame_in_full_nat(with_sources: Classifier, frame: bytes, ours: bool) -> None:
    assert takers(with_sources, frame) == all_say(ours)


@pytest.mark.parametrize(("frame", "ours"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
def test_sources_change_nothing_else(with_sources: Classifier, frame: bytes, ours: bool) -> None:
    assert takers(with_sources, frame) == all_say(ours)


# Whose a datagram is, its first fragment decides: source, its port, destination, its port, protocol; ours.
DATAGRAMS: list[tuple[str, tuple[str, int, str, int, int], bool]] = [
    ("to a vip", (CLIENT, 40000, VIP, 80, TCP), True),
    ("to another port of a vip", (CLIENT, 40000, VIP, 81, TCP), False),
    ("to another port of a vip, udp", (CLIENT, 40000, VIP, 5001, UDP), False),
    ("to a vip, ipv6", (CLIENT6, 40000, VIP6, 80, TCP), True),
    ("to another port of a vip, ipv6", (CLIENT6, 40000, VIP6, 81, TCP), False),
    ("a reply", (BACKEND, 8080, CLIENT, 40000, TCP), True),
    ("a backend's own", (BACKEND, 514, CLIENT, 40000, TCP), False),
    ("a reply, ipv6", (BACKEND6, 8080, CLIENT6, 40000, TCP), True),
    ("a backend's own, ipv6", (BACKEND6, 514, CLIENT6, 40000, TCP), False),
    ("a backend's own to the host", (BACKEND, 514, OWN, 40000, TCP), False),
    ("a backend's, from its service's port, to another port of a vip that is the host's", (BACKEND, 8080, OWN, 82, TCP),
     False),
    ("an answer", (FULL, 8080, SNAT, 5000, TCP), True),
    ("an answer to a socket of the host", (FULL, 8080, SNAT, 40000, TCP), False),
    ("from another port to a source port", (FULL, 53, SNAT, 5000, TCP), False),
    ("an answer, any port", (FULL_ANY, 99, SNAT, 5000, UDP), True),
    ("an answer to a socket of the host, any port", (FULL_ANY, 99, SNAT, 40000, UDP), False),
    ("an answer, ipv6", (FULL6, 8080, SNAT6, 5000, TCP), True),
    ("an answer to a socket of the host, ipv6", (FULL6, 8080, SNAT6, 40000, TCP), False),
    ("to another prefix's port", (CLIENT, 40000, "198.51.100.7", 81, TCP), False),
    ("to a prefix's port", (CLIENT, 40000, "198.51.100.7", 80, TCP), True),
]  # fmt: skip
LATER_SHAPED = {Key(ip_address("198.51.100.0"), 0, LATER | TCP, 24, 16)}
PROGRAMS = ("filter", "steering", "guard", "bell")


def sees(classified: Classifier, program: str, frame: bytes) -> bool:
    """One of the programs alone is given a frame: is it ours?"""
    if program == "guard":
        return is_taken(classified, frame)
    if program == "steering":
        return run(classified.steer_fd, frame) > 0
    if program == "filter":
        return run(classified.filter_fd, frame, frame[:14]) > 0
    return len(bells(classified, frame)) == 1


@pytest.fixture(scope="module")
def with_everything() -> Iterator[Classifier]:
    with Classifier(WORKERS, SOURCES) as classified:
        vips, replies = keys(VIPS) | SHAPED | LATER_SHAPED, keys(REPLIES) | SHAPED_REPLIES
        classified.replace(Keys(vips, replies, keys(FULL_REPLIES)), map(ip_address, LOCALS))
        classified.set_workers(OWNERS)
        yield classified


numbers = iter(range(100, 60_000))  # of datagrams, each of which is new


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("way", "ours"), [row[1:] for row in DATAGRAMS], ids=[row[0] for row in DATAGRAMS])
def test_a_first_fragment_decides_for_all(
    with_everything: Classifier, way: tuple[str, int, str, int, int], ours: bool, program: str
) -> None:
    """Whichever program meets it alone, all say the same of what follows, as often as it comes."""
    number = next(numbers)
    assert sees(with_everything, program, part(*way, "first", number)) is ours
    for which in ("middle", "last", "middle", "first", "last"):
        assert takers(with_everything, part(*way, which, number)) == all_say(ours), which


@pytest.mark.parametrize(("protocol", "where"), [(TCP, (VIP, VIP6)), (UDP, (FULL_ANY, BACKEND6_ANY))])
def test_numbers_come_again(with_everything: Classifier, protocol: int, where: tuple[str, str]) -> None:
    """With a datagram that is ours, with the host's, and so on."""
    ways = {
        VIP: ((CLIENT, 40000, VIP, 80), (CLIENT, 40000, VIP, 81)),
        VIP6: ((CLIENT6, 40000, VIP6, 80), (CLIENT6, 40000, VIP6, 81)),
        FULL_ANY: ((FULL_ANY, 99, SNAT, 5000), (FULL_ANY, 99, SNAT, 40000)),
        BACKEND6_ANY: ((BACKEND6_ANY, 99, CLIENT6, 5000), (BACKEND6_ANY, 99, OWN6, 5000)),
    }
    for address in where:
        number = next(numbers)
        for program in (*PROGRAMS, *reversed(PROGRAMS)):
            for way, ours in zip(ways[address], (True, False), strict=True):
                assert sees(with_everything, program, part(*way, protocol, "first", number)) is ours
                assert takers(with_everything, part(*way, protocol, "last", number)) == all_say(ours)


@pytest.mark.parametrize("link", [{"ihl": 9}, {"ihl": 15, "tags": (0x8100,)}], ids=["options", "options and a tag"])
def test_headers_of_any_length_are_stepped_over(with_everything: Classifier, link: dict[str, Any]) -> None:
    for way, ours in (((CLIENT, 40000, VIP, 80, TCP), True), ((CLIENT, 40000, VIP, 81, TCP), False)):
        number = next(numbers)
        assert takers(with_everything, part(*way, "first", number, **link)) == all_say(ours)
        assert takers(with_everything, part(*way, "last", number)) == all_say(ours)
        short = part(*way, "last", number, tags=(0x8100,))[: 14 + 4 + 20 + 1]
        assert takers(with_everything, short) == all_say(ours)


@pytest.mark.parametrize("link", [{"before": 1}, {"before": 5, "tags": (0x88A8,)}], ids=["a header", "five and a tag"])
def test_headers_before_the_fragment_header_are_stepped_over(
    with_everything: Classifier, link: dict[str, Any]
) -> None:
    for way, ours in (((CLIENT6, 40000, VIP6, 80, TCP), True), ((CLIENT6, 40000, VIP6, 81, TCP), False)):
        number = next(numbers)
        assert takers(with_everything, part(*way, "first", number, **link)) == all_say(ours)
        assert takers(with_everything, part(*way, "last", number, **link)) == all_say(ours)


def test_a_note_is_about_one_datagram(with_everything: Classifier) -> None:
    """Of these addresses, this protocol and this number."""
    number = next(numbers)
    assert not is_taken(with_everything, part(CLIENT, 40000, VIP, 81, TCP, "first", number))
    assert not is_taken(with_everything, part(CLIENT, 40000, VIP, 81, TCP, "last", number))
    for source, target, protocol, other in (
        (ELSEWHERE, VIP, TCP, number), (CLIENT, VIP_ANY, TCP, number), (CLIENT, VIP, UDP, number),
        (CLIENT, VIP, TCP, next(numbers)),
    ):  # fmt: skip
        assert is_taken(with_everything, part(source, 40000, target, 81, protocol, "last", other))


def test_only_datagrams_that_would_be_taken_are_noted() -> None:
    """And no more of them than there is room for; what was asked about last stays."""
    with Classifier() as classified:
        fill(classified)
        for number in range(100):
            for way in ((CLIENT, 1, ELSEWHERE, 2, UDP), (BACKEND_ANY, 514, OWN, 1, UDP), (CLIENT, 1, VIP, 80, TCP)):
                is_taken(classified, part(*way, "first", number))
        assert not list(ebpf.keys(classified.datagrams, fragments.KEY_SIZE))
        many = fragments.MAX_NOTED * 2
        for number in range(many):
            client = str(ip_address("10.64.0.0") + number)
            assert not is_taken(classified, part(client, 1, VIP, 81, TCP, "first", 5))
            assert not is_taken(classified, part(client, 1, VIP, 81, TCP, "last", 5))
        assert 0 < len(list(ebpf.keys(classified.datagrams, fragments.KEY_SIZE))) <= fragments.MAX_NOTED


# What the guard counts of what it leaves to the host; None: nothing.
NESTED = icmp(VIP, CLIENT, 3, ipv4(CLIENT, 1, VIP, 80))
NESTED6 = icmp(VIP6, CLIENT6, 1, ipv6(CLIENT6, 1, VIP6, 80))
LEFT_TO_HOST: list[tuple[str, bytes, str | None]] = [
    ("a tunnel", ipv4(CLIENT, 1, VIP, 80, 4), "not_tcp_udp"),
    ("a tunnel, options and a tag", ipv4(CLIENT, 1, VIP, 80, 47, ihl=8, tags=(0x8100,)), "not_tcp_udp"),
    ("a tunnel, ipv6", ipv6(CLIENT6, 1, VIP6, 80, 41), "not_tcp_udp"),
    ("a tunnel behind an extension", ipv6(CLIENT6, 1, VIP6, 80, 41, ((0, 0),), tags=(0x88A8,)), "not_tcp_udp"),
    ("to the last address of a prefix", ipv4(CLIENT, 1, "198.51.100.255", 80, SCTP), "not_tcp_udp"),
    ("to a VIP of UDP alone", ipv6(CLIENT6, 1, VIP6_ANY, 80, SCTP), "not_tcp_udp"),
    ("a later fragment of sctp", ipv4(CLIENT, 1, VIP, 2, SCTP, fragment=1), "not_tcp_udp"),
    ("a later fragment of sctp, ipv6", later6(CLIENT6, VIP6, SCTP), "not_tcp_udp"),
    ("icmp behind an extension", ipv6(CLIENT6, 1, VIP6, 80, ICMP6, ((0, 0),)), "not_tcp_udp"),
    ("seven extensions", ipv6(CLIENT6, 1, VIP6, 80, TCP, ((60, 0),) * 7), "extension_headers"),
    ("six, and a fragment header", ipv6(CLIENT6, 1, VIP6, 80, TCP, ((60, 0),) * 6 + ((44, 0),)), "extension_headers"),
    ("six, and a tunnel", ipv6(CLIENT6, 1, VIP6, 80, 4, ((60, 0),) * 6), "not_tcp_udp"),
    ("a first fragment before another header", part6(CLIENT6, 40000, VIP6, 80, 60, 1, 7), "extension_headers"),
    ("a later one", later6(CLIENT6, VIP6, 60), "extension_headers"),
    ("an error about an error", icmp(ELSEWHERE, VIP, 3, NESTED), "icmp_quote"),
    ("an error about an error, ipv6", icmp(ELSEWHERE6, VIP6, 1, NESTED6, tags=(0x8100,)), "icmp_quote"),
    ("an error about a later fragment", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 1, fragment=1)), "icmp_quote"),
    ("an error about a later fragment, ipv6", icmp(ELSEWHERE6, VIP6, 2, later6(VIP6, CLIENT6, TCP)), "icmp_quote"),
    ("an error about an extension", icmp(ELSEWHERE6, VIP6, 1, ipv6(VIP6, 80, CLIENT6, 9, TCP, ((0, 0),))),
     "icmp_quote"),
    ("an error about a header of 16 bytes", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 1, ihl=4)), "icmp_quote"),
    ("an error about a wrong version", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 1, version=6)), "icmp_quote"),
    *(
        (f"an error cut after {length} bytes", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 1)[: 14 + length]),
         "icmp_quote")
        for length in (0, 19, 20, 23)
    ),
    *(
        (f"an error cut after {length} bytes, ipv6",
         icmp(ELSEWHERE6, VIP6, 3, ipv6(VIP6, 80, CLIENT6, 1, TCP, ((44, 0),))[: 14 + length]), "icmp_quote")
        for length in (0, 39, 40, 43, 47, 51)
    ),
    ("a fragment of a ping", icmp(CLIENT, VIP, 8, bytes(30), fragment=MF), "icmp_fragment"),
    ("a later fragment of a ping", icmp(CLIENT, VIP, 8, bytes(30), fragment=1), "icmp_fragment"),
    ("neighbour solicitation", icmp(CLIENT6, VIP6, 135, bytes(30)), None),
    ("echo reply", icmp(CLIENT, VIP, 0, bytes(30)), None),
    ("another port", ipv4(CLIENT, 1, VIP, 81), None),
    ("a tunnel to the host", ipv4(CLIENT, 1, ELSEWHERE, 80, 4), None),
    ("a tunnel to the host, ipv6", ipv6(CLIENT6, 1, OWN6, 80, 41), None),
    ("a tunnel beside a prefix", ipv4(CLIENT, 1, "198.51.101.0", 80, 4), None),
    ("a tunnel of a backend", ipv4(BACKEND, 1, CLIENT, 80, 4), None),
    ("a tunnel from a VIP", ipv4(VIP, 1, CLIENT, 80, 4), None),
    ("an error about an error to the host, which quotes a VIP", icmp(CLIENT, ELSEWHERE, 3, NESTED), None),
    ("an error of many headers to the host", ipv6(CLIENT6, 1, OWN6, 80, TCP, ((60, 0),) * 7), None),
    ("for another host", ipv4(CLIENT, 1, VIP, 80, 4, mac=OTHER_HOST), None),
    ("what is ours", ipv4(CLIENT, 1, VIP, 80), None),
]  # fmt: skip


@pytest.fixture(scope="module")
def core() -> Datapath:
    """Of the same VIPs."""
    vips = ((VIP, "tcp", 4), (VIP6, "tcp", 6), (VIP6_ANY, "udp", 6), ("198.51.100.0/24", "tcp", 4))
    services = [
        {"name": f"{number}", "vip": vip, "port": 80, "protocol": protocol, "forward": "dsr",
         "backends": [{"address": BACKEND if version == 4 else BACKEND6}]}
        for number, (vip, protocol, version) in enumerate(vips)
    ]  # fmt: skip
    return Datapath(Config.from_dict({"interfaces": ["eth0"], "services": services}))


@pytest.mark.parametrize(("frame", "reason"), [row[1:] for row in LEFT_TO_HOST], ids=[row[0] for row in LEFT_TO_HOST])
def test_the_guard_counts_what_is_odd_at_a_vip(
    with_everything: Classifier, core: Datapath, frame: bytes, reason: str | None
) -> None:
    """By the name that the data path has for it; no other program does."""
    before = with_everything.host_counters()
    for program in ("filter", "steering", "bell"):
        sees(with_everything, program, frame)
    assert with_everything.host_counters() == before
    is_taken(with_everything, frame)
    after = with_everything.host_counters()
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == (
        {reason: 1} if reason else {}
    )
    if reason:
        out = core.process(frame)
        assert (out.verdict, out.reason) == (Verdict.PASS, reason)


def test_an_answer_belongs_to_the_worker_of_its_port_s_shard(with_sources: Classifier) -> None:
    for port in range(1024, 32768, 61):
        owner = OWNERS[port % SHARDS]
        for frame in (
            ipv4(FULL, 8080, SNAT, port),
            ipv6(FULL6, 8080, SNAT6, port, TCP, ((0, 0),)),
            icmp(ELSEWHERE, SNAT, 3, ipv4(SNAT, port, FULL, 8080)),
        ):
            assert run(with_sources.steer_fd, frame) == 1 + owner
            assert bells(with_sources, frame) == [owner]


@pytest.mark.parametrize(("frame", "enough"), [row[1:] for row in WHOLE], ids=[row[0] for row in WHOLE])
def test_a_frame_cut_before_its_ports_end_is_not_ours(filled: Classifier, frame: bytes, enough: int) -> None:
    for length in range(15, len(frame) + 1):
        assert takers(filled, frame[:length]) == all_say(length >= enough)


def legs(client: str, port: int, protocol: int, rng: random.Random) -> list[bytes]:
    """A client's frame to a VIP, and a backend's reply to it, each with options or extensions or tags of its own."""
    if ":" in client:
        vip, vport, backend, bport = {TCP: (VIP6, 80, BACKEND6, 8080), UDP: (VIP6_ANY, 9, BACKEND6_ANY, 99)}[protocol]
        ways = [(client, port, vip, vport), (backend, bport, client, port)]
        chains: list[tuple[tuple[int, int], ...]] = [(), (), ((0, 0),), ((60, 2), (51, 4))]
        return [ipv6(*way, protocol, rng.choice(chains), tags=rng.choice(TAGS)) for way in ways]
    vip, vport, backend, bport = {TCP: (VIP, 80, BACKEND, 8080), UDP: (VIP, 5000, BACKEND_ANY, 99)}[protocol]
    ways = [(client, port, vip, vport), (backend, bport, client, port)]
    return [ipv4(*way, protocol, ihl=rng.choice((5, 5, 6, 15)), tags=rng.choice(TAGS)) for way in ways]


def errors(client: str, port: int, protocol: int) -> list[bytes]:
    """ICMP errors about what the backend and fastlb sent for that flow."""
    if ":" in client:
        vip, vport, backend, bport = {TCP: (VIP6, 80, BACKEND6, 8080), UDP: (VIP6_ANY, 9, BACKEND6_ANY, 99)}[protocol]
        about = ipv6(vip, vport, client, port, protocol), ipv6(client, port, backend, bport, protocol)
        return [icmp(ELSEWHERE6, vip, 2, about[0]), icmp(ELSEWHERE6, client, 2, about[1])]
    vip, vport, backend, bport = {TCP: (VIP, 80, BACKEND, 8080), UDP: (VIP, 5000, BACKEND_ANY, 99)}[protocol]
    about = ipv4(vip, vport, client, port, protocol), ipv4(client, port, backend, bport, protocol)
    return [icmp(ELSEWHERE, vip, 3, about[0]), icmp(ELSEWHERE, client, 3, about[1])]


TAGS: list[tuple[int, ...]] = [(), (), (0x8100,), (0x88A8,)]


def clients(count: int, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Random addresses of both versions, ports and protocols; the first are the extremes."""
    yield from [("0.0.0.0", 0, TCP), ("255.255.255.255", 65535, UDP), ("::", 0, UDP)]
    for _ in range(count - 3):
        bits = rng.choice((32, 128))
        address = ip_address(rng.getrandbits(bits).to_bytes(bits // 8, "big"))
        yield str(address), rng.getrandbits(16), rng.choice((TCP, UDP))


def test_both_legs_of_a_flow_belong_to_the_worker_of_its_shard(filled: Classifier) -> None:
    rng = random.Random(1)
    shards = set()
    for client, port, protocol in clients(3000, rng):
        shard = shard_of(client, port)
        shards.add(shard)
        for frame in (*legs(client, port, protocol, rng), *errors(client, port, protocol)):
            assert run(filled.steer_fd, frame) == 1 + OWNERS[shard], (client, port, frame.hex())
            assert bells(filled, frame) == [OWNERS[shard]], (client, port, frame.hex())
    assert len(shards) == SHARDS


def test_the_greatest_number_of_workers() -> None:
    rng = random.Random(2)
    with Classifier(SHARDS) as classified:
        fill(classified)
        assert (run(classified.steer_fd, TO_VIP), bells(classified, TO_VIP)) == (1, [0])
        classified.set_workers(list(reversed(range(SHARDS))))
        for client, port, protocol in clients(200, rng):
            worker = SHARDS - 1 - shard_of(client, port)
            for frame in legs(client, port, protocol, rng):
                assert (run(classified.steer_fd, frame), bells(classified, frame)) == (1 + worker, [worker])


def test_one_worker_has_a_bell_and_needs_no_steering() -> None:
    with Classifier() as classified:
        fill(classified)
        classified.set_workers([0] * SHARDS)
        assert (classified.steer_fd, classified.nothing_fd) == (-1, -1)
        assert [bells(classified, frame) for frame in (TO_VIP, TO_CLIENT, FOREIGN)] == [[0], [0], []]


def test_a_bell_rings_only_for_a_sleeper() -> None:
    with Classifier(2) as classified:
        fill(classified)
        assert rings(classified, 0, TO_VIP)
        assert not rings(classified, 0, TO_VIP, before=BELL_AWAKE)
        assert not rings(classified, 1, TO_VIP)  # worker 0 owns every shard


def test_the_program_for_the_bin_keeps_nothing(filled: Classifier) -> None:
    assert [run(filled.nothing_fd, frame) for frame in (TO_VIP, TO_CLIENT, FOREIGN)] == [0, 0, 0]


@pytest.mark.parametrize("owners", [[], [0] * 63, [0] * 63 + [2], [0] * 63 + [-1]])
def test_each_shard_has_a_worker_that_exists(owners: list[int]) -> None:
    with Classifier(2) as classified, pytest.raises(ValueError, match="64 numbers below 2 are wanted"):
        classified.set_workers(owners)


@pytest.mark.parametrize("workers", [0, 65])
def test_more_workers_than_shards_are_refused(workers: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 workers"):
        Classifier(workers)


def test_a_kernel_without_shared_memory_has_no_bells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscall, "F_MMAPABLE", 1 << 30)  # a flag that this kernel does not know
    with Classifier(2) as classified:
        fill(classified)
        assert (classified.no_bells or "").startswith("cannot create the map fastlb_asleep: ")
        assert (classified.bell_fd(1), classified.asleep(1)) == (None, None)
        assert run(classified.steer_fd, TO_VIP) == 1


# What `replace` was given, in order, and what the second call must leave: the frame is of VIP or a reply.
VIP_80, VIP_8080, VIP_ALL = (
    Key(ip_address(VIP), 80, TCP),
    Key(ip_address(VIP), 8080, TCP),
    Key(ip_address(VIP), 0, TCP),
)
REPLY, REPLY_ALL = Key(ip_address(BACKEND), 8080, TCP), Key(ip_address(BACKEND), 0, TCP)
TO_VIP, TO_CLIENT = ipv4(CLIENT, 40000, VIP, 80), ipv4(BACKEND, 8080, CLIENT, 40000)
FOREIGN = ipv4(CLIENT, 40000, VIP, 81)
CHANGES: list[tuple[str, tuple[list[Key], list[Key], list[str]], tuple[bool, bool]]] = [
    ("nothing", ([], [], []), (False, False)),
    ("a vip", ([VIP_80], [], []), (True, False)),
    ("another port of it", ([VIP_8080], [], []), (False, False)),
    ("any port", ([VIP_ALL], [], []), (True, False)),
    ("any port and another", ([VIP_ALL, VIP_8080], [], []), (True, False)),
    ("no longer any", ([VIP_8080], [REPLY], []), (False, True)),
    ("reply of any port", ([VIP_80], [REPLY_ALL], []), (True, True)),
    ("reply of any port, but the client is this host", ([VIP_80], [REPLY_ALL], [CLIENT]), (True, False)),
    ("the vip is this host's", ([VIP_80], [REPLY], [VIP]), (True, True)),
    ("only locals", ([], [], [VIP, CLIENT]), (False, False)),
    ("nothing again", ([], [], []), (False, False)),
]


def test_replace_leaves_exactly_what_was_asked_for() -> None:
    with Classifier() as classified:
        seen = []
        for _name, (vips, replies, locals_), _ours in CHANGES:
            classified.replace(Keys(vips, replies), [ip_address(address) for address in locals_])
            seen.append((is_taken(classified, TO_VIP), is_taken(classified, TO_CLIENT)))
        assert seen == [ours for _, _, ours in CHANGES]


def test_set_locals_changes_the_hosts_addresses_alone() -> None:
    with Classifier() as classified:
        fill(classified)
        classified.set_locals([ip_address(CLIENT)])
        assert (is_taken(classified, TO_VIP), is_taken(classified, TO_CLIENT)) == (True, False)
        classified.set_locals([])
        assert (is_taken(classified, TO_VIP), is_taken(classified, TO_CLIENT)) == (True, True)


def test_thousands_of_services() -> None:
    first = int(ip_address("10.64.0.0"))
    many = [Key(ip_address(first + number), 80, TCP) for number in range(20_000)]
    with Classifier() as classified:
        classified.replace(Keys(set(many)))
        assert all(is_taken(classified, ipv4(CLIENT, 1, str(key.address), 80)) for key in many[::199])
        classified.replace(Keys(set(many[:1])))
        assert [is_taken(classified, ipv4(CLIENT, 1, str(key.address), 80)) for key in many[:3]] == [
            True,
            False,
            False,
        ]


def test_more_than_the_limit_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ENTRIES", 2)
    with Classifier() as classified:
        classified.replace(Keys({VIP_80}))
        with pytest.raises(KernelError, match=r"fastlb_replies would have to hold 3 entries.* limit is 2"):
            classified.replace(Keys(replies={Key(ip_address(BACKEND), port, TCP) for port in (8080, 2, 3)}))
        assert (is_taken(classified, TO_VIP), is_taken(classified, TO_CLIENT)) == (True, False)


def test_without_privilege_the_error_says_what_would_help() -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(KernelError, match=r"CAP_BPF and CAP_NET_ADMIN"):
            Classifier()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("workers", [1, 3])
def test_close_gives_up_every_descriptor(workers: int) -> None:
    before = os.listdir("/proc/self/fd")
    Classifier(workers).close()
    assert os.listdir("/proc/self/fd") == before


def test_a_word_in_use_outlives_the_classifier() -> None:
    before = os.listdir("/proc/self/fd")
    classified = Classifier()
    word = classified.asleep(0)
    assert word is not None
    classified.close()
    word[:] = BELL_ASLEEP
    assert bytes(word) == BELL_ASLEEP
    word.release()
    assert os.listdir("/proc/self/fd") == before
