"""Fragments: every one of a datagram goes where its first goes, in any order, and nowhere twice."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlb import Datapath, Verdict
from fastlb.plan.tables import services_table
from fastlb.workers.workers import open_pipelines
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, service
from tests.frames import checksum, ethernet, frame, ip4_packet, take_apart
from tests.tunnels import with_ip4_checksum
from tests.unit.dataplane.test_encap import HEADER, MODES, left_to_device, tunnel, unwrap

SNAT = ["10.3.0.5", "fd00:3::5"]
TUNNELS = {f"{mode} over {outer}": (mode, outer) for mode in MODES for outer in (4, 6)}
FORWARDS = ["nat", "fullnat", "dsr", *TUNNELS]
every_mode = pytest.mark.parametrize("forward", FORWARDS)
every_version = pytest.mark.parametrize("version", [4, 6])
PAYLOAD = random.Random(5).randbytes(3000)


def balancer_of(forward: str, version: int, protocol: str = "udp", **changes: Any) -> Datapath:
    if forward in TUNNELS:
        mode, outer = TUNNELS[forward]
        return datapath(tunnel(mode, version, outer, protocol), **changes)
    return datapath(service(forward, version, protocol), snat=SNAT, **changes)


def cut(raw: bytes, sizes: list[int], number: int = 77) -> list[bytes]:
    """A frame's packet in fragments of these many bytes each (the last has the rest), as a sender makes them."""
    packet = raw[14:]
    version = packet[0] >> 4
    header = (packet[0] & 15) * 4 if version == 4 else 40
    body, at, fragments = packet[header:], 0, []
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        if not piece:
            break
        more = at + len(piece) < len(body)
        fragments.append(one_fragment(packet[:header], piece, at, more, number))
        at += len(piece)
    return fragments


