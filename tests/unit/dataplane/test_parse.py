"""parse.pxd: which frames have a five-tuple, and under which name every other one ends."""

from __future__ import annotations

import random

import pytest

from fastlb import Verdict
from fastlb._core import reason_names
from tests.balancers import CLIENT, VIP, datapath, service
from tests.frames import (
    ACK,
    AUTH,
    DEST_OPTS,
    FIN,
    FRAGMENT,
    HOP_BY_HOP,
    PADDING4,
    ROUTING,
    RST,
    SYN,
    ethernet,
    frame,
    ip4_packet,
    ip6_packet,
    take_apart,
)

VLAN, QINQ = (0x8100, 0x2005), (0x88A8, 100)
FORWARD, PASS, DROP = Verdict.FORWARD, Verdict.PASS, Verdict.DROP

SERVICES = [
    service(forward, version, protocol, port=port, name=f"{forward}{version}{protocol}", backends=[{"address": host}])
    for version, host in ((4, "10.3.0.11"), (6, "fd00:3::11"))
    for protocol in ("tcp", "udp")
    for forward, port in (("nat", 80), ("dsr", 81))
]


def four(**how: object) -> bytes:
    return frame(CLIENT[4], 40000, VIP[4], 80, **how)  # type: ignore[arg-type]


def six(**how: object) -> bytes:
    return frame(CLIENT[6], 40000, VIP[6], 80, **how)  # type: ignore[arg-type]


