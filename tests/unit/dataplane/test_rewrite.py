"""rewrite.pxd and checksum.pxd: what a forwarded frame looks like, every checksum recomputed whole."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from fastlb import Datapath
from tests.balancers import BACKENDS, CLIENT, HOSTS, VIP, datapath, reply_to, service
from tests.frames import (
    ACK,
    AUTH,
    BALANCER_MAC,
    DEST_OPTS,
    HOP_BY_HOP,
    PADDING4,
    ROUTING,
    TCP,
    frame,
    mac_of,
    take_apart,
)
from tests.unit.dataplane.test_fragments import cut

VLAN, QINQ = (0x8100, 0x2005), (0x88A8, 100)
BACKEND_PORT = 8080

SHAPES: list[dict[str, object]] = [
    {},
    {"payload": b"x"},
    {"payload": bytes(range(256))},
    {"tags": (VLAN,)},
    {"tags": (QINQ, VLAN), "payload": b"odd"},
    {"ttl": 2},
    {"ttl": 255, "payload": b"\xff" * 31},
]
SHAPES4: list[dict[str, object]] = [*SHAPES, {"options": PADDING4}, {"options": PADDING4 * 10, "tags": (VLAN,)}]
SHAPES6: list[dict[str, object]] = [
    *SHAPES,
    {"extensions": ((HOP_BY_HOP, b""),)},
    {
        "extensions": ((HOP_BY_HOP, b""), (DEST_OPTS, bytes(20)), (ROUTING, b"\x04\0"), (AUTH, bytes(14))),
        "tags": (VLAN,),
    },
]
CASES = [
    (version, protocol, shape)
    for version, shapes in ((4, SHAPES4), (6, SHAPES6))
    for protocol in ("tcp", "udp")
    for shape in shapes
] + [(version, "udp", {"with_checksum": False, "payload": b"abc"}) for version in (4, 6)]


def one_backend(forward: str, version: int, protocol: str) -> Datapath:
    backend: dict[str, object] = {"address": BACKENDS[version][0]}
    if forward == "nat":
        backend["port"] = BACKEND_PORT
    return datapath(service(forward, version, protocol, backends=[backend]))


@pytest.mark.parametrize(("version", "protocol", "shape"), CASES)
def test_nat_both_legs(version: int, protocol: str, shape: dict[str, object]) -> None:
    balancer = one_backend("nat", version, protocol)
    raw = frame(CLIENT[version], 40000, VIP[version], 80, protocol, **shape)  # type: ignore[arg-type]
    before, after = take_apart(raw), take_apart(balancer.process(raw).frames[0])
    assert (after.src, after.sport) == (CLIENT[version], 40000)
    assert (after.dst, after.dport) == (BACKENDS[version][0], BACKEND_PORT)
    assert (after.eth_dst, after.eth_src) == (mac_of(BACKENDS[version][0]), BALANCER_MAC)
    unchanged(before, after)

    back = frame(BACKENDS[version][0], BACKEND_PORT, CLIENT[version], 40000, protocol, **shape)  # type: ignore[arg-type]
    before, after = take_apart(back), take_apart(balancer.process(back).frames[0])
    assert (after.src, after.sport) == (VIP[version], 80)
    assert (after.dst, after.dport) == (CLIENT[version], 40000)
    assert (after.eth_dst, after.eth_src) == (mac_of(CLIENT[version]), BALANCER_MAC)
    unchanged(before, after)


def unchanged(before: object, after: object) -> None:
    """All that neither NAT nor a router's hop may touch."""
    for name in ("tags", "version", "protocol", "between"):
        assert getattr(after, name) == getattr(before, name)
    assert after.ttl == before.ttl - 1  # type: ignore[attr-defined]
    checksum = 16 if before.protocol == TCP else 6  # type: ignore[attr-defined]
    old, new = before.segment, after.segment  # type: ignore[attr-defined]
    assert new[4:checksum] == old[4:checksum]
    assert new[checksum + 2 :] == old[checksum + 2 :]


