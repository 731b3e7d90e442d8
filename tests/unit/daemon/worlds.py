"""Worlds for tests of one part: real configurations, states and ways, on the host of tests/hostviews.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlb.daemon.configuration import Configuration
from fastlb.daemon.planner import next_world
from fastlb.daemon.world import DataPath, Marks, World
from fastlb.model.hostview import KernelView
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.ways import find_ways
from fastlb.workers.workers import open_pipelines
from tests import hostviews
from tests.balancers import BACKENDS, config, service

INTERFACES = ["eth0", "eth1"]
CHECKED = {"check": {"type": "tcp"}}
KEYS = tuple(f"{address}:8080" for address in BACKENDS[4])


def world_of(*services: Mapping[str, Any], view: KernelView | None = None, **settings: Any) -> World:
    """Return the world of a start with these services; of one in nat if none is given."""
    listed = services or (service("nat", name="web"),)
    conf = config(*listed, **{"interfaces": INTERFACES, "flow_file": "none"} | settings)
    states = BackendStates()
    states.apply_config(conf, 0.0)
    configuration = Configuration.of(conf, BackendIds(), states, 0.0)
    seen = view or hostviews.view()
    return World(configuration, seen, states, {}, find_ways(conf, configuration.plans, seen, {}))


def reloaded(world: World, *services: Mapping[str, Any], **settings: Any) -> World:
    """Return the world after a reload of these services."""
    conf = config(*services, **{"interfaces": INTERFACES, "flow_file": "none"} | settings)
    states, before = world.states.copy(), world.configuration
    states.apply_config(conf, 1.0)
    configuration = Configuration.of(conf, before.ids, states, 1.0)
    ways = find_ways(conf, configuration.plans, world.view, {})
    return World(configuration, world.view, states, {}, ways)


def followed(world: World, **marks: Any) -> World:
    """Return the world with what the marks say."""
    return next_world(world, Marks(**marks), world.states, 1.0)


def with_backend(world: World, key: str, state: str, service: str = "web") -> World:
    """Return the world after the health of one backend has changed; its states change with it."""
    checked = world.states.services[service]
    for _ in range(checked.check.fall if checked.check else 0):
        world.states.checked(checked, key, 0.01 if state == "up" else None, "", 1.0)
    return followed(world, backends={service: {key}})


def data_path_of(world: World, workers: int = 1) -> DataPath:
    """Return a data path with pipelines for this world."""
    return DataPath(open_pipelines(world.configuration.config, workers))


def written(path: Path, *services: Mapping[str, Any], **settings: Any) -> str:
    """Write what `world_of` would have of these services to a file, at once; return its path."""
    plain = {"flows": 4096, "maglev_size": 251, "new_flow_rate": 1_000_000}
    told = {**plain, "interfaces": INTERFACES, "flow_file": "none", **settings, "services": list(services)}
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(told))
    fresh.replace(path)
    return str(path)
