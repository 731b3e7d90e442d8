"""icmp.pxd: the answer to a packet that no backend can take."""

from __future__ import annotations

import pytest

from fastlb import Verdict
from tests.balancers import CLIENT, VIP, datapath, flags, service
from tests.frames import (
    ACK,
    BALANCER_MAC,
    HOP_BY_HOP,
    PADDING4,
    ROUTER_MAC,
    RST,
    SYN,
    frame,
    take_apart,
)

VLAN, QINQ = (0x8100, 0x2005), (0x88A8, 100)
EMPTY = [
    service("nat", version, protocol, backends=[], no_backend="reset")
    for version in (4, 6)
    for protocol in ("tcp", "udp")
]

# RFC 9293 section 3.10.7.1. What came: flags, sequence number, acknowledgement, payload; what goes back: the same.
RESETS = [
    ("S", 1000, 0, b"", "RA", 0, 1001),
    ("S", 0xFFFFFFFF, 0, b"", "RA", 0, 0),
    ("S", 1000, 0, b"fast open", "RA", 0, 1010),
    ("A", 1000, 5000, b"", "R", 5000, 0),
    ("SA", 1000, 5000, b"", "R", 5000, 0),
    ("A", 1000, 5000, b"data", "R", 5000, 0),
    ("FA", 1000, 0xFFFFFFFF, b"", "R", 0xFFFFFFFF, 0),
    ("F", 1000, 7, b"", "RA", 0, 1001),
    ("F", 1000, 0, b"data", "RA", 0, 1005),
    ("FP", 0xFFFFFFFE, 0, b"data", "RA", 0, 3),
    ("P", 1000, 0, b"data", "RA", 0, 1004),
    ("", 1000, 0, b"", "RA", 0, 1000),
]
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "tagged": {"tags": (QINQ, VLAN)},
    "TCP options": {"tcp_options": b"\x02\x04\x05\xb4"},
    "IPv4 options": {"options": PADDING4 * 3},
    "extension header": {"extensions": ((HOP_BY_HOP, bytes(14)),)},
}


@pytest.mark.parametrize(("letters", "seq", "ack", "payload", "answer", "answer_seq", "answer_ack"), RESETS)
@pytest.mark.parametrize("version", [4, 6])
def test_reset(
    version: int, letters: str, seq: int, ack: int, payload: bytes, answer: str, answer_seq: int, answer_ack: int
) -> None:
    raw = frame(CLIENT[version], 40000, VIP[version], 80, flags=flags(letters), seq=seq, ack=ack, payload=payload)
    out = datapath(*EMPTY).process(raw)
    assert (out.verdict, out.reason, out.backend) == (Verdict.FORWARD, "rejected", None)
    seen = take_apart(out.frames[0])
    assert (seen.src, seen.sport, seen.dst, seen.dport) == (VIP[version], 80, CLIENT[version], 40000)
    assert (seen.eth_dst, seen.eth_src) == (ROUTER_MAC, BALANCER_MAC)
    assert (seen.tcp.flags, seen.tcp.seq, seen.tcp.ack) == (flags(answer), answer_seq, answer_ack)
    assert (len(seen.segment), seen.between, seen.ttl) == (20, b"", 64)
    assert len(out.frames[0]) == (54 if version == 4 else 74)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", [4, 6])
def test_reset_to_every_shape(version: int, shape: str) -> None:
    raw = frame(CLIENT[version], 40000, VIP[version], 80, payload=b"abc", **SHAPES[shape])  # type: ignore[arg-type]
    seen = take_apart(datapath(*EMPTY).process(raw + bytes(9)).frames[0])
    assert seen.tags == SHAPES[shape].get("tags", ())
    assert (seen.tcp.flags, seen.tcp.ack) == (RST | ACK, 1004)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "TCP options"])
@pytest.mark.parametrize("length", [0, 1, 100, 1400])
@pytest.mark.parametrize("version", [4, 6])
def test_port_unreachable(version: int, length: int, shape: str) -> None:
    """RFC 792 and RFC 1812: at most 576 bytes; RFC 4443: at most 1280, and a pseudo-header in the checksum."""
    how = SHAPES[shape]
    payload = bytes(number % 251 for number in range(length))
    raw = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=payload, **how)  # type: ignore[arg-type]
    out = datapath(*EMPTY).process(raw + b"\xee" * 5)
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "rejected")
    seen = take_apart(out.frames[0])
    link = 14 + 4 * len(seen.tags)
    assert (seen.src, seen.dst, seen.ttl, seen.between) == (VIP[version], CLIENT[version], 64, b"")
    assert (seen.eth_dst, seen.eth_src) == (ROUTER_MAC, BALANCER_MAC)
    assert seen.tags == how.get("tags", ())
    assert seen.protocol == (1 if version == 4 else 58)
    assert seen.segment[:2] == (b"\x03\x03" if version == 4 else b"\x01\x04")
    assert seen.segment[4:8] == bytes(4)
    limit = 576 - 28 if version == 4 else 1280 - 48
    assert seen.segment[8:] == raw[link : link + limit]
    assert len(out.frames[0]) == link + (28 if version == 4 else 48) + min(limit, len(raw) - link)


