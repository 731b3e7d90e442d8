"""host_routes.py: the kernel's routes, as bytes, and what they amount to; dumped and kept up by events."""

from __future__ import annotations

import random
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import pytest

from fastlb.kernel import host_routes, netlink
from fastlb.kernel.host_routes import CHANGED, SAME, UNSURE, MainTable, kind_of
from fastlb.model.hostview import KernelView, Link, Route
from tests.messages import APPEND, REPLACE, route, with_nexthop

DONE, ERROR = 3, 2
LINKS = {2: Link(2, "eth0", b"", 1500, True), 3: Link(3, "eth1", b"", 1500, False), 4: Link(4, "eth2", b"", 1500, True)}


def made(target: str, gateway: str | None, out: int) -> Route:
    return Route(ip_network(target), ip_address(gateway) if gateway else None, out)


def loaded(*messages: bytes) -> MainTable:
    table = MainTable()
    for message in messages:
        assert table.load(message, message[16]) is None
    return table


def routes(table: MainTable) -> list[Route]:
    return list(table.routes(LINKS))


ROUTES: list[tuple[str, list[bytes], list[Route]]] = [
    ("on-link", [route("10.0.0.0/24")], [made("10.0.0.0/24", None, 2)]),
    ("default", [route("0.0.0.0/0", gateway="10.0.0.1")], [made("0.0.0.0/0", "10.0.0.1", 2)]),
    ("default, ipv6", [route("::/0", gateway="fe80::1", out=4)], [made("::/0", "fe80::1", 4)]),
    ("the lowest metric", [route("10.0.0.0/24", metric=9), route("10.0.0.0/24", metric=5, out=4)],
     [made("10.0.0.0/24", None, 4)]),
    ("the first of equals", [route("10.0.0.0/24"), route("10.0.0.0/24", out=4)], [made("10.0.0.0/24", None, 2)]),
    ("a live link before a dead one", [route("10.0.0.0/24", out=3), route("10.0.0.0/24", metric=9)],
     [made("10.0.0.0/24", None, 2)]),
    ("a dead next hop on a live link", [route("10.0.0.0/24", flags=1), route("10.0.0.0/24", metric=9, out=4)],
     [made("10.0.0.0/24", None, 4)]),
    ("unreachable", [route("10.0.0.0/8", kind=7)], [made("10.0.0.0/8", None, 0)]),
    ("local", [route("10.0.0.1/32", kind=2)], []),
    ("by tos", [route("10.0.0.0/24", tos=8)], []),
    ("by source", [route("10.0.0.0/24", src_len=24)], []),
    ("by a link that nobody knows", [route("10.0.0.0/24", out=9)], []),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "best"), [row[1:] for row in ROUTES], ids=[row[0] for row in ROUTES])
def test_one_route_a_prefix(messages: list[bytes], best: list[Route]) -> None:
    assert routes(loaded(*messages)) == best


@pytest.mark.parametrize(("messages", "best"), [row[1:] for row in ROUTES], ids=[row[0] for row in ROUTES])
def test_one_route_a_prefix_by_events(messages: list[bytes], best: list[Route]) -> None:
    table = MainTable()
    for message in messages:
        table.apply(message, 0)
    found = routes(table)
    assert {each.prefix for each in found} == {each.prefix for each in best}
    if len(messages) < 2 or messages[0] != ROUTES[4][1][0]:  # of equals the kernel puts the later one first
        assert found == best


def deleted(target: str, **more: Any) -> bytes:
    return route(target, event=netlink.DELROUTE, **more)


A, B, C = "10.0.0.0/24", "10.0.1.0/24", "fd00::/64"
HOPS, HOPS6 = (
    [{"oif": 2, "hops": 0, "flags": 0, "attrs": [("RTA_GATEWAY", f"{base}{number}")]} for number in (1, 2)]
    for base in ("10.0.0.", "fe80::")
)
DEAD = [HOPS[0] | {"flags": 1}, HOPS[1]]