def patched(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def swapped(raw: bytes) -> bytes:
    """A frame like this one that is not for the VIP: its wrongness is the host's business."""
    return patched(raw, 30, bytes([192, 0, 2, 1]))


# Offsets from the start of an untagged frame
IP4, TCP4, IP6, TCP6 = 14, 34, 14, 54

CASES = [
    # sound, in every shape
    ("IPv4 TCP", four(), FORWARD, "scheduled"),
    ("IPv4 UDP", four(proto="udp"), FORWARD, "scheduled"),
    ("IPv6 TCP", six(), FORWARD, "scheduled"),
    ("IPv6 UDP", six(proto="udp"), FORWARD, "scheduled"),
    ("IPv4 options", four(options=PADDING4), FORWARD, "scheduled"),
    ("IPv4 forty bytes of options", four(options=PADDING4 * 10), FORWARD, "scheduled"),
    ("802.1Q", four(tags=(VLAN,)), FORWARD, "scheduled"),
    ("QinQ", four(tags=(QINQ, VLAN)), FORWARD, "scheduled"),
    ("QinQ IPv6", six(tags=(QINQ, VLAN)), FORWARD, "scheduled"),
    ("DF set", patched(four(), IP4 + 6, b"\x40\x00"), FORWARD, "scheduled"),
    ("Ethernet padding", four() + bytes(20), FORWARD, "scheduled"),
    ("TCP options", four(tcp_options=b"\x02\x04\x05\xb4"), FORWARD, "scheduled"),
    ("IPv6 hop-by-hop", six(extensions=((HOP_BY_HOP, b"\x01\x04"),)), FORWARD, "scheduled"),
    ("IPv6 destination options", six(extensions=((DEST_OPTS, bytes(20)),)), FORWARD, "scheduled"),
    ("IPv6 authentication header", six(extensions=((AUTH, bytes(14)),)), FORWARD, "scheduled"),
    ("IPv6 routing header at its end", six(extensions=((ROUTING, b"\x04\x00"),)), FORWARD, "scheduled"),
    ("IPv6 six extension headers", six(extensions=((DEST_OPTS, b""),) * 6), FORWARD, "scheduled"),
    ("UDP shorter than its packet", patched(four(proto="udp", payload=b"abcd", with_checksum=False), 38, b"\0\x09"),
     FORWARD, "scheduled"),
    # not IP
    ("empty", b"", PASS, "not_ip"),
    ("one byte", b"\x02", PASS, "not_ip"),
    ("half an Ethernet header", four()[:13], PASS, "not_ip"),
    ("ARP", ethernet(bytes(28), ethertype=0x0806), PASS, "not_ip"),
    ("802.3 length", ethernet(bytes(46), ethertype=46), PASS, "not_ip"),
    ("tag without its end", four(tags=(VLAN,))[:17], PASS, "not_ip"),
    ("second tag without its end", four(tags=(QINQ, VLAN))[:21], PASS, "not_ip"),
    ("three tags", four(tags=(QINQ, VLAN, VLAN)), PASS, "not_ip"),
    # IP headers
    ("IPv4 in an IPv6 frame", ethernet(four()[14:], ethertype=0x86DD), PASS, "ip_header"),
    ("IPv6 in an IPv4 frame", ethernet(six()[14:], ethertype=0x0800), PASS, "ip_header"),
    ("IPv4 version 5", patched(four(), IP4, b"\x55"), PASS, "ip_header"),
    ("IPv4 header of 16 bytes", patched(four(), IP4, b"\x44"), PASS, "ip_header"),
    ("IPv4 header of 0 bytes", patched(four(), IP4, b"\x40"), PASS, "ip_header"),
    ("IPv4 header longer than the frame", patched(four(), IP4, b"\x4f"), PASS, "truncated"),
    ("IPv4 header cut", four()[: IP4 + 19], PASS, "truncated"),
    ("IPv6 header cut", six()[: IP6 + 39], PASS, "truncated"),
    ("IPv6 version 4", patched(six(), IP6, b"\x40"), PASS, "ip_header"),
    ("IPv4 total length 0", patched(four(), IP4 + 2, b"\0\0"), DROP, "ip_length"),
    ("IPv4 total length below the header", patched(four(), IP4 + 2, b"\0\x13"), DROP, "ip_length"),
    ("IPv4 total length above the frame", patched(four(), IP4 + 2, b"\0\x29"), DROP, "ip_length"),
    ("IPv6 payload length above the frame", patched(six(), IP6 + 4, b"\0\x15"), DROP, "ip_length"),
    ("IPv6 payload length 0", patched(six(), IP6 + 4, b"\0\0"), DROP, "tcp_header"),
    ("IPv4 wrong length, not for us", swapped(patched(four(), IP4 + 2, b"\0\x29")), PASS, "no_service"),
    # fragments
    ("IPv4 fragment of ICMP", patched(patched(four(), IP4 + 9, b"\x01"), IP4 + 6, b"\x20\x00"), PASS, "icmp_fragment"),
    ("IPv6 atomic fragment", six(extensions=((FRAGMENT, bytes(6)),)), FORWARD, "scheduled"),
    ("IPv6 atomic fragment after options", six(extensions=((HOP_BY_HOP, b""), (FRAGMENT, bytes(6)))), FORWARD,
     "scheduled"),
    # transports
    ("ICMP", ethernet(ip4_packet(CLIENT[4], VIP[4], 1, b"\x08\0\xf7\xff\0\0\0\0")), FORWARD, "echo"),
    ("ICMPv6", ethernet(ip6_packet(CLIENT[6], VIP[6], 58, b"\x80\0\0\0\0\0\0\0")), FORWARD, "echo"),
    ("SCTP", ethernet(ip4_packet(CLIENT[4], VIP[4], 132, bytes(20))), PASS, "not_tcp_udp"),
    ("IPIP", ethernet(ip4_packet(CLIENT[4], VIP[4], 4, four()[14:])), PASS, "not_tcp_udp"),
    ("IPv6 no next header", ethernet(ip6_packet(CLIENT[6], VIP[6], 59, b"")), PASS, "not_tcp_udp"),
    ("IPv6 hop-by-hop in IPv4", ethernet(ip4_packet(CLIENT[4], VIP[4], 0, bytes(20))), PASS, "not_tcp_udp"),
    ("IPv6 seven extension headers", six(extensions=((DEST_OPTS, b""),) * 7), PASS, "extension_headers"),
    ("IPv6 extension header cut", ethernet(ip6_packet(CLIENT[6], VIP[6], 60, bytes(7))), PASS, "truncated"),
    ("IPv6 extension header beyond the frame",
     ethernet(ip6_packet(CLIENT[6], VIP[6], 60, b"\x06\xff" + bytes(30))), PASS, "truncated"),
    ("IPv6 routing header, segments left", six(extensions=((ROUTING, b"\x04\x01"),)), DROP, "routing_header"),
    ("IPv4 without ports", ethernet(ip4_packet(CLIENT[4], VIP[4], 6, b"\x9c\x40\0")), PASS, "truncated"),
    ("IPv6 without ports", ethernet(ip6_packet(CLIENT[6], VIP[6], 17, b"\x9c\x40\0")), PASS, "truncated"),
    ("TCP of 19 bytes", ethernet(ip4_packet(CLIENT[4], VIP[4], 6, four()[TCP4:-1])), DROP, "tcp_header"),
    ("TCP of 19 bytes and padding",
     ethernet(ip4_packet(CLIENT[4], VIP[4], 6, four()[TCP4:-1])) + bytes(9), DROP, "tcp_header"),
    ("TCP ports alone", ethernet(ip4_packet(CLIENT[4], VIP[4], 6, four()[TCP4 : TCP4 + 4])), DROP, "tcp_header"),
    ("TCP ports in the padding", patched(four(), IP4 + 2, b"\0\x14"), DROP, "tcp_header"),
    ("TCP data offset 4", patched(four(), TCP4 + 12, b"\x40"), DROP, "tcp_header"),
    ("TCP data offset 0", patched(six(), TCP6 + 12, b"\x00"), DROP, "tcp_header"),
    ("TCP data offset beyond the packet", patched(four(), TCP4 + 12, b"\x60"), DROP, "tcp_header"),
    ("TCP wrong offset, not for us", swapped(patched(four(), TCP4 + 12, b"\x40")), PASS, "no_service"),
    ("TCP SYN FIN", four(flags=SYN | FIN), DROP, "tcp_flags"),
    ("TCP SYN RST", six(flags=SYN | RST), DROP, "tcp_flags"),
    ("TCP everything set", four(flags=0xFF), DROP, "tcp_flags"),
    ("TCP nothing set", four(flags=0), FORWARD, "maglev"),
    ("UDP of 7 bytes", ethernet(ip4_packet(CLIENT[4], VIP[4], 17, b"\x9c\x40\0\x50\0\x07\0")), DROP, "udp_length"),
    ("UDP length 7", patched(four(proto="udp"), TCP4 + 4, b"\0\x07"), DROP, "udp_length"),
    ("UDP length 0", patched(six(proto="udp"), TCP6 + 4, b"\0\0"), DROP, "udp_length"),
    ("UDP length beyond the packet", patched(four(proto="udp"), TCP4 + 4, b"\0\x09"), DROP, "udp_length"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "verdict", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_case(raw: bytes, verdict: Verdict, reason: str) -> None:
    balancer = datapath(*SERVICES)
    out = balancer.process(raw)
    assert (out.verdict, out.reason) == (verdict, reason)
    assert len(out.frames) == (verdict is FORWARD)
    counters = balancer.stats()["counters"]
    assert counters[("paths", "passed", "drops")[verdict]][reason] == 1
    assert counters["packets"] == 1
    assert counters["bytes"] == len(raw)


GOOD = [
    four(payload=b"0123456789", options=PADDING4, tags=(VLAN,)),
    four(proto="udp", payload=b"0123456789"),
    six(payload=b"0123456789", extensions=((HOP_BY_HOP, b""), (DEST_OPTS, bytes(14))), tags=(QINQ, VLAN)),
    six(proto="udp", payload=b"0123456789", extensions=((AUTH, bytes(14)),)),
    frame(CLIENT[4], 40000, VIP[4], 81, flags=ACK, payload=b"0123456789"),
    frame(CLIENT[6], 40000, VIP[6], 81, "udp", payload=b"0123456789"),
]


@pytest.mark.parametrize("raw", GOOD, ids=range(len(GOOD)))
def test_no_prefix_of_a_frame_is_forwarded(raw: bytes) -> None:
    balancer = datapath(*SERVICES)
    assert balancer.process(raw).verdict is FORWARD
    seen = {balancer.process(raw[:length]).reason for length in range(len(raw))}
    assert seen == {"not_ip", "truncated", "ip_length"}


@pytest.mark.parametrize("raw", GOOD, ids=range(len(GOOD)))
def test_flipped_bytes_end_in_one_counted_reason(raw: bytes) -> None:
    """Whatever is flipped, each frame has one reason, and a forwarded one is as long as its length field says."""
    balancer = datapath(*SERVICES)
    rng = random.Random(len(raw))
    for _ in range(3000):
        changed = bytearray(raw)
        for at in rng.sample(range(12, len(raw)), rng.randint(1, 4)):
            changed[at] = rng.randrange(256)
        out = balancer.process(changed)
        assert out.reason in reason_names()
        if out.verdict is FORWARD and out.reason not in ("time_exceeded", "held"):
            assert len(out.frames[0]) == len(raw)
    counters = balancer.stats()["counters"]
    by_reason = {**counters["paths"], **counters["passed"], **counters["drops"]}
    assert sum(by_reason.values()) == counters["packets"] == 3000


def test_header_growth_is_bounded() -> None:
    """The longest chain of extension headers that is walked: six of 2,048 bytes."""
    longest = tuple((DEST_OPTS, bytes(2046)) for _ in range(6))
    raw = six(extensions=longest)
    balancer = datapath(*SERVICES)
    out = balancer.process(raw)
    assert out.reason == "too_big"
    sent = datapath(*SERVICES, mtu=65535).process(raw)
    assert sent.reason == "scheduled"
    assert take_apart(sent.frames[0]).dst == "fd00:3::11"
