"""current.py: all parts follow what is marked, go over to what a file says, or back; nothing gets lost on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog

from fastlb.daemon import planner
from fastlb.daemon.current import Current
from fastlb.daemon.parts import Parts
from fastlb.daemon.world import Marks, World
from fastlb.errors import FastlbError
from tests import hostviews
from tests.balancers import service
from tests.unit.daemon.worlds import KEYS, data_path_of, world_of, written

WEB = service("nat", name="web", check={"type": "tcp", "fall": 1, "rise": 1})
API = service("nat", name="api", port=81)
PATIENCE = 20.0  # seconds that no test waits


class FakePart:
    """A part that notes which worlds it is given, in which thread, and refuses those it is told to."""

    def __init__(self, name: str, done: list[tuple[str, World]]) -> None:
        self.name, self.done = name, done
        self.refuses: Callable[[World], bool] = lambda _: False
        self.meanwhile: Callable[[], None] = lambda: None
        self.threads: list[int] = []

    def open(self, stack: ExitStack, world: World) -> World:
        return world

    def tick(self, now: float) -> None:
        """Do nothing."""

    def apply(self, world: World) -> None:
        self._note(self.name, world)

    def _note(self, what: str, world: World) -> None:
        self.threads.append(threading.get_ident())
        self.meanwhile()
        if self.refuses(world):
            raise FastlbError(f"{what} refuses")
        self.done.append((what, world))


class FakeFlows(FakePart):
    """The part that is told of a world before it is applied, and has a log that is opened again."""

    def __init__(self, name: str, done: list[tuple[str, World]]) -> None:
        super().__init__(name, done)
        self.reopened = 0

    def reopen_log(self) -> None:
        self.reopened += 1

    def prepare(self, world: World) -> None:
        self._note("prepare", world)


class Stage:
    """A world that holds, and three parts that go by it."""

    def __init__(self, tmp_path: Path, *services: dict[str, Any]) -> None:
        self.done: list[tuple[str, World]] = []
        self.flows, self.publisher = FakeFlows("flows", self.done), FakePart("publisher", self.done)
        self.backends = FakePart("backends", self.done)
        self.file, self.marks, self.first = tmp_path / "fastlb.yaml", Marks(), world_of(*(services or (WEB, API)))
        self.data_path = data_path_of(self.first)
        self.current = Current(written(self.file, WEB, API), self.first, self.marks, self._parts())
        self.read = 0

    def _parts(self) -> Parts:
        stage = self

        class InOrder:
            flows, publisher, data_path = stage.flows, stage.publisher, stage.data_path

            def in_order(self) -> list[FakePart]:
                return [stage.flows, stage.publisher, stage.backends]

        made: Any = InOrder()
        return made

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.done]

    def check(self, key: str, passed: bool = False) -> None:
        """A check of web ends."""
        states = self.current.world.states
        if states.checked(states.services["web"], key, 0.01 if passed else None, "refused", 5.0):
            self.marks.mark(("web", key))

    def all_up(self) -> None:
        for key in KEYS:
            self.check(key, passed=True)
        asyncio.run(self.current.follow())
        self.done.clear()

    def while_it_reads(self, monkeypatch: pytest.MonkeyPatch, *events: Callable[[], Any]) -> None:
        """Have these happen in the event loop, one after another, while a file is being planned beside it."""
        reloaded = planner.reloaded
        loop: list[asyncio.AbstractEventLoop] = []

        async def happen() -> None:
            for event in events:
                result = event()
                if asyncio.iscoroutine(result):
                    await result

        def slowly(*given: Any) -> World:
            world = reloaded(*given)
            asyncio.run_coroutine_threadsafe(happen(), loop[0]).result(PATIENCE)
            return world

        beside = planner.beside

        async def noted(*given: Any) -> Any:
            loop[:] = [asyncio.get_running_loop()]
            return await beside(*given)

        monkeypatch.setattr(planner, "reloaded", slowly)
        monkeypatch.setattr(planner, "beside", noted)


def working(world: World, name: str = "web") -> set[str]:
    """The backends that get new flows."""
    plan = world.configuration.plans[world.configuration.positions[name]]
    return {member.key for member in plan.members if member.unweighted}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    staged = Stage(tmp_path)
    staged.all_up()
    return staged


# --- following -------------------------------------------------------------------------------------------------------


def test_all_parts_follow_in_their_order(stage: Stage) -> None:
    stage.check(KEYS[0])
    asyncio.run(stage.current.follow())
    assert stage.names == ["flows", "publisher", "backends"]
    assert {id(world) for _, world in stage.done} == {id(stage.current.world)}
    assert working(stage.current.world) == set(KEYS[1:])
    assert not stage.marks.due


@pytest.mark.parametrize(("at_most", "in_loop"), [(planner.MAX_IN_LOOP, True), (0, False)])
def test_only_planning_goes_beside_the_loop(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, at_most: int, in_loop: bool
) -> None:
    planned: list[int] = []
    next_world = planner.next_world

    def noted(*given: Any) -> World:
        planned.append(threading.get_ident())
        return next_world(*given)

    monkeypatch.setattr(planner, "next_world", noted)
    monkeypatch.setattr(planner, "MAX_IN_LOOP", at_most)
    stage.check(KEYS[0])
    asyncio.run(stage.current.follow())
    assert (planned == [threading.get_ident()]) == in_loop
    assert set(stage.flows.threads + stage.publisher.threads) == {threading.get_ident()}


def test_a_change_that_a_part_refuses_is_logged_and_the_next_one_follows(stage: Stage) -> None:
    stage.publisher.refuses = lambda _: True
    stage.check(KEYS[0])
    with structlog.testing.capture_logs() as logs:
        asyncio.run(stage.current.follow())
    assert [(line["event"], line["error"]) for line in logs] == [
        ("a change was not taken over", "publisher refuses")
    ]
    stage.publisher.refuses = lambda _: False
    stage.check(KEYS[1])
    asyncio.run(stage.current.follow())
    assert working(stage.done[-1][1]) == {KEYS[2]}


# --- reloads ---------------------------------------------------------------------------------------------------------


def reload(stage: Stage, *services: dict[str, Any], **settings: Any) -> World:
    """Write the file, and go over to it; what was done of it, without the follow before, is left in ``done``."""
    written(stage.file, *services, **settings)

    async def run() -> None:
        await stage.current.reload()

    asyncio.run(run())
    del stage.done[:3]
    return stage.current.world


def test_the_next_process_knows_before_the_data_path_does(stage: Stage) -> None:
    """What takes long with many backends is not done in the event loop's thread."""
    world = reload(stage, WEB)
    assert stage.done == [("prepare", world), ("flows", world), ("publisher", world), ("backends", world)]
    assert stage.flows.reopened == 1
    here = threading.get_ident()
    assert [each == here for each in stage.flows.threads[-2:]] == [False, True]
    assert stage.publisher.threads[-1] != here
    assert stage.backends.threads[-1] == here
    assert [plan.name for plan in world.configuration.plans] == ["web"]
    assert working(world) == set(KEYS)


