"""From one world to the next: what is small is planned in the event loop, what is large in a thread beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ParamSpec, TypeVar

from fastlb.config.load import load_config
from fastlb.daemon.configuration import Configuration
from fastlb.daemon.memory import check_plans
from fastlb.daemon.preflight import check_reachable, host_warnings
from fastlb.daemon.world import Marks, World
from fastlb.errors import FastlbError
from fastlb.model.names import BackendName
from fastlb.plan.backends import BackendState, BackendStates
from fastlb.plan.restart import restart_reasons
from fastlb.plan.ways import find_ways

MAX_IN_LOOP = 500  # backends that are planned at once in the event loop, in 5 ms or so
SERVICE_WORK = 200  # as many backends cost as much as the tables of one service

P = ParamSpec("P")
T = TypeVar("T")


def next_world(world: World, marks: Marks, states: BackendStates, now: float) -> World:
    """Return the world with what the marks say; ``states``: the world's, or a copy of them. Pure."""
    configuration = world.configuration
    if marks.removed:
        differing = marks.removed | marks.backends.keys()
        configuration = Configuration.of(
            configuration.config, configuration.ids, states, now, configuration, differing
        )
    elif marks.backends:
        configuration = configuration.updated(states, marks.backends, now)
    view = world.view if marks.view is None else marks.view
    path_mtus = world.path_mtus if marks.path_mtus is None else marks.path_mtus
    ways = world.ways
    if marks.removed or view is not world.view or path_mtus is not world.path_mtus:
        ways = find_ways(configuration.config, configuration.plans, view, path_mtus)
    return replace(world, configuration=configuration, view=view, path_mtus=path_mtus, ways=ways)


def work(world: World, marks: Marks) -> int:
    """Return about how many backends must be planned for these marks."""
    if marks.removed or marks.view is not None or marks.path_mtus is not None:
        return len(world.states.by_backend)
    return sum(
        SERVICE_WORK
        + (len(world.states.keys[name]) if keys is None or not _is_settled(world, name) else len(keys))
        for name, keys in marks.backends.items()
        if name in world.states.keys
    )


def _is_settled(world: World, service: str) -> bool:
    at = world.configuration.positions.get(service)
    return at is not None and world.configuration.plans[at].settled


async def plan(world: World, marks: Marks) -> World:
    """Return the world with what the marks say, computed where it holds up nobody."""
    now = time.monotonic()
    if work(world, marks) <= MAX_IN_LOOP:
        return next_world(world, marks, world.states, now)
    return await beside(next_world, world, marks, world.states.copy(), now)


def reloaded(path: str, world: World, states: BackendStates) -> World:
    """Return the world with what the file says now. ``states`` are a copy, and go over to it. Raises FastlbError."""
    before = world.configuration
    config, now = load_config(path), time.monotonic()
    refused = list(restart_reasons(before.config, config))
    if refused:
        raise FastlbError("a reload cannot change " + "; ".join(refused) + "; restart fastlb instead")
    check_plans(config, before.config)
    known = dict(states.by_backend)
    states.apply_config(config, now)
    differing = {name[0] for name, state in states.by_backend.items() if known.get(name) is not state}
    differing |= {service for service, _ in known.keys() - states.by_backend.keys()} | states.removed.keys()
    configuration = Configuration.of(config, before.ids, states, now, before, differing)
    check_reachable(world.view, list(configuration.plans), config.interfaces)
    ways = find_ways(config, configuration.plans, world.view, world.path_mtus)
    return replace(world, configuration=configuration, states=states, ways=ways)


def fresh_notes(before: World, after: World) -> list[tuple[str, str]]:
    """Return what may be a mistake in a configuration that a reload brings, as event and problem; not what was so
    before."""
    known, found = (
        host_warnings(world.configuration.config, world.configuration.plans, world.view) for world in (before, after)
    )
    return [note for note in found if note not in set(known)]


async def caught_up(fresh: World, now_holds: World, earlier: Mapping[BackendName, BackendState]) -> World:
    """Return a world that was planned beside the event loop with what has changed in the meantime.

    ``now_holds``: the world that holds. ``earlier``: the states of backends, by name, when planning began.
    """
    marks = Marks()
    for name in fresh.states.catch_up(now_holds.states, earlier, time.monotonic()):
        marks.mark(name)
    marks.view = None if now_holds.view is fresh.view else now_holds.view
    marks.path_mtus = None if now_holds.path_mtus is fresh.path_mtus else now_holds.path_mtus
    return await plan(fresh, marks) if marks.due else fresh


async def beside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a pure function in a thread, while the event loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: function(*args, **kwargs))


