"""host_tables.py: the kernel's messages, as bytes, and what they make of the tables."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from fastlb.kernel import netlink
from fastlb.kernel.host_tables import Change, HostTables, best_routes
from fastlb.model.hostview import Link, Route

UP, DOWN = 0x1 | 0x10000, 0x1
REACHABLE, STALE, FAILED = 0x02, 0x04, 0x20
MAC, OTHER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


def encoded(message: nlmsg, kind: int, fields: dict[str, Any], attrs: list[tuple[str, Any]]) -> bytes:
    message.update(fields)
    message["header"]["type"] = kind
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data)


def link(
    index: int, name: str, mac: str | None = MAC, flags: int = UP, kind: int = netlink.NEWLINK, **more: Any
) -> bytes:
    attrs: list[tuple[str, Any]] = [("IFLA_IFNAME", name), ("IFLA_MTU", 1500)]
    attrs += [("IFLA_ADDRESS", mac)] if mac else []
    return encoded(ifinfmsg(), kind, {"index": index, "flags": flags, "family": 0} | more, attrs)


def address(index: int, text: str, length: int, kind: int = netlink.NEWADDR) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return encoded(ifaddrmsg(), kind, {"index": index, "prefixlen": length, "family": family}, [("IFA_ADDRESS", text)])


def neighbour(
    index: int, text: str, state: int, mac: str | None = MAC, kind: int = netlink.NEWNEIGH, **more: Any
) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    attrs = [("NDA_DST", text)] + ([("NDA_LLADDR", mac)] if mac else [])
    return encoded(ndmsg(), kind, {"ifindex": index, "state": state, "family": family, "flags": 0} | more, attrs)


def apply(tables: HostTables, *messages: bytes) -> list[Change]:
    return [
        tables.apply(kind, data, offset)
        for message in messages
        for kind, _flags, data, offset in netlink.messages(message)
    ]


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


LINKS = {2: Link(2, "eth0", b"", 1500, True), 3: Link(3, "eth1", b"", 1500, False), 4: Link(4, "eth2", b"", 1500, True)}


def route(target: str, *, kind: int = 1, metric: int = 0, gateway: str | None = None, out: int = 2, **more: Any) -> Any:
    """An RTM_NEWROUTE as pyroute2 presents it."""
    network = ip_network(target)
    family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
    attrs: list[tuple[str, Any]] = [("RTA_PRIORITY", metric), ("RTA_OIF", out)]
    attrs += [("RTA_DST", str(network.network_address))] if network.prefixlen else []
    attrs += [("RTA_GATEWAY", gateway)] if gateway else []
    fields = {"family": family, "dst_len": network.prefixlen, "src_len": 0, "tos": 0, "type": kind, "flags": 0} | more
    ((number, _flags, data, offset),) = netlink.messages(encoded(rtmsg(), netlink.NEWROUTE, fields, attrs))
    return netlink.decode(number, data, offset)


def made(target: str, gateway: str | None, out: int) -> Route:
    return Route(ip_network(target), ip_address(gateway) if gateway else None, out)


ROUTES: list[tuple[str, list[Any], list[Route]]] = [
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
def test_one_route_a_prefix(messages: list[Any], best: list[Route]) -> None:
    assert list(best_routes(messages, LINKS)) == best


def test_a_route_event_changes_no_table_by_itself() -> None:
    tables = HostTables()
    assert tables.apply(netlink.DELROUTE, b"", 0) is Change.ROUTES
    tables.links = LINKS
    tables.apply_routes([route("10.0.0.0/24")])
    assert tables.view().routes == (made("10.0.0.0/24", None, 2),)
