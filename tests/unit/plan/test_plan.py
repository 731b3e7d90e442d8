"""reconcile.py: from a configuration to tables, and from one configuration to the next."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

import fastlb
from fastlb.errors import FastlbError
from fastlb.model.match import LATER, Key, Keys
from fastlb.plan.ids import ID_QUARANTINE, BackendIds
from fastlb.plan.keys import classifier_keys, held_vips
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.restart import restart_reasons
from tests.balancers import BACKENDS, VIP, config, service

A, B, C, D = (("web", f"10.3.0.{n}:80") for n in (1, 2, 3, 4))

# --- numbers of backends ------------------------------------------------------

# Calls in their order: (wanted, seconds, the numbers they get)
ASSIGNED = {
    "counted from 1": [([A, B], 0, [1, 2])],
    "kept": [([A, B], 0, [1, 2]), ([B, A], 1, [2, 1])],
    "one added": [([A, B], 0, [1, 2]), ([A, C, B], 1, [1, 3, 2])],
    "a free number rests": [([A, B], 0, [1, 2]), ([A], 1, [1]), ([A, C], 60.9, [1, 3])],
    "and is used again": [([A, B], 0, [1, 2]), ([A], 1, [1]), ([A, C], 61, [1, 2])],
    "at the very moment of its leaving too": [([A], 0, [1]), ([B], 100, [2])],
    "oldest first": [([A, B, C], 0, [1, 2, 3]), ([A, C], 1, [1, 3]), ([A], 2, [1]), ([A, D], 62, [1, 2])],
    "only those that rested": [
        ([A, B, C], 0, [1, 2, 3]),
        ([A, C], 1, [1, 3]),
        ([A], 50, [1]),
        ([A, B, D], 62, [1, 2, 4]),
    ],
    "one that comes back is new": [([A], 0, [1]), ([], 1, []), ([A], 2, [2])],
    "by service": [([A, ("api", A[1])], 0, [1, 2])],
}


@pytest.mark.parametrize("calls", ASSIGNED.values(), ids=ASSIGNED.keys())
def test_backend_numbers(calls: list[tuple[list[tuple[str, str]], float, list[int]]]) -> None:
    ids = BackendIds()
    for wanted, now, expected in calls:
        numbers = ids.assign(wanted, now)
        assert [numbers[backend] for backend in wanted] == expected
        assert set(numbers) == set(wanted)


def test_numbers_rest_longer_than_a_sweep() -> None:
    assert ID_QUARANTINE > 2 * 10


def test_numbers_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackendIds, "MAX", 2)
    ids = BackendIds()
    before = dict(ids.assign([A, B], 0))
    with pytest.raises(FastlbError, match="more than 2 backends, those that left within a minute included"):
        ids.copy().assign([B, C], 1)
    assert ids.assign([A, B], 2) == before  # tried with a copy, it changed nothing


def test_a_copy_goes_its_own_way() -> None:
    ids = BackendIds()
    ids.assign([A, B], 0)
    ids.assign([A], 1)
    copy = ids.copy()
    assert copy.assign([A, C], 70)[C] == 2
    assert ids.assign([A, D], 70)[D] == 2
    assert B not in ids.assign([A], 71)


# --- plans --------------------------------------------------------------------


def plans(*services: dict[str, Any], **settings: Any) -> list[Plan]:
    return plan_services(config(*services, **settings), BackendIds(), 0.0)


def test_a_plan() -> None:
    plan = plans(service("nat", name="web", backends=[
        {"address": "10.3.0.9"},
        {"address": "10.3.0.10", "port": 8080, "weight": 7},
        {"address": "10.3.0.10", "port": 443, "weight": 0},
    ]), hash_seed=5)[0]  # fmt: skip
    assert (plan.name, plan.vip, plan.port) == ("web", ip_address(VIP[4]), 80)
    assert (plan.protocol, plan.forward, plan.no_backend) == ("tcp", "nat", "drop")
    # Sorted by key, as text; numbers by the configuration's order
    assert [(m.key, m.id, str(m.address), m.port, m.weight) for m in plan.members] == [
        ("10.3.0.10:443", 3, "10.3.0.10", 443, 0),
        ("10.3.0.10:8080", 2, "10.3.0.10", 8080, 7),
        ("10.3.0.9:80", 1, "10.3.0.9", 80, 1),
    ]
    assert plan.table is not None
    expected = fastlb.maglev_table([m.key for m in plan.members], [0, 7, 1], 251, 5)
    assert memoryview(plan.table.to_bytes()).cast("H").tolist() == list(expected)


def test_a_plan_for_any_port() -> None:
    plan = plans(service("dsr", 6, port="any"))[0]
    assert plan.port == 0
    assert [(m.key, m.port) for m in plan.members] == [(f"[{address}]:0", 0) for address in BACKENDS[6]]


@pytest.mark.parametrize("backends", [[], [{"address": "10.3.0.9", "weight": 0}]])
def test_a_plan_without_a_backend(backends: list[dict[str, Any]]) -> None:
    plan = plans(service("dsr", backends=backends))[0]
    assert plan.table is None
    assert len(plan.members) == len(backends)


def test_plans_keep_the_configuration_s_order() -> None:
    named = [service("dsr", name=name, port=port) for port, name in enumerate(["z", "a", "m"], 1)]
    assert [plan.name for plan in plans(*named)] == ["z", "a", "m"]


# --- what the classifier takes ------------------------------------------------


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
SNAT = ["10.3.0.5", "fd00:3::5"]


@pytest.mark.parametrize(("services", "vips", "replies"), TAKEN)
def test_classifier_keys(services: list[dict[str, Any]], vips: set[Key], replies: set[Key]) -> None:
    vips |= {key(str(each.address), 0, LATER | each.protocol) for each in vips}
    replies |= {key(str(each.address), 0, LATER | each.protocol) for each in replies}
    assert classifier_keys(plans(*services), False) == Keys(vips, replies)
    addresses = {key(str(each.address), 0, 0) for each in vips}
    assert classifier_keys(plans(*services), True) == Keys(vips | addresses, replies)


# --- from one configuration to the next ---------------------------------------

CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"interfaces": ["eth1", "eth2"]}, ["interfaces: eth0 -> eth1, eth2"]),
    ({"workers": 1}, ["workers: auto -> 1"]),
    ({"workers": 2, "transmit": "xdp"}, ["workers: auto -> 2", "transmit: auto -> xdp"]),
    ({"flows": 9999}, ["flows: 4096 -> 9999"]),
    ({"control": "/tmp/x.sock"}, ["control: /run/fastlb/fastlb.sock -> /tmp/x.sock"]),
    ({"vip_address": "interface"}, ["vip_address: none -> interface"]),
    ({"hash_seed": 3, "maglev_size": 509, "timeouts": {"udp": 5}}, []),
    ({"workers": 1, "interfaces": []}, ["interfaces: eth0 -> ", "workers: auto -> 1"]),
]


@pytest.mark.parametrize(("changes", "reasons"), CHANGES)
def test_restart_reasons(changes: dict[str, Any], reasons: list[str]) -> None:
    old = config(interfaces=["eth0"])
    new = config(service("dsr"), **{"interfaces": ["eth0"], **changes})
    assert list(restart_reasons(old, new)) == reasons


RING_CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"blocks": 128}, "blocks=64", "blocks=128"),
    ({"open_blocks": False}, "open_blocks='auto'", "open_blocks=False"),
    ({"spin": "0us"}, "spin=5e-05", "spin=0.0"),
]


@pytest.mark.parametrize(("ring", "before", "after"), RING_CHANGES)
def test_a_changed_ring_needs_a_restart(ring: dict[str, Any], before: str, after: str) -> None:
    (reason,) = restart_reasons(config(), config(ring=ring))
    key, _, change = reason.partition(": ")
    old, new = change.split(" -> ")
    assert key == "ring"
    assert before in old.split()
    assert after in new.split()


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