def test_a_file_that_is_refused_changes_nothing(stage: Stage) -> None:
    before = stage.current.world
    with structlog.testing.capture_logs() as logs, pytest.raises(FastlbError, match="restart fastlb instead"):
        reload(stage, WEB, flows=8192)
    assert [line["event"] for line in logs] == ["reload refused; nothing was changed"]
    assert stage.names == ["flows", "publisher", "backends"]  # the follow before
    assert stage.current.world == before


@pytest.mark.parametrize("who", ["flows", "publisher", "backends"])
def test_a_part_that_refuses_brings_the_world_before_back(stage: Stage, who: str) -> None:
    part: FakePart = getattr(stage, who)
    part.refuses = lambda world: len(world.configuration.plans) == 1
    with pytest.raises(FastlbError, match="refuses"):
        reload(stage, WEB)
    held = stage.current.world
    assert stage.done[-3:] == [("flows", held), ("publisher", held), ("backends", held)]
    assert [plan.name for plan in held.configuration.plans] == ["web", "api"]


def test_the_way_back_does_not_end_at_the_first_part_that_fails(stage: Stage) -> None:
    """A part that cannot hold the world before, either, keeps no other one from it."""
    new: list[World] = []

    def refuses(world: World) -> bool:
        new.append(world) if len(world.configuration.plans) == 1 else None
        return bool(new)

    stage.publisher.refuses = refuses
    stage.flows.refuses = lambda world: bool(new)
    with structlog.testing.capture_logs() as logs, pytest.raises(FastlbError, match="publisher refuses"):
        reload(stage, WEB)
    events = [line["event"] for line in logs]
    assert events == ["the world before was not taken back"] * 2 + ["reload refused; nothing was changed"]
    assert stage.done[-1] == ("backends", stage.current.world)


