"""decap.pxd and coalesce.pxd: tunnel frames in; what comes out is what a TUN device would be given.

A socket that keeps the bounds of messages stands where the device is.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb._core import Decapsulator
from tests.frames import (
    ACK,
    DEST_OPTS,
    FIN,
    HOP_BY_HOP,
    PADDING4,
    PSH,
    RST,
    SYN,
    TCP,
    UDP,
    checksum,
    ethernet,
    frame,
    ip6_packet,
    pseudo_header,
    take_apart,
)
from tests.tunnels import (
    GRE,
    MODES,
    PORT,
    WAYS,
    gre_header,
    gue_header,
    outer_packet,
    tunnel,
    udp_segment,
    with_ip4_checksum,
    with_tos,
)

URG, ECE, CWR = 0x20, 0x40, 0x80
CLIENT = {4: "192.0.2.7", 6: "2001:db8::7"}
VIP = {4: "203.0.113.10", 6: "2001:db8:cafe::10"}
TIMESTAMPS = b"\x01\x01\x08\x0a\x00\x00\x00\x01\x00\x00\x00\x02"
NEEDS_CSUM, GSO_TCP, GSO_UDP = 1, {4: 1, 6: 4}, 5


# ---- building


def tcp_packet(
    version: int, payload: bytes = b"data", *, sport: int = 40000, tos: int = 0, ident: int = 0, df: bool = True,
    **fields: Any,
) -> bytes:  # fmt: skip
    """A whole inner packet from the client to the VIP."""
    fields = {"flags": ACK, "ack": 77, **fields}
    packet = with_tos(frame(CLIENT[version], sport, VIP[version], 80, payload=payload, **fields)[14:], tos)
    if version == 4:
        packet = with_ip4_checksum(packet[:4] + struct.pack("!HH", ident, 0x4000 if df else 0) + packet[8:])
    return packet


def stream(
    version: int, count: int, size: int, *, seq: int = 1000, last: int | None = None, **fields: Any
) -> list[bytes]:
    """Segments in order; the last one with ``last`` bytes."""
    sizes = [size] * (count - 1) + [size if last is None else last]
    return [
        tcp_packet(version, bytes((at + byte) % 251 for byte in range(length)), ident=at, seq=(seq + at * size) % 2**32,
                   **fields)
        for at, length in enumerate(sizes)
    ]  # fmt: skip


def with_byte(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes([value]) + packet[at + 1 :]


# ---- receiving


class Written(NamedTuple):
    """One write to the device."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int
    packet: bytes

    def segments(self) -> list[bytes]:
        """What the kernel takes it for: each segment as a packet of its own."""
        if not self.gso_type:
            return [self.packet]
        version, l4, header = self.packet[0] >> 4, self.csum_start, self.hdr_len
        assert (self.flags, self.gso_type, self.csum_offset) == (NEEDS_CSUM, GSO_TCP[version], 16)
        assert (l4, header) == (20 if version == 4 else 40, l4 + dpkt.tcp.TCP(self.packet[l4:]).off * 4)
        addresses = self.packet[12:20] if version == 4 else self.packet[8:40]
        pseudo = pseudo_header(addresses, b"", TCP, len(self.packet) - l4)
        assert int.from_bytes(self.packet[l4 + 16 : l4 + 18], "big") == ~checksum(pseudo) & 0xFFFF
        if version == 4:
            assert checksum(self.packet[:20]) == 0
            assert int.from_bytes(self.packet[2:4], "big") == len(self.packet)
        else:
            assert int.from_bytes(self.packet[4:6], "big") == len(self.packet) - 40
        payload = self.packet[header:]
        starts = range(0, len(payload), self.gso_size)
        assert len(starts) > 1
        return [self._segment(at, payload[at : at + self.gso_size], at == starts[-1]) for at in starts]

    def _segment(self, at: int, payload: bytes, is_last: bool) -> bytes:
        """Segmentation as RFC 9293 and Linux have it: IDs count on, only the last has PSH and FIN."""
        version = self.packet[0] >> 4
        ip, tcp = bytearray(self.packet[: self.csum_start]), bytearray(self.packet[self.csum_start : self.hdr_len])
        (seq,) = struct.unpack_from("!I", tcp, 4)
        struct.pack_into("!I", tcp, 4, (seq + at) % 2**32)
        if not is_last:
            tcp[13] &= ~(PSH | FIN)
        tcp[16:18] = bytes(2)
        addresses = bytes(ip[12:20] if version == 4 else ip[8:40])
        segment = bytes(tcp) + payload
        total = checksum(pseudo_header(addresses, b"", TCP, len(segment)) + segment)
        segment = segment[:16] + total.to_bytes(2, "big") + segment[18:]
        if version == 6:
            ip[4:6] = len(segment).to_bytes(2, "big")
            return bytes(ip) + segment
        ip[2:4] = (20 + len(segment)).to_bytes(2, "big")
        ip[4:6] = ((int.from_bytes(ip[4:6], "big") + at // self.gso_size) % 2**16).to_bytes(2, "big")
        return with_ip4_checksum(bytes(ip) + segment)


class Device:
    """A Decapsulator, and what it writes."""

    def __init__(self, **options: Any) -> None:
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.near.setblocking(False)
        self.far.setblocking(False)
        self.decap = Decapsulator(self.near.fileno(), **options)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.near.close()
        self.far.close()

    def take(self, *frames: bytes, vnet: bytes = bytes(10)) -> list[Written]:
        self.decap.process(frames, vnet)
        found = []
        while True:
            try:
                raw = self.far.recv(1 << 17)
            except BlockingIOError:
                self.check()
                return found
            found.append(Written(*struct.unpack_from("=BBHHHH", raw), raw[10:]))

    def check(self) -> None:
        """Every packet has exactly one end."""
        counters = self.decap.counters()
        assert counters["packets"] == counters["decapsulated"] + sum(counters["drops"].values())

    def drops(self) -> dict[str, int]:
        return {name: count for name, count in self.decap.counters()["drops"].items() if count}


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as device:
        yield device


def packets(written: Sequence[Written]) -> list[bytes]:
    """All segments, in the order in which they were written."""
    return [packet for each in written for packet in each.segments()]


# ---- every tunnel


@pytest.mark.parametrize(("mode", "outer", "inner"), WAYS)
def test_what_is_inside_comes_out(device: Device, mode: str, outer: int, inner: int) -> None:
    udp = frame(CLIENT[inner], 40000, VIP[inner], 53, "udp", payload=b"question")[14:]
    for packet in (tcp_packet(inner, flags=SYN, payload=b""), tcp_packet(inner), udp):
        (out,) = device.take(tunnel(mode, outer, packet) + bytes(7))  # padding of the link
        assert (out.packet, out[:6]) == (packet, (0, 0, 0, 0, 0, 0))
        take_apart(ethernet(out.packet))
    assert device.drops() == {}


@pytest.mark.parametrize("mode", MODES)
def test_outer_options(device: Device, mode: str) -> None:
    packet = tcp_packet(4)
    limit = ((DEST_OPTS, b"\x04\x01\x04\x01\x01\x00"),)  # RFC 2473 section 4.1.1
    assert packets(device.take(tunnel(mode, 4, packet, options=PADDING4 * 2))) == [packet]
    assert packets(device.take(tunnel(mode, 6, packet, extensions=limit))) == [packet]
    device.take(tunnel(mode, 6, packet, extensions=((HOP_BY_HOP, bytes(6)),)))
    assert device.drops() == {"not_tunnel": 1}


@pytest.mark.parametrize("modes", [("ipip",), ("gre",), ("gue",), ("ipip", "gue")])
def test_only_the_modes_that_are_on(modes: tuple[str, ...]) -> None:
    with Device(modes=modes) as device:
        for mode in ("ipip", "gre", "gue"):
            assert len(device.take(tunnel(mode, 4, tcp_packet(4)))) == (mode in modes)
        assert device.drops() == {"not_tunnel": 3 - len(modes)}


def test_another_port() -> None:
    with Device(port=PORT + 1) as device:
        assert device.take(tunnel("gue", 4, tcp_packet(4))) == []
        assert device.drops() == {"not_tunnel": 1}


@pytest.mark.parametrize("words", [0, 1, 31])
def test_gue_private_data_is_stepped_over(device: Device, words: int) -> None:
    segment = udp_segment(6, gue_header(4, words=words) + tcp_packet(4))
    assert packets(device.take(ethernet(outer_packet(6, UDP, segment)))) == [tcp_packet(4)]


@pytest.mark.parametrize("outer", [4, 6])
def test_gue_without_a_checksum(device: Device, outer: int) -> None:
    segment = udp_segment(outer, gue_header(4) + tcp_packet(4), with_checksum=False)
    assert packets(device.take(ethernet(outer_packet(outer, UDP, segment)))) == [tcp_packet(4)]


KEYS = [
    (None, None, True), (None, 5, False), (5, 5, True), (5, 6, False), (5, None, False), (0, 0, True), (0, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "given_key", "taken"), KEYS)
def test_gre_key(expected: int | None, given_key: int | None, taken: bool) -> None:
    with Device(key=expected) as device:
        raw = ethernet(outer_packet(4, GRE, gre_header(6, key=given_key) + tcp_packet(6)))
        assert len(device.take(raw)) == taken
        assert device.drops() == ({} if taken else {"gre_key": 1})


def test_options_are_checked() -> None:
    for wrong in ({"modes": ("ipip", "vxlan")}, {"modes": ()}, {"port": 0}, {"port": 1 << 16}, {"key": 1 << 32}):
        with pytest.raises(ValueError, match="not"):
            Decapsulator(0, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 bytes"):
        Decapsulator(0).process([], b"")


# ---- ECN: RFC 6040 figure 4, by inner and outer: Not-ECT, ECT(1), ECT(0), CE as their bits; None: dropped

JOINED: dict[int, dict[int, int | None]] = {
    0: {0: 0, 1: 0, 2: 0, 3: None},
    1: {0: 1, 1: 1, 2: 1, 3: 3},
    2: {0: 2, 1: 1, 2: 2, 3: 3},
    3: {0: 3, 1: 3, 2: 3, 3: 3},
}


@pytest.mark.parametrize(("mode", "outer", "inner"), WAYS)
def test_ecn(device: Device, mode: str, outer: int, inner: int) -> None:
    for inside, by_outer in JOINED.items():
        for outside, joined in by_outer.items():
            raw = tunnel(mode, outer, tcp_packet(inner, tos=0xB8 | inside), tos=0x28 | outside)
            wanted = [] if joined is None else [tcp_packet(inner, tos=0xB8 | joined)]
            assert [out.packet for out in device.take(raw)] == wanted
    assert device.drops() == {"ecn": 1}


# ---- what is dropped


def cut(packet: bytes, length: int) -> Callable[[], bytes]:
    return lambda: ethernet(packet[:length])


def raw_ipip(payload: bytes, protocol: int = 4) -> Callable[[], bytes]:
    return lambda: ethernet(outer_packet(4, protocol, payload))


def raw_gue(payload: bytes, port: int = PORT, outer: int = 4) -> Callable[[], bytes]:
    return lambda: ethernet(outer_packet(outer, UDP, udp_segment(outer, payload, port)))


def raw_gre(payload: bytes) -> Callable[[], bytes]:
    return lambda: ethernet(outer_packet(4, GRE, payload))


WHOLE = outer_packet(4, 4, tcp_packet(4))
WHOLE6 = outer_packet(6, 4, tcp_packet(4))
UDP4 = outer_packet(4, UDP, udp_segment(4, gue_header(4) + tcp_packet(4)))
INNER4, INNER6 = tcp_packet(4), tcp_packet(6)
DROPS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "no Ethernet header": ("outer_header", lambda: ethernet(WHOLE)[:13]),
    "ARP": ("not_tunnel", lambda: ethernet(WHOLE, ethertype=0x0806)),
    "TCP": ("not_tunnel", lambda: ethernet(INNER4)),
    "UDP to another port": ("not_tunnel", raw_gue(gue_header(4) + INNER4, PORT + 1)),
    "IPv4 header cut": ("outer_header", cut(WHOLE, 19)),
    "IPv6 header cut": ("outer_header", cut(WHOLE6, 39)),
    "IPv4 packet cut": ("outer_header", cut(WHOLE, len(WHOLE) - 1)),
    "IPv6 packet cut": ("outer_header", cut(WHOLE6, len(WHOLE6) - 1)),
    "IPv4 header length 4": ("outer_header", lambda: ethernet(with_byte(WHOLE, 0, 0x44))),
    "IPv4 total below the header": ("outer_header", lambda: ethernet(WHOLE[:2] + b"\0\x13" + WHOLE[4:])),
    "version 5": ("outer_header", lambda: ethernet(with_byte(WHOLE, 0, 0x55), ethertype=0x0800)),
    "version 7": ("outer_header", lambda: ethernet(with_byte(WHOLE6, 0, 0x70), ethertype=0x86DD)),
    "options cut": ("outer_header", lambda: ethernet(outer_packet(6, DEST_OPTS, b"\x04\0\0\0"))),
    "options too long": ("outer_header", lambda: ethernet(outer_packet(6, DEST_OPTS, b"\x04\x09" + bytes(40)))),
    "first fragment": ("outer_fragment", lambda: ethernet(with_ip4_checksum(with_byte(WHOLE, 6, 0x20)))),
    "later fragment": ("outer_fragment", lambda: ethernet(with_ip4_checksum(with_byte(WHOLE, 7, 1)))),
    "IPv4 checksum": ("outer_checksum", lambda: ethernet(with_byte(WHOLE, 8, WHOLE[8] ^ 1))),
    "UDP checksum": ("outer_checksum", lambda: ethernet(with_byte(UDP4, len(UDP4) - 1, UDP4[-1] ^ 1))),
    "UDP header cut": ("udp_length", lambda: ethernet(outer_packet(4, UDP, bytes(7)))),
    "UDP length 7": ("udp_length", lambda: ethernet(UDP4[:24] + b"\0\x07" + UDP4[26:])),
    "UDP length beyond": ("udp_length", lambda: ethernet(UDP4[:24] + b"\xff\xff" + UDP4[26:])),
    "GRE cut": ("gre_header", raw_gre(bytes(3))),
    "GRE key cut": ("gre_header", raw_gre(gre_header(4, key=0)[:7])),
    "GRE checksum": ("gre_header", raw_gre(gre_header(4, flags=0x8000) + bytes(4) + INNER4)),
    "GRE sequence": ("gre_header", raw_gre(gre_header(4, flags=0x1000) + bytes(4) + INNER4)),
    "GRE version 1": ("gre_header", raw_gre(gre_header(4, flags=1) + INNER4)),
    "GRE key": ("gre_key", raw_gre(gre_header(4, key=1) + INNER4)),
    "GRE Ethernet": ("gre_protocol", raw_gre(b"\0\0\x65\x58" + INNER4)),
    "GUE cut": ("gue_header", raw_gue(bytes(3))),
    "GUE fields cut": ("gue_header", raw_gue(gue_header(4, words=2)[:8])),
    "GUE flags": ("gue_header", raw_gue(gue_header(4, words=1, flags=1) + INNER4)),
    "GUE variant 2": ("gue_header", raw_gue(gue_header(4, variant=2) + INNER4)),
    "GUE variant 1, version 5": ("gue_header", raw_gue(b"\x55" + INNER4[1:])),
    "GUE control": ("gue_control", raw_gue(gue_header(4, control=1) + INNER4)),
    "GUE Ethernet": ("gue_protocol", raw_gue(b"\0\x8f\0\0" + INNER4)),
    "nothing inside": ("inner_truncated", raw_ipip(b"")),
    "inner IPv4 header cut": ("inner_truncated", raw_ipip(INNER4[:19])),
    "inner IPv6 header cut": ("inner_truncated", raw_ipip(INNER6[:39], 41)),
    "inner IPv4 cut": ("inner_truncated", raw_ipip(INNER4[:-1])),
    "inner IPv6 cut": ("inner_truncated", raw_ipip(INNER6[:-1], 41)),
    "inner IPv6 as IPv4": ("inner_header", raw_ipip(INNER6)),
    "inner IPv4 as IPv6": ("inner_header", raw_ipip(INNER4, 41)),
    "inner header length 4": ("inner_header", raw_ipip(with_byte(INNER4, 0, 0x44))),
    "inner total below the header": ("inner_header", raw_ipip(INNER4[:2] + b"\0\x13" + INNER4[4:])),
    "inner options too long": ("inner_header", raw_ipip(
        ip6_packet(CLIENT[6], VIP[6], DEST_OPTS, b"\x06\x09" + bytes(40)), 41)),
    "ipip in ipip": ("nested", raw_ipip(WHOLE)),
    "gre in ipip": ("nested", raw_ipip(outer_packet(4, GRE, gre_header(4) + INNER4))),
    "ipip in gue": ("nested", raw_gue(gue_header(6) + WHOLE6)),
    "IPv6 behind options": ("nested", raw_ipip(
        outer_packet(6, 41, INNER6, extensions=((DEST_OPTS, b"\x04\x01\x04\x01\x01\x00"),)), 41)),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPS)
def test_drop(device: Device, case: str) -> None:
    reason, make = DROPS[case]
    assert device.take(make()) == []
    assert device.drops() == {reason: 1}
    assert packets(device.take(tunnel("ipip", 4, INNER4))) == [INNER4]  # and nothing else was touched


def test_a_device_that_refuses() -> None:
    device = Device()
    device.far.close()
    device.decap.process([tunnel("ipip", 4, packet) for packet in [*stream(4, 3, 100), INNER6]])
    device.check()
    assert device.drops() == {"tun_refused": 4}
    device.near.close()


# ---- GSO packets


@pytest.mark.parametrize(("mode", "outer", "inner"), WAYS)
@pytest.mark.parametrize("end", [0, PSH, FIN | PSH])
def test_segments_become_one(device: Device, mode: str, outer: int, inner: int, end: int) -> None:
    segments = stream(inner, 5, 1000, last=333, tcp_options=TIMESTAMPS, tos=0xBA)
    segments[-1] = tcp_packet(inner, bytes(333), seq=5000, ident=4, tos=0xBA, flags=ACK | end, tcp_options=TIMESTAMPS)
    (out,) = device.take(*(tunnel(mode, outer, segment) for segment in segments))
    assert out.gso_size == 1000
    assert out.segments() == segments
    counters = device.decap.counters()
    assert (counters["decapsulated"], counters["merged"], counters["writes"]) == (5, 5, 1)


@pytest.mark.parametrize("version", [4, 6])
def test_a_super_frame_has_at_most_64_kib(device: Device, version: int) -> None:
    segments = stream(version, 120, 1400, seq=2**32 - 30_000)
    out = device.take(*(tunnel("ipip", 4, segment) for segment in segments))
    assert packets(out) == segments
    assert [len(each.segments()) for each in out] == [46, 46, 28]
    assert max(len(each.packet) for each in out) <= 65535


def test_a_super_frame_has_at_most_64_segments(device: Device) -> None:
    segments = stream(4, 130, 10)
    out = device.take(*(tunnel("ipip", 4, segment) for segment in segments))
    assert (packets(out), [len(each.segments()) for each in out]) == (segments, [64, 64, 2])


def test_nothing_waits_beyond_a_batch(device: Device) -> None:
    for segment in stream(4, 3, 100):
        (out,) = device.take(tunnel("ipip", 4, segment))
        assert (out.packet, out.gso_type) == (segment, 0)


def test_flows_stay_apart_and_in_order(device: Device) -> None:
    """Of more flows than can wait at once."""
    for flows in (2, 8, 11):
        streams = [stream(version, 6, 500, sport=sport)
                   for sport in range(flows) for version in (4, 6)][:flows]  # fmt: skip
        turns = [segment for turn in zip(*streams, strict=True) for segment in turn]
        out = device.take(*(tunnel("ipip", 4, segment) for segment in turns))
        found = packets(out)
        assert sorted(found) == sorted(turns)
        for each in streams:
            assert [packet for packet in found if packet in each] == each
        assert len(out) == (flows if flows <= 8 else len(turns))


# What the third of five segments of 100 bytes is like instead; the rest of the writes follow from it.
ODD: dict[str, tuple[dict[str, Any], list[int]]] = {
    "the same": ({}, [5]),
    "PSH": ({"flags": ACK | PSH}, [3, 2]),
    "FIN": ({"flags": ACK | FIN}, [3, 2]),
    "shorter": ({"payload": bytes(99)}, [3, 2]),
    "longer": ({"payload": bytes(101)}, [2, 1, 2]),
    "empty": ({"payload": b""}, [2, 1, 2]),
    "SYN": ({"flags": ACK | SYN}, [2, 1, 2]),
    "RST": ({"flags": ACK | RST}, [2, 1, 2]),
    "URG": ({"flags": ACK | URG}, [2, 1, 2]),
    "CWR": ({"flags": ACK | CWR}, [2, 1, 2]),
    "ECE": ({"flags": ACK | ECE}, [2, 1, 2]),
    "no ACK": ({"flags": PSH}, [2, 1, 2]),
    "another acknowledgement": ({"ack": 78}, [2, 1, 2]),
    "a gap": ({"seq": 1201}, [2, 1, 2]),
    "again": ({"seq": 1100}, [2, 1, 2]),
    "another TTL": ({"ttl": 63}, [2, 1, 2]),
    "another TOS": ({"tos": 0x20}, [2, 1, 2]),
    "ECN": ({"tos": 2}, [2, 1, 2]),
    "other options": ({"tcp_options": b"\x01\x01\x01\x01"}, [2, 1, 2]),
    "other timestamps": ({"tcp_options": with_byte(TIMESTAMPS, 7, 9)}, [2, 1, 2]),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("version", [4, 6])
def test_what_is_merged(device: Device, version: int, case: str) -> None:
    changes, sizes = ODD[case]
    fields = {"payload": bytes(100), "tcp_options": TIMESTAMPS}
    segments = [tcp_packet(version, ident=at, seq=1000 + 100 * at, **fields) for at in range(5)]
    segments[2] = tcp_packet(version, ident=2, **(fields | {"seq": 1200} | changes))
    out = device.take(*(tunnel("gre", 6, segment) for segment in segments))
    assert packets(out) == segments
    assert [len(each.segments()) for each in out] == sizes


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("at", [0, 6, 9, 30, -1])
def test_a_damaged_segment_is_the_kernels_to_find(device: Device, version: int, at: int) -> None:
    segments = stream(version, 3, 100)
    l4 = 20 if version == 4 else 40
    where = len(segments[1]) - 1 if at < 0 else l4 + at
    segments[1] = with_byte(segments[1], where, segments[1][where] ^ 0x10)
    out = device.take(*(tunnel("ipip", 4, segment) for segment in segments))
    assert sorted(each.packet for each in out) == sorted(segments)
    assert {(each.flags, each.gso_type) for each in out} == {(0, 0)}


def test_a_damaged_ip_header_is_the_kernels_to_find(device: Device) -> None:
    segments = stream(4, 3, 100)
    segments[1] = with_byte(segments[1], 8, 63)
    out = device.take(*(tunnel("ipip", 4, segment) for segment in segments))
    assert [(each.packet, each.flags) for each in out] == [(segment, 0) for segment in segments]


@pytest.mark.parametrize(("idents", "sizes"), [((7, 8, 9), [3]), ((65535, 0, 1), [3]), ((7, 7, 7), [1, 1, 1]),
                                               ((7, 9, 10), [1, 2])])  # fmt: skip
def test_identifications_without_df(device: Device, idents: tuple[int, ...], sizes: list[int]) -> None:
    segments = [tcp_packet(4, bytes(100), df=False, ident=ident, seq=1000 + 100 * at)
                for at, ident in enumerate(idents)]  # fmt: skip
    out = device.take(*(tunnel("ipip", 4, segment) for segment in segments))
    assert packets(out) == segments
    assert [len(each.segments()) for each in out] == sizes


def test_fragments_and_options_are_written_as_they_are(device: Device) -> None:
    odd = [
        with_ip4_checksum(with_byte(tcp_packet(4, bytes(96)), 6, 0x20)),
        tcp_packet(4, bytes(96), options=PADDING4, seq=1000),
        tcp_packet(6, bytes(96), extensions=((DEST_OPTS, bytes(6)),)),
        tcp_packet(6, bytes(96), extensions=((HOP_BY_HOP, bytes(6)),)),
        INNER4[:2] + b"\0\x1a" + INNER4[4:26],  # ends in the TCP header
    ]
    out = device.take(*(tunnel("ipip", 4, packet) for packet in odd + odd))
    assert [(each.packet, each.flags) for each in out] == [(packet, 0) for packet in odd + odd]


# ---- what is left to the device


def left_open(packet: bytes) -> bytes:
    """With the checksum that a host hands to a device: the pseudo-header's sum."""
    version, l4 = packet[0] >> 4, 20 if packet[0] >> 4 == 4 else 40
    addresses = packet[12:20] if version == 4 else packet[8:40]
    total = ~checksum(pseudo_header(addresses, b"", TCP, len(packet) - l4)) & 0xFFFF
    return packet[: l4 + 16] + total.to_bytes(2, "big") + packet[l4 + 18 :]


@pytest.mark.parametrize(("mode", "outer", "inner"), WAYS)
def test_open_checksum(device: Device, mode: str, outer: int, inner: int) -> None:
    packet = left_open(tcp_packet(inner))
    raw, l4 = tunnel(mode, outer, packet), 20 if inner == 4 else 40
    start = raw.index(packet) + l4
    (out,) = device.take(raw, vnet=struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, start, 16))
    assert out == (NEEDS_CSUM, 0, 0, 0, l4, 16, packet)


@pytest.mark.parametrize("inner", [4, 6])
def test_open_checksums_are_merged(device: Device, inner: int) -> None:
    segments = stream(inner, 4, 700)
    frames = [tunnel("ipip", 4, left_open(segment)) for segment in segments]
    (out,) = device.take(*frames, vnet=struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, 34 + 20 * (inner // 2 - 1), 16))
    assert out.segments() == segments


@pytest.mark.parametrize("inner", [4, 6])
def test_super_frame_from_a_tunnel(device: Device, inner: int) -> None:
    """As a kernel's tunnel device sends it to a neighbour on the same machine."""
    segments = stream(inner, 2, 1000)
    whole = left_open(tcp_packet(inner, bytes(5000), seq=3000, ident=2))
    l4 = 20 if inner == 4 else 40
    vnet = struct.pack("=BBHHHH", NEEDS_CSUM, GSO_TCP[inner], 0, 1000, 34 + l4, 16)
    out = device.take(tunnel("ipip", 4, whole), vnet=vnet)
    assert out == [(NEEDS_CSUM, GSO_TCP[inner], 0, 1000, l4, 16, whole)]
    assert packets(device.take(*(tunnel("ipip", 4, segment) for segment in segments))) == segments


def test_open_checksum_of_the_outer_header(device: Device) -> None:
    raw = with_byte(tunnel("gue", 4, INNER4), 40, 0x55)  # the checksum field, which is not there yet
    (out,) = device.take(raw, vnet=struct.pack("=BBHHHH", NEEDS_CSUM, 0, 0, 0, 34, 6))
    assert out == (0, 0, 0, 0, 0, 0, INNER4)


def test_offloads_that_nobody_can_do(device: Device) -> None:
    raw = tunnel("gue", 4, INNER4)
    for vnet in ((NEEDS_CSUM, GSO_UDP, 42, 19, 34, 6), (0, 1, 0, 100, 0, 0), (NEEDS_CSUM, 0, 0, 0, len(raw) - 2, 1)):
        assert device.take(raw, vnet=struct.pack("=BBHHHH", *vnet)) == []
    assert device.drops() == {"offload": 3}


# ---- datagrams that came as a GSO packet of UDP


def joined(outer: int, datagrams: Sequence[bytes], size: int | None = None) -> tuple[bytes, bytes]:
    """The frame and its virtio_net_hdr: each datagram from its GUE header on, all of ``size`` but the last."""
    raw = ethernet(outer_packet(outer, UDP, udp_segment(outer, b"".join(datagrams), with_checksum=False)))
    l4 = 14 + (20 if outer == 4 else 40)
    raw = raw[: l4 + 6] + b"\x12\x34" + raw[l4 + 8 :]  # left open
    return raw, struct.pack("=BBHHHH", NEEDS_CSUM, GSO_UDP, l4 + 8, size or len(datagrams[0]), l4, 6)


@pytest.mark.parametrize("last", [1000, 3])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_joined_datagrams(device: Device, outer: int, inner: int, last: int) -> None:
    segments = stream(inner, 20, 1000, last=last)
    raw, vnet = joined(outer, [gue_header(inner) + segment for segment in segments])
    (out,) = device.take(raw, vnet=vnet)
    assert out.segments() == segments
    assert device.decap.counters()["packets"] == 20


def test_joined_datagrams_of_several_flows_do_not_overwrite_each_other(device: Device) -> None:
    """One waits for more of its flow, while the next is written at once. Variant 1 has nothing between them."""
    flows = [stream(4, 5, 500, sport=sport) for sport in (40001, 40002)]
    udp = frame(CLIENT[4], 40003, VIP[4], 53, "udp", payload=bytes(len(flows[0][0]) - 28))[14:]
    packets_in = [packet for pair in zip(*flows, strict=True) for packet in (*pair, udp)]
    for header in (gue_header(4), b""):
        raw, vnet = joined(4, [header + packet for packet in packets_in])
        found = packets(device.take(raw, vnet=vnet))
        assert sorted(found) == sorted(packets_in)
        for flow in flows:
            assert [packet for packet in found if packet in flow] == flow


def test_each_joined_datagram_ends_by_itself(device: Device) -> None:
    good = tcp_packet(4, b"data", flags=ACK | PSH)
    bad = [gue_header(4, control=1) + good, gue_header(4) + with_byte(good, 0, 0x65), gue_header(6) + good]
    raw, vnet = joined(4, [gue_header(4) + good, *bad, gue_header(4) + good, gue_header(4) + good[:-1]])
    assert [each.packet for each in device.take(raw, vnet=vnet)] == [good, good]
    assert device.drops() == {"gue_control": 1, "inner_header": 2, "inner_truncated": 1}


def test_a_super_frame_of_udp_out_of_a_tunnel_is_one_packet(device: Device) -> None:
    """Its checksum is open inside; it is not gue's own."""
    packet = frame(CLIENT[4], 40000, VIP[4], 53, "udp", payload=bytes(3000))[14:]
    raw = tunnel("gue", 4, packet)
    start = raw.index(packet) + 20
    (out,) = device.take(raw, vnet=struct.pack("=BBHHHH", NEEDS_CSUM, GSO_UDP, 0, 1000, start, 6))
    assert out == (NEEDS_CSUM, GSO_UDP, 0, 1000, 20, 6, packet)


# ---- anything

SOUND = [tunnel(mode, outer, packet) for mode, outer, inner in WAYS
         for packet in (*stream(inner, 2, 64, tos=2), tcp_packet(inner, flags=SYN, payload=b""))]  # fmt: skip


@given(st.data())
def test_malformed_frames(data: st.DataObject) -> None:
    """Every frame has one end, whatever is changed or cut; what comes out lay in it, but for ECN and its checksum."""
    frames = []
    for _ in range(data.draw(st.integers(1, 6))):
        raw = bytearray(data.draw(st.sampled_from(SOUND)))
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(12, len(raw) - 1))] = data.draw(st.integers(0, 255))
        frames.append(bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]))
    with Device() as device:
        for packet in packets(device.take(*frames)):
            assert any(blurred(packet) in blurred_anywhere(raw, packet) for raw in frames)


