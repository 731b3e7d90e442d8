"""segments.pxd: TCP segments that are too long for the way on, where ICMP is known to get lost (mss_clamp); and
datagrams of UDP GSO packets that are.

GSO packets that are only cut, and fragments, are in test_encap.py and test_fragments.py.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastlb import Datapath
from tests.balancers import CLIENT, VIP, datapath, reply_to, service
from tests.frames import ACK, FIN, PSH, RST, SYN, Seen, ethernet, frame, take_apart
from tests.unit.dataplane.test_encap import HEADER, MODES, left_to_device, tunnel, unwrap
from tests.unit.dataplane.test_fragments import put_together
from tests.unit.dataplane.test_icmperror import ROUTER, error

NARROW = 1400
URG = 32
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))
PAYLOAD = random.Random(3).randbytes(1448)
FORWARDS = ["nat", "fullnat", "dsr", *MODES]
every_mode = pytest.mark.parametrize("forward", FORWARDS)
every_version = pytest.mark.parametrize("version", [4, 6])


def clamping(forward: str, version: int, mtu: int = NARROW) -> Datapath:
    """With a connection from port 40000, where that is needed for further packets."""
    plain = tunnel(forward, version, 4) if forward in MODES else service(forward, version)
    balancer = datapath(plain | {"mss_clamp": True}, mtu=mtu, snat=["10.3.0.5", "fd00:3::5"])
    assert balancer.process(frame(CLIENT[version], 40000, VIP[version], 80)).reason == "scheduled"
    return balancer


def segment(version: int, **how: object) -> bytes:
    plain: dict[str, object] = {"flags": ACK | PSH, "payload": PAYLOAD, "seq": 77_000, "ack": 5, "df": True}
    return frame(CLIENT[version], 40000, VIP[version], 80, tcp_options=TIMESTAMPS, **plain | how)  # type: ignore[arg-type]


def stream(frames: list[bytes], forward: str, mtu: int) -> list[Seen]:
    """The segments, each with its checksums verified and short enough; in order, and nothing missing between."""
    assert all(len(each) - 14 <= mtu for each in frames)
    seen = [take_apart(unwrap(each).inner if forward in MODES else each) for each in frames]
    at = seen[0].tcp.seq
    for each in seen:
        assert (each.tcp.seq, each.tcp.ack, each.tcp.opts) == (at, 5, TIMESTAMPS)
        at += len(each.tcp.data)
    return seen


@every_version
@every_mode
def test_long_segments_become_shorter_ones(forward: str, version: int) -> None:
    """FIN and PSH belong to the last byte."""
    balancer = clamping(forward, version)
    for flags in (ACK, ACK | PSH, ACK | PSH | FIN):
        out = balancer.process(segment(version, flags=flags))
        assert (out.reason, len(out.frames)) == ("conntrack", 2)
        first, last = stream(out.frames, forward, NARROW)
        assert bytes(first.tcp.data + last.tcp.data) == PAYLOAD
        assert (first.tcp.flags, last.tcp.flags) == (ACK, flags)
    short = segment(version, payload=PAYLOAD[:1000])
    assert len(balancer.process(short).frames) == 1


@every_version
@every_mode
def test_super_frames_become_shorter_ones(forward: str, version: int) -> None:
    """Their checksum is only begun."""
    payload = random.Random(4).randbytes(10_000)
    opened, offload = left_to_device(segment(version, payload=payload), "tcp", version, 1448)
    balancer = clamping(forward, version)
    _, reason, sent, *_ = balancer.pipeline.process([opened], 0, offloads=[offload])[0]
    assert reason == "conntrack"
    assert b"".join(bytes(each.tcp.data) for each in stream(sent, forward, NARROW)) == payload


@every_version
def test_replies_too(version: int) -> None:
    for forward in ("nat", "fullnat"):
        balancer = clamping(forward, version)
        sent = balancer.process(segment(version, payload=b"x")).frames[0]
        seen = take_apart(sent)
        long = frame(
            seen.dst, seen.dport, seen.src, seen.sport, flags=ACK, payload=PAYLOAD, tcp_options=TIMESTAMPS, ack=5,
            df=True,
        )  # fmt: skip
        out = balancer.process(long)
        assert out.reason == "conntrack"
        parts = stream(out.frames, forward, NARROW)
        assert b"".join(bytes(each.tcp.data) for each in parts) == PAYLOAD
        assert {(each.src, each.dst, each.dport) for each in parts} == {(VIP[version], CLIENT[version], 40000)}


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(200, 1500), st.sampled_from(FORWARDS), st.sampled_from([4, 6]))
def test_any_segment(size: int, mtu: int, forward: str, version: int) -> None:
    """IPv6 packets of up to 1,280 bytes have another way through a tunnel; all others come out as one stream."""
    payload = random.Random(size).randbytes(size)
    raw = segment(version, payload=payload)
    out = clamping(forward, version, mtu).process(raw)
    assert out.reason == "conntrack"
    if not (version == 6 and len(raw) - 14 <= 1280):
        assert b"".join(bytes(each.tcp.data) for each in stream(out.frames, forward, mtu)) == payload


def damaged(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@every_version
@every_mode
def test_what_is_not_cut_is_answered(forward: str, version: int) -> None:
    """What is damaged must not get a sound checksum; an urgent pointer counts from its segment's beginning."""
    balancer = clamping(forward, version)
    payload_at = 14 + HEADER[version] + 32
    for raw in (
        damaged(segment(version), payload_at + 700),
        damaged(segment(version), payload_at - 9),
        segment(version, flags=ACK | URG),
        segment(version, flags=SYN),
        segment(version, flags=RST | ACK),
    ):
        assert balancer.process(raw).reason == "too_big"