def one_fragment(header: bytes, piece: bytes, offset: int, more: bool, number: int) -> bytes:
    new = bytearray(header)
    if header[0] >> 4 == 4:
        new[2:4] = struct.pack("!H", len(header) + len(piece))
        new[4:8] = struct.pack("!HH", number & 0xFFFF, more << 13 | offset // 8)
        new[10:12] = bytes(2)
        new[10:12] = checksum(bytes(new)).to_bytes(2, "big")
        return ethernet(bytes(new) + piece)
    new[4:6] = struct.pack("!H", 8 + len(piece))
    new[6] = 44
    return ethernet(bytes(new) + struct.pack("!BBHI", header[6], 0, offset | more, number) + piece)


def put_together(packets: list[bytes]) -> bytes:
    """The packet that fragments make up, in any order; AssertionError when they do not, or a header is wrong."""
    parts, header, end = {}, b"", 0
    for packet in packets:
        if packet[0] >> 4 == 4:
            assert checksum(packet[:20]) == 0
            length, _, field = struct.unpack("!HHH", packet[2:8])
            assert length == len(packet)
            offset, more, start = (field & 0x1FFF) * 8, field >> 13 & 1, 20
            head = packet[:2] + bytes(2) + packet[4:6] + bytes(2) + packet[8:10] + bytes(2) + packet[12:20]
        else:
            assert struct.unpack("!H", packet[4:6])[0] == len(packet) - 40
            following, _, field, _ = struct.unpack("!BBHI", packet[40:48])
            offset, more, start = field & 0xFFF8, field & 1, 48
            head = packet[:4] + bytes(2) + bytes([following]) + packet[7:40]
        assert header in (b"", head), "all have one header"
        assert offset not in parts
        header, parts[offset] = head, packet[start:]
        end = end if more else offset + len(packet) - start
    body = b"".join(parts[offset] for offset in sorted(parts))
    assert len(body) == end
    whole = bytearray(header + body)
    if whole[0] >> 4 == 4:
        whole[2:4] = struct.pack("!H", len(whole))
        whole[4:6] = b"\0\0"
        whole[10:12] = checksum(bytes(whole[:20])).to_bytes(2, "big")
    else:
        whole[4:6] = struct.pack("!H", len(body))
    return bytes(whole)


def datagram(version: int, payload: bytes = PAYLOAD, sport: int = 40000) -> bytes:
    return frame(CLIENT[version], sport, VIP[version], 80, "udp", payload=payload)


def packets_of(frames: list[bytes], forward: str) -> list[bytes]:
    return [unwrap(each).packet if forward in TUNNELS else each[14:] for each in frames]


def unfragmented(forward: str, version: int, raw: bytes) -> bytes:
    """What a balancer with room enough makes of the whole."""
    whole = balancer_of(forward, version, mtu=9000).process(raw)
    return packets_of(whole.frames, forward)[0]


@every_version
@every_mode
def test_every_order(forward: str, version: int) -> None:
    """First, middle, last; and each other way round."""
    raw = datagram(version)
    fragments = cut(raw, [1208, 1200])
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        balancer = balancer_of(forward, version)
        outs = [balancer.process(fragments[at]) for at in order]
        first = order.index(0)
        assert [out.reason for out in outs] == [
            "scheduled" if at == 0 else "held" if when < first else "fragment" for when, at in enumerate(order)
        ]
        assert all(out.verdict is Verdict.FORWARD for out in outs)
        sent = [each for out in outs for each in out.frames]
        assert {each[:6] for each in sent} == {sent[0][:6]}, "to one backend"
        whole = put_together(packets_of(sent, forward))
        seen = take_apart(ethernet(whole))  # with its UDP checksum
        if forward != "fullnat":
            expected = bytearray(unfragmented(forward, version, raw))
            if version == 4:  # the datagram's number
                expected[4:6] = b"\0\0"
                expected[10:12] = bytes(2)
                expected[10:12] = checksum(bytes(expected[:20])).to_bytes(2, "big")
            assert whole == bytes(expected)
        assert seen.segment[8:] == PAYLOAD
        counters = balancer.stats()["counters"]
        assert (counters["paths"]["held"], counters["paths"]["fragment"], counters["packets"]) == (0, 2, 3)


@every_version
@every_mode
@pytest.mark.parametrize("size", [1912, 8952, 32_000, 65_408])
def test_long_ones_wait_too(forward: str, version: int, size: int) -> None:
    """Whatever links carry: jumbo frames, and the longest packet that there can be."""
    payload = random.Random(size).randbytes(size + 99)
    for at in (96, size):
        first, last = cut(datagram(version, payload), [at])
        balancer = balancer_of(forward, version, mtu=65535)
        outs = [balancer.process(each) for each in (last, first)]
        assert [out.reason for out in outs] == ["held", "scheduled"]
        whole = put_together(packets_of([each for out in outs for each in out.frames], forward))
        assert take_apart(ethernet(whole)).segment[8:] == payload


@settings(max_examples=60, deadline=None)
@given(st.data())
@every_mode
@every_version
def test_any_cut_in_any_order(forward: str, version: int, data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=1, max_size=4000))
    sizes = data.draw(st.lists(st.integers(1, 100).map(lambda units: units * 8), max_size=12))
    fragments = cut(datagram(version, payload), sizes)
    order = data.draw(st.permutations(fragments))
    balancer = balancer_of(forward, version)
    sent = [each for out in balancer.process_batch(order, 0.0) for each in out.frames]
    if len(fragments) > 1:
        whole = put_together(packets_of(sent, forward))
        assert take_apart(ethernet(whole)).segment[8:] == payload
    else:
        assert len(sent) == 1


@every_version
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_replies(forward: str, version: int) -> None:
    """A backend's big answer comes in fragments too."""
    for order in ((0, 1, 2), (2, 1, 0)):
        balancer = balancer_of(forward, version)
        asked = take_apart(balancer.process(datagram(version, b"?")).frames[0])
        answer = frame(asked.dst, asked.dport, asked.src, asked.sport, "udp", payload=PAYLOAD)
        fragments = cut(answer, [1400, 1400])
        outs = [balancer.process(fragments[at]) for at in order]
        seen = take_apart(ethernet(put_together([each[14:] for out in outs for each in out.frames])))
        assert (seen.src, seen.sport, seen.dst, seen.dport) == (VIP[version], 80, CLIENT[version], 40000)
        assert seen.segment[8:] == PAYLOAD