EVENTS: list[tuple[str, list[bytes], list[bytes], int, list[Route]]] = [
    # what is dumped; the events; what the last one does; the routes then
    ("a new one", [route(A)], [route(B)], CHANGED, [made(A, None, 2), made(B, None, 2)]),
    ("one between", [route(A), route("10.0.2.0/24")], [route(B)], CHANGED,
     [made(A, None, 2), made(B, None, 2), made("10.0.2.0/24", None, 2)]),
    ("a known one", [route(A)], [route(A)], SAME, [made(A, None, 2)]),
    ("a shorter one", [route(A)], [route("10.0.0.0/23")], CHANGED, [made("10.0.0.0/23", None, 2), made(A, None, 2)]),
    ("a replaced one", [route(A)], [route(A, gateway="10.0.0.1", how=REPLACE)], CHANGED, [made(A, "10.0.0.1", 2)]),
    ("a replaced one, ipv6", [route(C)], [route(C, gateway="fe80::1", how=REPLACE)], CHANGED, [made(C, "fe80::1", 2)]),
    ("the first of two is replaced", [route(A, out=2), route(A, out=4)], [route(A, gateway="10.0.0.1", how=REPLACE)],
     CHANGED, [made(A, "10.0.0.1", 2)]),
    ("only one with the metric is replaced", [route(A, metric=5)], [route(A, out=4, metric=6, how=REPLACE)], CHANGED,
     [made(A, None, 2)]),
    ("one with a better metric", [route(A, metric=5)], [route(A, out=4, metric=4)], CHANGED, [made(A, None, 4)]),
    ("an equal one goes first", [route(A)], [route(A, out=4)], CHANGED, [made(A, None, 4)]),
    ("or last", [route(A)], [route(A, out=4, how=APPEND)], CHANGED, [made(A, None, 2)]),
    ("an equal one may be joined, ipv6", [route(C, gateway="fe80::1")], [route(C, gateway="fe80::2")], UNSURE,
     [made(C, "fe80::1", 2)]),
    ("one goes", [route(A), route(B)], [deleted(A)], CHANGED, [made(B, None, 2)]),
    ("one goes, ipv6", [route(C)], [deleted(C)], CHANGED, []),
    ("the one behind it remains", [route(A), route(A, out=4, metric=9)], [deleted(A)], CHANGED, [made(A, None, 4)]),
    ("the second one goes", [route(A), route(A, out=4, metric=9)], [deleted(A, out=4, metric=9)], CHANGED,
     [made(A, None, 2)]),
    ("one goes that nobody knows", [route(A)], [deleted(B)], UNSURE, [made(A, None, 2)]),
    ("one hop of several goes, ipv6", [route(C, hops=HOPS6)], [deleted(C, gateway="fe80::1")], UNSURE,
     [made(C, "fe80::1", 2)]),
    ("one goes whose hop has died", [route(A, hops=HOPS)], [deleted(A, hops=DEAD)], CHANGED, []),
    ("it comes and goes", [], [route(A), deleted(A)], CHANGED, []),
    ("it goes and comes", [route(A)], [deleted(A), route(A, out=4)], CHANGED, [made(A, None, 4)]),
    ("of another table", [route(A)], [deleted(A, table=100)], SAME, [made(A, None, 2)]),
    ("from the cache", [route(A)], [deleted(A, flags=0x200)], SAME, [made(A, None, 2)]),
    ("unreachable", [route("10.0.0.0/8")], [route(A, kind=7)], CHANGED,
     [made("10.0.0.0/8", None, 2), made(A, None, 0)]),
]  # fmt: skip


@pytest.mark.parametrize(("dumped", "events", "done", "after"), [row[1:] for row in EVENTS], ids=[r[0] for r in EVENTS])
def test_events(dumped: list[bytes], events: list[bytes], done: int, after: list[Route]) -> None:
    table = loaded(*dumped)
    routes(table)  # what events change lies in another place from then on
    assert [table.apply(event, 0) for event in events][-1] == done
    assert routes(table) == after


def test_an_event_that_is_older_than_the_dump_casts_no_doubt() -> None:
    table = loaded(route(A))
    assert table.apply(deleted(B), 0, late=True) == SAME
    assert table.apply(route(A), 0, late=True) == SAME


def test_the_best_live_hop_of_several() -> None:
    other = {"oif": 4, "hops": 0, "flags": 0, "attrs": [("RTA_GATEWAY", "10.0.0.9")]}
    assert routes(loaded(route(A, hops=HOPS))) == [made(A, "10.0.0.1", 2)]
    assert routes(loaded(route(A, hops=DEAD))) == [made(A, "10.0.0.2", 2)]
    assert routes(loaded(route(A, hops=[HOPS[0] | {"oif": 3}, other]))) == [made(A, "10.0.0.9", 4)]  # 3 is down


def test_a_table_follows_its_links() -> None:
    table = loaded(route(A, out=2), route(A, out=4, metric=9))
    assert routes(table) == [made(A, None, 2)]
    assert list(table.routes({4: LINKS[4]})) == [made(A, None, 4)]
    assert routes(table) == [made(A, None, 2)]


def test_a_route_of_many_hops() -> None:
    many = [HOPS[0] | {"attrs": [("RTA_GATEWAY", f"10.0.{n >> 8}.{n & 255}")]} for n in range(1, 513)]
    assert routes(loaded(route(A, hops=many))) == [made(A, "10.0.0.1", 2)]


def test_a_dump_ends_with_its_errno() -> None:
    table = MainTable()
    end = struct.pack("=IHHIIi", 20, DONE, 0, 0, 0, 0)
    assert table.load(route(A) + route(B) + end, socket.AF_INET) == 0
    assert table.load(struct.pack("=IHHIIi", 20, ERROR, 0, 0, 0, -2), socket.AF_INET6) == 2
    assert table.load(route("10.9.0.0/24"), socket.AF_INET6) is None  # a kernel without IPv6 lists IPv4
    assert routes(table) == [made(A, None, 2), made(B, None, 2)]


