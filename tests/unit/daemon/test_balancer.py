"""balancer.py: parts are opened in order, driven, taken down in reverse; stops, failures and signals on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from fastlb.daemon import balancer as balancers
from fastlb.daemon.balancer import Balancer
from fastlb.daemon.lifecycle import Lifecycle, State
from fastlb.daemon.world import DataPath, Marks, World
from fastlb.errors import ConfigError, ControlError, FastlbError, KernelError
from fastlb.model.hostview import KernelView
from tests import hostviews
from tests.balancers import service
from tests.unit.daemon.worlds import written

WEB, API = service("nat", name="web"), service("nat", name="api", port=81)
BEFORE_THE_LOOP = ["host", "flows", "publisher", "path_mtus", "packet_path", "vips", "manager"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
NAMES = [*BEFORE_THE_LOOP, "backends", "answers"]
HANDED_OVER = "stopped; guard, VIPs and flows stay"
UNRESOLVED = hostviews.view(neighbours={})


class FakePart:
    """A part that notes what is asked of it, and does what a test has put in its place."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done
        self.on_open: Callable[[World], World] = lambda world: world
        self.on_tick: list[Callable[[], object]] = []
        self.worlds: list[World] = []
        self.listeners: Mapping[int, object] = {}

    def open(self, stack: ExitStack, world: World) -> World:
        stack.callback(self.done.append, f"close {self.name}")
        self.done.append(f"open {self.name}")
        self.worlds.append(world)
        return self.on_open(world)

    def tick(self, now: float) -> None:
        if self.on_tick:
            self.on_tick.pop(0)()

    def apply(self, world: World) -> None:
        self.worlds.append(world)

    def describe(self, *_: World) -> dict[str, Any]:
        return {"open_blocks": True, "transmit": {}, "flow_file": None, "workers": [], self.name: "shown"}

    # what one part or another has besides

    def claim_interfaces(self, stack: ExitStack, interfaces: Iterable[str]) -> None:
        stack.callback(self.done.append, "release")
        self.done.append(f"claim {' '.join(interfaces)}")

    def start(self, stack: ExitStack) -> KernelView:
        stack.callback(self.done.append, "end mirror")
        return hostviews.view()

    def reopen_log(self) -> None:
        self.done.append("reopen log")

    def prepare(self, world: World) -> None:
        self.done.append("prepare")

    def close_file(self) -> None:
        self.done.append("close file")

    def give_up(self) -> None:
        self.done.append("give up VIPs")

    def waits(self, interfaces: Sequence[str]) -> None:
        self.done.append(f"wait for {' '.join(interfaces)}")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        self.done.append("reload")
        yield
        self.done.append("reloaded")