@every_version
def test_another_worker_s_hash(version: int) -> None:
    """The first is with the worker of its ports, the later ones with that of their address; either may be earlier."""
    settings = config(service("nat", version, "udp"))
    known = Balancer(settings)
    for first_goes_first in (True, False):
        workers = open_pipelines(settings, 2)
        for pipeline in workers:
            pipeline.publish(services_table(settings, known.plans), known.routes())
        for sport in range(40000, 40020):
            first, *later = cut(datagram(version, sport=sport), [1400, 1400], number=sport)
            reason = "wrong_worker"
            if first_goes_first:
                reason, sent = next(
                    (each[1], each[2]) for worker in workers
                    if (each := worker.process([first], 0)[0])[1] != "wrong_worker"
                )  # fmt: skip
                assert reason == "scheduled"
            else:
                sent = []
            other = workers[sport % 2]
            outs = [other.process([each], 0)[0] for each in later]
            assert {out[1] for out in outs} == {"fragment" if first_goes_first else "held"}
            if not first_goes_first:
                sent = next(
                    each[2] for worker in workers if (each := worker.process([first], 0)[0])[1] == "scheduled"
                )
                if len(sent) == 1:  # held by the other, which looks again when a millisecond has passed
                    stray = frame(CLIENT[version], 9, VIP[version], 81)
                    outs = [other.process([stray], 1)[0]]
            sent = [*sent, *(each for out in outs for each in out[2])]
            assert take_apart(ethernet(put_together([each[14:] for each in sent]))).segment[8:] == PAYLOAD


# --- tunnels that are narrower than what IPv6 promises --------------------------


def through_narrow(mode: str, outer: int, mtu: int, raw: bytes, offload: bytes = bytes(10)) -> tuple[str, list[bytes]]:
    """The reason, and the packets of the tunnel."""
    balancer = datapath(tunnel(mode, 6, outer, "udp", tunnel={"udp_checksum": True} if mode == "gue" else {}), mtu=mtu)
    balancer.process(b"")  # publishes
    _, reason, sent, *_ = balancer.pipeline.process([raw], 0, offloads=[offload])[0]
    assert all(len(each) - 14 <= mtu for each in sent) or reason == "too_big"
    return reason, [each[14:] for each in sent]


@pytest.mark.parametrize(("outer", "mtu"), [(4, 1299), (4, 700), (4, 576), (4, 84), (6, 1280), (6, 1319), (6, 112)])
@pytest.mark.parametrize("mode", MODES)
def test_a_tunnel_passes_what_ipv6_promises(mode: str, outer: int, mtu: int) -> None:
    """1,280 bytes, in fragments of the tunnel's own packet; no sender goes below (RFC 2473 7.1, RFC 4213 3.2.2)."""
    raw = datagram(6, bytes(range(256)) * 4 + bytes(208))
    opened, offload = left_to_device(raw, "udp", 6, 0)
    assert len(raw) == 14 + 1280
    for each, left in ((raw, bytes(10)), (opened, offload)):
        reason, sent = through_narrow(mode, outer, mtu, each, left)
        assert (reason, len(sent) > 1) == ("scheduled", True)
        whole = unwrap(ethernet(put_together(sent)))
        assert (whole.packet, whole.df) == (raw[14:], False)
    assert through_narrow(mode, outer, mtu, datagram(6, bytes(1233)))[0] == "too_big"


@pytest.mark.parametrize(("outer", "mtu"), [(4, 83), (6, 111)])
@pytest.mark.parametrize("mode", MODES)
def test_a_tunnel_that_is_too_narrow_for_anything(mode: str, outer: int, mtu: int) -> None:
    assert through_narrow(mode, outer, mtu, datagram(6, bytes(1000)))[0] == "over_mtu"


@settings(deadline=None)
@given(st.integers(0, 1232), st.integers(500, 1400), st.sampled_from(MODES), st.sampled_from([4, 6]))
def test_any_size_through_a_narrow_tunnel(size: int, mtu: int, mode: str, outer: int) -> None:
    raw = datagram(6, random.Random(size).randbytes(size))
    reason, sent = through_narrow(mode, outer, mtu, raw)
    assert reason == "scheduled"
    assert unwrap(ethernet(put_together(sent) if len(sent) > 1 else sent[0])).packet == raw[14:]