@every_version
def test_only_where_the_mss_is_clamped(version: int) -> None:
    balancer = datapath(service("dsr", version), mtu=NARROW)
    assert balancer.process(segment(version)).reason == "too_big"


def test_other_packets_are_as_without() -> None:
    """Fragments, and ICMP errors about TCP."""
    balancer = clamping("dsr", 6)
    reply = frame(VIP[6], 80, CLIENT[6], 40000, flags=ACK, payload=bytes(1400))
    assert balancer.process(error(reply[14:], "too big", ROUTER[6])).reason == "over_mtu"
    may_be_fragmented = clamping("dsr", 4).process(segment(4, df=False)).frames
    assert may_be_fragmented[0][20] & 0x20, "more fragments"


def test_headers_that_are_too_long_to_copy() -> None:
    """A chain of extension headers: such a packet is answered instead."""
    balancer = clamping("dsr", 6)
    assert balancer.process(segment(6, extensions=((60, bytes(200)),))).reason == "too_big"


def test_a_reply_to_a_clamped_syn_is_whole() -> None:
    """The connection itself is as ever."""
    balancer = clamping("nat", 4)
    sent = balancer.process(frame(CLIENT[4], 40001, VIP[4], 80)).frames[0]
    assert take_apart(ethernet(balancer.process(reply_to(sent)).frames[0][14:])).dport == 40001


# ---- datagrams


def whole_packets(packets: list[bytes]) -> list[bytes]:
    """Those of one number put together, in the order of their first fragments; the others as they are."""
    of_number: dict[object, list[bytes]] = {}
    for packet in packets:
        if packet[0] >> 4 == 4:
            number: object = packet[4:6]
        else:
            number = packet[44:48] if packet[6] == 44 else len(of_number)
        of_number.setdefault(number, []).append(packet)
    return [put_together(parts) if len(parts) > 1 else parts[0] for parts in of_number.values()]


def sent_datagrams(
    forward: str, version: int, gso: int, data: bytes, mtu: int, outer: int = 4, **how: bool
) -> tuple[str, list[bytes], list[Seen]]:
    """The reason, the frames, and the datagrams in them, with their checksums verified, of a GSO packet of UDP."""
    summed = {"tunnel": {"udp_checksum": True}} if forward == "gue" else {}
    plain = (
        tunnel(forward, version, outer, "udp", **summed) if forward in MODES else service(forward, version, "udp")
    )
    balancer = datapath(plain, mtu=mtu, snat=["10.3.0.5", "fd00:3::5"])
    balancer.process(b"")  # publishes
    raw = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=data, **how)  # type: ignore[arg-type]
    opened, offload = left_to_device(raw, "udp", version, gso)
    _, reason, sent, *_ = balancer.pipeline.process([opened], 0, offloads=[offload])[0]
    if reason != "scheduled":
        return reason, sent, []
    packets = [each[14:] for each in sent]
    if forward in MODES and version == 4:  # IPv4 is fragmented inside of the tunnel
        packets = [unwrap(each).packet for each in sent]
    packets = whole_packets(packets)
    if forward in MODES and version == 6:
        packets = [unwrap(ethernet(each)).packet for each in packets]
    return reason, sent, [take_apart(ethernet(each)) for each in packets]


