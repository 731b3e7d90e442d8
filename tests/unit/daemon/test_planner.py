"""planner.py: the next world from marks, where it is planned, and what a reload makes of what changed meanwhile."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from fastlb.daemon import planner
from fastlb.daemon.planner import SERVICE_WORK
from fastlb.daemon.world import Marks, World
from fastlb.errors import FastlbError
from fastlb.plan.backends import BackendStates
from tests import hostviews
from tests.balancers import service
from tests.unit.daemon.worlds import KEYS, followed, world_of, written

WEB = service("nat", name="web", check={"type": "tcp", "fall": 1, "rise": 1})
API = service("nat", name="api", port=81)


def down(world: World, key: str = KEYS[0], passed: bool = False) -> None:
    """Let a check of web fail, or pass."""
    states = world.states
    assert states.checked(states.services["web"], key, 0.01 if passed else None, "refused", 5.0)


def working(world: World, service: str = "web") -> set[str]:
    """The backends that get new flows."""
    plan = world.configuration.plans[world.configuration.positions[service]]
    return {member.key for member in plan.members if member.unweighted}


# --- the next world --------------------------------------------------------------------------------------------------


def test_nothing_marked_changes_nothing() -> None:
    world = world_of(WEB)
    after = followed(world)
    assert after == world
    assert after.ways is world.ways


def test_a_state_changes_its_plan_alone() -> None:
    world = world_of(WEB, API)
    down(world)
    after = followed(world, backends={"web": {KEYS[0]}})
    assert working(after) == set(KEYS[1:])
    assert (after.ways, after.view, after.states) == (world.ways, world.view, world.states)
    assert working(world) == set(KEYS)


def test_a_view_and_path_mtus_change_the_ways_alone() -> None:
    world, view = world_of(WEB), hostviews.view(routes=())
    after = followed(world, view=view)
    assert (after.view, after.configuration) == (view, world.configuration)
    assert after.ways.next_hops == set()
    narrow = followed(world, path_mtus={ip_address("10.3.0.11"): 1400})
    assert narrow.path_mtus == {ip_address("10.3.0.11"): 1400}
    assert narrow.ways is not world.ways
    assert followed(narrow, view=view).path_mtus == narrow.path_mtus


def test_a_removed_backend_that_is_forgotten_frees_its_id() -> None:
    keeping = WEB | {"on_leave": "keep"}
    world = reloaded_by(world_of(keeping), keeping | {"backends": keeping["backends"][1:]})
    assert ("web", KEYS[0]) in world.configuration.ids.by_name
    assert world.states.drop_removed(lambda _: 0, 1e9) == [("web", KEYS[0])]
    after = followed(world, removed={"web"})
    assert ("web", KEYS[0]) not in after.configuration.ids.by_name
    assert after.configuration.ids is not world.configuration.ids


# --- where it is planned ---------------------------------------------------------------------------------------------

SETTLED, WHOLE = {"web": {KEYS[0]}}, {"web": None}
WORK: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"backends": SETTLED}, SERVICE_WORK + 1),
    ({"backends": WHOLE}, SERVICE_WORK + 3),
    ({"backends": {"web": set(KEYS[:2]), "api": {KEYS[0]}, "gone": None}}, 2 * SERVICE_WORK + 3),
    ({"view": hostviews.view()}, 6),
    ({"path_mtus": {}}, 6),
    ({"removed": {"web"}}, 6),
]


def settled_world() -> World:
    """Every backend is up, so that one more or less changes nothing for the rest."""
    world = world_of(WEB, API)
    for key in KEYS:
        down(world, key, passed=True)
    return followed(world, backends={"web": None})


@pytest.mark.parametrize(("marked", "backends"), WORK)
def test_how_much_it_is(marked: dict[str, Any], backends: int) -> None:
    assert planner.work(settled_world(), Marks(**marked)) == backends


def test_a_service_of_which_nothing_is_known_yet_is_planned_whole() -> None:
    assert planner.work(world_of(WEB, API), Marks(backends=SETTLED)) == SERVICE_WORK + 3


@pytest.mark.parametrize(("at_most", "in_loop"), [(SERVICE_WORK + 1, True), (SERVICE_WORK, False)])
def test_what_is_large_is_planned_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, at_most: int, in_loop: bool
) -> None:
    """By a copy of the states, which go on changing; the world keeps those that do."""
    threads: list[int] = []
    used: list[BackendStates] = []
    next_world = planner.next_world

    def noted(world: World, marks: Marks, states: BackendStates, now: float) -> World:
        threads.append(threading.get_ident())
        used.append(states)
        return next_world(world, marks, states, now)

    monkeypatch.setattr(planner, "next_world", noted)
    monkeypatch.setattr(planner, "MAX_IN_LOOP", at_most)
    world = settled_world()
    down(world)
    after = asyncio.run(planner.plan(world, Marks(backends={"web": {KEYS[0]}})))
    assert (threads == [threading.get_ident()], used[0] is world.states) == (in_loop, in_loop)
    assert after.states is world.states
    assert working(after) == set(KEYS[1:])


# --- reloads ---------------------------------------------------------------------------------------------------------


def reloaded_by(world: World, *services: dict[str, Any]) -> World:
    """Return the world after a reload that went through at once."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(planner, "load_config", lambda _: world_of(*services).configuration.config)
        return planner.reloaded("", world, world.states.copy())