class FakeParts:
    """The parts of a balancer that is made; `make` stands for `Parts.make`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.named = {name: FakePart(name, self.done) for name in NAMES}
        self.data_path = DataPath()
        self.lifecycle, self.marks, self.abandon = Lifecycle(), Marks(), lambda: None

    def make(
        self, lifecycle: Lifecycle, marks: Marks, cores: object, hand_over: object, abandon: Callable[[], None]
    ) -> FakeParts:
        self.lifecycle, self.marks, self.abandon = lifecycle, marks, abandon
        return self

    def __getattr__(self, name: str) -> FakePart:
        return self.named[name]

    def before_the_loop(self) -> list[FakePart]:
        return [self.named[name] for name in BEFORE_THE_LOOP]

    def in_order(self) -> list[FakePart]:
        return [self.named[name] for name in NAMES]


class Stage:
    """A balancer that can be run without a kernel."""

    def __init__(self, folder: Path) -> None:
        self.file, self.control = folder / "fastlb.yaml", folder / "control"
        self.write(WEB)
        self.balancer = Balancer(str(self.file))
        self.parts = FakeParts()
        self.last = self.parts.named[NAMES[-1]].on_tick
        self.logs: list[Any] = []

    def write(self, *services: dict[str, Any]) -> None:
        written(self.file, *services, control=str(self.control))

    def run(self) -> list[str]:
        """What was done, in order."""
        with structlog.testing.capture_logs() as self.logs:
            self.balancer.run()
        return self.parts.done

    @property
    def state(self) -> State:
        return self.balancer.lifecycle.state


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    staged = Stage(tmp_path)
    for check in ("check_privileges", "check_memory", "raise_file_limit", "warn"):
        monkeypatch.setattr(balancers, check, lambda *_: None)
    monkeypatch.setattr(balancers, "Parts", staged.parts)
    monkeypatch.setattr(balancers, "FIRST_NEIGHBOURS", 0.0)
    yield staged
    for number, handler in before.items():
        signal.signal(number, handler)


def opened(*names: str) -> list[str]:
    return [f"open {name}" for name in names]


def closed(*names: str) -> list[str]:
    return [f"close {name}" for name in reversed(names)]


def test_from_the_start_to_the_end(stage: Stage) -> None:
    """In order, and in reverse; the control socket is there all the time."""
    there: list[bool] = []
    for part in stage.parts.in_order():
        part.on_open = lambda world: there.append(stage.control.exists()) or world
    stage.last.append(stage.balancer.stop)
    done = stage.run()
    assert done == [
        "claim eth0 eth1", *opened(*NAMES), *closed(*NAMES), "end mirror", "release",
    ]  # fmt: skip
    assert there == [True] * len(NAMES)
    assert not stage.control.exists()
    assert (stage.state, stage.balancer.lifecycle.keeps) == (State.STOPPED, False)
    assert [line["event"] for line in stage.logs] == ["running", "stopped"]


def test_a_balancer_runs_once(stage: Stage) -> None:
    stage.last.append(stage.balancer.stop)
    stage.run()
    with pytest.raises(ValueError, match="a balancer does not go from STOPPED to OPENING"):
        stage.run()


def test_the_world_is_handed_from_part_to_part(stage: Stage) -> None:
    """As flows of another process change it."""
    flows, found = stage.parts.named["flows"], {"10.0.0.1": 1400}
    flows.on_open = lambda world: replace(world, path_mtus=found)
    stage.last.append(stage.balancer.stop)
    stage.run()
    got = {name: part.worlds[0].path_mtus for name, part in stage.parts.named.items()}
    assert got == {name: {} if name in ("host", "flows") else found for name in NAMES}
    assert stage.balancer.world.path_mtus == found


@pytest.mark.parametrize("at", range(len(NAMES)))
@pytest.mark.parametrize("taken_over", [False, True])
def test_a_part_that_cannot_be_opened(stage: Stage, at: int, taken_over: bool) -> None:
    """Those before it are closed; what another process has left stays with the next one, until this one runs."""

    def refuse(world: World) -> World:
        stage.balancer.lifecycle.keeps = stage.balancer.lifecycle.keeps or (taken_over and at < len(BEFORE_THE_LOOP))
        raise KernelError("no room")

    stage.parts.named[NAMES[at]].on_open = refuse
    with pytest.raises(KernelError, match="no room"):
        stage.run()
    names = NAMES[: at + 1]
    assert stage.parts.done[1:-2] == [*opened(*names), *closed(*names)]
    assert stage.state is State.STOPPING
    assert stage.balancer.lifecycle.keeps is (taken_over and at < len(BEFORE_THE_LOOP))
    assert not stage.control.exists()


@pytest.mark.parametrize("at", range(len(BEFORE_THE_LOOP)))
def test_a_stop_is_looked_at_between_parts(stage: Stage, at: int) -> None:
    """Everything is taken down then, what was taken over as well."""

    def stop(world: World) -> World:
        signal.raise_signal(signal.SIGTERM)
        stage.balancer.lifecycle.keeps = True
        return world

    stage.parts.named[NAMES[at]].on_open = stop
    names = NAMES[: at + 1]
    assert stage.run()[1:-2] == [*opened(*names), *closed(*names)]
    assert (stage.state, stage.balancer.lifecycle.keeps) == (State.STOPPED, False)
    assert [line["event"] for line in stage.logs] == ["stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_by_a_signal(stage: Stage, number: signal.Signals) -> None:
    stage.last.append(lambda: signal.raise_signal(number))
    stage.run()
    assert stage.state is State.STOPPED
    assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_IGN}


def test_a_handover(stage: Stage) -> None:
    stage.last.append(lambda: stage.balancer.stop(handover=True))
    stage.run()
    assert stage.balancer.lifecycle.keeps
    assert stage.logs[-1]["event"] == HANDED_OVER


@pytest.mark.parametrize("at", range(len(NAMES)))
def test_a_handover_by_a_signal(stage: Stage, at: int) -> None:
    """At any time: what another process has left is not taken down by one that does not run yet."""

    def hand_over(world: World) -> World:
        signal.raise_signal(signal.SIGUSR2)
        return world

    stage.parts.named[NAMES[at]].on_open = hand_over
    stage.run()
    assert (stage.state, stage.balancer.lifecycle.keeps) == (State.STOPPED, True)
    assert stage.logs[-1]["event"] == HANDED_OVER


def test_a_failure_is_raised_after_all_is_taken_down(stage: Stage) -> None:
    error = FastlbError("a worker is stuck")
    stage.last.append(lambda: stage.balancer.lifecycle.fail(error))
    with pytest.raises(FastlbError) as raised:
        stage.run()
    assert raised.value is error
    assert stage.parts.done[-2:] == ["end mirror", "release"]
    assert stage.state is State.STOPPED


def test_what_is_marked_is_followed_by_all_parts_at_once(stage: Stage) -> None:
    """In the turn in which it was marked."""
    view = hostviews.view(routes=())

    def mark() -> None:
        stage.parts.marks.view = view
        stage.parts.marks.wake()

    stage.last += [mark, stage.balancer.stop]
    stage.run()
    for part in stage.parts.in_order():
        assert [world.view for world in part.worlds][-1] is view
    assert stage.balancer.world.view is view


def test_a_reload_by_a_signal(stage: Stage) -> None:
    def stop_when_reloaded() -> None:
        names = [plan.name for plan in stage.balancer.world.configuration.plans]
        stage.last.append(stage.balancer.stop if names == ["web", "api"] else stop_when_reloaded)

    def reload() -> None:
        stage.write(WEB, API)
        signal.raise_signal(signal.SIGHUP)
        stage.last.append(stop_when_reloaded)

    stage.last.append(reload)
    stage.run()
    assert [word for word in stage.parts.done if "reload" in word] == ["reload", "reloaded"]
    assert "prepare" in stage.parts.done
    assert [line["event"] for line in stage.logs] == ["running", "reloaded", "stopped"]


@pytest.mark.parametrize("at", BEFORE_THE_LOOP)
def test_a_reload_that_is_asked_for_during_the_start(stage: Stage, at: str) -> None:
    """The file was read before: it is read again when the balancer runs."""

    def reload(world: World) -> World:
        stage.write(WEB, API)
        signal.raise_signal(signal.SIGHUP)
        return world

    def stop_when_reloaded() -> None:
        names = [plan.name for plan in stage.balancer.world.configuration.plans]
        stage.last.append(stage.balancer.stop if names == ["web", "api"] else stop_when_reloaded)

    stage.parts.named[at].on_open = reload
    stage.last.append(stop_when_reloaded)
    stage.run()
    assert [line["event"] for line in stage.logs] == ["running", "reloaded", "stopped"]


LATE = hostviews.view(links={index: link for index, link in hostviews.LINKS.items() if link.name != "eth1"})


@pytest.fixture
def waiting(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A balancer that waits for interfaces, on a host that lacks one of them."""
    stage.balancer = Balancer(str(stage.file), waits=True)
    monkeypatch.setattr(stage.parts.named["host"], "start", lambda _: LATE)
    return stage