def blurred(packet: bytes) -> bytes:
    """Without what RFC 6040 changes, and without IDs, which count on in a GSO packet."""
    hidden = (1, 4, 5, 10, 11) if packet[0] >> 4 == 4 else (1,)
    return bytes(0 if at in hidden else byte for at, byte in enumerate(packet))


def blurred_anywhere(raw: bytes, packet: bytes) -> set[bytes]:
    starts = (at for at in range(len(raw)) if raw[at : at + 1] == packet[:1])
    return {blurred(raw[at : at + len(packet)]) for at in starts}


@given(st.data())
def test_any_offloads(data: st.DataObject) -> None:
    """Sound frames and joined ones, with any virtio_net_hdr: each datagram has one end (``Device.check``)."""
    outer, inner = data.draw(st.sampled_from([4, 6])), data.draw(st.sampled_from([4, 6]))
    together, _ = joined(outer, [gue_header(inner) + each for each in stream(inner, 5, 64)])
    raw = data.draw(st.sampled_from([*SOUND, together]))
    small, any16 = st.integers(0, 200), st.integers(0, 65535)
    vnet = struct.pack(
        "=BBHHHH", data.draw(st.integers(0, 3)), data.draw(st.sampled_from([0, 1, 4, GSO_UDP, 0x81, 0x85, 3])),
        data.draw(any16), *(data.draw(small | any16) for _ in range(3)),
    )  # fmt: skip
    with Device() as device:
        device.take(raw, raw, vnet=vnet)


@given(st.binary(max_size=200), st.sampled_from([0x0800, 0x86DD]))
def test_garbage(raw: bytes, ethertype: int) -> None:
    with Device() as device:
        device.take(ethernet(raw, ethertype=ethertype))
