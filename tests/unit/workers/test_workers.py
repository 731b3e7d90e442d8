"""workers.py: what is opened together and closed together, with rings and threads that need no kernel."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pytest

from fastlb.config import Config
from fastlb.errors import KernelError
from fastlb.kernel import cpus
from fastlb.model.hostview import KernelView
from fastlb.model.names import SHARDS, owner_of_shard
from fastlb.workers import workers
from fastlb.workers.workers import BLOCK_TIMEOUT, OPEN_BLOCK_TIMEOUT, STUCK, Workers, open_pipelines

VIEW = KernelView({}, (), {}, frozenset())
COUNTERS = dict.fromkeys(
    (
        "transmitted", "transmitted_bytes", "transmitted_xdp", "tunnels_offloaded", "blocks_read", "read_early",
        "sleeps", "ring_packets", "ring_drops", "ring_freezes",
    ),
    0,
)  # fmt: skip


def config(**changes: Any) -> Config:
    return Config.from_dict({"interfaces": ["eth0", "eth1"], "services": [], "transmit": "sendmmsg"} | changes)


class Stage:
    """Everything that workers are made of, and what was done to it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.rings: list[tuple[str, int, int, bool]] = []  # interface, program, block timeout, open blocks
        self.workers: list[FakeWorker] = []
        self.ring_refused = 0
        self.kept_off: list[Sequence[int]] = []
        monkeypatch.setattr(workers, "RingMemory", lambda *_: Closing(self.done, "memory"))
        monkeypatch.setattr(workers, "Ring", self._ring)
        monkeypatch.setattr(workers, "Worker", self._worker)
        monkeypatch.setattr(workers, "Group", lambda interface, nothing: FakeGroup(self.done, interface))
        monkeypatch.setattr(cpus, "keep_off", lambda plan, threads: self.kept_off.append(threads))

    def _ring(self, interface: str, program: int, memory: object, timeout: int, open_blocks: bool) -> FakeRing:
        if self.ring_refused:
            raise OSError(self.ring_refused, os.strerror(self.ring_refused))
        self.rings.append((interface, program, timeout, open_blocks))
        return FakeRing(self.done, f"ring of {interface}")

    def _worker(self, pipeline: object, rings: list[object], *_: object) -> FakeWorker:
        self.workers.append(FakeWorker(self.done, len(rings)))
        return self.workers[-1]


class Closing:
    """Something that is closed."""

    def __init__(self, done: list[str], name: str) -> None:
        self.done, self.name = done, name

    def close(self) -> None:
        self.done.append(f"close {self.name}")


class FakeRing(Closing):
    """A ring that may join a group."""

    def join(self, argument: int) -> None:
        self.done.append(f"{self.name} joins {argument}")


class FakeGroup(Closing):
    """A fanout group of number 77."""

    join_argument = 77

    def __init__(self, done: list[str], interface: str) -> None:
        super().__init__(done, f"group of {interface}")

    def __enter__(self) -> FakeGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, program: int) -> None:
        self.done.append(f"start {self.name} with {program}")

    def stop(self) -> None:
        self.done.append(f"stop {self.name}")


class FakeWorker(Closing):
    """A worker that goes round until it is stopped, or is told to ``end`` or to stand still."""

    def __init__(self, done: list[str], rings: int) -> None:
        super().__init__(done, "worker")
        self.rounds, self.rings = 0, rings
        self.offloaded: Sequence[int] = ()
        self.stopping = True  # whether it stops when it is told to
        self.ended = threading.Event()

    def run(self) -> None:
        self.ended.wait()

    def stop(self) -> None:
        if self.stopping:
            self.ended.set()

    def counters(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(COUNTERS, 1)}

    def offload_tunnels(self, links: Sequence[int]) -> None:
        self.offloaded = links


class FakeClassifier:
    """Descriptors, and the owners of shards."""

    filter_fd, nothing_fd, steer_fd = 3, 4, 5

    def __init__(self) -> None:
        self.owners: list[int] = []

    def set_workers(self, owners: list[int]) -> None:
        self.owners = owners

    def bell_fd(self, worker: int) -> None:
        """No bells."""

    def asleep(self, worker: int) -> None:
        """No bells."""


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


class GaveUp(Exception):
    """Stands for the end of the process."""


def give_up(numbers: Sequence[int]) -> NoReturn:
    raise GaveUp(list(numbers))


Open = Callable[..., Workers]


@pytest.fixture
def opened(stage: Stage) -> Iterator[Open]:
    held: list[Workers] = []
    core = max(os.sched_getaffinity(0))

    def open_workers(count: int, **given: Any) -> Workers:
        plan = cpus.Plan((core,) * count, frozenset({core}), True)
        arguments = {"links": ["eth0", "eth1"], "open_blocks": False, "classifier": FakeClassifier()} | given
        settings = arguments.pop("settings", config())
        pipelines = [object()] * count
        held.append(Workers(settings, pipelines, plan=plan, give_up=give_up, **arguments))  # type: ignore[arg-type]
        return held[-1]

    yield open_workers
    for each in stage.workers:
        each.ended.set()
    for made in held:
        made.close()


