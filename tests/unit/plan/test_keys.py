"""What the receive filter and the guard must take for the data path, and what of it is the host's own."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from fastlb.model.match import LATER, Block, Key, Keys
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.keys import classifier_keys, held_vips, portless_key, vips_of_this_host
from fastlb.plan.plan import Plan, plan_services
from tests.balancers import VIP, config, service


def plans(*services: dict[str, Any], **settings: Any) -> list[Plan]:
    return plan_services(config(*services, **settings), BackendIds(), 0.0)


def key(address: str, port: int, protocol: int) -> Key:
    return Key(ip_address(address), port, protocol)


TAKEN = [
    ([], set(), set()),
    (
        [service("nat", backends=[{"address": "10.3.0.9", "port": 8080}, {"address": "10.3.0.10"}])],
        {key(VIP[4], 80, 6)},
        {key("10.3.0.9", 8080, 6), key("10.3.0.10", 80, 6)},
    ),
    ([service("dsr")], {key(VIP[4], 80, 6)}, set()),
    ([service("dsr", 6, "udp", port="any")], {key(VIP[6], 0, 17)}, set()),
    (
        [service("nat", port="any", nat_any_port=True, backends=[{"address": "10.3.0.9"}])],
        {key(VIP[4], 0, 6)},
        {key("10.3.0.9", 0, 6)},
    ),
    (
        [
            service("nat", protocol=protocol, backends=[{"address": "10.3.0.9", "weight": 0}])
            for protocol in ("tcp", "udp")
        ],
        {key(VIP[4], 80, 6), key(VIP[4], 80, 17)},
        {key("10.3.0.9", 80, 6), key("10.3.0.9", 80, 17)},  # drained: its flows still answer
    ),
    ([service("nat", backends=[])], {key(VIP[4], 80, 6)}, set()),
]


@pytest.mark.parametrize(("services", "vips", "replies"), TAKEN)
def test_classifier_keys(services: list[dict[str, Any]], vips: set[Key], replies: set[Key]) -> None:
    vips |= {key(str(each.address), 0, LATER | each.protocol) for each in vips}
    replies |= {key(str(each.address), 0, LATER | each.protocol) for each in replies}
    assert classifier_keys(plans(*services), False) == Keys(vips, replies)
    addresses = {key(str(each.address), 0, 0) for each in vips}
    assert classifier_keys(plans(*services), True) == Keys(vips | addresses, replies)


def test_replies_of_full_nat_are_apart() -> None:
    """The classifier asks for the port of a reply to fullnat, too."""
    full = plans(service("fullnat", backends=[{"address": "10.3.0.9"}]), snat=["10.3.0.5"])
    found = classifier_keys(full, False)
    assert (found.replies, found.full_replies) == (
        set(), {key("10.3.0.9", 80, 6), key("10.3.0.9", 0, LATER | 6)})  # fmt: skip


@pytest.mark.parametrize("forward", ["dsr", "ipip", "gre", "gue"])
def test_modes_that_see_no_replies_take_none(forward: str) -> None:
    found = classifier_keys(plans(service(forward)), True)
    assert (len(found.vips), found.replies, found.full_replies) == (3, set(), set())


def test_replies_of_a_removed_backend_are_taken_as_long_as_it_has_flows() -> None:
    states = BackendStates()
    for listed in (["10.3.0.9", "10.3.0.10"], ["10.3.0.10"]):
        backends = [{"address": address} for address in listed]
        settings = config(service("nat", name="web", on_leave="keep", backends=backends))
        states.apply_config(settings, 0.0)
    replies = classifier_keys(plan_services(settings, BackendIds(), 0.0, states), False).replies
    assert key("10.3.0.9", 80, 6) in replies
    assert key("10.3.0.10", 80, 6) in replies


# VIP, ports; the VIP's keys as (address, port, prefix, bits of the port), and the prefix and bits of keys without ports
SHAPES: list[tuple[str, int | str, list[tuple[str, int, int | None, int | None]], tuple[int | None, int | None]]] = [
    ("203.0.113.10", 80, [("203.0.113.10", 80, None, None)], (None, None)),
    ("203.0.113.10", "any", [("203.0.113.10", 0, None, None)], (None, None)),
    ("203.0.113.10", "8000-8003", [("203.0.113.10", 8000, None, 14)], (None, None)),
    ("203.0.113.0/28", 80, [("203.0.113.0", 80, 28, None)], (28, 16)),
    ("203.0.113.0/28", "any", [("203.0.113.0", 0, 28, None)], (28, 0)),
    ("203.0.113.0/28", "7-8", [("203.0.113.0", 7, 28, None), ("203.0.113.0", 8, 28, None)], (28, 16)),
]


@pytest.mark.parametrize(("vip", "ports", "expected", "portless"), SHAPES)
def test_keys_are_in_their_shortest_form(
    vip: str, ports: int | str, expected: list[tuple[str, int, int | None, int | None]],
    portless: tuple[int | None, int | None],
) -> None:  # fmt: skip
    """None where all bits count, so that one endpoint has one key; keys without ports have a mask that is there."""
    [plan] = plans(service("dsr", vip=vip, port=ports))
    found = classifier_keys([plan], True).vips
    written = {Key(ip_address(address), port, 6, prefix, bits) for address, port, prefix, bits in expected}
    for protocol in (0, LATER | 6):
        assert portless_key(plan, protocol) == Key(plan.network.network_address, 0, protocol, *portless)
    assert found == written | {portless_key(plan, 0), portless_key(plan, LATER | 6)}
    if "/" in vip:
        assert {each.mask for each in found} == {each.mask for each in written}


def test_a_range_has_the_fewest_keys() -> None:
    [plan] = plans(service("dsr", port="8000-8005"))
    assert plan.blocks == (Block(8000, 14), Block(8004, 15))
    taken = classifier_keys([plan], False).vips
    assert {(each.port, each.port_bits) for each in taken if each.protocol == 6} == {(8000, 14), (8004, 15)}


OWN = [ip_address(address) for address in ("203.0.113.5", "203.0.113.77", "2001:db8:cafe::5", "192.0.2.1")]


@pytest.mark.parametrize(("vip", "held"), [
    ("203.0.113.0/28", ["203.0.113.5"]),
    ("203.0.113.0/24", ["203.0.113.5", "203.0.113.77"]),
    ("203.0.113.128/28", []),
    ("203.0.113.5", []),  # one address may be the host's: vip_address: interface
    ("2001:db8:cafe::/64", ["2001:db8:cafe::5"]),
])  # fmt: skip
def test_prefixes_that_hold_an_address_of_the_host(vip: str, held: list[str]) -> None:
    made = plans(service("dsr", 6 if ":" in vip else 4, name="web", vip=vip))
    assert vips_of_this_host(made, iter(OWN)) == [
        f"service web: VIP {vip} holds {address}, an address of this host; use prefixes without it" for address in held
    ]


HELD = [
    ("interface", [VIP[4], VIP[6]], {VIP[4], VIP[6]}),
    ("interface", [VIP[4], VIP[4]], {VIP[4]}),
    ("interface", [], set()),
    ("none", [VIP[4]], set()),
]


@pytest.mark.parametrize(("vip_address", "vips", "held"), HELD)
def test_held_vips(vip_address: str, vips: list[str], held: set[str]) -> None:
    services = [
        service("dsr", ip_address(vip).version, name=f"s{port}", vip=vip, port=port)
        for port, vip in enumerate(vips, 80)
    ]
    assert {str(vip) for vip in held_vips(config(*services, vip_address=vip_address))} == held