def test_ipv6_lists_a_prefix_behind_those_that_it_holds_and_perhaps_twice() -> None:
    longer = [route(f"fd00:0:{number}::/48", out=4) for number in range(9)]
    table = loaded(*longer, route("fd00::/32"), longer[3], route("::/0", gateway="fe80::1"))
    assert routes(table) == [
        made("::/0", "fe80::1", 2),
        made("fd00::/32", None, 2),
        *(made(f"fd00:0:{number}::/48", None, 4) for number in range(9)),
    ]
    assert table.apply(deleted("fd00:0:3::/48", out=4), 0) == CHANGED
    assert table.routes(LINKS).find(ip_address("fd00:0:3::1")) == made("fd00::/32", None, 2)


def test_neighbouring_prefixes_with_one_way_are_no_difference() -> None:
    """A view that is equal is not planned with, so what changes no address's way costs nobody anything."""
    table = loaded(route("10.0.0.0/8"), route("10.1.0.0/16", out=4))
    before = table.routes(LINKS)
    for more in (route("10.2.0.0/16"), route("10.1.2.0/24", out=4)):
        assert table.apply(more, 0) == CHANGED
        assert table.routes(LINKS) == before
    assert table.apply(route("10.2.3.0/24", out=4), 0) == CHANGED
    assert table.routes(LINKS) != before
    assert table.apply(deleted("10.2.3.0/24", out=4), 0) == CHANGED
    assert table.routes(LINKS) == before
    assert before != ()


def test_kinds_that_come_and_go_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_routes, "SPARE_KINDS", 10)
    table = loaded(route(A))  # one kind is known
    done = [table.apply(route(A, gateway=f"10.0.0.{number}", how=REPLACE), 0) for number in range(1, 14)]
    assert done == [CHANGED] * 11 + [UNSURE] * 2


def test_what_leads_where() -> None:
    table = loaded(with_nexthop(route(A), 7), route(B, out=4))
    assert [table.leads_through(link) for link in (2, 3, 4)] == [True, False, True]
    assert [table.leads_to(number) for number in (6, 7)] == [False, True]
    assert kind_of(with_nexthop(route(A), 7)) == kind_of(with_nexthop(route(B), 7))


def addresses(version: int, targets: list[str], draw: random.Random) -> list[IPv4Address | IPv6Address]:
    """The edges of prefixes, what lies beyond them, and some between."""
    found = []
    for target in targets:
        network = ip_network(target)
        first, last = int(network.network_address), int(network.broadcast_address)
        found += [first - 1, first, draw.randint(first, last), last, last + 1]
    make: Any = IPv4Address if version == 4 else IPv6Address
    return [make(number) for number in found if 0 <= number < 1 << (32 if version == 4 else 128)]


def drawn(version: int, draw: random.Random) -> str:
    """A prefix; few different beginnings, so that they nest."""
    bits = 32 if version == 4 else 128
    length = draw.choice([0, 1, 7, 8, 9, 16, 24, 31, 32, *([48, 63, 64, 65, 127, 128] if version == 6 else [])])
    number = draw.choice([0, 10 << bits - 8, (1 << bits) - 1, draw.getrandbits(4) << bits - 4, draw.getrandbits(bits)])
    network: Any = IPv4Network if version == 4 else IPv6Network
    return str(network((number, length), strict=False))


def as_the_kernel_lists(target: str) -> tuple[int, int]:
    network = ip_network(target)
    return int(network.network_address), -network.prefixlen


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_a_plain_table(version: int, seed: int) -> None:
    """Every address goes the way that one finds by trying every prefix, after a dump and after events."""
    draw = random.Random(seed)
    base = {4: "10.0.0.", 6: "fe80::"}[version]
    known: dict[str, str] = {}
    table = MainTable()
    for turn in range(6):
        for _ in range(40):
            target, gateway = drawn(version, draw), f"{base}{draw.randint(1, 3)}"
            if turn and target in known and draw.random() < 0.5:
                assert table.apply(deleted(target, gateway=known.pop(target)), 0) == CHANGED
            elif turn:
                expected = SAME if known.get(target) == gateway else CHANGED
                assert table.apply(route(target, gateway=gateway, how=REPLACE), 0) == expected
                known[target] = gateway
            elif target not in known:
                known[target] = gateway
        if not turn:
            for target in sorted(known, key=as_the_kernel_lists):
                message = route(target, gateway=known[target])
                table.load(message, message[16])
        plain = tuple(made(target, gateway, 2) for target, gateway in known.items())
        found = table.routes(LINKS)
        assert set(found) == set(plain)
        view, expected_view = (KernelView(LINKS, each, {}, frozenset()) for each in (found, plain))
        for address in addresses(version, list(known), draw):
            assert view.route(address) == expected_view.route(address), address
        assert view.ways <= expected_view.ways
