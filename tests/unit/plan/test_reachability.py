"""What of a configuration the host cannot serve, as lines for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from fastlb.model.hostview import KernelView, Route
from fastlb.model.modes import TUNNELS
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.reachability import (
    narrow_tunnels,
    nobody_answers,
    not_on_link,
    outer_length,
    own_addresses,
    replies_by_a_router,
    replies_elsewhere,
    replies_lost_here,
    replies_over_another_link,
    too_narrow,
    without_route,
)
from tests.balancers import config, service
from tests.hostviews import LINKS, planned, view

# --- without a way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "forward", "problem"), [
    ("10.3.0.11", "nat", None), ("10.3.0.11", "gue", None), ("10.3.0.12", "nat", None),
    ("10.7.0.1", "nat", "no route to backend 10.7.0.1"), ("10.7.0.1", "ipip", "no route to backend 10.7.0.1"),
    ("10.7.0.1", "dsr", None),  # refused: see not_on_link
])  # fmt: skip
def test_backends_that_nothing_can_be_sent_to(backend: str, forward: str, problem: str | None) -> None:
    placed = frozenset({(3, 24, ip_address("10.3.0.2"))})
    lines = without_route(view(placed=placed), planned(backend, forward=forward))
    assert lines == ([f"service s0: {problem}"] if problem else [])


def test_a_tunnel_that_has_nowhere_to_come_from() -> None:
    [line] = without_route(view(), planned("10.3.0.11", forward="gue"))
    assert line.startswith("service s0: no address of IPv4 on the link towards backend 10.3.0.11")


def test_dsr_backends_that_are_not_on_link() -> None:
    lines = not_on_link(view(), planned("10.3.0.11", "10.6.0.1", "10.7.0.1", forward="dsr"))
    assert lines == [
        "service s1: dsr backend 10.6.0.1 is behind gateway 10.3.0.254; it must be on-link "
        "(dsr only rewrites the MAC address), or use forward: nat",
        "service s2: no route to dsr backend 10.7.0.1; it must be on-link",
    ]
    assert not_on_link(view(), planned("10.6.0.1", forward="nat")) == []


# --- this host, and interfaces without a ring -------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["nat", "dsr", "gue"])
def test_backends_that_are_this_host(forward: str) -> None:
    seen = view(addresses=frozenset(map(ip_address, ("10.3.0.11", "fd00:3::11", "127.0.0.1"))))
    assert own_addresses(seen, planned("10.3.0.11", "10.3.0.12", "fd00:3::11", forward=forward)) == [
        f"service s{number}: backend {address} is an address of this host; it must be another host's"
        for number, address in ((0, "10.3.0.11"), (2, "fd00:3::11"))
    ]


# backend, mode, interfaces with a ring; the interface on which replies would be missed
REPLIES: list[tuple[str, str, list[str], str | None]] = [
    ("10.3.0.11", "nat", ["eth0", "eth1"], None),
    ("10.3.0.11", "nat", ["eth0"], "eth1"),
    ("10.3.0.11", "nat", [], "eth1"),
    ("10.6.0.1", "nat", ["eth0"], "eth1"),  # behind a gateway
    ("fd00:3::11", "nat", ["eth0"], "eth1"),
    ("192.0.2.1", "nat", ["eth0"], None),  # by the default route
    ("10.7.0.1", "nat", ["eth0"], None),  # no route at all: for another line
    ("10.3.0.11", "dsr", ["eth0"], None),  # replies do not come here
    ("10.3.0.11", "gre", ["eth0"], None),
]


@pytest.mark.parametrize(("backend", "forward", "interfaces", "missed"), REPLIES)
def test_replies_on_an_interface_without_a_ring(
    backend: str, forward: str, interfaces: list[str], missed: str | None
) -> None:
    expected = [
        f"service s0: backend {backend} is reached by {missed}, which is not among the interfaces, so that replies "
        f"would not be seen; add it: interfaces: [{', '.join([*interfaces, str(missed)])}]"
    ]
    assert replies_elsewhere(view(), planned(backend, forward=forward), interfaces) == (expected if missed else [])


def test_replies_of_full_nat_on_an_interface_without_a_ring() -> None:
    settings = config(service("fullnat", name="s0", backends=[{"address": "10.3.0.11"}]), snat=["10.2.0.5"])
    plans = plan_services(settings, BackendIds(), 0.0)
    assert len(replies_elsewhere(view(), plans, ["eth0"])) == 1
    assert replies_elsewhere(view(), plans, ["eth1"]) == []


def test_a_link_over_one_of_the_interfaces() -> None:
    """What comes in by the port of a bridge, or by the link of a VLAN, is seen there."""
    plans = planned("10.3.0.11", "fd00:3::11", forward="nat")
    over = {
        "bridge": LINKS | {6: replace(LINKS[2], index=6, name="eth6", master=3)},
        "vlan": LINKS | {6: replace(LINKS[2], index=6, name="eth6"), 3: replace(LINKS[3], parent=6)},
    }
    for links in over.values():
        assert replies_elsewhere(view(links=links), plans, ["eth6"]) == []
        assert len(replies_over_another_link(view(links=links), plans, ["eth6"])) == 2
        assert len(replies_elsewhere(view(links=links), plans, ["eth0"])) == 2
        assert replies_over_another_link(view(links=links), plans, ["eth0", "eth1"]) == []


def test_many_backends_are_one_line() -> None:
    settings = config(service("nat", name="s0", backends=[{"address": f"10.3.0.{n}"} for n in range(20, 60)]))
    [line] = replies_elsewhere(view(), plan_services(settings, BackendIds(), 0.0), ["eth0"])
    assert line.startswith("service s0: backend 10.3.0.20 and 39 more is reached by eth1")


# --- wired so that no reply comes -------------------------------------------------------------------------------------

# mode, backend, who holds the VIP; is it told that replies are lost here, or that they take another way?
WIRED: list[tuple[str, str, bool, bool, bool]] = [
    ("dsr", "10.9.0.1", True, True, False),  # on eth1, which has gateways in the second column only
    ("dsr", "10.9.0.1", False, False, False),
    ("dsr", "fd00:3::11", True, False, False),  # IPv6 has no such rule
    ("ipip", "10.9.0.1", True, True, False),
    ("gue", "10.9.0.1", True, True, False),
    ("gre", "192.0.2.1", True, False, False),  # behind a router
    ("dsr", "10.2.0.9", True, False, False),  # a router is on its network
    ("nat", "10.9.0.1", True, False, False),
    ("fullnat", "10.9.0.1", True, False, False),
    ("nat", "192.0.2.1", False, False, True),
    ("nat", "10.6.0.1", True, False, True),
    ("fullnat", "192.0.2.1", False, False, False),
    ("dsr", "10.7.0.1", True, False, False),  # no route at all
]


@pytest.mark.parametrize(("forward", "backend", "holds", "lost", "elsewhere"), WIRED)
def test_replies_that_cannot_come(forward: str, backend: str, holds: bool, lost: bool, elsewhere: bool) -> None:
    listed = [{"address": backend}]
    settings = config(service(forward, ip_address(backend).version, name="s0", backends=listed), snat=["10.2.0.5"])
    plans = plan_services(settings, BackendIds(), 0.0)
    only = tuple(route for route in view().routes if route.link != 3 or route.gateway is None)
    seen = view() if forward == "nat" else view(routes=only)
    assert [line.split(",")[0] for line in replies_lost_here(seen, plans, holds)] == (
        [f"service s0: if this host is the gateway of backend {backend} on eth1"] if lost else []
    )
    assert [f"backend {backend} is behind gateway" in line for line in replies_by_a_router(seen, plans)] == (
        [True] if elsewhere else []
    )


# VIP, who holds it, the host's own addresses; on which interface neighbours ask for it in vain
ASKED: list[tuple[str, bool, list[str], str | None]] = [
    ("10.2.0.100", False, [], "eth0"), ("10.2.0.100", True, [], None), ("10.2.0.100", False, ["10.2.0.100"], None),
    ("fd00:3::100", False, [], "eth1"), ("203.0.113.10", False, [], None), ("10.3.0.128/28", False, [], None),
]  # fmt: skip


@pytest.mark.parametrize(("vip", "holds", "own", "asked"), ASKED)
def test_a_vip_that_nobody_answers_for(vip: str, holds: bool, own: list[str], asked: str | None) -> None:
    version = 6 if ":" in vip else 4
    settings = config(*(service("nat", version, name=f"s{port}", vip=vip, port=port) for port in (80, 443)))
    plans = plan_services(settings, BackendIds(), 0.0)
    lines = nobody_answers(view(addresses=frozenset(map(ip_address, own))), plans, holds)
    assert [line.split(",")[0] for line in lines] == (
        [f"service s80: {vip} is on the network of {asked}"] if asked else []
    )


# --- removed backends -------------------------------------------------------------------------------------------------

ON_LINK = tuple(route for route in view().routes if route.gateway is None)
Lines = Callable[[KernelView, list[Plan]], list[str]]
# what is asked, the mode, and a backend of which a line is said as long as it is configured
SAID: dict[str, tuple[Lines, str, str]] = {
    "own_addresses": (own_addresses, "nat", "10.3.0.11"),
    "replies_lost_here": (
        lambda seen, plans: replies_lost_here(replace(seen, routes=ON_LINK), plans, True), "dsr", "10.3.0.11"),
    "replies_by_a_router": (replies_by_a_router, "nat", "10.6.0.1"),
    "replies_elsewhere": (lambda seen, plans: replies_elsewhere(seen, plans, ["eth0"]), "nat", "10.3.0.11"),
    "without_route": (without_route, "nat", "10.7.0.1"),
    "no address for a tunnel": (without_route, "gue", "10.3.0.11"),
    "not_on_link": (not_on_link, "dsr", "10.6.0.1"),
}


@pytest.mark.parametrize(("lines", "forward", "backend"), SAID.values(), ids=SAID)
def test_nothing_is_said_of_a_backend_that_was_removed(lines: Lines, forward: str, backend: str) -> None:
    """What the operator has taken out, and is there for its last flows only, need not be mended."""
    seen = view(addresses=frozenset({ip_address("10.3.0.11")}))
    states, counts = BackendStates(), []
    for listed in ([{"address": backend}], []):
        settings = config(service(forward, protocol="udp", name="s0", on_leave="keep", backends=listed))
        states.apply_config(settings, 0.0)
        [plan] = plan_services(settings, BackendIds(), 0.0, states)
        assert [str(member.address) for member in plan.members] == [backend]
        counts.append(len(lines(seen, [plan])))
    assert counts == [1, 0]


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["nat", "dsr", "ipip", "gre", "gue"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mtu", [68, 91, 92, 111, 112, 1000, 1279, 1280, 1311, 1312, 1331, 1332, 1500])
def test_ways_that_are_too_narrow(version: int, forward: str, mtu: int) -> None:
    """IPv6 needs 1,280 bytes, or a tunnel that can be fragmented; the table says what tunnels take over IPv4."""
    backend = {4: "10.9.0.1", 6: "fd00:3::11"}[version]
    taken = {"ipip": 20, "gre": 24, "gue": 32}.get(forward, 0) + (20 if version == 6 and forward in TUNNELS else 0)
    known = (Route(ip_network(f"{backend}/{32 if version == 4 else 128}"), None, 3, mtu),)
    plans = planned(backend, forward=forward)
    least = 1280 if version == 6 and forward not in TUNNELS else 92
    inside = f", which leaves {max(mtu - taken, 0)} inside {forward}" if forward in TUNNELS else ""
    what = "a tunnel" if forward in TUNNELS else f"IPv{version}"
    assert too_narrow(view(routes=known), plans) == (
        [f"service s0: the MTU towards backend {backend} is {mtu}{inside}; {what} needs {least}: "
         "raise that of the link or route"] if mtu - taken < least else []
    )  # fmt: skip
    in_fragments = version == 6 and forward in TUNNELS and 92 <= mtu - taken < 1280
    assert len(narrow_tunnels(view(routes=known), plans)) == in_fragments
    assert too_narrow(view(routes=()), plans) == []


@pytest.mark.parametrize(("tunnel", "forward", "four", "six"), [
    ({}, "nat", 0, 0), ({}, "dsr", 0, 0), ({}, "ipip", 20, 40), ({}, "gre", 24, 44), ({"key": 0}, "gre", 28, 48),
    ({}, "gue", 32, 52),
])  # fmt: skip
def test_what_a_tunnel_takes(tunnel: dict[str, int], forward: str, four: int, six: int) -> None:
    settings = config(service(forward, tunnel=tunnel))
    [planned] = plan_services(settings, BackendIds(), 0.0)
    assert (outer_length(planned, 4), outer_length(planned, 6)) == (four, six)