def test_the_file_as_it_is_now(tmp_path: Path) -> None:
    world = world_of(WEB)
    down(world)
    world = followed(world, backends={"web": {KEYS[0]}})
    states = world.states.copy()
    after = planner.reloaded(written(tmp_path / "file", WEB, API), world, states)
    assert [plan.name for plan in after.configuration.plans] == ["web", "api"]
    assert after.states is states
    assert working(after) == set(KEYS[1:])  # what checks said stays
    assert [plan.name for plan in world.configuration.plans] == ["web"]
    assert world.states.of("api", KEYS[0]).state == "unchecked"
    assert (after.view, after.path_mtus) == (world.view, world.path_mtus)


REFUSED: list[tuple[tuple[dict[str, Any], ...], dict[str, Any], str]] = [
    ((WEB,), {"flows": 8192}, r"^a reload cannot change .*flows.*; restart fastlb instead$"),
    ((service("dsr", name="far", backends=[{"address": "10.6.0.1"}]),), {}, r"10\.6\.0\.1"),
    ((WEB, WEB), {}, "web"),
]


@pytest.mark.parametrize(("services", "settings", "problem"), REFUSED)
def test_what_is_refused(
    tmp_path: Path, services: tuple[dict[str, Any], ...], settings: dict[str, Any], problem: str
) -> None:
    world = world_of(WEB)
    with pytest.raises(FastlbError, match=problem):
        planner.reloaded(written(tmp_path / "file", *services, **settings), world, world.states.copy())
    assert world == replace(world, states=world_of(WEB).states)


class Reload:
    """A reload that is being planned beside the event loop, while ``world`` goes on to hold."""

    def __init__(self, before: tuple[dict[str, Any], ...], after: tuple[dict[str, Any], ...]) -> None:
        self.world = world_of(*before)
        for key in KEYS:
            down(self.world, key, passed=True)
        self.world = followed(self.world, backends={"web": None})
        states = self.world.states.copy()
        self.earlier = dict(states.by_backend)
        conf = world_of(*after).configuration.config
        with pytest.MonkeyPatch.context() as context:
            context.setattr(planner, "load_config", lambda _: conf)
            self.fresh = planner.reloaded("", self.world, states)

    def caught_up(self) -> World:
        return asyncio.run(planner.caught_up(self.fresh, self.world, self.earlier))


def test_nothing_changed_meanwhile() -> None:
    reload = Reload((WEB,), (WEB, API))
    assert reload.caught_up() is reload.fresh


def test_a_backend_that_goes_down_while_the_file_is_read_is_down_in_the_new_world() -> None:
    reload = Reload((WEB,), (WEB, API))
    down(reload.world)
    after = reload.caught_up()
    assert after.states.of("web", KEYS[0]).state == "down"
    assert working(after) == set(KEYS[1:])
    assert [plan.name for plan in after.configuration.plans] == ["web", "api"]


def test_the_operator_s_word_of_meanwhile_holds() -> None:
    reload = Reload((WEB, API), (WEB, API | {"port": 82}))
    reload.world.states.drain(("api", KEYS[1]), 60.0)
    after = reload.caught_up()
    assert after.states.timed == {("api", KEYS[1])}
    assert working(after, "api") == {KEYS[0], KEYS[2]}


def test_states_of_what_the_file_has_no_more_are_gone() -> None:
    reload = Reload((WEB, API), (API,))
    down(reload.world)
    assert reload.caught_up() is reload.fresh
    assert ("web", KEYS[0]) not in reload.fresh.states.by_backend


def test_a_check_that_ended_meanwhile_says_nothing_where_there_is_none_any_more() -> None:
    """Else the backend would be down for ever."""
    reload = Reload((WEB,), (service("nat", name="web"),))
    down(reload.world)
    after = reload.caught_up()
    assert after.states.of("web", KEYS[0]).state == "unchecked"
    assert working(after) == set(KEYS)


def test_a_slow_start_by_the_file_is_not_lost_to_a_check_of_meanwhile() -> None:
    """The backend had no weight, and the file gives it one."""
    slow = WEB | {"slow_start": {"window": 60}}
    backends = [dict(each) for each in WEB["backends"]]
    none = [backends[0] | {"weight": 0}, *backends[1:]]
    reload = Reload((slow | {"backends": none},), (slow | {"backends": backends},))
    assert reload.fresh.states.of("web", KEYS[0]).slow_since is not None
    reload.world.states.checked(reload.world.states.services["web"], KEYS[0], 0.02, "", 6.0)
    after = reload.caught_up()
    assert after.states.of("web", KEYS[0]).slow_since is not None
    assert after.states.slow == {"web": {KEYS[0]}}


def test_the_host_and_path_mtus_of_meanwhile() -> None:
    reload = Reload((WEB,), (WEB, API))
    view, path_mtus = hostviews.view(routes=()), {ip_address("10.3.0.11"): 1400}
    reload.world = followed(reload.world, view=view, path_mtus=path_mtus)
    after = reload.caught_up()
    assert (after.view, after.path_mtus) == (view, path_mtus)
    assert after.ways.next_hops == set()


def test_beside_the_loop_it_is_another_thread() -> None:
    assert asyncio.run(planner.beside(threading.get_ident)) != threading.get_ident()
