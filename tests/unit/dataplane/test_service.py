"""service.pxd and lookup.pxd: whose packet is it?"""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

import pytest

import fastlb
from tests.balancers import BACKENDS, CLIENT, VIP, datapath, reply_to, service
from tests.frames import SYN, frame

DIRECT4 = [{"address": BACKENDS[4][0]}]


def test_thousands_of_services_each_find_their_own() -> None:
    """Two protocols and many ports on many VIPs of both versions, each with its own backend port."""
    rng = random.Random(5)
    ports = {}
    while len(ports) < 4000:
        base = IPv4Address("198.18.0.0") if rng.random() < 0.5 else IPv6Address("2001:db8:5::")
        vip = base + rng.randrange(500)
        ports.setdefault((str(vip), rng.randrange(1, 2000), rng.choice(["tcp", "udp"])), 10000 + len(ports))
    services = [
        service(
            "nat", 6 if ":" in vip else 4, protocol, name=f"s{backend_port}", vip=vip, port=port,
            backends=[{"address": BACKENDS[6 if ":" in vip else 4][0], "port": backend_port}],
        )
        for (vip, port, protocol), backend_port in ports.items()
    ]  # fmt: skip
    balancer = datapath(*services, flows=8192)
    for (vip, port, protocol), backend_port in ports.items():
        client = CLIENT[6 if ":" in vip else 4]
        out = balancer.process(frame(client, 40000, vip, port, protocol))
        assert out.backend is not None
        assert out.backend.rpartition(":")[2] == str(backend_port)
        other = "udp" if protocol == "tcp" else "tcp"
        if (vip, port, other) not in ports:
            assert balancer.process(frame(client, 40000, vip, port, other)).reason == "no_service"


TABLE = [
    service("dsr", name="exact", port=80, backends=[{"address": BACKENDS[4][0]}]),
    service("dsr", name="any", port="any", backends=[{"address": BACKENDS[4][1]}]),
    service("dsr", name="udp", port=80, protocol="udp", backends=[{"address": BACKENDS[4][2]}]),
    service("dsr", 6, name="six", port="any", protocol="udp", backends=[{"address": BACKENDS[6][0]}]),
]


@pytest.mark.parametrize(
    ("version", "vip", "port", "protocol", "backend"),
    [
        (4, VIP[4], 80, "tcp", "10.3.0.11:80"),  # the exact port beats any
        (4, VIP[4], 81, "tcp", "10.3.0.12:0"),
        (4, VIP[4], 0, "tcp", "10.3.0.12:0"),
        (4, VIP[4], 65535, "tcp", "10.3.0.12:0"),
        (4, VIP[4], 80, "udp", "10.3.0.13:80"),  # one VIP, two protocols
        (4, VIP[4], 81, "udp", None),
        (4, "203.0.113.11", 80, "tcp", None),
        (6, VIP[6], 53, "udp", "[fd00:3::11]:0"),
        (6, VIP[6], 53, "tcp", None),
        (6, "::cb00:710a", 80, "tcp", None),  # the IPv4 VIP's bits in an IPv6 address
    ],
)
def test_match(version: int, vip: str, port: int, protocol: str, backend: str | None) -> None:
    out = datapath(*TABLE).process(frame(CLIENT[version], 40000, vip, port, protocol))
    assert out.backend == backend
    assert out.reason == ("scheduled" if backend else "no_service")
    assert out.verdict is (fastlb.Verdict.FORWARD if backend else fastlb.Verdict.PASS)


def test_without_services_all_is_the_host_s() -> None:
    out = datapath().process(frame(CLIENT[4], 40000, VIP[4], 80, flags=SYN))
    assert (out.verdict, out.reason) == (fastlb.Verdict.PASS, "no_service")


@pytest.mark.parametrize(
    ("src", "sport", "protocol", "reason"),
    [
        (BACKENDS[4][0], 8080, "tcp", "reply_unknown"),
        (BACKENDS[4][0], 8081, "tcp", "no_service"),
        (BACKENDS[4][0], 8080, "udp", "no_service"),
        (BACKENDS[4][2], 80, "udp", "no_service"),  # dsr: its replies do not pass here
        ("10.3.0.99", 8080, "tcp", "no_service"),
    ],
)
def test_what_backends_send(src: str, sport: int, protocol: str, reason: str) -> None:
    balancer = datapath(service("nat"), service("dsr", protocol="udp", backends=[{"address": BACKENDS[4][2]}]))
    assert balancer.process(frame(src, sport, CLIENT[4], 40000, protocol)).reason == reason


def test_any_port_keeps_the_port_both_ways() -> None:
    balancer = datapath(service("nat", port="any", nat_any_port=True, backends=DIRECT4))
    for port in (22, 80, 50000):
        sent = balancer.process(frame(CLIENT[4], 1000 + port, VIP[4], port))
        back = balancer.process(reply_to(sent.frames[0]))
        assert (sent.reason, back.reason) == ("scheduled", "conntrack")
        assert sent.frames[0][36:38] == back.frames[0][34:36] == port.to_bytes(2, "big")


def test_any_port_one_client_port_to_two_ports() -> None:
    """The backend sees two tuples that differ in their destination port: there is no conflict."""
    balancer = datapath(service("nat", port="any", nat_any_port=True, backends=DIRECT4))
    sent = [balancer.process(frame(CLIENT[4], 40000, VIP[4], port)) for port in (80, 443)]
    assert [out.reason for out in sent] == ["scheduled", "scheduled"]
    back = [balancer.process(reply_to(out.frames[0])) for out in sent]
    assert [out.frames[0][34:36] for out in back] == [b"\x00\x50", b"\x01\xbb"]