DATA = random.Random(5).randbytes(10_000)


@every_mode
@pytest.mark.parametrize("mtu", [1399, NARROW, 576])
def test_each_datagram_of_a_super_frame_is_fragmented(forward: str, mtu: int) -> None:
    """As the one datagram is that comes by itself: what arrives is what was sent."""
    reason, sent, seen = sent_datagrams(forward, 4, 1472, DATA, mtu)
    assert (reason, max(len(each) for each in sent) - 14 <= mtu) == ("scheduled", True)
    assert [each.segment[8:] for each in seen] == [DATA[at : at + 1472] for at in range(0, 10_000, 1472)]
    assert len(sent) == {1399: 13, NARROW: 13, 576: 6 * 3 + 3}[mtu]
    assert {each.sport for each in seen if forward != "fullnat"} <= {40000}


@pytest.mark.parametrize("forward", MODES)
@pytest.mark.parametrize(("outer", "mtu"), [(4, 1299), (4, 576), (6, 1319), (6, 1280)])
def test_datagrams_of_a_promised_size_go_in_fragments_of_the_tunnel(forward: str, outer: int, mtu: int) -> None:
    """A packet of 1,280 bytes is the least that IPv6 asks of a sender to do without."""
    reason, sent, seen = sent_datagrams(forward, 6, 1232, DATA, mtu, outer)
    assert (reason, max(len(each) for each in sent) - 14 <= mtu) == ("scheduled", True)
    assert [each.segment[8:] for each in seen] == [DATA[at : at + 1232] for at in range(0, 10_000, 1232)]
    assert len(sent) > len(seen) == 9
    assert sent_datagrams(forward, 6, 1233, DATA, mtu, outer)[0] == "too_big"


@every_mode
@every_version
def test_datagrams_that_may_not_be_fragmented_are_answered(forward: str, version: int) -> None:
    reason, (answer,), _ = sent_datagrams(forward, version, 1472 - 20 * (version == 6), DATA, NARROW, df=True)
    seen = take_apart(answer)
    assert (reason, seen.dst) == ("too_big", CLIENT[version])
    assert seen.segment[:2] == (b"\x03\x04" if version == 4 else b"\x02\0")


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(200, 1472), st.integers(200, 1500), st.sampled_from(FORWARDS))
def test_any_datagrams(size: int, gso: int, mtu: int, forward: str) -> None:
    assume(forward in MODES or 28 + gso > mtu)  # else it leaves whole, for a device to cut
    data = random.Random(size).randbytes(size)
    reason, sent, seen = sent_datagrams(forward, 4, gso, data, mtu)
    assert (reason, all(len(each) - 14 <= mtu for each in sent)) == ("scheduled", True)
    assert [each.segment[8:] for each in seen] == [data[at : at + gso] for at in range(0, size, gso)]


@settings(deadline=None)
@given(
    st.integers(1, 20_000), st.integers(100, 1232), st.integers(300, 1400), st.sampled_from(MODES),
    st.sampled_from([4, 6]),
)  # fmt: skip
def test_any_datagrams_of_a_promised_size(size: int, gso: int, mtu: int, forward: str, outer: int) -> None:
    data = random.Random(size).randbytes(size)
    reason, sent, seen = sent_datagrams(forward, 6, gso, data, mtu, outer)
    assert (reason, all(len(each) - 14 <= mtu for each in sent)) == ("scheduled", True)
    assert [each.segment[8:] for each in seen] == [data[at : at + gso] for at in range(0, size, gso)]


def test_what_is_no_super_frame_is_not_cut_as_one() -> None:
    """A fragment, and an ICMP error: nobody makes such frames, and they lack the headers that would be mended."""
    balancer = datapath(tunnel("ipip", 4, 4, "udp"))
    opened, offload = left_to_device(frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=DATA[:4000]), "udp", 4, 1400)
    balancer.process(opened)
    fragment = opened[:20] + b"\x20\0" + opened[22:]
    about = error(frame(VIP[4], 80, CLIENT[4], 40000, "udp")[14:], "unreachable", ROUTER[4])
    results = balancer.pipeline.process([fragment, about], 0, offloads=[offload, offload])
    assert [each[1] for each in results] == ["tunnel_offload", "tunnel_offload"]
