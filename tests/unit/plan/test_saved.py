"""What the next process is told of the states of backends, and what it makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastlb.config import Config
from fastlb.plan.backends import KEPT_BY, BackendState, BackendStates
from fastlb.plan.saved import SAVED, restored_states, saved_services, saved_states
from tests.balancers import BACKENDS, config, service

KEYS = [f"{address}:8080" for address in BACKENDS[4]]
CHECK = {"type": "tcp", "rise": 2, "fall": 3}
SLOW = {"window": 100, "floor": 0.1}


def settings(**changes: Any) -> Config:
    return config(service("nat", name="web") | changes)


def following(conf: Config) -> BackendStates:
    states = BackendStates()
    states.apply_config(conf, 0.0)
    return states


def through_json(states: BackendStates, now: float = 0.0) -> BackendStates:
    return restored_states(json.loads(json.dumps(saved_states(states))), now)


def test_what_is_saved_is_what_is_restored() -> None:
    """Through JSON: health, drain, weight, slow start, and a backend that was removed."""
    conf = settings(check=CHECK, slow_start=SLOW, on_leave="keep")
    states = following(conf)
    states.checked(conf.services[0], KEYS[0], None, "no answer", 0.0)
    states.checked(conf.services[0], KEYS[1], 0.01, "", 0.0)
    states.drain(("web", KEYS[1]), 500.0)
    states.set_weight(("web", KEYS[2]), 7, 10.0)
    left = conf.model_dump()["services"][0]["backends"][1:]
    less = settings(check=CHECK, slow_start=SLOW, on_leave="keep", backends=left)
    states.apply_config(less, 20.0)
    again = through_json(states, 30.0)
    again.apply_config(less, 30.0)
    for key in KEYS:
        for name in SAVED:
            assert getattr(again.of("web", key), name) == getattr(states.of("web", key), name), (key, name)
    assert {key: gone.backend for key, gone in again.removed["web"].items()} == {KEYS[0]: conf.services[0].backends[0]}
    assert (len(again.drains_ended(499.0, 501.0)), again.drains_ended(400.0, 499.0)) == (1, [])


def test_what_is_restored_is_followed_as_by_a_reload() -> None:
    """A backend that is new beside those of the process before comes slowly; one that left is removed."""
    before = following(settings(on_leave="keep", backends=[{"address": host} for host in BACKENDS[4][:2]]))
    now = settings(on_leave="keep", slow_start=SLOW, backends=[{"address": host} for host in BACKENDS[4][1:]])
    again = restored_states(saved_states(before), 50.0)
    again.apply_config(now, 50.0)
    first, second, third = (again.of("web", f"{host}:80") for host in BACKENDS[4])
    assert (first.left, second.left, third.left) == (50.0, None, None)
    assert (second.slow_since, third.slow_since) == (None, 50.0)


@pytest.mark.parametrize("damage", [
    {"services": [{"name": "web"}]},
    {"stand": [["web", KEYS[0], {"quarantined": True}]]},
    {"removed": [["web", "10.0.0.1:80", {"address": "x"}, {"left": 1.0}]]},
])  # fmt: skip
def test_what_another_fastlb_saved_may_mean_nothing(damage: dict[str, Any]) -> None:
    saved = saved_states(following(settings()))
    assert restored_states(saved, 0.0).by_backend.keys() == {("web", key) for key in KEYS}
    assert restored_states(saved | damage, 0.0) == BackendStates()
    assert restored_states({}, 0.0) == BackendStates()


# A state, and what is written of it
MARKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"state": "up"}, {"state": "up"}),
    ({"state": "down", "reason": "refused", "streak": 2, "response": 0.1}, {"state": "down"}),  # checks tell it again
    ({"weight": 0}, {"weight": 0}),  # 0 is no default
    ({"draining": True, "deadline": 7.5, "slow_since": 0.0}, {"draining": True, "deadline": 7.5, "slow_since": 0.0}),
]


@pytest.mark.parametrize(("state", "written"), MARKS)
def test_only_what_is_not_as_at_first_is_written(state: dict[str, Any], written: dict[str, Any]) -> None:
    states = following(settings())
    states.update(("web", KEYS[1]), BackendState(**state))
    saved = saved_states(states)
    assert saved["stand"] == ([["web", KEYS[1], written]] if written else [])
    assert through_json(states).of("web", KEYS[1]) == BackendState(**written)


def test_deadlines_and_slow_starts_go_on() -> None:
    conf = settings(slow_start=SLOW)
    states = following(conf)
    states.drain(("web", KEYS[0]), 40.0)
    states.set_weight(("web", KEYS[1]), 0, 0.0)
    states.set_weight(("web", KEYS[1]), 1, 10.0)
    states.drain(("web", KEYS[2]))
    again = through_json(states)
    assert again.timed == {("web", KEYS[0])}  # the others have no deadline
    assert again.slow == {"web": {KEYS[1]}}
    again.apply_config(conf, 50.0)
    assert again.due(30.0, 50.0) == {"web"}
    assert [share.ramp for share in again.shares(conf.services[0], 60.0)] == [
        share.ramp for share in states.shares(conf.services[0], 60.0)]  # fmt: skip


def test_services_are_what_decides_over_removed_backends() -> None:
    """Written once a configuration: what is not in it may change without an effect on them."""
    [web] = saved_services(settings(check=CHECK, scheduler="rr", on_leave="reset"))
    assert set(web) == {"name", "backends", *KEPT_BY}
    states = following(settings())
    assert saved_states(states, [{"name": "as given"}])["services"] == [{"name": "as given"}]
    assert saved_states(states)["services"] == saved_services(settings())


@pytest.mark.parametrize(("changes", "kept"), [
    ({}, True), ({"scheduler": "rr"}, True), ({"vip": "203.0.113.11"}, False), ({"port": 81}, False),
    ({"protocol": "udp"}, False), ({"forward": "dsr", "backends": []}, False), ({"on_leave": "rehash"}, False),
])  # fmt: skip
def test_a_backend_that_left_while_nothing_ran_is_kept_as_by_a_reload(changes: dict[str, Any], kept: bool) -> None:
    """As long as its service can still have its flows."""
    again = through_json(following(settings(on_leave="keep")))
    fewer = [{"address": address, "port": 8080} for address in BACKENDS[4][1:]]
    again.apply_config(settings(**{"on_leave": "keep", "backends": fewer} | changes), 5.0)
    assert list(again.removed.get("web", {})) == ([KEYS[0]] if kept else [])