def test_interfaces_that_come_late(waiting: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, and nothing is opened before they are there."""
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            assert waiting.parts.done == ["claim eth0 eth1", "wait for eth1"]
            waiting.parts.marks.view = hostviews.view()

    monkeypatch.setattr(balancers.time, "sleep", sleep)
    waiting.last.append(waiting.balancer.stop)
    waiting.run()
    assert len(looks) == 3
    assert waiting.parts.named["host"].worlds[0].view.links == hostviews.LINKS
    first, *others = waiting.logs
    assert (first["event"], first["interfaces"]) == ("waiting for interfaces that do not exist yet", ["eth1"])
    assert [line["event"] for line in others] == ["running", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_while_it_waits(
    waiting: Stage, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(balancers.time, "sleep", lambda _: signal.raise_signal(number))
    waiting.run()
    assert [word for word in waiting.parts.done if "open" in word] == []
    assert (waiting.state, waiting.balancer.lifecycle.keeps) == (State.STOPPED, number == signal.SIGUSR2)


def test_without_waiting_a_missing_interface_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.parts.named["host"], "start", lambda _: LATE)
    with pytest.raises(KernelError, match="interface eth1 does not exist"):
        stage.run()


def test_the_start_waits_for_next_hops(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not longer than it takes the kernel to resolve them."""
    monkeypatch.setattr(balancers, "FIRST_NEIGHBOURS", 600.0)
    host, resolved = stage.parts.named["host"], hostviews.view(
        routes=(), neighbours=hostviews.view().neighbours
    )
    monkeypatch.setattr(host, "start", lambda _: UNRESOLVED)

    def learn(world: World) -> World:
        stage.parts.marks.view = resolved
        return world

    stage.parts.named["vips"].on_open = learn
    stage.last.append(stage.balancer.stop)
    stage.run()
    assert stage.parts.named["backends"].worlds[0].view is resolved


def test_what_status_shows_of_the_parts(stage: Stage) -> None:
    shown: dict[str, Any] = {}
    stage.last += [lambda: shown.update(stage.balancer.describe()), stage.balancer.stop]
    stage.run()
    assert shown["interfaces"] == ["eth0", "eth1"]
    assert set(shown["event_loop"]) == {"p50", "p99", "max"}
    assert [shown[name] for name in ("packet_path", "flows", "vips")] == ["shown"] * 3
    assert stage.balancer.pipelines is stage.parts.data_path.pipelines
    assert stage.balancer.operator is stage.parts.named["backends"]


def test_leaving_without_workers(stage: Stage) -> None:
    """VIPs and the file are given up, and nobody is answered any more."""
    seen: list[bool] = []
    stage.last += [lambda: (stage.parts.abandon(), seen.append(stage.control.exists())), stage.balancer.stop]
    done = stage.run()
    at = done.index("give up VIPs")
    assert done[at : at + 2] == ["give up VIPs", "close file"]
    assert seen == [False]


def test_a_second_one_with_the_same_socket(stage: Stage) -> None:
    """It has opened no part by then, and the first one goes on."""
    errors: list[str] = []

    def start_another() -> None:
        with pytest.raises(ControlError, match="another fastlb is running") as raised:
            Balancer(str(stage.file)).run()
        errors.append(str(raised.value))

    stage.parts.named["vips"].on_open = lambda world: start_another() or world
    stage.last.append(stage.balancer.stop)
    done = stage.run()
    assert len(errors) == 1
    assert [line for line in done if line.startswith("open")] == opened(*NAMES)


def test_a_file_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Balancer(str(tmp_path / "none"))


def test_without_interfaces_it_does_not_run(tmp_path: Path) -> None:
    path = written(tmp_path / "file", WEB, interfaces=[])
    with pytest.raises(ConfigError, match="needs at least one interface"):
        Balancer(path).run()