def test_a_super_frame_whose_segments_are_promised_is_cut_shorter() -> None:
    """No answer could make a client of IPv6 send less than 1,280 bytes."""
    raw = frame(CLIENT[6], 40000, VIP[6], 80, payload=bytes(range(250)) * 40)
    opened, offload = left_to_device(raw, "tcp", 6, 1220)
    balancer = datapath(tunnel("ipip", 6, 6), mtu=1280)
    balancer.process(b"")
    _, reason, sent, *_ = balancer.pipeline.process([opened], 0, offloads=[offload])[0]
    assert reason == "scheduled"
    segments = [take_apart(unwrap(each).inner) for each in sent]
    assert {len(each) - 14 for each in sent[:-1]} == {1280}
    assert b"".join(segment.segment[20:] for segment in segments) == raw[14 + HEADER[6] + 20 :]


# --- what is the host's ---------------------------------------------------------


def own_traffic(forward: str, version: int) -> list[bytes]:
    """Datagrams that are none of the service's, though their addresses are: to another port of the VIP, a backend's."""
    backend, client = BACKENDS[version][0], CLIENT[version]
    ways = [(client, 40000, VIP[version], 81)]
    if forward == "nat":
        ways += [(backend, 514, client, 40000)]
    if forward == "fullnat":
        own = SNAT[0 if version == 4 else 1]
        ways += [(backend, 514, own, 5000), (backend, 80, own, 50_000)]
    return [frame(src, sport, dst, dport, "udp", payload=PAYLOAD) for src, sport, dst, dport in ways]


@every_version
@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr"])
def test_later_fragments_follow_a_first_to_the_host(forward: str, version: int) -> None:
    for raw in own_traffic(forward, version):
        balancer = balancer_of(forward, version)
        fragments = cut(raw, [1400, 1400])
        for _ in range(2):  # and again with the same number
            outs = [balancer.process(each) for each in fragments]
            assert [(out.verdict, out.reason, out.frames) for out in outs] == [(Verdict.PASS, "no_service", [])] * 3
        outs = [balancer.process(each) for each in (*fragments[:2], fragments[1], fragments[0], fragments[2])]
        assert {out.reason for out in outs} == {"no_service"}
        outs = balancer.process_batch(fragments, now=3.0)
        assert [out.reason for out in outs] == ["no_service"] * 3
        assert balancer.stats()["counters"]["passed"]["no_service"] == 14


@every_version
def test_a_later_fragment_that_overtook_its_first_cannot_go_back(version: int) -> None:
    balancer = balancer_of("nat", version)
    for raw in own_traffic("nat", version):
        first, second, third = cut(raw, [1400, 1400])
        reasons = [balancer.process(each, now=now).reason for each, now in ((second, 0.0), (first, 0.1), (third, 0.2))]
        assert reasons == ["held", "no_service", "no_service"]
    counters = balancer.stats()["counters"]
    assert (counters["paths"]["held"], counters["drops"]["fragment_unknown"]) == (0, 2)


@every_version
@pytest.mark.parametrize("incomplete", [False, True])
def test_a_number_goes_from_the_host_to_a_service_and_back(version: int, incomplete: bool) -> None:
    """All of the datagrams have the same; where the last fragment is lost, what follows is no part of it."""
    balancer = balancer_of("nat", version)
    ours, others = (
        cut(frame(CLIENT[version], 40000, VIP[version], port, "udp", payload=PAYLOAD), [1400, 1400])
        for port in (80, 81)
    )
    end = 2 if incomplete else 3
    for known in (False, True, True):
        assert [balancer.process(each).reason for each in others[:end]] == ["no_service"] * end
        outs = [balancer.process(each) for each in ours[:end]]
        assert [out.reason for out in outs] == ["conntrack" if known else "scheduled", *["fragment"] * (end - 1)]
        assert all(out.verdict is Verdict.FORWARD for out in outs)


def test_fragments_of_strangers_leave_no_note() -> None:
    """What no later fragment would be taken of is not remembered, and takes no place from what is."""
    balancer = balancer_of("nat", 4)
    first, *later = cut(datagram(4), [1400, 1400])
    assert balancer.process(first).reason == "scheduled"
    stranger = frame("192.0.2.1", 40000, "192.0.2.2", 80, "udp", payload=PAYLOAD)
    for number in range(20_000):
        assert balancer.process(cut(stranger, [1400], number)[0]).reason == "no_service"
    assert {balancer.process(each).reason for each in later} == {"fragment"}


