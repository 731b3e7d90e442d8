"""answers.py: a backend that answers none of its flows is told of once, beside its state, and once when it answers."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from fastlb.daemon.answers import EVERY, Answers
from fastlb.daemon.world import DataPath, World
from fastlb.model.modes import MODES
from fastlb.observe.changes import MAX_LINES
from tests.balancers import service
from tests.unit.daemon.worlds import KEYS, reloaded, world_of

STEP = EVERY + 0.1


class FakePipeline:
    """Counters that a test sets: by id, flows that were sent, and answers."""

    def __init__(self) -> None:
        self.counted: dict[int, tuple[int, int]] = {}

    def backend_stats(self, number: int) -> dict[str, int]:
        new, answered = self.counted.get(number, (0, 0))
        return {"new_flows": new, "answered_flows": answered, "reply_packets": 0}


class Stage:
    def __init__(self, world: World) -> None:
        self.world, self.now, self.pipeline = world, 100.0, FakePipeline()
        pipelines: list[Any] = [self.pipeline]
        self.part = Answers(DataPath(pipelines))
        self.part.apply(world)
        self.look(1)

    def count(self, key: str, new: int, answered: int, name: str = "web") -> None:
        self.pipeline.counted[self.world.configuration.ids.by_name[name, key]] = new, answered

    def look(self, times: int = 8) -> list[dict[str, Any]]:
        """What is logged in so many rounds."""
        with structlog.testing.capture_logs() as logs:
            for _ in range(times):
                self.now += STEP
                self.part.tick(self.now)
        return [dict(line) for line in logs]

    def silent(self, name: str = "web") -> list[str]:
        states = self.world.states.by_backend
        return [key for (service, key), state in states.items() if service == name and state.silent]


@pytest.mark.parametrize("forward", MODES)
def test_it_is_told_once_and_its_state_stays(forward: str) -> None:
    world = world_of(service(forward, name="web", backends=[{"address": "10.3.0.11"}]), snat=["10.2.0.5"])
    stage, key = Stage(world), "10.3.0.11:80"
    stage.count(key, 9, 0)
    [line] = stage.look()
    assert (line["log_level"], line["event"], line["flows"]) == ("warning", MODES[forward].silence, 9)
    assert (line["service"], line["backend"], line["hint"]) == ("web", key, MODES[forward].wiring)
    assert stage.silent() == [key]
    assert world.states.of("web", key).state == "unchecked"
    stage.count(key, 20, 0)
    assert stage.look() == []
    stage.count(key, 20, 1)
    assert [line["event"] for line in stage.look()] == ["flows are answered again"]
    assert stage.silent() == []
    stage.count(key, 40, 1)
    assert stage.look() == []  # its state says so; the log has said it
    assert stage.silent() == [key]


def test_others_are_not_concerned() -> None:
    stage = Stage(world_of())
    stage.count(KEYS[0], 9, 0)
    stage.count(KEYS[1], 9, 9)
    assert len(stage.look()) == 1
    assert stage.silent() == [KEYS[0]]


def test_over_udp_nobody_need_answer() -> None:
    stage = Stage(world_of(service("nat", protocol="udp", name="web")))
    stage.count(KEYS[0], 9, 0)
    assert stage.look() == []


def test_many_are_one_line() -> None:
    listed = [{"address": f"10.3.0.{n}", "port": 8080} for n in range(20, 20 + MAX_LINES + 1)]
    stage = Stage(world_of(service("nat", name="web", backends=listed)))
    for backend in listed:
        stage.count(f"{backend['address']}:8080", 5, 0)
    [line] = stage.look()
    assert (line["count"], len(line["backends"])) == (MAX_LINES + 1, 3)


def test_a_reload_forgets_those_that_left() -> None:
    before = world_of()
    stage = Stage(before)
    stage.count(KEYS[0], 9, 0)
    stage.look()
    stage.world = reloaded(before, service("nat", name="web", backends=[{"address": "10.3.0.12", "port": 8080}]))
    stage.part.apply(stage.world)
    stage.count(KEYS[1], 9, 0)
    assert [line["backend"] for line in stage.look()] == [KEYS[1]]
    assert stage.silent() == [KEYS[1]]
