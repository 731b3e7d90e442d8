"""What a reload cannot change, said as `key: old -> new`."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Config
from fastlb.plan.restart import NEEDS_RESTART, restart_reasons
from tests.balancers import config, service

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


# every key with a value that it does not have by itself
OTHER: dict[str, Any] = {
    "interfaces": ["eth7"], "workers": 3, "flows": 64, "ring": {"blocks": 128}, "transmit": "xdp",
    "control": "/tmp/x.sock", "vip_address": "interface", "snat": ["10.3.0.5"], "snat_ports": "2000-2999",
    "flow_log": "/tmp/flows", "flow_file": "/tmp/flow", "affinity_entries": 128,
}  # fmt: skip


def test_they_are_settings_of_all_services() -> None:
    assert set(NEEDS_RESTART) <= set(Config.model_fields)
    assert len(set(NEEDS_RESTART)) == len(NEEDS_RESTART)


def test_reasons_come_in_one_order() -> None:
    """That of the list, whatever order the file has."""
    old, new = config(), config(**{key: OTHER[key] for key in reversed(OTHER)})
    assert [reason.partition(":")[0] for reason in restart_reasons(old, new)] == list(NEEDS_RESTART)