def test_headers_behind_the_fragment_header_are_the_host_s() -> None:
    """A later fragment would show the next of them instead of UDP: none of the datagram is ours. Whole ones are."""
    balancer = balancer_of("nat", 6)
    raw = datagram(6)
    options = bytes([17, 0, 1, 4, 0, 0, 0, 0])  # UDP follows; padding
    header = raw[14:20] + bytes([60]) + raw[21:54]
    for offset, more in ((0, True), (8, True), (1400, False)):
        piece = one_fragment(header, options + raw[54 : 54 + 1392], offset, more, 77)
        assert balancer.process(piece).reason == "extension_headers"
    whole = one_fragment(header, options + datagram(6, b"?")[54:], 0, False, 77)
    assert balancer.process(whole).reason == "scheduled"


# --- what does not pass -------------------------------------------------------


@every_version
def test_a_first_that_never_comes(version: int) -> None:
    balancer = balancer_of("nat", version)
    _, *later = cut(datagram(version), [1400, 1400])
    assert {balancer.process(each, now=1.0).reason for each in later} == {"held"}
    stray = frame(CLIENT[version], 9, VIP[version], 81)
    assert balancer.process(stray, now=1.4).frames == []
    assert balancer.stats()["counters"]["paths"]["held"] == 2
    assert balancer.process(stray, now=1.6).frames == []
    counters = balancer.stats()["counters"]
    assert (counters["paths"]["held"], counters["drops"]["fragment_unknown"]) == (0, 2)
    assert balancer.process(cut(datagram(version), [1400, 1400])[0], now=1.7).frames != []


@every_version
def test_of_a_first_that_was_dropped(version: int) -> None:
    balancer = datapath(service("nat", version, "udp", backends=[]))
    fragments = cut(datagram(version), [1400, 1400])
    assert [balancer.process(each).reason for each in fragments] == [
        "no_backend", "fragment_unknown", "fragment_unknown",
    ]  # fmt: skip


