"""KernelView: which way a packet goes, as literal tables."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from fastlb._core import HostRoutes
from fastlb.model.hostview import KernelView, Link, Route


def route(prefix: str, gateway: str | None, link: int, mtu: int = 0) -> Route:
    return Route(ip_network(prefix), ip_address(gateway) if gateway else None, link, mtu)


VIEW = KernelView(
    links={
        2: Link(2, "eth0", bytes.fromhex("020000000002"), 1500, True),
        3: Link(3, "eth1", bytes.fromhex("020000000003"), 9000, True),
    },
    routes=(
        route("0.0.0.0/0", "10.2.0.1", 2),
        route("10.2.0.0/24", None, 2),
        route("10.3.0.0/24", None, 3),
        route("10.3.0.128/25", "10.3.0.1", 3, 1400),
        route("10.3.0.200/32", "10.2.0.9", 2),
        route("172.16.0.0/12", None, 0),
        route("172.16.5.0/24", "10.2.0.7", 2),
        route("192.0.2.0/24", "fd00:2::1", 2),
        route("fd00:2::/64", None, 2),
        route("fd00:3::/64", None, 3),
        route("fd00:3::8000:0:0:0/65", "fe80::1", 3),
        route("fd00:3::8000:0:0:7/128", "fd00:2::1", 2),
        route("2001:db8:dead::/48", None, 0),
        route("2001:db8::/32", "fe80::2", 2),
    ),
    neighbours={},
    addresses=frozenset(),
)

# destination, prefix of the route that carries it, next hop
WAYS = [
    ("10.2.0.5", "10.2.0.0/24", (2, "10.2.0.5")),
    ("10.3.0.5", "10.3.0.0/24", (3, "10.3.0.5")),
    ("10.3.0.127", "10.3.0.0/24", (3, "10.3.0.127")),
    ("10.3.0.128", "10.3.0.128/25", (3, "10.3.0.1")),
    ("10.3.0.199", "10.3.0.128/25", (3, "10.3.0.1")),
    ("10.3.0.200", "10.3.0.200/32", (2, "10.2.0.9")),
    ("10.3.1.0", "0.0.0.0/0", (2, "10.2.0.1")),
    ("0.0.0.0", "0.0.0.0/0", (2, "10.2.0.1")),
    ("255.255.255.255", "0.0.0.0/0", (2, "10.2.0.1")),
    ("172.16.5.1", "172.16.5.0/24", (2, "10.2.0.7")),
    ("172.31.255.255", None, None),
    ("192.0.2.1", "192.0.2.0/24", (2, "fd00:2::1")),
    ("fd00:2::5", "fd00:2::/64", (2, "fd00:2::5")),
    ("fd00:3::5", "fd00:3::/64", (3, "fd00:3::5")),
    ("fd00:3::7fff:ffff:ffff:ffff", "fd00:3::/64", (3, "fd00:3::7fff:ffff:ffff:ffff")),
    ("fd00:3:0:0:8000::", "fd00:3:0:0:8000::/65", (3, "fe80::1")),
    ("fd00:3::8000:0:0:7", "fd00:3::8000:0:0:7/128", (2, "fd00:2::1")),
    ("2001:db8:beef::1", "2001:db8::/32", (2, "fe80::2")),
    ("2001:db8:dead::1", None, None),
    ("fd00:4::1", None, None),
    ("::a02:5", None, None),
]


COMPACT = HostRoutes.of(((each.prefix, (each.gateway, each.link, each.mtu)) for each in VIEW.routes), Route)
IN_LITTLE_ROOM = replace(VIEW, routes=COMPACT)


@pytest.mark.parametrize(("address", "prefix", "hop"), WAYS)
@pytest.mark.parametrize("view", [VIEW, IN_LITTLE_ROOM], ids=["tuple", "HostRoutes"])
def test_longest_prefix_decides(
    view: KernelView, address: str, prefix: str | None, hop: tuple[int, str] | None
) -> None:
    found = view.route(ip_address(address))
    assert (str(found.prefix) if found else None) == prefix
    assert view.next_hop(ip_address(address)) == (hop and (hop[0], ip_address(hop[1])))


def test_ways_are_those_of_all_routes() -> None:
    assert VIEW.ways == IN_LITTLE_ROOM.ways
    assert VIEW.has_on_link_mtu == IN_LITTLE_ROOM.has_on_link_mtu


def test_without_routes_there_is_no_way() -> None:
    empty = KernelView(links={}, routes=(), neighbours={}, addresses=frozenset())
    assert empty.next_hop(ip_address("10.0.0.1")) is None
    assert empty.next_hop(ip_address("fd00::1")) is None


def test_views_compare_by_value() -> None:
    hop = (2, ip_address("10.2.0.1"))
    views = [
        KernelView({}, (), {hop: bytes.fromhex(mac)}, frozenset())
        for mac in ("020000000001", "020000000001", "020000000002")
    ]
    assert views[0] == views[1]
    assert views[1] != views[2]