def test_one_worker_has_the_filter_and_no_group(stage: Stage, opened: Open) -> None:
    classifier = FakeClassifier()
    opened(1, classifier=classifier)
    assert stage.rings == [(name, classifier.filter_fd, BLOCK_TIMEOUT, False) for name in ("eth0", "eth1")]
    assert (stage.done, [each.rings for each in stage.workers]) == ([], [2])
    assert classifier.owners == [0] * SHARDS


def test_several_join_a_group_in_their_order(stage: Stage, opened: Open) -> None:
    classifier = FakeClassifier()
    made = opened(2, links=["eth0"], classifier=classifier)
    assert stage.rings == [("eth0", classifier.nothing_fd, BLOCK_TIMEOUT, False)] * 2
    assert classifier.owners == [owner_of_shard(shard, 2) for shard in range(SHARDS)]
    made.start(VIEW, set())
    made.close()
    assert stage.done == [
        "ring of eth0 joins 77", "ring of eth0 joins 77", "start group of eth0 with 5", "stop group of eth0",
        "close worker", "close worker", "close ring of eth0", "close ring of eth0", "close group of eth0",
        "close memory", "close memory",
    ]  # fmt: skip
    made.close()
    assert len(stage.done) == 11


def test_without_an_interface_nobody_works(stage: Stage, opened: Open) -> None:
    opened(2, links=[]).start(VIEW, set())
    assert (stage.workers, stage.rings) == ([], [])


@pytest.mark.parametrize(
    ("ring", "open_blocks", "timeout"),
    [({}, False, BLOCK_TIMEOUT), ({}, True, OPEN_BLOCK_TIMEOUT), ({"timeout": "7ms"}, True, 7)],
)
def test_how_long_a_block_waits(
    stage: Stage, opened: Open, ring: dict[str, str], open_blocks: bool, timeout: int
) -> None:
    opened(1, open_blocks=open_blocks, settings=config(ring=ring))
    assert {each[2:] for each in stage.rings} == {(timeout, open_blocks)}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOMEM, r"Cannot allocate memory; it takes \d+ MiB, try fewer ring.blocks"),
        (errno.EPERM, "Operation not permitted$"),
    ],
)
def test_a_ring_that_cannot_be_had_leaves_nothing_open(stage: Stage, opened: Open, code: int, message: str) -> None:
    stage.ring_refused = code
    with pytest.raises(KernelError, match=f"cannot open a receive ring on eth0: {message}"):
        opened(2)
    assert stage.done == ["close group of eth0", "close memory", "close memory"]


def test_other_threads_keep_off(stage: Stage, opened: Open) -> None:
    opened(2).start(VIEW, set())
    ((first, second),) = stage.kept_off
    assert len({first, second, threading.get_native_id()}) == 3


def test_who_has_died_and_who_is_stuck(stage: Stage, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    made = opened(3)
    assert made.dead() == [], "nobody has started"
    made.start(VIEW, set())
    assert (made.dead(), made.stuck()) == ([], [])
    now[0] += STUCK + 1
    stage.workers[1].rounds += 1
    assert made.stuck() == [0, 2]
    stage.workers[0].ended.set()
    monkeypatch.undo()
    deadline = workers.time.monotonic() + 20
    while made.dead() != [0] and workers.time.monotonic() < deadline:
        workers.time.sleep(0.001)
    assert made.dead() == [0]


def test_who_does_not_stop_is_given_up(stage: Stage, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ring must not be unmapped under it."""
    made = opened(2, links=["eth0"])
    made.start(VIEW, set())
    stage.workers[1].stopping = False
    monkeypatch.setattr(workers, "END_TIMEOUT", 0.05)
    with pytest.raises(GaveUp, match=r"\[1\]"):
        made.close()


def test_totals_go_on_with_those_who_come_after(stage: Stage, opened: Open) -> None:
    first = opened(2)
    assert first.totals() == [stage.workers[0].counters()] * 2
    first.close()
    second = opened(2, earlier=first.totals())
    twice = {name: 2 * count for name, count in stage.workers[0].counters().items()}
    assert second.totals() == [twice] * 2
    assert second.counters() == {name: 2 * count for name, count in twice.items()}


def test_every_worker_hears_of_links_that_segment(stage: Stage, opened: Open) -> None:
    opened(2).offload_tunnels([2, 3])
    assert [each.offloaded for each in stage.workers] == [[2, 3]] * 2


@pytest.mark.parametrize("count", [1, 3, 64])
def test_pipelines_share_the_table_and_divide_its_shards(count: int) -> None:
    pipelines = open_pipelines(config(flows=4096), count)
    assert len(pipelines) == count
    assert len({pipeline.flow_capacity for pipeline in pipelines}) == 1