@pytest.mark.parametrize(("version", "protocol", "shape"), CASES)
def test_dsr_touches_the_mac_addresses_only(version: int, protocol: str, shape: dict[str, object]) -> None:
    raw = frame(CLIENT[version], 40000, VIP[version], 80, protocol, **shape)  # type: ignore[arg-type]
    sent = one_backend("dsr", version, protocol).process(raw).frames[0]
    assert sent[12:] == raw[12:]
    assert take_apart(sent).eth_dst == mac_of(BACKENDS[version][0])
    assert take_apart(sent).eth_src == BALANCER_MAC


@pytest.mark.parametrize("version", [4, 6])
def test_udp_without_a_checksum_stays_without(version: int) -> None:
    balancer = one_backend("nat", version, "udp")
    raw = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=b"abc", with_checksum=False)
    sent = balancer.process(raw).frames[0]
    assert take_apart(sent).segment[6:8] == b"\0\0"
    back = frame(BACKENDS[version][0], BACKEND_PORT, CLIENT[version], 40000, "udp", with_checksum=False)
    assert take_apart(balancer.process(back).frames[0]).segment[6:8] == b"\0\0"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_checksums_through_all_their_values(version: int, protocol: str) -> None:
    """A payload word steers the checksum through 16 bits; a computed UDP zero must go out as all ones (RFC 768)."""
    balancer = one_backend("nat", version, protocol)
    interesting = {*range(0, 65536, 251), *range(64), *range(65536 - 64, 65536)}
    base = take_apart(
        frame(CLIENT[version], 40000, BACKENDS[version][0], BACKEND_PORT, protocol, payload=b"\0\0", flags=2)
    )
    field = 16 if protocol == "tcp" else 6
    zero_at = int.from_bytes(base.segment[field : field + 2], "big")  # this payload word makes the sent checksum 0
    interesting |= {(zero_at + offset) % 65536 for offset in range(-3, 4)}
    seen = set()
    for word in interesting:
        raw = frame(CLIENT[version], 40000, VIP[version], 80, protocol, payload=word.to_bytes(2, "big"), flags=2)
        after = take_apart(balancer.process(raw).frames[0])
        seen.add(after.segment[field : field + 2])
    if protocol == "udp":
        assert b"\0\0" not in seen
        assert b"\xff\xff" in seen


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_checksums_of_random_packets(version: int, protocol: str) -> None:
    balancer = one_backend("nat", version, protocol)
    rng = random.Random(version)
    for _ in range(500):
        host = (
            f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
            if version == 4
            else f"fd00:1::{rng.randrange(1 << 16):x}:{rng.randrange(1 << 16):x}"
        )
        balancer.set_neighbour(host, mac_of(host))
        raw = frame(host, rng.randrange(1, 65536), VIP[version], 80, protocol, payload=rng.randbytes(rng.randrange(64)),
                    ttl=rng.randrange(2, 256), seq=rng.getrandbits(32), ack=rng.getrandbits(32))  # fmt: skip
        sent = balancer.process(raw).frames[0]
        take_apart(sent)
        take_apart(balancer.process(reply_to(sent, "A", rng.randbytes(rng.randrange(64)))).frames[0])


def test_a_wrong_checksum_stays_as_wrong_as_it_was() -> None:
    """Mended by difference: a damaged packet must not become a valid one on its way."""
    raw = bytearray(frame(CLIENT[4], 40000, VIP[4], 80, payload=b"abcd", flags=ACK))
    raw[-1] ^= 0x01
    sent = one_backend("nat", 4, "tcp").process(raw).frames[0]
    with pytest.raises(AssertionError, match="transport checksum"):
        take_apart(sent)


@pytest.mark.parametrize(("forward", "version", "ttl", "reason"), [
    ("nat", 4, 2, "scheduled"), ("nat", 4, 1, "time_exceeded"), ("nat", 4, 0, "time_exceeded"),
    ("nat", 6, 2, "scheduled"), ("nat", 6, 1, "time_exceeded"), ("nat", 6, 0, "time_exceeded"),
    ("dsr", 4, 1, "scheduled"), ("dsr", 6, 1, "scheduled"),  # dsr is no hop
])  # fmt: skip
def test_ttl(forward: str, version: int, ttl: int, reason: str) -> None:
    out = one_backend(forward, version, "tcp").process(frame(CLIENT[version], 40000, VIP[version], 80, ttl=ttl))
    assert out.reason == reason
    assert (take_apart(out.frames[0]).dst == CLIENT[version]) == (reason == "time_exceeded")


