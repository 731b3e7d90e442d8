"""host_tables.py: the kernel's messages, as bytes, and what they make of the tables."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

import pytest

from fastlb.kernel import netlink
from fastlb.kernel.host_tables import Change, HostTables
from fastlb.model.hostview import Link, Route
from tests.messages import (
    DOWN,
    FAILED,
    MAC,
    OTHER_MAC,
    REACHABLE,
    STALE,
    address,
    apply,
    link,
    neighbour,
    nexthop,
    route,
    with_nexthop,
)  # fmt: skip


def test_links_come_change_and_go() -> None:
    tables = HostTables()
    assert apply(tables, link(2, "eth0"), link(3, "tun0", None, DOWN)) == [Change.VIEW | Change.ROUTES] * 2
    assert tables.view().links == {
        2: Link(2, "eth0", bytes.fromhex("020000000001"), 1500, True),
        3: Link(3, "tun0", b"", 1500, False),
    }
    apply(tables, address(2, "10.0.0.1", 24), neighbour(2, "10.0.0.9", REACHABLE))
    apply(tables, link(2, "eth0", kind=netlink.DELLINK))
    view = tables.view()
    assert (set(view.links), view.addresses, view.neighbours) == ({3}, frozenset(), {})


def test_a_bridge_port_is_no_link() -> None:
    tables = HostTables()
    assert apply(tables, link(2, "eth0", family=socket.AF_BRIDGE)) == [Change.NOTHING]
    assert tables.view().links == {}


def test_addresses() -> None:
    tables = HostTables()
    apply(tables, address(2, "10.0.0.1", 24), address(3, "10.0.0.1", 32), address(2, "fd00::1", 64))
    assert tables.view().placed == {
        (2, 24, ip_address("10.0.0.1")), (3, 32, ip_address("10.0.0.1")), (2, 64, ip_address("fd00::1")),
    }  # fmt: skip
    apply(tables, address(2, "10.0.0.1", 24, netlink.DELADDR))
    assert tables.view().addresses == {ip_address("10.0.0.1"), ip_address("fd00::1")}
    apply(tables, address(3, "10.0.0.1", 32, netlink.DELADDR))
    assert tables.view().addresses == {ip_address("fd00::1")}


HOP = (2, ip_address("10.0.0.9"))
NEIGHBOURS: list[tuple[list[bytes], str | None, bool, Change]] = [
    # messages; the MAC address that is used; whether the kernel should be asked; what the last one changes
    ([], None, True, Change.NOTHING),
    ([neighbour(2, "10.0.0.9", REACHABLE)], MAC, False, Change.VIEW),
    ([neighbour(2, "10.0.0.9", STALE)], MAC, True, Change.VIEW),
    ([neighbour(2, "10.0.0.9", FAILED, None)], None, True, Change.NOTHING),
    ([neighbour(2, "10.0.0.9", REACHABLE), neighbour(2, "10.0.0.9", STALE)], MAC, True, Change.NOTHING),
    ([neighbour(2, "10.0.0.9", REACHABLE), neighbour(2, "10.0.0.9", FAILED)], None, True, Change.VIEW),
    ([neighbour(2, "10.0.0.9", REACHABLE), neighbour(2, "10.0.0.9", REACHABLE, OTHER_MAC)], OTHER_MAC, False,
     Change.VIEW),
    ([neighbour(2, "10.0.0.9", REACHABLE), neighbour(2, "10.0.0.9", REACHABLE, kind=netlink.DELNEIGH)], None, True,
     Change.VIEW),
    ([neighbour(2, "10.0.0.9", REACHABLE, flags=0x08)], None, True, Change.NOTHING),  # a proxy entry
]  # fmt: skip


@pytest.mark.parametrize(("messages", "mac", "asked", "change"), NEIGHBOURS)
def test_neighbours(messages: list[bytes], mac: str | None, asked: bool, change: Change) -> None:
    tables = HostTables()
    apply(tables, link(2, "eth0"))
    changes = apply(tables, *messages)
    assert changes[-1:] in ([], [change])
    expected = {} if mac is None else {HOP: bytes.fromhex(mac.replace(":", ""))}
    assert (tables.view().neighbours, tables.should_ask(HOP)) == (expected, asked)


def test_nobody_is_asked_for_on_a_link_that_is_down() -> None:
    tables = HostTables()
    apply(tables, link(2, "eth0", flags=DOWN))
    assert not tables.should_ask(HOP)
    assert not tables.should_ask((7, HOP[1]))


def test_a_view_stays_as_it_was() -> None:
    tables = HostTables()
    apply(tables, link(2, "eth0"))
    before = tables.view()
    apply(tables, link(3, "eth1"), neighbour(2, "10.0.0.9", REACHABLE))
    assert (set(before.links), before.neighbours) == ({2}, {})


def dumped(tables: HostTables, *messages: bytes) -> None:
    """Let a dump have these routes."""
    for message in messages:
        tables.table.load(message, message[16])  # the family


OF_LINKS = [  # what happens to a link that routes lead through, and to one that they do not
    (link(2, "eth0", flags=DOWN), link(3, "eth1", flags=DOWN)),
    (link(2, "eth0", kind=netlink.DELLINK), link(3, "eth1", kind=netlink.DELLINK)),
]


@pytest.mark.parametrize(("used", "unused"), OF_LINKS)
def test_routes_are_in_doubt_when_their_link_goes(used: bytes, unused: bytes) -> None:
    """IPv4 drops them without a word; but what containers do to their links must not cost a dump."""
    tables = HostTables()
    apply(tables, link(2, "eth0"), link(3, "eth1"))
    dumped(tables, route("10.0.0.0/24"))
    assert apply(tables, used, unused) == [Change.VIEW | Change.ROUTES | Change.DOUBT, Change.VIEW | Change.ROUTES]


def test_a_link_or_an_address_that_is_told_of_again_changes_nothing() -> None:
    tables = HostTables()
    dumped(tables, route("10.0.0.0/24"))
    apply(tables, link(2, "eth0"), address(2, "10.0.0.1", 24))
    assert apply(tables, link(2, "eth0"), address(2, "10.0.0.1", 24)) == [Change.NOTHING] * 2


def test_routes_are_in_doubt_when_an_address_goes() -> None:
    tables = HostTables()
    assert apply(tables, address(2, "10.0.0.1", 24)) == [Change.VIEW]
    assert apply(tables, address(2, "10.0.0.1", 24, netlink.DELADDR)) == [Change.VIEW | Change.DOUBT]


def test_routes_are_in_doubt_when_their_nexthop_object_changes() -> None:
    tables = HostTables()
    dumped(tables, with_nexthop(route("10.0.0.0/24"), 7))
    assert apply(tables, nexthop(7), nexthop(8)) == [Change.DOUBT, Change.NOTHING]
    assert apply(tables, nexthop(7, netlink.DELNEXTHOP)) == [Change.DOUBT]


def test_events_of_routes() -> None:
    tables = HostTables()
    tables.links = {2: Link(2, "eth0", b"", 1500, True)}
    assert apply(tables, route("10.0.0.0/24"), route("10.0.0.0/24")) == [Change.ROUTES, Change.NOTHING]
    tables.count_routes()
    assert list(tables.view().routes) == [Route(ip_network("10.0.0.0/24"), None, 2)]
    assert apply(tables, route("10.0.1.0/24", event=netlink.DELROUTE)) == [Change.DOUBT]
    tables.late = True
    assert apply(tables, route("10.0.1.0/24", event=netlink.DELROUTE)) == [Change.NOTHING]
