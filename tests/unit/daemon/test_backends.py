"""backends.py: results of checks, time and the operator's word mark services, and are logged once they hold."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import structlog

from fastlb.config import Config
from fastlb.daemon.backends import DROP_EVERY, RESPONSES_EVERY, Backends
from fastlb.daemon.world import DataPath, Marks, World
from fastlb.health.results import CheckResult, OnTrouble, Report
from fastlb.observe.changes import MAX_LINES
from tests.balancers import CLIENT, VIP, service
from tests.frames import RST, frame
from tests.unit.daemon.worlds import CHECKED, KEYS, data_path_of, followed, reloaded, world_of

WEB = service("nat", name="web", check={"type": "tcp", "fall": 1, "rise": 1})
API = service("nat", name="api", port=81, **CHECKED)
PLAIN = service("nat", name="plain", port=82)


class FakeChecks:
    """A checker that reports what a test says, in the loop that there is not."""

    def __init__(self, report: Report, trouble: OnTrouble) -> None:
        self.report, self.trouble = report, trouble
        self.configured: list[Config] = []
        self.closed = False

    def apply_config(self, config: Config, changed: Collection[str] | None = None) -> None:
        self.configured.append(config)

    def close(self) -> None:
        self.closed = True


class Stage:
    """Backends alone, over real pipelines."""

    def __init__(self, world: World) -> None:
        self.world, self.woken = world, 0
        self.marks, self.stack = Marks(wake=self.wake), ExitStack()
        self.data_path = data_path_of(world)
        self.backends = Backends(self.data_path, self.marks, self.make)
        with structlog.testing.capture_logs() as self.logs:
            assert self.backends.open(self.stack, world) is world

    def wake(self) -> None:
        self.woken += 1

    def make(self, report: Report, trouble: OnTrouble) -> FakeChecks:
        self.checks = FakeChecks(report, trouble)
        return self.checks

    def checked(self, *results: tuple[str, str, float | None]) -> None:
        with structlog.testing.capture_logs() as self.logs:
            self.checks.report([
                CheckResult((name, key), seconds, "" if seconds is not None else "refused")
                for name, key, seconds in results
            ])  # fmt: skip

    def apply(self, world: World) -> list[str]:
        """What is logged then."""
        with structlog.testing.capture_logs() as logs:
            self.backends.apply(world)
        return [line["event"] for line in logs]

    def follow(self) -> list[str]:
        """Plan and apply what is marked, as the balancer does."""
        taken = self.marks.take()
        self.world = followed(self.world, backends=taken.backends, removed=taken.removed)
        return self.apply(self.world)

    def tick(self, now: float) -> list[str]:
        with structlog.testing.capture_logs() as logs:
            self.backends.tick(now)
        return [line["event"] for line in logs]

    def state(self, key: str, name: str = "web") -> str:
        return self.world.states.of(name, key).state


def test_checks_begin_and_end_with_the_part() -> None:
    world = world_of(WEB)
    stage = Stage(world)
    assert stage.checks.configured == [world.configuration.config]
    stage.stack.close()
    assert stage.checks.closed


def test_a_result_marks_its_backend_alone() -> None:
    stage = Stage(world_of(WEB, API, PLAIN))
    stage.checked(("web", KEYS[0], 0.01))
    assert stage.marks.backends == {"web": {KEYS[0]}}
    assert stage.woken == 1
    assert stage.state(KEYS[0]) == "up"


def test_what_changes_no_state_marks_nothing() -> None:
    """Nor does a service without a check, or a backend that is not known any more."""
    stage = Stage(world_of(WEB, API, PLAIN))
    stage.checked(("web", KEYS[0], 0.01))
    stage.follow()
    stage.checked(("web", KEYS[0], 0.02), ("plain", KEYS[0], None), ("gone", KEYS[0], None), ("web", "1.2.3.4:5", None))
    assert (stage.marks.due, stage.woken) == (False, 1)


def test_a_change_is_logged_after_the_data_path_has_followed() -> None:
    stage = Stage(world_of(WEB))
    stage.checked(("web", KEYS[0], None))
    assert stage.logs == []
    assert stage.follow() == ["backend down"]
    assert stage.apply(stage.world) == []


def test_many_changes_are_one_line() -> None:
    stage = Stage(world_of(*(service("nat", name=f"s{n}", port=80 + n, **CHECKED) for n in range(MAX_LINES))))
    stage.checked(*((f"s{n}", key, None) for n in range(MAX_LINES) for key in KEYS))
    assert stage.woken == 1
    assert stage.follow() == ["backends down", *["no backend takes new flows"] * MAX_LINES]


def test_checks_that_cannot_be_made_are_told_of() -> None:
    """And change no state."""
    stage = Stage(world_of(WEB))
    with structlog.testing.capture_logs() as logs:
        stage.checks.trouble(OSError("too many open files"), 7)
    assert [(line["log_level"], line["reason"], line["count"]) for line in logs] == [
        ("warning", "too many open files", 7)
    ]
    assert not stage.marks.due


def test_a_reload_goes_to_the_checker_once() -> None:
    before = world_of(WEB)
    stage, after = Stage(before), reloaded(before, WEB, API)
    stage.apply(after)
    stage.apply(followed(after, backends={"web": None}))
    assert stage.checks.configured == [before.configuration.config, after.configuration.config]
    stage.world = after
    stage.checked(("api", KEYS[0], 0.01))  # by the states of the new world
    assert stage.state(KEYS[0], "api") == "up"


def test_a_backend_that_comes_up_is_measured_anew() -> None:
    """The time that it took to answer before it went down says nothing of now."""
    forgotten: list[int] = []

    class Forgetting:
        def forget_response(self, backend: int) -> None:
            forgotten.append(backend)

    stage = Stage(world_of(WEB))
    pipelines: list[Any] = [Forgetting(), Forgetting()]
    stage.data_path.pipelines[:] = pipelines
    stage.checked(("web", KEYS[0], None), ("web", KEYS[1], 0.01))
    assert forgotten == [stage.world.configuration.ids.by_name["web", KEYS[1]]] * 2


def test_the_operator_s_word() -> None:
    stage = Stage(world_of(WEB, API))
    name = "api", KEYS[0]
    for say, shown, weight in (
        (lambda: stage.backends.drain(name, None), "draining", None),
        (lambda: stage.backends.set_weight(name, 7), "draining", 7),
        (lambda: stage.backends.enable(name), "unknown", None),
        (lambda: stage.backends.drain(name, 0.0), "drained", None),
    ):
        say()
        assert stage.marks.take().backends == {"api": {KEYS[0]}}
        state = stage.world.states.of(*name)
        assert (state.shown(time.monotonic()), state.weight) == (shown, weight)


def test_the_end_of_a_drain() -> None:
    """Its flows go then: the whole service is planned, and it is said once."""
    stage = Stage(world_of(WEB, API))
    now = time.monotonic()
    stage.backends.drain(("api", KEYS[0]), 30.0)
    stage.follow()
    assert stage.tick(now + 20) == []
    assert not stage.marks.due
    assert stage.tick(now + 40) == []  # what the data path has not followed yet is not said
    assert stage.marks.take().backends == {"api": None}
    assert stage.follow() == ["drained"]
    assert stage.tick(now + 41) == []
    assert not stage.marks.due


def test_steps_of_a_slow_start() -> None:
    slow = service("nat", name="web", slow_start={"window": 20})
    stage = Stage(world_of(slow, PLAIN))
    stage.backends.drain(("web", KEYS[0]), None)
    stage.backends.enable(("web", KEYS[0]))
    stage.follow()
    began, steps = time.monotonic(), 0
    for tenths in range(300):
        stage.tick(began + tenths / 10)
        steps += stage.marks.take().backends == {"web": None}
    assert 18 <= steps <= 21  # the last one is when it is through
    assert not stage.world.states.slow


def test_response_times_are_planned_now_and_then() -> None:
    """For schedulers that go by them, in services that are checked."""
    fast = service("nat", name="fast", scheduler="lrt", port=83, **CHECKED)
    stage = Stage(world_of(WEB, fast))
    now = time.monotonic()
    stage.tick(now)
    assert not stage.marks.due
    stage.tick(now + RESPONSES_EVERY)
    assert stage.marks.take().backends == {"fast": None}
    stage.tick(now + RESPONSES_EVERY + 0.1)
    assert not stage.marks.due


def test_removed_backends_are_forgotten_after_their_flows() -> None:
    keeping = service("nat", name="web", on_leave="keep", timeouts={"tcp_closing": 5})
    before = world_of(keeping | {"backends": [{"address": "10.3.0.11", "port": 8080}]})
    stage = Stage(before)
    (pipeline,) = stage.data_path.pipelines
    pipeline.publish(before.configuration.services, before.ways.routes)
    pipeline.process([frame(CLIENT[4], 40000, VIP[4], 80)], 0)
    after = reloaded(before, keeping | {"backends": [{"address": "10.3.0.12", "port": 8080}]})
    pipeline.publish(after.configuration.services, after.ways.routes)
    stage.world = after
    stage.apply(after)
    assert stage.data_path.flows_of(after.configuration.ids.by_name["web", KEYS[0]]) == 1
    for later in (10.0, 20.0):
        assert stage.tick(later) == []
        assert not stage.marks.due
    pipeline.process([frame(CLIENT[4], 40000, VIP[4], 80, flags=RST)], 1)
    assert stage.tick(20.0 + DROP_EVERY) == []  # its time is not over
    assert stage.tick(20.0 + DROP_EVERY / 2) == []
    assert stage.tick(26.0) == ["removed backends have no flows any more"]
    assert stage.marks.removed == {"web"}
    stage.follow()
    assert ("web", KEYS[0]) not in stage.world.configuration.ids.by_name


def test_without_a_world_nothing_is_due() -> None:
    marks = Marks()
    Backends(DataPath(), marks, FakeChecks).tick(time.monotonic())
    assert not marks.due