@pytest.mark.parametrize("version", [4, 6])
def test_ttl_of_replies(version: int) -> None:
    balancer = one_backend("nat", version, "tcp")
    balancer.process(frame(CLIENT[version], 40000, VIP[version], 80))
    out = balancer.process(frame(BACKENDS[version][0], BACKEND_PORT, CLIENT[version], 40000, flags=0x12, ttl=1))
    assert (out.reason, take_apart(out.frames[0]).dst) == ("time_exceeded", BACKENDS[version][0])


def test_ethernet_padding_is_kept() -> None:
    raw = frame(CLIENT[4], 40000, VIP[4], 80) + b"\xaa" * 6
    sent = one_backend("nat", 4, "tcp").process(raw).frames[0]
    assert len(sent) == 60
    assert sent[-6:] == b"\xaa" * 6


def test_the_frame_that_came_is_not_modified() -> None:
    raw = bytearray(frame(CLIENT[4], 40000, VIP[4], 80, tags=(VLAN,)))
    kept = bytes(raw)
    one_backend("nat", 4, "tcp").process(raw)
    assert raw == kept


# ---- identifications


def numbers_of(frames: list[bytes]) -> set[int]:
    """Of IPv4, or in IPv6's Fragment headers."""
    return {int.from_bytes(raw[18:20] if raw[12:14] == b"\x08\0" else raw[58:62], "big") for raw in frames}


@pytest.mark.parametrize(("version", "fragments"), [(4, False), (4, True), (6, True)])
def test_datagrams_that_meet_at_one_pair_of_addresses(version: int, fragments: bool) -> None:
    """Fragments of both would be put together if two had one number; those of one still have one (RFC 6864)."""
    clients = [CLIENT[version], str(ip_address(CLIENT[version]) + 1)]
    vips = [VIP[version], str(ip_address(VIP[version]) + 1)]

    def through(balancer: Datapath, raw: bytes, number: int = 777) -> set[int]:
        parts = cut(raw, [1000] if fragments else [], number)
        found = numbers_of([balancer.process(part).frames[0] for part in parts])
        assert len(found) == 1
        return found

    def balancer_of(forward: str, *vips: str, backends: int = 1) -> Datapath:
        one = [{"address": address} for address in BACKENDS[version][:backends]]
        balancer = datapath(
            *[service(forward, version, "udp", name=f"to{at}", vip=vip, backends=one) for at, vip in enumerate(vips)],
            snat=["10.3.0.5", "fd00:3::5"],
        )  # fmt: skip
        for host in {*clients} - {*HOSTS}:
            balancer.set_neighbour(host, mac_of(host))
        return balancer

    data = random.Random(9).randbytes(1600 if fragments else 100)
    shared = balancer_of("fullnat", vips[0])
    from_clients = [through(shared, frame(client, 40000, vips[0], 80, "udp", payload=data)) for client in clients]
    assert from_clients[0] != from_clients[1]
    next_one = through(shared, frame(clients[0], 40000, vips[0], 80, "udp", payload=data), 778)
    (first,), (second,) = from_clients[0], next_one
    assert (second - first) % 2 ** (16 if version == 4 else 32) == 1, "numbers that count up still do"

    nat = balancer_of("nat", *vips)
    assert len(set.union(*[through(nat, frame(clients[0], 40000 + at, vip, 80, "udp", payload=data))
                           for at, vip in enumerate(vips)])) == 2  # fmt: skip

    nat = balancer_of("nat", vips[0], backends=3)
    answers: dict[str, set[int]] = {}
    for port in range(40000, 40020):
        asked = take_apart(nat.process(frame(clients[0], port, vips[0], 80, "udp")).frames[0])
        answers[asked.dst] = through(nat, frame(asked.dst, 80, clients[0], port, "udp", payload=data))
    assert len(answers) == len(set.union(*answers.values())) == 3


@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_a_packet_that_stays_whole_keeps_its_number(forward: str) -> None:
    balancer = datapath(service(forward), snat=["10.3.0.5"])
    sent = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, df=True)).frames[0]
    assert numbers_of([sent]) == {0x1234}
    seen = take_apart(sent)
    back = frame(seen.dst, seen.dport, seen.src, seen.sport, flags=ACK, df=True)
    assert numbers_of([balancer.process(back).frames[0]]) == {0x1234}