@every_version
def test_overlaps(version: int) -> None:
    """Each byte passes once: duplicates, other lengths, beyond the end, a second first."""
    raw = datagram(version)
    header = raw[14:34] if version == 4 else raw[14:54]
    body = raw[14 + len(header) :]

    def part(start: int, end: int) -> bytes:
        return one_fragment(header, body[start:end], start, end < len(body), 77)

    for wrong in ((8, 16), (0, 1400), (1392, 1408), (1400, 2800), (1600, 2000), (2792, len(body))):
        balancer = balancer_of("nat", version)
        assert balancer.process(part(0, 1400)).reason == "scheduled"
        assert balancer.process(part(1400, 2800)).reason == "fragment"
        assert balancer.process(part(*wrong)).reason == "fragment_overlap"
        assert balancer.process(part(2800, len(body))).reason == "fragment"
    balancer = balancer_of("nat", version)
    assert balancer.process(part(0, 1400)).reason == "scheduled"
    assert balancer.process(part(2800, len(body))).reason == "fragment"
    for start, end in ((2800, len(body)), (len(body) // 8 * 8 + 8, len(body) + 16)):
        beyond = one_fragment(header, bytes(end - start), start, False, 77)
        assert balancer.process(beyond).reason == "fragment_overlap"
    assert balancer.process(part(1400, 2800)).reason == "fragment"


CONTRADICTIONS = [  # (start, end, more) in the order in which they come, after bytes 0 to 800; the last is one too much
    [(1600, 2400, True), (800, 1000, False)],
    [(1600, 2400, True), (800, 1003, False)],
    [(1600, 2400, True), (1000, 1600, False)],
    [(896, 1000, False), (1600, 2400, True)],
    [(896, 1000, False), (1600, 2400, False)],
    [(1600, 2400, False), (800, 1000, False)],
    [(1600, 2400, False), (2400, 2408, True)],
    [(1600, 2400, False), (3000, 3001, False)],
    [(1600, 2397, False), (2400, 2401, False)],
]


@pytest.mark.parametrize("parts", CONTRADICTIONS, ids=str)
@every_version
def test_there_is_one_end(version: int, parts: list[tuple[int, int, bool]]) -> None:
    """A last fragment before what has passed, others beyond it, a second one; also when they had to wait."""
    raw = datagram(version)
    header, body = (raw[14:34], raw[34:]) if version == 4 else (raw[14:54], raw[54:])
    whole = [one_fragment(header, body[start:end], start, more, 77) for start, end, more in [(0, 800, True), *parts]]
    balancer = balancer_of("nat", version)
    assert [balancer.process(each).reason for each in whole] == ["scheduled", "fragment", "fragment_overlap"]
    balancer = balancer_of("nat", version)
    waited = balancer.process_batch([*whole[1:], whole[0]])
    assert [out.reason for out in waited] == ["held", "held", "scheduled"]
    assert sum(len(out.frames) for out in waited) == 2
    assert balancer.stats()["counters"]["drops"]["fragment_overlap"] == 1


@pytest.mark.parametrize("end", [1000, 1600])
@every_version
def test_an_end_that_all_agree_about(version: int, end: int) -> None:
    raw = datagram(version)
    header, body = (raw[14:34], raw[34:]) if version == 4 else (raw[14:54], raw[54:])
    parts = [(800, 992, True), (992, end - 3, False)]
    for order in (parts, parts[::-1]):
        balancer = balancer_of("nat", version)
        assert balancer.process(one_fragment(header, body[:800], 0, True, 77)).reason == "scheduled"
        for start, stop, more in order:
            assert balancer.process(one_fragment(header, body[start:stop], start, more, 77)).reason == "fragment"


@pytest.mark.parametrize(("protocol", "offset", "length", "more"), [
    ("udp", 8, 0, False), ("udp", 8, 12, True), ("udp", 65528, 16, False), ("tcp", 8, 100, False),
    ("tcp", 16, 8, True), ("udp", 0, 12, True),
])  # fmt: skip
@every_version
def test_absurd_ones(version: int, protocol: str, offset: int, length: int, more: bool) -> None:
    balancer = datapath(service("nat", version, protocol))
    raw = frame(CLIENT[version], 40000, VIP[version], 80, protocol, payload=bytes(100))
    header, body = (raw[14:34], raw[34:]) if version == 4 else (raw[14:54], raw[54:])
    assert balancer.process(one_fragment(header, body[:length], offset, more, 77)).reason == "fragment_shape"


def test_tiny_first_fragments() -> None:
    """RFC 1858: the TCP header must be in the first."""
    balancer = datapath(service("nat"))
    fragments = cut(frame(CLIENT[4], 40000, VIP[4], 80), [16])
    assert [balancer.process(each).reason for each in fragments] == ["tcp_header", "fragment_shape"]


def test_numbers_are_used_again() -> None:
    """A complete datagram is forgotten at once, an incomplete one after two seconds."""
    balancer = balancer_of("nat", 4)
    for _ in range(3):
        outs = [balancer.process(each) for each in cut(datagram(4), [1400, 1400])]
        assert [out.reason for out in outs][1:] == ["fragment", "fragment"]
    first, second, _ = cut(datagram(4), [1400, 1400])
    assert balancer.process(first).reason == "conntrack"
    assert balancer.process(first).reason == "fragment_overlap"
    assert balancer.process(second).reason == "fragment"
    assert balancer.process(first, now=2.1).reason == "conntrack"


@every_version
def test_storms_leave_memory_and_flows_as_they_are(version: int) -> None:
    """Later fragments without firsts, and firsts without later ones, ten thousand each."""
    balancer = balancer_of("nat", version, flows=30_000)
    first, *later = cut(datagram(version), [1400, 1400])
    assert balancer.process(first).reason == "scheduled"
    rng = random.Random(6)
    alone = datagram(version, bytes(64))
    for number in range(10_000):
        header, body = (alone[14:34], alone[34:]) if version == 4 else (alone[14:54], alone[54:])
        storm = one_fragment(header, body[:24], 8 * rng.randint(1, 500), True, 100 + number)
        assert balancer.process(storm).reason in ("held", "fragment_limit")
    counters = balancer.stats()["counters"]
    assert (counters["paths"]["held"], counters["drops"]["fragment_limit"]) == (256, 10_000 - 256)
    assert {balancer.process(each).reason for each in later} == {"fragment"}, "whose first is known"
    for number in range(10_000):
        header, body = (alone[14:34], alone[34:]) if version == 4 else (alone[14:54], alone[54:])
        balancer.process(one_fragment(header, body[:24], 0, True, 100 + number), now=1.0)
    assert balancer.stats()["flows"]["active"] == 1
    assert balancer.process(datagram(version), now=1.0).reason in ("conntrack", "too_big")


@pytest.mark.parametrize(("mtu", "most"), [(1500, 1024), (9000, 3072), (65535, 17 * 1024)])
def test_what_waits_takes_memory_by_its_length(mtu: int, most: int) -> None:
    """256 places, whatever fills them. `most`: KiB; results take some, too."""
    balancer = balancer_of("nat", 4, mtu=65535)
    header, body = datagram(4)[14:34], bytes((mtu - 20) // 8 * 8)
    waiting = [one_fragment(header, body, 8, True, number) for number in range(256)]
    balancer.process_batch([one_fragment(header, body, 0, True, 1000)] * 32)
    before = resident()
    assert {out.reason for out in balancer.process_batch(waiting)} == {"held"}
    assert resident() - before <= most + 256
    assert balancer.process(one_fragment(header, body, 8, True, 256)).reason == "fragment_limit"


def resident() -> int:
    """KiB of this process, exactly."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_narrow_ways_cut_fragments_again() -> None:
    balancer = balancer_of("dsr", 4, mtu=700)
    sent = [each for part in cut(datagram(4), [1400, 1400]) for each in balancer.process(part).frames]
    assert all(len(each) <= 714 for each in sent)
    assert take_apart(ethernet(put_together([each[14:] for each in sent]))).segment[8:] == PAYLOAD


@pytest.mark.parametrize(("mtu", "reason"), [(68, "scheduled"), (52, "scheduled"), (51, "over_mtu")])
def test_the_narrowest_way(mtu: int, reason: str) -> None:
    """RFC 791 promises 68 bytes; fragments of less than 32 are not made."""
    out = balancer_of("dsr", 4, mtu=mtu).process(datagram(4, PAYLOAD[:400]))
    assert out.reason == reason
    if out.frames:
        assert take_apart(ethernet(put_together([each[14:] for each in out.frames]))).segment[8:] == PAYLOAD[:400]


@pytest.mark.parametrize(("version", "reason"), [(4, "over_mtu"), (6, "too_big")])
def test_a_fragment_that_is_too_long(version: int, reason: str) -> None:
    """With the ports it is answered; without them only in IPv6 (RFC 1812 section 4.3.2.7, RFC 4443 section 2.4)."""
    balancer = balancer_of("dsr", version, mtu=1300)
    first, second, last = map(unbreakable, cut(datagram(version), [1208, 1400]))
    assert balancer.process(first).reason == "scheduled"
    assert balancer.process(second).reason == reason
    assert balancer.process(last).reason == "fragment"
    longer, _ = map(unbreakable, cut(datagram(version), [1400], number=78))
    assert balancer.process(longer).reason == "too_big"


def unbreakable(raw: bytes) -> bytes:
    """The frame of a fragment with IPv4's "don't fragment" set."""
    if raw[14] >> 4 == 6:
        return raw
    return ethernet(with_ip4_checksum(raw[14:20] + bytes([raw[20] | 0x40]) + raw[21:]))


@pytest.mark.parametrize(("version", "reason"), [(4, "ttl_expired"), (6, "time_exceeded")])
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_each_fragment_spends_a_hop(forward: str, version: int, reason: str) -> None:
    balancer = balancer_of(forward, version)
    first, *later = cut(datagram(version), [1400, 1400])
    assert balancer.process(first).reason == "scheduled"
    fresh = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=PAYLOAD, ttl=1)
    dying = cut(fresh, [1400, 1400])
    assert balancer.process(dying[1]).reason == reason, "to one without ports only IPv6 allows an answer"
    [sent] = balancer.process(later[1]).frames
    assert hops_of(sent) == 63
    assert balancer.process(cut(fresh, [1400, 1400], number=78)[0]).reason == "time_exceeded"


def hops_of(raw: bytes) -> int:
    return raw[22] if raw[14] >> 4 == 4 else raw[21]


def test_other_protocols_stay_with_the_host() -> None:
    balancer = balancer_of("nat", 4)
    packet = bytearray(ip4_packet(CLIENT[4], VIP[4], 132, bytes(64)))
    packet[6:8] = b"\0\1"
    assert balancer.process(ethernet(bytes(packet))).reason == "not_tcp_udp"
    assert balancer.process(cut(frame(CLIENT[4], 1, BACKENDS[4][0], 80, "udp"), [8])[-1]).reason == "no_service"
