"""Fields against each other."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from fastlb.config import Backend, Config, Service
from fastlb.config.rules import broken_rules
from fastlb.errors import ConfigError
from tests.unit.config.written import DSR, NAT, messages_of, problems_in, service

NAT_ANY = NAT.replace("port: 80", "port: any")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            DSR + "    backends:\n      - address: 10.0.0.1\n        port: 8080\n",
            (
                9,
                "services[0].backends[0].port",
                "forward: dsr cannot change the port; leave it out (backends listen on the service's port), "
                "or use forward: nat",
            ),
            id="a backend port in dsr",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 'fd00::1'}\n",
            (
                8,
                "services[0].backends[0].address",
                "fd00::1 is IPv6 and the VIP 203.0.113.10 is IPv4; both must be of one family (tunnels may mix them)",
            ),
            id="an IPv4 VIP with an IPv6 backend",
        ),
        pytest.param(
            NAT.replace("203.0.113.10", "2001:db8::1") + "    backends:\n      - {address: 10.0.0.1}\n",
            (
                8,
                "services[0].backends[0].address",
                "10.0.0.1 is IPv4 and the VIP 2001:db8::1 is IPv6; both must be of one family (tunnels may mix them)",
            ),
            id="an IPv6 VIP with an IPv4 backend",
        ),
        pytest.param(
            NAT_ANY,
            (
                4,
                "services[0].port",
                "forward: nat with port: any cuts every connection that a backend opens through this host; "
                "give a port, or accept that with nat_any_port: true",
            ),
            id="nat with port any",
        ),
        pytest.param(
            NAT + "    nat_any_port: true\n",
            (
                7,
                "services[0].nat_any_port",
                "it is only for forward: nat with port: any; leave it out",
            ),
            id="nat_any_port with a port",
        ),
        pytest.param(
            DSR.replace("80", "any") + "    nat_any_port: true\n",
            (
                7,
                "services[0].nat_any_port",
                "it is only for forward: nat with port: any; leave it out",
            ),
            id="nat_any_port with dsr",
        ),
        pytest.param(
            NAT_ANY + "    nat_any_port: true\n    backends:\n      - {address: 10.0.0.1, port: 1}\n",
            (
                9,
                "services[0].backends[0].port",
                "a service with port: any keeps each packet's port; leave it out",
            ),
            id="a backend port with port any",
        ),
        pytest.param(
            NAT + NAT.removeprefix("services:\n").replace("80", "81"),
            (7, "services[1].name", '"web" is already the name of services[0]; give each its own'),
            id="a name twice",
        ),
        pytest.param(
            NAT + NAT.removeprefix("services:\n").replace("web", "other"),
            (
                7,
                "services[1]",
                "services[0] already has VIP 203.0.113.10, port 80, tcp; change one of the three, or put the "
                "backends into one service",
            ),
            id="VIP, port and protocol twice",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 10.0.0.1}\n      - {address: 10.0.0.1, port: 80}\n",
            (
                9,
                "services[0].backends[1]",
                "10.0.0.1:80 is already backends[0]; keep one, with the sum of the weights",
            ),
            id="a backend twice",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 203.0.113.10, port: 8080}\n",
            (
                8,
                "services[0].backends[0].address",
                '203.0.113.10 is the VIP of service "web"; it must be the server\'s own address',
            ),
            id="a VIP for a backend",
        ),
    ],
)
def test_fields_against_each_other(tmp_path: Path, text: str, expected: tuple[int, str, str]) -> None:
    assert problems_in(text, tmp_path) == [expected]


def ranges(*ports: str, vip: str = "203.0.113.10") -> list[dict[str, Any]]:
    return [service(name=f"s{number}", vip=vip, port=each) for number, each in enumerate(ports)]


@pytest.mark.parametrize(
    ("services", "path", "message"),
    [
        (
            ranges("8000-8099", "8050-8150"),
            "services[1].port",
            "8050-8150 overlaps 8000-8099 of services[0], which has the same VIP and protocol; one must lie within the "
            "other, or they must have no port in common",
        ),
        (
            ranges("8000-8099", "7950-8000"),
            "services[1].port",
            "7950-8000 overlaps 8000-8099 of services[0], which has the same VIP and protocol; one must lie within the "
            "other, or they must have no port in common",
        ),
        (
            [service(vip="203.0.113.1/28")],
            "services[0].vip",
            'found "203.0.113.1/28"; host bits are set: for one address write "203.0.113.1", for the whole prefix '
            '"203.0.113.0/28"',
        ),
        (
            [service(vip="0.0.0.0/0")],
            "services[0].vip",
            "0.0.0.0 is the unspecified address; a VIP must be a unicast address that clients can reach",
        ),
        (
            [service(vip="10.0.0.0/8", backends=[{"address": "10.1.2.3"}])],
            "services[0].backends[0].address",
            '10.1.2.3 is in 10.0.0.0/8, the VIP of service "web"; it must be the server\'s own address',
        ),
        (
            [service(port="8000-8099", backends=[{"address": "10.0.0.1", "port": 8000}])],
            "services[0].backends[0].port",
            "a service with port: 8000-8099 keeps each packet's port; leave it out",
        ),
        (
            [*ranges("1-65534"), *ranges("1-65534", vip="10.0.0.0/24"), *ranges("1-65534", vip="10.0.0.0/23")],
            "services",
            "the prefixes and port ranges of VIPs take 44 look-ups of different kinds, and at most 31 are made; use "
            "fewer lengths of prefixes, or ranges that begin and end at multiples of a power of two (8000-8063, "
            "32768-49151), or any",
        ),
    ],
)
def test_prefixes_and_ranges(services: list[dict[str, Any]], path: str, message: str) -> None:
    for number, each in enumerate(services):
        each["name"] = each["name"] if len(services) == 1 else f"web{number}"
    assert messages_of({"services": services}) == [(path, message)]


def test_a_prefix_cannot_be_put_on_an_interface() -> None:
    assert messages_of({"vip_address": "interface", "services": [service(vip="203.0.113.0/28")]}) == [
        (
            "services[0].vip",
            "vip_address: interface puts single addresses on the interface, and 203.0.113.0/28 is a prefix; route it "
            "to this host, with vip_address: none",
        )
    ]


def test_prefixes_and_ranges_that_go_together() -> None:
    services = [
        *ranges("8000-8099", "8050-8060", "8000-8049", "8100-8200", "1-65535"),
        service(name="prefix", vip="203.0.113.0/24"),
        service(name="longer", vip="203.0.113.0/28", port="80-80"),
        service(name="whole", vip="203.0.113.11/32", port="any", nat_any_port=True),
    ]
    config = Config.from_dict({"services": services})
    assert [str(each.vip) for each in config.services[5:]] == ["203.0.113.0/24", "203.0.113.0/28", "203.0.113.11"]
    assert [each.port for each in config.services[4:]] == [(1, 65535), 80, 80, "any"]
    shown = json.loads(config.model_dump_json())
    assert [each["port"] for each in shown["services"]][3:] == ["8100-8200", "1-65535", 80, 80, "any"]

FULL = {"forward": "fullnat"}


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (
            {"services": [service(**FULL)]},
            "services[0].forward",
            "fullnat needs an IPv4 address to send from; add one of this host's to snat, which stands beside services",
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, vip="2001:db8::1", backends=[])]},
            "services[0].forward",
            "fullnat needs an IPv6 address to send from; add one of this host's to snat, which stands beside services",
        ),
        (
            {"snat": ["203.0.113.10"], "services": [service(**FULL)]},
            "snat[0]",
            '203.0.113.10 is the VIP of service "web"; it must be an address of its own',
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, backends=[{"address": "10.0.0.5"}])]},
            "snat[0]",
            "10.0.0.5 is a backend; it must be an address of this host",
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, backends=[{"address": "fd00::1"}])]},
            "services[0].backends[0].address",
            "fd00::1 is IPv6 and the VIP 203.0.113.10 is IPv4; both must be of one family (tunnels may mix them)",
        ),
        ({"snat": ["10.0.0.5", "10.0.0.5"]}, "snat", '"10.0.0.5" is listed twice; keep one'),
        (
            {"snat": ["127.0.0.1"]},
            "snat[0]",
            "127.0.0.1 is a loopback address; it must be a unicast address to which backends can answer",
        ),
        ({"snat": ["10.0.0.0/24"]}, "snat[0]", 'found "10.0.0.0/24"; it must be an IPv4 or IPv6 address, as text'),
        ({"snat": [f"10.0.{n}.1" for n in range(256)]}, "snat", "256 IPv4 addresses; at most 255 can be used"),
        *(
            (
                {"snat_ports": ports},
                "snat_ports",
                f'found {shown}; it must be a range of ports such as "1024-32767", within 1-65535',
            )
            for ports, shown in (
                ("2000-1000", '"2000-1000"'), ("0-9", '"0-9"'), ("1-65536", '"1-65536"'), (80, "80"), ("99", '"99"'),
            )
        ),
        ({"flow_log": "flows.log"}, "flow_log", 'found "flows.log"; it must be an absolute path'),
        ({"flow_file": "shm/x"}, "flow_file", 'found "shm/x"; it must be auto, none or an absolute path'),
    ],
)  # fmt: skip
def test_fullnat(data: dict[str, Any], path: str, message: str) -> None:
    assert messages_of(data) == [(path, message)]


def test_what_goes_together() -> None:
    """Near misses of the rules: each differs from a refused case in one thing."""
    config = Config.from_dict(
        {
            "services": [
                service(backends=[{"address": "10.0.0.1", "port": 1}, {"address": "10.0.0.1", "port": 2}]),
                service(name="udp", protocol="udp", backends=[{"address": "10.0.0.1", "port": 1}]),
                service(name="any", port="any", nat_any_port=True, backends=[{"address": "10.0.0.1"}]),
                service(name="dsr", vip="203.0.113.11", forward="dsr", port="any"),
            ]
        }
    )
    assert [s.name for s in config.services] == ["web", "udp", "any", "dsr"]

GROUP = {"group": "site", "timeout": 60, "prefix": 24}


@pytest.mark.parametrize(("changes", "message"), [
    ({"affinity": GROUP}, None),
    ({"affinity": GROUP | {"timeout": "1m"}}, None),
    ({"affinity": GROUP | {"group": "other", "prefix": 32}}, None),
    ({"affinity": {"prefix": 32}}, None),
    ({"affinity": GROUP | {"prefix": 32}}, "prefix 32 differs from 24 of services[0]"),
    ({"affinity": GROUP | {"timeout": 61}}, "timeout 61.0 differs from 60.0 of services[0]"),
    ({"affinity": GROUP, "vip": "2001:db8::1"}, "IP version 6 differs from 4 of services[0]"),
])  # fmt: skip
def test_services_of_a_group_agree(changes: dict[str, Any], message: str | None) -> None:
    first = service(name="a", affinity=GROUP, backends=[])
    second = service(**{"name": "b", "port": 443, "backends": []} | changes)
    if message is None:
        assert len(Config.from_dict({"services": [first, second]}).services) == 2
    else:
        [(path, text)] = messages_of({"services": [first, second]})
        assert path == "services[1].affinity.group"
        assert text.startswith(message)

PREFIX = "a prefix of client addresses, such as 198.51.100.0/24; or one address"


@pytest.mark.parametrize(("changes", "path", "message"), [
    ({"allow": "10.0.0.0/8"}, "allow", 'found "10.0.0.0/8"; it must be a list: write ["10.0.0.0/8"]'),
    ({"allow": ["10.0.0.0/33"]}, "allow[0]", f'found "10.0.0.0/33"; it must be {PREFIX}'),
    ({"deny": ["10.0.0.0/8", "web"]}, "deny[1]", f'found "web"; it must be {PREFIX}'),
    ({"deny": [10]}, "deny[0]", f"found 10; it must be {PREFIX}"),
    ({"deny": ["10.0.0.1/8"]}, "deny[0]",
     'found "10.0.0.1/8"; host bits are set: for one address write "10.0.0.1", for the whole prefix "10.0.0.0/8"'),
    ({"deny": ["10.0.0.1", "10.0.0.1/32"]}, "deny", '"10.0.0.1/32" is listed twice; keep one'),
    ({"allow": ["10.0.0.0/8", "fd00::/8"]}, "allow[1]",
     "fd00::/8 is IPv6 and the VIP 203.0.113.10 is IPv4; no client of this service is in it; leave it out"),
    ({"allow": ["10.0.0.1", "10.0.0.0/8"], "deny": ["10.0.0.0/8"]}, "deny[0]",
     "10.0.0.0/8 is allow[1] as well; keep one of the two"),
    ({"source_limit": 5}, "source_limit",
     "found 5; it must be a mapping with keys among: rate, burst, prefix; write {rate: 5}"),
    ({"source_limit": {"burst": 5}}, "source_limit.rate", "it is missing; add it: new flows a second, in the long run"),
    ({"source_limit": {"rate": 0}}, "source_limit.rate", "found 0; it must be a whole number from 1 to 100000"),
    ({"source_limit": {"rate": 1.5}}, "source_limit.rate", "found 1.5; it must be a whole number from 1 to 100000"),
    ({"source_limit": {"rate": 1, "burst": 0}}, "source_limit.burst",
     "found 0; it must be a whole number from 1 to 1000000"),
    ({"source_limit": {"rate": 2, "burst": 7201}}, "source_limit.burst",
     "found 7201; at 2 a second it must be at most 7200, an hour's worth"),
    ({"source_limit": {"rate": 1, "prefix": 33}}, "source_limit.prefix",
     "found 33; clients of VIP 203.0.113.10 are IPv4, so it must be a whole number from 1 to 32"),
    ({"source_limit": {"rate": 1, "prefix": 129}}, "source_limit.prefix",
     "found 129; it must be a whole number from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6"),
])  # fmt: skip
def test_who_may_open_flows(changes: dict[str, Any], path: str, message: str) -> None:
    assert messages_of({"services": [service(**changes)]}) == [(f"services[0].{path}", message)]


def test_more_backends_than_a_table_can_tell_apart() -> None:
    backends = [{"address": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"} for n in range(1, 65536)]
    service = {"name": "a", "vip": "203.0.113.1", "port": 80, "protocol": "tcp", "forward": "dsr"}
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"services": [service | {"backends": backends}]})
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("services[0].backends", "65535 backends; a Maglev table takes at most 65534: use several services")
    ]


def test_more_backends_than_slots() -> None:
    backends = [{"address": f"10.0.{number // 250}.{number % 250 + 1}"} for number in range(252)]
    data = {"services": [service(backends=backends)], "maglev_size": 251}
    [(path, message)] = messages_of(data)
    assert path == "services[0].backends"
    assert message.startswith("252 backends, and 251 slots in a Maglev table; raise maglev_size")
    backends.pop()
    assert len(Config.from_dict(data).services[0].backends) == 251


@cache
def many(count: int) -> tuple[Backend, ...]:
    """Backends that were not checked one by one; several services share them."""
    return tuple(Backend.model_construct(address=IPv4Address(0x0B000000 + n), port=None) for n in range(count))


def of_many(count: int, **changes: Any) -> Service:
    """A service of many backends."""
    one = Config.from_dict({"services": [service(**changes)]}).services[0]
    return one.model_copy(update={"backends": many(count)})


def test_backends_of_all_services_beyond_the_numbers_of_flow_entries() -> None:
    services = (of_many(65534, forward="dsr"),) * 17
    loc, message = next(broken_rules(services, (), "none", 65537))
    assert (loc, message) == (("services",), "1114078 backends in all; flows can be told apart by at most 1048575")


def test_more_services_than_counters() -> None:
    loc, message = next(broken_rules((of_many(0),) * 65536, (), "none", 65537))
    assert (loc, message) == (("services",), "65536 services; there can be at most 65535")


@pytest.mark.parametrize(
    ("forward", "ports", "taken"),
    [
        ("nat", (80, 80), 262146),
        ("nat", (80, 81), 3 * 131073),
        ("nat", ("8000-8003", 8000), 3 * 131073),
        ("fullnat", (80, 80), 262146),
    ],
)
def test_more_replies_than_the_receive_filter_holds(forward: str, ports: tuple[Any, Any], taken: int) -> None:
    """Each address takes an entry, and each of its ports (or block of ports) another one, whoever has them."""
    first, second = (of_many(131073, name=f"s{n}", port=port) for n, port in enumerate(ports))
    services = tuple(each.model_copy(update={"forward": forward}) for each in (first, second))
    loc, message = next(broken_rules(services, (), "none", None))
    assert loc == ("services",)
    assert f"forward: {forward} take {taken} entries in the receive filter, and it holds at most 262144" in message


def test_replies_that_just_fit() -> None:
    """Three services whose 31 entries for each backend are too many by themselves, but the same for all of them."""
    each = of_many(3000, port="1-65534")
    services = tuple(
        each.model_copy(update={"name": f"s{n}", "vip": IPv4Address(0xCB007101 + n)}) for n in range(3)
    )
    assert list(broken_rules(services, (), "none", 65537)) == []


def test_a_hundred_thousand_backends() -> None:
    services = [
        service(
            name=f"s{number}",
            vip=f"203.0.113.{number}",
            backends=[{"address": f"10.{number}.{n >> 8}.{n & 255}"} for n in range(1, 1001)],
        )
        for number in range(100)
    ]
    config = Config.from_dict({"services": services})
    assert sum(len(each.backends) for each in config.services) == 100_000


def test_many_ranges_of_one_vip() -> None:
    """Nested ones, of which each would be compared with each other one if ranges were taken in pairs."""
    services = [service(name=f"s{n}", port=f"{n}-{65534 - n}") for n in range(1, 3000)]
    assert len(Config.from_dict({"services": services}).services) == 2999


def test_many_prefixes_beside_many_backends() -> None:
    """The first VIP of the file that holds an address is named, however long its prefix is."""
    vips = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.128/25"]
    for order in (vips, vips[::-1]):
        services = [service(name=f"s{n}", vip=vip) for n, vip in enumerate(order)]
        services[0]["backends"] = [{"address": "10.1.2.129"}, {"address": "11.0.0.1"}]
        assert messages_of({"services": services}) == [
            (
                "services[0].backends[0].address",
                f'10.1.2.129 is in {order[0]}, the VIP of service "s0"; it must be the server\'s own address',
            )
        ]


def test_every_pair_of_ranges_that_cross_is_named() -> None:
    """Beside a slow model that takes each with each."""
    drawn = random.Random(1)
    for _ in range(30):
        pairs = {tuple(sorted(drawn.sample(range(1, 40), 2))) for _ in range(10)}
        listed = [service(name=f"s{n}", port=f"{first}-{last}") for n, (first, last) in enumerate(sorted(pairs))]
        drawn.shuffle(listed)
        ports = [tuple(map(int, each["port"].split("-"))) for each in listed]
        expected = {
            (number, other)
            for number, (first, last) in enumerate(ports)
            for other, (low, high) in enumerate(ports[:number])
            if first < low <= last < high or low < first <= high < last
        }
        named = re.findall(r"services\[(\d+)\]\.port: .* overlaps .* of services\[(\d+)\]", faults_of(listed))
        assert {(int(number), int(other)) for number, other in named} == expected


def faults_of(services: list[dict[str, Any]]) -> str:
    try:
        Config.from_dict({"services": services})
    except ConfigError as error:
        return str(error)
    return ""
