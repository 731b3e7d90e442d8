"""flowhash.pxd: the hash that a fleet agrees on is XXH3-64 of the tuple; the table's own hashes spread what comes."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
import xxhash

import fastlb
from tests.balancers import Balancer, config, service
from tests.frames import SYN, frame

SEEDS = [0, 1, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1]


def by_xxhash(src: str, sport: int, dst: str, dport: int, protocol: int, seed: int) -> int:
    data = ip_address(src).packed + ip_address(dst).packed
    data += sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + bytes([protocol])
    assert len(data) in (13, 37)
    return xxhash.xxh3_64_intdigest(data, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [32, 128])
def test_equals_the_xxhash_package(width: int, seed: int) -> None:
    address = IPv4Address if width == 32 else IPv6Address
    rng = random.Random(seed ^ width)
    for _ in range(2000):
        src, dst = str(address(rng.getrandbits(width))), str(address(rng.getrandbits(width)))
        sport, dport, protocol = rng.randrange(65536), rng.randrange(65536), rng.choice([6, 17])
        expected = by_xxhash(src, sport, dst, dport, protocol, seed)
        assert fastlb.flow_hash(src, sport, dst, dport, protocol, seed) == expected


@pytest.mark.parametrize(
    ("src", "sport", "dst", "dport", "protocol"),
    [
        ("0.0.0.0", 0, "0.0.0.0", 0, 6),
        ("255.255.255.255", 65535, "255.255.255.255", 65535, 17),
        ("::", 0, "::", 0, 17),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535, "::1", 1, 6),
    ],
)
def test_extremes(src: str, sport: int, dst: str, dport: int, protocol: int) -> None:
    assert fastlb.flow_hash(src, sport, dst, dport, protocol) == by_xxhash(src, sport, dst, dport, protocol, 0)


def test_arguments_may_be_objects_and_names() -> None:
    one = fastlb.flow_hash("10.1.0.2", 40000, "203.0.113.10", 80, "tcp")
    assert one == fastlb.flow_hash(ip_address("10.1.0.2"), 40000, ip_address("203.0.113.10"), 80, 6)
    assert one != fastlb.flow_hash("10.1.0.2", 40000, "203.0.113.10", 80, "UDP")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.1.0.2", 1, "fd00::1", 1, 6), "source 10.1.0.2 and destination fd00::1 are of different IP versions"),
        (("10.1.0.2", 65536, "10.1.0.3", 1, 6), "port 65536 is not in 0..65535"),
        (("10.1.0.2", 1, "10.1.0.3", -1, 6), "port -1 is not in 0..65535"),
        (("10.1.0.2", 1, "10.1.0.3", 1, "icmp"), 'protocol \'icmp\' is neither "tcp" (6) nor "udp" (17)'),
        (("10.1.0.2", 1, "10.1.0.3", 1, 1), "protocol 1 is neither"),
        (("host", 1, "10.1.0.3", 1, 6), "'host' does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fastlb.flow_hash(*arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_pipeline_places_by_this_hash(seed: int) -> None:
    settings = config(service("dsr"), service("dsr", 6), hash_seed=seed)
    for version, client in ((4, "10.1.0.2"), (6, "fd00:1::2")):
        plan = Balancer(settings).plans[version == 6]
        keys = [member.key for member in plan.members]
        table = fastlb.maglev_table(keys, size=251, seed=seed)
        for sport in range(1000, 1100):
            hashed = by_xxhash(client, sport, str(plan.vip), 80, 6, seed)
            raw = frame(client, sport, str(plan.vip), 80, flags=SYN)
            assert Balancer(settings).send(raw)[2] == keys[table[hashed % 251]]


STREAMS = {
    "one client, every port": [("10.1.0.2", port) for port in range(1024, 1024 + 40000)],
    "one port, neighbouring clients": [(str(IPv4Address(0x0A000000 + n)), 40000) for n in range(40000)],
    "clients of one /24, many ports": [(f"192.0.2.{n % 250 + 1}", 1024 + n) for n in range(40000)],
    "one IPv6 client, every port": [("2001:db8::1", port) for port in range(1024, 1024 + 40000)],
    "IPv6 clients of one /64": [(f"2001:db8::{n:x}", 40000) for n in range(1, 40000)],
}


@pytest.mark.parametrize("name", STREAMS)
def test_regular_clients_spread_over_the_table(name: str) -> None:
    """Shards and buckets: a table at half load takes flows of whatever pattern without giving one up."""
    clients = STREAMS[name]
    version = ip_address(clients[0][0]).version
    settings = config(service("nat", version, "udp"), flows=len(clients) * 3 // 2)
    balancer = Balancer(settings)
    vip = str(balancer.plans[0].vip)
    frames = [frame(client, port, vip, 80, "udp", with_checksum=False) for client, port in clients]
    balancer.pipeline.process(frames, 0)
    counters = balancer.pipeline.counters()
    assert (counters["flows_evicted"], counters["flows_untracked"]) == (0, 0)
    assert balancer.pipeline.flow_count() == len(clients)
