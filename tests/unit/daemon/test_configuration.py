"""configuration.py: a configuration with its plans, replaced as a whole, and brought up to date service by service."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlb.daemon.configuration import Configuration
from fastlb.errors import ConfigError
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from tests.balancers import config, service
from tests.unit.daemon.worlds import CHECKED, KEYS, with_backend, world_of, written

WEB, API = service("nat", name="web", **CHECKED), service("dsr", name="api", port=81)


def test_a_file_is_read_and_its_states_begin(tmp_path: Path) -> None:
    ids, states = BackendIds(), BackendStates()
    read = Configuration.load(written(tmp_path / "file", WEB, API), ids, states)
    assert [plan.name for plan in read.plans] == ["web", "api"]
    assert read.positions == {"web": 0, "api": 1}
    assert states.config is read.config
    assert states.of("web", KEYS[0]).state == "unknown"
    assert read.summary() == {"services": 2, "backends": 6}
    assert len(read.ids.by_name) == 6
    assert ids.by_name == {}  # they are copied


def test_a_file_that_is_wrong_changes_nothing(tmp_path: Path) -> None:
    ids, states = BackendIds(), BackendStates()
    with pytest.raises(ConfigError):
        Configuration.load(written(tmp_path / "file", WEB, flows="many"), ids, states)
    assert states == BackendStates()


def test_ids_go_on_with_those_before() -> None:
    before = world_of(WEB)
    conf = config(API, WEB)
    before.states.apply_config(conf, 1.0)
    after = Configuration.of(conf, before.configuration.ids, before.states, 1.0)
    old, new = before.configuration.ids.by_name, after.ids.by_name
    assert {name: new[name] for name in old} == old
    assert len(new) == 6
    assert len(old) == 3


def test_plans_that_stay_are_taken_from_before() -> None:
    before = world_of(WEB, API).configuration
    states = BackendStates()
    conf = config(WEB, API, service("nat", name="more", port=82))
    states.apply_config(conf, 1.0)
    after = Configuration.of(conf, before.ids, states, 1.0, before)
    assert [new is old for new, old in zip(after.plans, before.plans, strict=False)] == [True, True]
    differing = Configuration.of(conf, before.ids, states, 1.0, before, {"web"})
    assert [new is old for new, old in zip(differing.plans, before.plans, strict=False)] == [False, True]


def test_what_the_filter_takes() -> None:
    """Replies come back in nat only, pings unless they are switched off."""
    with_echo, without = (world_of(WEB, API, icmp_echo=echo).configuration.keys for echo in (True, False))
    assert len(with_echo.vips) == len(without.vips) + 1
    assert {str(key.address) for key in with_echo.replies} == {key.split(":")[0] for key in KEYS}


def test_only_services_whose_states_have_changed_are_planned() -> None:
    world = world_of(WEB, API)
    before = world.configuration
    after = with_backend(world, KEYS[0], "down").configuration
    assert after.plans[0] is not before.plans[0]
    assert after.plans[1] is before.plans[1]
    assert after.services is not before.services
    assert (after.ids, after.keys) == (before.ids, before.keys)
    assert [member.key for member in after.plans[0].members if not member.unweighted] == [KEYS[0]]


def test_what_changes_no_plan_changes_nothing() -> None:
    """Nor do services that it does not have."""
    world = world_of(WEB)
    updated = world.configuration.updated(world.states, {"web": {KEYS[0]}, "gone": None}, 1.0)
    assert updated is world.configuration
    assert world.configuration.updated(world.states, {}, 1.0) is world.configuration