SILENT = {
    4: ("0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "239.255.255.255", "255.255.255.255"),
    6: ("::", "::1", "ff02::1", "ff0e::5"),
}
UNANSWERED = [
    (4, "tcp", CLIENT[4], RST),
    (4, "tcp", CLIENT[4], RST | ACK),
    (6, "tcp", CLIENT[6], RST),
    *(
        (version, protocol, source, SYN)
        for version in SILENT
        for protocol in ("tcp", "udp")
        for source in SILENT[version]
    ),
]


@pytest.mark.parametrize(("version", "protocol", "source", "bits"), UNANSWERED)
def test_never_answered(version: int, protocol: str, source: str, bits: int) -> None:
    """RFC 9293 section 3.10.7.1 (a RST), RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e)."""
    out = datapath(*EMPTY).process(frame(source, 40000, VIP[version], 80, protocol, flags=bits))
    assert (out.verdict, out.reason, out.frames) == (Verdict.DROP, "no_backend", [])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_drop_is_silent(protocol: str) -> None:
    out = datapath(service("nat", protocol=protocol, backends=[])).process(frame(CLIENT[4], 1, VIP[4], 80, protocol))
    assert (out.verdict, out.reason, out.frames) == (Verdict.DROP, "no_backend", [])


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_service_whose_backends_are_all_drained(forward: str) -> None:
    weightless = [{"address": "10.3.0.11", "weight": 0}]
    balancer = datapath(service(forward, backends=weightless, no_backend="reset"))
    assert balancer.process(frame(CLIENT[4], 1, VIP[4], 80)).reason == "rejected"
    assert balancer.stats()["flows"]["active"] == 0


def test_answers_are_limited() -> None:
    """A thousand a second, both kinds together; what is above is counted apart."""
    balancer = datapath(*EMPTY)
    syn, datagram = frame(CLIENT[4], 1, VIP[4], 80), frame(CLIENT[4], 1, VIP[4], 80, "udp")

    def answered(now: float, count: int) -> int:
        results = balancer.process_batch([syn, datagram] * (count // 2), now)
        assert {result.reason for result in results} <= {"rejected", "reject_limit"}
        return sum(result.reason == "rejected" for result in results)

    assert answered(100.0, 3000) == 1000
    assert answered(100.0, 10) == 0
    assert answered(100.25, 1000) == 250
    assert answered(100.5, 100) == 100
    assert answered(160.0, 3000) == 1000
    assert balancer.stats()["counters"]["drops"]["reject_limit"] == 2000 + 10 + 750 + 2000


def test_nothing_is_rejected_on_behalf_of_the_host() -> None:
    out = datapath(*EMPTY).process(frame(CLIENT[4], 40000, VIP[4], 81))
    assert (out.verdict, out.reason) == (Verdict.PASS, "no_service")


@pytest.mark.parametrize("version", [4, 6])
def test_a_malformed_packet_is_not_answered(version: int) -> None:
    raw = frame(CLIENT[version], 40000, VIP[version], 80, flags=SYN | 1)
    assert datapath(*EMPTY).process(raw).reason == "tcp_flags"


def test_junk_for_one_service_does_not_silence_another_s_path_mtu() -> None:
    """What is forged for fullnat is answered with RST, at a limited rate; packet too big is not held back by that."""
    balancer = datapath(
        service("fullnat"), service("dsr", 6) | {"vip": VIP[6]}, service("dsr", vip="203.0.113.11"), mtu=1400,
        snat=["10.3.0.5"],
    )  # fmt: skip
    junk = [frame(CLIENT[4], 1024 + at, VIP[4], 80, flags=ACK) for at in range(1100)]
    reasons = [balancer.process(each).reason for each in junk]
    assert (reasons.count("rejected"), reasons[-1]) == (1000, "reject_limit")
    for target in ("203.0.113.11", VIP[6]):
        client = CLIENT[6 if ":" in target else 4]
        long = frame(client, 40000, target, 80, flags=ACK, payload=bytes(1400), df=True)
        assert balancer.process(long).reason == "too_big"
    assert [balancer.process(each, now=0.01).reason for each in junk].count("rejected") == 10, "one a millisecond"