def test_a_reload_begins_with_plans_of_all_that_is_marked(stage: Stage) -> None:
    stage.check(KEYS[0])
    written(stage.file, WEB, API, service("nat", name="more", port=82))
    asyncio.run(stage.current.reload())
    assert stage.current.world.states.of("web", KEYS[0]).state == "down"
    assert working(stage.current.world) == set(KEYS[1:])
    assert not stage.marks.due


def test_a_backend_that_goes_down_while_the_file_is_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the data path has followed before the new world is installed, or not."""
    stage.while_it_reads(
        monkeypatch,
        lambda: stage.check(KEYS[0]),
        lambda: stage.current.follow(),
        lambda: stage.check(KEYS[1]),
    )
    published = reload(stage, WEB)
    assert working(published) == {KEYS[2]}
    assert published.states.of("web", KEYS[0]).state == published.states.of("web", KEYS[1]).state == "down"


def test_the_host_as_it_is_after_the_file_is_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    view = hostviews.view(routes=())

    def changed() -> None:
        stage.marks.view = view

    stage.while_it_reads(monkeypatch, changed, lambda: stage.current.follow())
    world = reload(stage, WEB)
    assert world.view is view
    assert world.ways.next_hops == set()


@pytest.mark.parametrize("who", ["flows", "publisher"])
def test_what_is_said_while_a_world_is_installed(stage: Stage, who: str) -> None:
    """By a check and by the operator: it is known to the new states, and planned next."""
    part: FakePart = getattr(stage, who)

    def said() -> None:
        if threading.get_ident() != threading.main_thread().ident:
            stage.check(KEYS[0])
            stage.current.world.states.drain(("web", KEYS[1]), 60.0)
            stage.marks.mark(("web", KEYS[1]))

    part.meanwhile = said
    world = reload(stage, WEB)
    assert world.states.of("web", KEYS[0]).state == "down"
    assert world.states.timed == {("web", KEYS[1])}
    assert stage.marks.due
    asyncio.run(stage.current.follow())
    assert working(stage.current.world) == {KEYS[2]}


def test_what_time_brings_while_the_file_is_read(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a drain changes no state: its service is planned once more."""
    stage.while_it_reads(
        monkeypatch, lambda: stage.marks.mark_service("api"), lambda: stage.current.follow()
    )
    reload(stage, WEB, API)
    assert stage.marks.backends == {"api": None}
    asyncio.run(stage.current.follow())
    monkeypatch.undo()
    reload(stage, WEB, API)
    assert not stage.marks.due


def test_a_reload_that_takes_nearly_all_away(stage: Stage) -> None:
    """It holds, and everybody is told: who reads the log, and who asked."""
    others = [service("nat", name=f"api{number}", port=81 + number) for number in range(4)]
    written(stage.file, WEB, *others)
    asyncio.run(stage.current.reload())
    written(stage.file, WEB)
    with structlog.testing.capture_logs() as logs:
        (warning,) = asyncio.run(stage.current.reload()).warnings
    assert warning.startswith("4 of 5 services and 12 of 15 backends are gone with this reload; ")
    assert [(line["event"], line.get("problem")) for line in logs if line["log_level"] == "warning"] == [
        ("a reload took nearly all away", warning)
    ]
    assert [plan.name for plan in stage.current.world.configuration.plans] == ["web"]


def test_many_reloads_at_once(stage: Stage) -> None:
    """Every one is answered, and the file as the last one left it is what runs."""
    loads: list[str] = []
    load = planner.load_config

    async def run() -> None:
        asked = []
        for number in range(50):
            written(stage.file, WEB, service("nat", name=f"api{number}", port=81))
            asked.append(asyncio.create_task(stage.current.reload()))
            await asyncio.sleep(0)
        await asyncio.gather(*asked)

    def noted(path: str) -> Any:
        loads.append(path)
        return load(path)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(planner, "load_config", noted)
        asyncio.run(run())
    assert [plan.name for plan in stage.current.world.configuration.plans] == ["web", "api49"]
    assert 2 <= len(loads) < 50
    assert {stage.current.world.states.of("web", key).state for key in KEYS} == {"up"}
