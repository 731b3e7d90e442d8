"""The tunnel modes: what wraps a packet, taken apart by dpkt and struct; and packets that do not fit.

The reader here shares nothing with the writer: headers are opened by dpkt, checksums summed whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb import Verdict
from fastlb.errors import ConfigError
from fastlb.plan.tables import services_table
from fastlb.workers.workers import open_pipelines
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, reply_to, service
from tests.frames import ACK, FIN, PSH, SYN, checksum, ethernet, frame, mac_of, pseudo_header, take_apart

MODES = ("ipip", "gre", "gue")
VERSIONS = [(inner, outer) for inner in (4, 6) for outer in (4, 6)]
OWN = {4: "192.0.2.1", 6: "2001:db8::1"}
HEADER = {4: 20, 6: 40}
EXTRA = {"ipip": 0, "gre": 4, "gue": 12}
VLAN = (0x8100, 0x2005)
EVERY = pytest.mark.parametrize(("mode", "inner", "outer"), [(mode, *pair) for mode in MODES for pair in VERSIONS])


def tunnel(mode: str, inner: int = 4, outer: int = 4, protocol: str = "tcp", **changes: Any) -> dict[str, Any]:
    return service(mode, inner, protocol, backends=[{"address": address} for address in BACKENDS[outer]]) | changes


@dataclass(frozen=True)
class Wrapped:
    """A frame of a tunnel, taken apart."""

    eth_dst: str
    tags: bytes
    src: str
    dst: str
    tos: int
    ttl: int
    df: bool
    number: int
    label: int
    sport: int | None  # gue
    dport: int | None
    udp_checksum: int | None
    key: int | None  # gre
    packet: bytes

    @property
    def inner(self) -> bytes:
        """The packet inside as a frame, for `take_apart`."""
        return ethernet(self.packet)


def unwrap(raw: bytes) -> Wrapped:
    """AssertionError when any length, checksum or protocol number of the outer headers is wrong."""
    at = 12
    while raw[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    tags, ethertype, body = raw[12:at], raw[at : at + 2], raw[at + 2 :]
    if ethertype == b"\x08\x00":
        ip = dpkt.ip.IP(body)
        assert (ip.hl, ip.len, ip.mf, ip.offset) == (5, len(body), 0, 0)
        assert checksum(body[:20]) == 0
        source, target, tos, ttl, protocol, payload = ip.src, ip.dst, ip.tos, ip.ttl, ip.p, body[20:]
        df, number, label = bool(ip.df), ip.id, 0
    else:
        assert ethertype == b"\x86\xdd"
        six = dpkt.ip6.IP6(body)
        assert six.plen == len(body) - 40
        source, target, tos, ttl, protocol, payload = six.src, six.dst, six.fc, six.hlim, six.nxt, body[40:]
        df, number, label = False, 0, six.flow
    sport = dport = udp_checksum = key = None
    if protocol == 17:
        sport, dport, length, udp_checksum = struct.unpack("!4H", payload[:8])
        assert length == len(payload)
        if udp_checksum:
            assert checksum(pseudo_header(source, target, 17, length) + payload) == 0
        assert (payload[8], payload[10:12]) == (0, b"\0\0"), "GUE: version 0, no control, no options, no flags"
        protocol, payload = payload[9], payload[12:]
    elif protocol == 47:
        flags, kind = struct.unpack("!2H", payload[:4])
        assert flags in (0, 0x2000)
        if flags:
            (key,) = struct.unpack("!I", payload[4:8])
        payload = payload[8 if flags else 4 :]
        protocol = {0x0800: 4, 0x86DD: 41}[kind]
    assert protocol == {4: 4, 6: 41}[payload[0] >> 4]
    return Wrapped(
        raw[:6].hex(":"), tags, str(ip_address(source)), str(ip_address(target)), tos, ttl, df, number, label, sport,
        dport, udp_checksum, key, payload,
    )  # fmt: skip


@EVERY
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_packet_inside_is_the_client_s(mode: str, inner: int, outer: int, protocol: str) -> None:
    balancer = datapath(tunnel(mode, inner, outer, protocol))
    raw = frame(CLIENT[inner], 40000, VIP[inner], 80, protocol, payload=b"data")
    out = balancer.process(raw + b"padding")
    got = unwrap(out.frames[0])
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "scheduled")
    assert got.packet == raw[14:]
    assert got.dst in BACKENDS[outer]
    assert (got.eth_dst, got.src, got.ttl) == (mac_of(got.dst), OWN[outer], 64)
    assert (got.key, got.dport) == (None, 6080 if mode == "gue" else None)
    again = unwrap(balancer.process(frame(CLIENT[inner], 40000, VIP[inner], 80, protocol, flags=ACK)).frames[0])
    assert (again.dst, again.sport, again.label) == (got.dst, got.sport, got.label), "a flow keeps its way"


@pytest.mark.parametrize(("inner", "outer"), VERSIONS)
def test_the_key_of_gre(inner: int, outer: int) -> None:
    for key in (0, 1, 0xFFFFFFFF):
        balancer = datapath(tunnel("gre", inner, outer, tunnel={"key": key}))
        assert unwrap(balancer.process(frame(CLIENT[inner], 40000, VIP[inner], 80)).frames[0]).key == key


@pytest.mark.parametrize(("inner", "outer"), VERSIONS)
@pytest.mark.parametrize(("wanted", "summed"), [("auto", {4: False, 6: True}), (True, {4: True, 6: True}),
                                                (False, {4: False, 6: False})])  # fmt: skip
def test_the_checksum_of_gue(inner: int, outer: int, wanted: object, summed: dict[int, bool]) -> None:
    balancer = datapath(tunnel("gue", inner, outer, tunnel={"udp_checksum": wanted, "port": 7777}))
    for size in (0, 1, 2, 777):
        got = unwrap(balancer.process(frame(CLIENT[inner], 40000, VIP[inner], 80, payload=bytes(size))).frames[0])
        assert bool(got.udp_checksum) == summed[outer]
        assert got.dport == 7777


@EVERY
def test_dscp_and_ecn(mode: str, inner: int, outer: int) -> None:
    """RFC 6040 section 4.1: the outer header has what the inner one has."""
    balancer = datapath(tunnel(mode, inner, outer))
    for tos in (0, 0xB8, 1, 2, 3, 0xFF):
        raw = frame(CLIENT[inner], 40000, VIP[inner], 80, tos=tos)
        got = unwrap(balancer.process(raw).frames[0])
        assert (got.tos, got.packet) == (tos, raw[14:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wanted", "expected"), [("inner", {4: {True, False}, 6: {True}}), ("always", {4: {True}, 6: {True}}),
                             ("never", {4: {False}, 6: {False}})],
)  # fmt: skip
def test_dont_fragment(mode: str, wanted: str, expected: dict[int, set[bool]]) -> None:
    for inner in (4, 6):
        balancer = datapath(tunnel(mode, inner, tunnel={"df": wanted}))
        sent = [unwrap(balancer.process(frame(CLIENT[inner], 1, VIP[inner], 80, df=df)).frames[0]) for df in (0, 1)]
        assert {each.df for each in sent} == expected[inner]
        if wanted == "inner" and inner == 4:
            assert [each.df for each in sent] == [False, True]


def test_packets_that_may_be_fragmented_have_different_numbers() -> None:
    balancer = datapath(tunnel("ipip", tunnel={"df": "never"}))
    numbers = [unwrap(balancer.process(frame(CLIENT[4], 1, VIP[4], 80)).frames[0]).number for _ in range(1000)]
    assert len(set(numbers)) == 1000


def test_two_workers_have_different_numbers() -> None:
    """Towards one backend, where fragments of both are put together; each goes round all of its own (RFC 6864)."""
    settings = config(tunnel("ipip", tunnel={"source": ["10.3.0.1"]}))
    plans = Balancer(settings)
    workers = open_pipelines(settings, 2)
    used: list[list[int]] = [[], []]
    for worker, numbers in zip(workers, used, strict=True):
        worker.publish(services_table(settings, plans.plans), plans.routes())
        mine = next(
            raw for port in range(1, 100)
            if worker.process([raw := frame(CLIENT[4], port, VIP[4], 80)], 0)[0][1] == "scheduled"
        )  # fmt: skip
        for _ in range(33):
            sent = worker.process([mine] * 1000, 0)
            numbers += [int.from_bytes(frames[0][18:20], "big") for _, _, frames, _, _ in sent]
    assert not set(used[0]) & set(used[1])
    for numbers in used:
        assert len(set(numbers)) == len(set(numbers[:32768])) == 32768
        assert numbers[32768:] == numbers[: len(numbers) - 32768]


@pytest.mark.parametrize("mode", MODES)
def test_the_outer_source_spreads_flows(mode: str) -> None:
    """From the prefix, the same for every packet of a flow."""
    prefixes = {4: "10.99.0.0/16", 6: "fd00:99::/64"}
    for outer in (4, 6):
        balancer = datapath(tunnel(mode, 4, outer, tunnel={"source": list(prefixes.values())}))
        first = [unwrap(balancer.process(frame(CLIENT[4], port, VIP[4], 80)).frames[0]).src for port in range(1, 201)]
        later = [
            unwrap(balancer.process(frame(CLIENT[4], port, VIP[4], 80, flags=ACK)).frames[0]).src
            for port in range(1, 201)
        ]
        assert first == later
        assert all(ip_address(source) in ip_network(prefixes[outer]) for source in first)
        assert len(set(first)) > 190


def test_the_source_port_of_gue_and_the_flow_label_spread_flows() -> None:
    for outer in (4, 6):
        balancer = datapath(tunnel("gue", 4, outer))
        sent = [unwrap(balancer.process(frame(CLIENT[4], port, VIP[4], 80)).frames[0]) for port in range(1, 201)]
        assert all(each.sport is not None and each.sport >= 0xC000 for each in sent)
        assert len({each.sport for each in sent}) > 190
        assert len({each.label for each in sent}) > 190 * (outer == 6)


def test_without_an_address_to_send_from() -> None:
    balancer = Balancer(config(tunnel("ipip", 4, 6)))
    assert balancer.send(frame(CLIENT[4], 1, VIP[4], 80))[0] == "no_tunnel_source"


@EVERY
def test_tags_stay_on_their_link(mode: str, inner: int, outer: int) -> None:
    """An embedded balancer has one link."""
    raw = frame(CLIENT[inner], 40000, VIP[inner], 80, tags=((0x88A8, 100), VLAN))
    got = unwrap(datapath(tunnel(mode, inner, outer)).process(raw).frames[0])
    assert (got.tags.hex(), got.packet) == ("88a8006481002005", raw[22:])


# ---- what does not fit


@EVERY
@pytest.mark.parametrize("mtu", [1400, 1500])
def test_the_longest_packet_that_fits(mode: str, inner: int, outer: int, mtu: int) -> None:
    balancer = datapath(tunnel(mode, inner, outer, "udp"), mtu=mtu)
    room = mtu - HEADER[outer] - EXTRA[mode]
    payload = room - HEADER[inner] - 8
    fits = frame(CLIENT[inner], 40000, VIP[inner], 80, "udp", payload=bytes(payload), df=True)
    assert len(balancer.process(fits).frames[0]) == mtu + 14
    over = frame(CLIENT[inner], 40000, VIP[inner], 80, "udp", payload=bytes(payload + 1), df=True)
    out = balancer.process(over)
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "too_big")
    seen = take_apart(out.frames[0])
    assert (seen.src, seen.dst, seen.eth_dst) == (VIP[inner], CLIENT[inner], over[6:12].hex(":"))
    kind, code = (3, 4) if inner == 4 else (2, 0)
    limit = room if inner == 4 else max(room, 1280)
    assert seen.segment[:2] == bytes([kind, code])
    assert int.from_bytes(seen.segment[4:8], "big") == limit
    quoted = seen.segment[8:]
    assert quoted == over[14 : 14 + len(quoted)]
    assert len(quoted) >= 28


def too_long(client: str, version: int = 4) -> bytes:
    return frame(client, 40000, VIP[version], 80, flags=ACK, payload=bytes(1460), df=True)


def forged(first: str, count: int) -> list[bytes]:
    """Packets that are too long, from one address after another: one is built, and the others have another address.

    Their checksums are the first one's, at which nobody looks.
    """
    raw, start = too_long(first), int(ip_address(first))
    return [raw[:26] + (start + at).to_bytes(4, "big") + raw[30:] for at in range(count)]


@pytest.mark.parametrize("version", [4, 6])
def test_too_big_is_answered_at_a_limited_rate(version: int) -> None:
    """To each client by itself; time brings back what may be answered."""
    balancer = datapath(tunnel("ipip", version))
    over = too_long(CLIENT[version], version)
    reasons = [balancer.process(over).reason for _ in range(110)]
    assert (reasons.count("too_big"), reasons.count("reject_limit")) == (100, 10)
    others = [str(ip_address(CLIENT[version]) + at) for at in range(1, 101)]
    reasons = [balancer.process(too_long(each, version)).reason for each in others]
    assert reasons.count("too_big") > 95, "but for those that share its bucket"
    answered = [balancer.process(over, now=at / 1000).reason for at in range(1, 101)].count("too_big")
    assert answered == 10, "one in ten milliseconds"


def test_forged_sources_do_not_use_up_path_mtu() -> None:
    """50,000 packets that are too long, at once: most of the buckets have something left, and soon all have."""
    balancer = datapath(tunnel("ipip"))
    balancer.process_batch(forged("20.0.0.0", 50_000))
    clients = [str(ip_address(CLIENT[4]) + at) for at in range(200)]
    assert [balancer.process(too_long(each)).reason for each in clients].count("too_big") == 200
    balancer.process_batch(forged("21.0.0.0", 150_000))
    assert balancer.stats()["counters"]["drops"]["reject_limit"] > 50_000, "there is a limit"
    assert balancer.process(too_long(CLIENT[4]), now=0.5).reason == "too_big"


@pytest.mark.parametrize("mode", ["nat", "dsr", *MODES])
@pytest.mark.parametrize("options", [b"", b"\x07\x07\x04\x00\x00\x00\x00\x01", b"\x94\x04\x00\x00"])
def test_fragments_make_up_the_packet(mode: str, options: bytes) -> None:
    """IPv4 without "don't fragment"; record route is for the first fragment only, router alert for all (RFC 791)."""
    services = tunnel(mode, 4, 4, "udp") if mode in MODES else service(mode, 4, "udp")
    raw = frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=bytes(range(256)) * 15, options=options)
    whole = datapath(services, mtu=9000).process(raw).frames[0]
    out = datapath(services, mtu=1500).process(raw)
    assert (out.verdict, out.reason, len(out.frames)) == (Verdict.FORWARD, "scheduled", 3)
    packets = [unwrap(each).packet if mode in MODES else each[14:] for each in out.frames]
    assert all(len(each) - 14 <= 1500 for each in out.frames)
    expected = unwrap(whole).packet if mode in MODES else whole[14:]
    assert reassembled(packets, options) == expected


def reassembled(packets: list[bytes], options: bytes) -> bytes:
    """By RFC 791 section 3.2; AssertionError when the fragments do not make up a packet."""
    first = dpkt.ip.IP(packets[0])
    payload = b""
    for number, raw in enumerate(packets):
        ip = dpkt.ip.IP(raw)
        header = ip.hl * 4
        assert checksum(raw[:header]) == 0
        assert (ip.src, ip.dst, ip.id, ip.p, ip.len) == (first.src, first.dst, first.id, first.p, len(raw))
        assert ip.offset * 8 == len(payload)
        assert bool(ip.mf) == (number < len(packets) - 1)
        copied = options if number == 0 or not options or options[0] & 0x80 else b"\x01" * len(options)
        assert raw[20:header] == copied
        payload += raw[header:]
    header = bytearray(packets[0][: first.hl * 4])
    header[2:4] = (len(header) + len(payload)).to_bytes(2, "big")
    header[6:8] = header[10:12] = b"\0\0"
    header[10:12] = checksum(bytes(header)).to_bytes(2, "big")
    return bytes(header) + payload


# ---- GSO packets


NEEDS_CSUM, GSO_TCP4, GSO_TCP6, GSO_UDP = 1, 1, 4, 5


def left_to_device(raw: bytes, protocol: str, version: int, gso_size: int, ecn: bool = False) -> tuple[bytes, bytes]:
    """The frame as a local socket sends it, its checksum field the sum of the pseudo-header; and its virtio_net_hdr."""
    l4 = 14 + HEADER[version]
    at = 16 if protocol == "tcp" else 6
    source, target = (ip_address(address).packed for address in (CLIENT[version], VIP[version]))
    pseudo = pseudo_header(source, target, 6 if protocol == "tcp" else 17, len(raw) - l4)
    opened = bytearray(raw)
    opened[l4 + at : l4 + at + 2] = (~checksum(pseudo) & 0xFFFF).to_bytes(2, "big")
    kind = GSO_UDP if protocol == "udp" else {4: GSO_TCP4, 6: GSO_TCP6}[version]
    kind = (kind | 0x80 * ecn) if gso_size else 0
    header = l4 + (raw[l4 + 12] >> 4) * 4 if protocol == "tcp" else l4 + 8
    return bytes(opened), struct.pack("=BBHHHH", NEEDS_CSUM, kind, header, gso_size, l4, at)


def through(
    mode: str, inner: int, outer: int, protocol: str, raw: bytes, offload: bytes, **changes: Any
) -> list[bytes]:
    balancer = datapath(tunnel(mode, inner, outer, protocol, **changes))
    balancer.process(b"")  # publishes
    return list(balancer.pipeline.process([raw], 0, offloads=[offload])[0][2])


@EVERY
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_super_frames_are_cut(mode: str, inner: int, outer: int, protocol: str) -> None:
    """Every segment by itself is sound; together they are what the client sent."""
    data, size = bytes(at * 7 % 251 for at in range(10_001)), 1000
    plain = frame(
        CLIENT[inner], 40000, VIP[inner], 80, protocol, payload=data, flags=ACK | PSH | FIN | 0x80, seq=0xFFFFF000,
        tcp_options=b"\x01\x01\x08\x0a" + bytes(8),
    )  # fmt: skip
    raw, offload = left_to_device(plain, protocol, inner, size, ecn=protocol == "tcp")
    changes = {"udp_checksum": True} if mode == "gue" else {}
    frames = through(mode, inner, outer, protocol, raw, offload, tunnel=changes)
    wrapped = [unwrap(each) for each in frames]
    segments = [take_apart(each.inner) for each in wrapped]
    header = 32 if protocol == "tcp" else 8
    assert [len(each.segment) - header for each in segments] == [size] * 10 + [1]
    assert b"".join(each.segment[header:] for each in segments) == data
    assert {(each.dst, each.src, each.sport) for each in wrapped} == {(wrapped[0].dst, OWN[outer], wrapped[0].sport)}
    if protocol == "tcp":
        assert [each.tcp.seq for each in segments] == [(0xFFFFF000 + at * size) % 2**32 for at in range(11)]
        assert [each.tcp.flags for each in segments] == [ACK | 0x80, *[ACK] * 9, ACK | PSH | FIN]
    if inner == 4:
        numbers = [dpkt.ip.IP(each.packet).id for each in wrapped]
        assert numbers == list(range(0x1234, 0x1234 + 11))


@EVERY
def test_an_open_checksum_is_completed_where_the_tunnel_covers_it(mode: str, inner: int, outer: int) -> None:
    plain = frame(CLIENT[inner], 40000, VIP[inner], 80, payload=b"x" * 101)
    raw, offload = left_to_device(plain, "tcp", inner, 0)
    got = unwrap(through(mode, inner, outer, "tcp", raw, offload)[0])
    if mode == "gue" and outer == 6:
        assert got.packet == plain[14:]
    else:
        assert got.packet == raw[14:], "left to the device, which finds it by its offset"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("protocol", "gso"), [("tcp", 1460), ("udp", 1472)])
def test_super_frames_whose_segments_do_not_fit(mode: str, protocol: str, gso: int) -> None:
    """TCP in shorter segments; datagrams stay what they are, each in fragments (test_segments.py)."""
    room = 1500 - 20 - EXTRA[mode]
    for df in (False, True):
        plain = frame(CLIENT[4], 40000, VIP[4], 80, protocol, payload=bytes(5000), flags=ACK, df=df)
        raw, offload = left_to_device(plain, protocol, 4, gso)
        frames = through(mode, 4, 4, protocol, raw, offload)
        if df:
            (answer,) = map(take_apart, frames)
            assert (answer.dst, answer.segment[:2]) == (CLIENT[4], b"\x03\x04")
            assert int.from_bytes(answer.segment[6:8], "big") == room
            continue
        assert 1507 <= max(map(len, frames)) <= 1514
        packets = [unwrap(each).packet for each in frames]
        assert len({unwrap(each).number for each in frames}) == len(frames)
        if protocol == "tcp":
            assert sum(len(take_apart(ethernet(each)).segment) - 20 for each in packets) == 5000
        else:
            first = (room - 20) // 8 * 8
            assert [len(each) - 20 for each in packets] == [first, 1480 - first] * 3 + [5000 - 3 * 1472 + 8]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 7, 31])
def test_the_smallest_datagrams(mode: str, size: int) -> None:
    """Linux puts at most 128 of them into a GSO packet."""
    data = bytes(range(128)) * size
    raw, offload = left_to_device(frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=data), "udp", 4, size)
    sent = [take_apart(unwrap(each).inner).segment[8:] for each in through(mode, 4, 4, "udp", raw, offload)]
    assert (len(sent), b"".join(sent)) == (128, data)


def test_a_super_frame_that_is_not_cut() -> None:
    """Of an unknown kind, without segments, in more than 2,048 of them; fragments are no GSO packets."""
    plain = frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=bytes(5000))
    raw, offload = left_to_device(plain, "udp", 4, 1400)
    balancer = datapath(tunnel("ipip", 4, 4, "udp"))
    balancer.process(b"")  # publishes
    for kind, size in ((3, 1400), (5, 0), (5, 2)):
        odd = offload[:1] + bytes([kind]) + offload[2:4] + struct.pack("=H", size) + offload[6:]
        assert balancer.pipeline.process([raw], 0, offloads=[odd])[0][1] == "tunnel_offload"


def test_a_super_frame_with_more_headers_than_are_copied() -> None:
    chain = tuple((60, bytes(2046)) for _ in range(2))
    plain = frame(CLIENT[6], 40000, VIP[6], 80, payload=bytes(5000), extensions=chain, flags=ACK)
    offload = struct.pack("=BBHHHH", NEEDS_CSUM, GSO_TCP6, 0, 1000, 54 + 4096, 16)
    balancer = datapath(tunnel("ipip", 6, 4), mtu=9000)
    balancer.process(b"")  # publishes
    assert balancer.pipeline.process([plain], 0, offloads=[offload])[0][1] == "tunnel_offload"


@given(
    size=st.integers(1, 3000), gso=st.integers(32, 1380), mode=st.sampled_from(MODES), pair=st.sampled_from(VERSIONS)
)
def test_any_super_frame(size: int, gso: int, mode: str, pair: tuple[int, int]) -> None:
    plain = frame(CLIENT[pair[0]], 40000, VIP[pair[0]], 80, payload=bytes(size), flags=ACK)
    raw, offload = left_to_device(plain, "tcp", pair[0], gso)
    frames = through(mode, *pair, "tcp", raw, offload)
    assert b"".join(take_apart(unwrap(each).inner).segment[20:] for each in frames) == bytes(size)


# ---- MSS


def mss_of(raw: bytes) -> int | None:
    found = [value for kind, value in dpkt.tcp.parse_opts(take_apart(raw).tcp.opts) if kind == 2]
    return int.from_bytes(found[0], "big") if found else None


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("options", ["mss", "nop mss", "timestamps mss", "none"])
def test_mss_is_lowered_on_both_ways(version: int, options: str) -> None:
    """To what fits the way to the backend, wherever in the options it stands."""
    mss = b"\x02\x04\x05\xb4"
    built = {
        "mss": mss, "nop mss": b"\x01" + mss + b"\x01" * 3, "timestamps mss": b"\x08\x0a" + bytes(8) + mss + b"\0\0",
        "none": b"",
    }[options]  # fmt: skip
    balancer = datapath(service("nat", version, mss_clamp=True), mtu=1400)
    syn = frame(CLIENT[version], 40000, VIP[version], 80, tcp_options=built)
    sent = balancer.process(syn).frames[0]
    seen = take_apart(sent)
    expected = None if options == "none" else 1400 - HEADER[version] - 20
    assert mss_of(sent) == expected
    back = balancer.process(
        frame(seen.dst, seen.dport, seen.src, seen.sport, flags=SYN | ACK, tcp_options=built)
    ).frames[0]  # fmt: skip
    assert mss_of(back) == expected
    later = frame(CLIENT[version], 40000, VIP[version], 80, flags=ACK, tcp_options=built)
    assert mss_of(balancer.process(later).frames[0]) == (None if options == "none" else 1460), "only with SYN"


def test_mss_is_never_raised() -> None:
    balancer = datapath(service("nat", mss_clamp=1400), service("dsr", port=81))
    for announced, expected in ((1460, 1400), (1400, 1400), (1300, 1300)):
        options = b"\x02\x04" + announced.to_bytes(2, "big")
        for port, mss in ((80, expected), (81, announced)):
            syn = frame(CLIENT[4], announced, VIP[4], port, tcp_options=options)
            assert mss_of(balancer.process(syn).frames[0]) == mss


@pytest.mark.parametrize("options", [
    b"\x02\x03\x05\xb4", b"\x02\x00\x05\xb4", b"\x09\xff\x02\x04", b"\x02\x04\x05\xb4\x02\x04\xff\xff",
])  # fmt: skip
def test_broken_options_stay_as_they_are(options: bytes) -> None:
    balancer = datapath(service("nat", mss_clamp=1460))
    raw = frame(CLIENT[4], 40000, VIP[4], 80, tcp_options=options)
    assert take_apart(balancer.process(raw).frames[0]).tcp.opts == options


def test_mss_inside_a_tunnel_leaves_room_for_it() -> None:
    for mode in MODES:
        balancer = datapath(tunnel(mode, mss_clamp=True))
        raw = frame(CLIENT[4], 40000, VIP[4], 80, tcp_options=b"\x02\x04\x05\xb4")
        assert mss_of(unwrap(balancer.process(raw).frames[0]).inner) == 1500 - 20 - EXTRA[mode] - 40


def test_replies_that_do_not_fit_are_answered_to_the_backend() -> None:
    balancer = datapath(service("nat", 4, "udp"), mtu=1400)
    sent = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, "udp")).frames[0]
    seen = take_apart(sent)
    over = frame(seen.dst, seen.dport, seen.src, seen.sport, "udp", payload=bytes(1400), df=True)
    answer = take_apart(balancer.process(over).frames[0])
    assert (answer.dst, answer.segment[:2], answer.segment[6:8]) == (seen.dst, b"\x03\x04", b"\x05\x78")
    assert balancer.process(reply_to(sent)).verdict is Verdict.FORWARD


# ---- configuration


@pytest.mark.parametrize(("changes", "path", "words"), [
    ({"forward": "nat", "tunnel": {"key": 1}}, "tunnel.key", "only for forward: gre"),
    ({"forward": "ipip", "tunnel": {"port": 6080}}, "tunnel.port", "only for forward: gue"),
    ({"forward": "gre", "tunnel": {"udp_checksum": True}}, "tunnel.udp_checksum", "only for forward: gue"),
    ({"forward": "dsr", "tunnel": {"df": "always"}}, "tunnel.df", "only for forward: ipip, gre, gue"),
    ({"forward": "gre", "tunnel": {"source": ["10.0.0.0/8", "10.1.0.0/16"]}}, "tunnel.source", "more than one prefix"),
    ({"forward": "gre", "tunnel": {"source": ["10.0.0.1/8"]}}, "tunnel.source[0]", "the prefix that outer"),
    ({"forward": "gre", "tunnel": {"source": ["224.0.0.0/8"]}}, "tunnel.source[0]", "a multicast address"),
    ({"forward": "gre", "tunnel": {"df": "yes"}}, "tunnel.df", "use one of: inner, always, never"),
    ({"forward": "gre", "tunnel": {"keys": 1}}, "tunnel.keys", 'did you mean "key"'),
    ({"forward": "gue", "backends": [{"address": "10.0.0.1", "port": 81}]}, "backends[0].port", "gue cannot change"),
    ({"forward": "dsr", "backends": [{"address": "fd00::1"}]}, "backends[0].address", "both must be of one family"),
])  # fmt: skip
def test_what_cannot_work_is_refused(changes: dict[str, Any], path: str, words: str) -> None:
    plain = {"name": "a", "vip": VIP[4], "port": 80, "protocol": "tcp", "backends": [{"address": "10.0.0.1"}]}
    with pytest.raises(ConfigError) as caught:
        config(plain | changes)
    assert [problem.path for problem in caught.value.problems] == [f"services[0].{path}"]
    assert words in caught.value.problems[0].message
