"""flows.py: what the next process gets and when, what this one takes over, and the flow log beside the event loop."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from fastlb.daemon import flows
from fastlb.daemon.flows import Flows
from fastlb.daemon.lifecycle import Lifecycle, State
from fastlb.daemon.world import DataPath, World
from fastlb.errors import FastlbError
from fastlb.model.clock import flow_clock
from fastlb.observe import flow_log
from fastlb.observe.flow_log import AT_ONCE, FlowLog
from fastlb.workers.flow_file import FlowFile, FlowFileError
from fastlb.workers.flow_records import HEAD_BYTES, Head, parse_head, unseal
from tests.balancers import CLIENT, VIP, service
from tests.frames import frame
from tests.unit.daemon.worlds import CHECKED, KEYS, followed, reloaded, with_backend, world_of

WEB = service("nat", name="web", backends=[{"address": "10.3.0.11", "port": 8080}], **CHECKED)
MORE = service("nat", name="more", port=81)
PATIENCE = 20.0  # seconds that no test waits


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastlb-test-") as name:
        yield Path(name)


class Process:
    """What one process has of its flows; what is put off waits in ``later``."""

    def __init__(self, world: World, workers: int = 1) -> None:
        self.lifecycle, self.data_path, self.stack = Lifecycle(), DataPath(), ExitStack()
        self.later: list[Callable[[], None]] = []
        self.lifecycle.move(State.OPENING)
        self.flows = Flows(self.data_path, self.lifecycle, workers, lambda _, function: self.later.append(function))
        with structlog.testing.capture_logs() as self.logs:
            self.world = self.flows.open(self.stack, world)
        for pipeline in self.data_path.pipelines:
            pipeline.publish(self.world.configuration.services, self.world.ways.routes)

    def open_flows(self, count: int) -> None:
        frames = [frame(CLIENT[4], 1024 + number, VIP[4], 80) for number in range(count)]
        for pipeline in self.data_path.pipelines:
            pipeline.process(frames, flow_clock())

    def flow_count(self) -> int:
        return self.data_path.pipelines[0].flow_count()

    def end(self, handover: bool) -> None:
        self.lifecycle.stop(handover)
        self.stack.close()


def in_file(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"flow_file": str(folder / "flows"), **settings}


def saved(folder: Path) -> dict[str, Any]:
    """What the next process would read."""
    with (folder / "flows").open("rb") as file:
        head = parse_head(file.read(HEAD_BYTES))
        assert isinstance(head, Head)
        record = unseal(file.fileno(), *head.lists[head.sequence % 2])
    assert record is not None
    return record[1]


def names(folder: Path) -> set[tuple[str, str]]:
    return {(service, key) for service, key, _ in saved(folder)["ids"]["named"]}


def states(folder: Path) -> dict[str, str]:
    """The states that were saved, by the backend's key, where they are not the first one."""
    return {key: mark["state"] for _, key, mark in saved(folder)["stand"] if "state" in mark}


def lines_in(folder: Path, count: int = 0) -> list[dict[str, Any]]:
    """The lines of the flow log, when there are so many at least: a thread writes them."""
    until = time.monotonic() + PATIENCE
    while (folder / "log").read_bytes().count(b"\n") < count and time.monotonic() < until:
        time.sleep(0.001)
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_clean_stop_removes_the_file(folder: Path) -> None:
    process = Process(world_of(WEB, **in_file(folder)))
    assert process.flows.describe()["flow_file"] == str(folder / "flows")
    assert names(folder) == {("web", KEYS[0])}
    process.end(handover=False)
    assert list(folder.iterdir()) == []


def test_a_handover_leaves_the_last_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those as well that were not written yet."""
    monkeypatch.setattr(flows, "SAVED_AT_ONCE", 0)
    process = Process(world_of(WEB, **in_file(folder)))
    process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    assert states(folder)[KEYS[0]] == "unknown"
    process.end(handover=True)
    assert states(folder) == {KEYS[0]: "down"}


def test_without_a_file(folder: Path) -> None:
    process = Process(world_of(WEB))
    process.open_flows(3)
    assert process.flow_count() == 3
    assert process.flows.describe() == {"flow_file": None, "lost_lines": {"flow_log_lost": 0}}
    process.flows.apply(reloaded(process.world, WEB, MORE))
    process.end(handover=True)


def test_ids_are_saved_by_the_time_that_a_world_is_applied(folder: Path) -> None:
    process = Process(world_of(WEB, **in_file(folder)))
    after = reloaded(process.world, WEB, MORE, **in_file(folder))
    process.flows.prepare(after)
    assert ("more", KEYS[0]) in names(folder)
    process.flows.apply(after)
    back = reloaded(after, WEB, **in_file(folder))
    process.flows.apply(back)  # not prepared
    assert names(folder) == {("web", KEYS[0])}


def test_the_way_back_after_preparing(folder: Path) -> None:
    process = Process(world_of(WEB, **in_file(folder)))
    process.flows.prepare(reloaded(process.world, MORE, **in_file(folder)))
    process.flows.apply(process.world)
    assert names(folder) == {("web", KEYS[0])}


def test_ids_that_cannot_be_saved_are_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world is not applied, and what follows knows that; states of the world before are saved as ever."""
    process = Process(world_of(WEB, **in_file(folder)))
    after = reloaded(process.world, WEB, MORE, **in_file(folder))

    def refuse(*_: object) -> None:
        raise FlowFileError("no room")

    for attempt in (process.flows.prepare, process.flows.apply):
        with monkeypatch.context() as context:
            context.setattr(FlowFile, "save", refuse)
            with pytest.raises(FlowFileError, match="no room"):
                attempt(after)
    process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    assert (names(folder), states(folder)) == ({("web", KEYS[0])}, {KEYS[0]: "down"})
    assert [one["name"] for one in saved(folder)["services"]] == ["web"]
    process.flows.apply(after)
    assert ("more", KEYS[0]) in names(folder)


def test_states_of_few_are_saved_at_once(folder: Path) -> None:
    process = Process(world_of(WEB, **in_file(folder)))
    process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    assert states(folder) == {KEYS[0]: "down"}


def test_states_that_cannot_be_saved_cost_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(world_of(WEB, **in_file(folder)))

    def refuse(*_: object) -> None:
        raise FlowFileError("no room")

    monkeypatch.setattr(FlowFile, "save", refuse)
    with structlog.testing.capture_logs() as logs:
        process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    assert [line["event"] for line in logs] == ["the next process will not know the states of backends"]


class SlowSaving:
    """Saves that end when they are told to, and what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []  # begin or end, and how many names
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.save = FlowFile.save
        monkeypatch.setattr(FlowFile, "save", lambda file, backends: self.slowly(file, backends))

    def slowly(self, file: FlowFile, backends: dict[str, Any]) -> None:
        count = len(backends["ids"]["named"])
        self.done.append(("begin", count))
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        self.save(file, backends)
        self.done.append(("end", count))


def test_states_of_many_are_saved_in_a_thread_which_preparing_waits_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows, "SAVED_AT_ONCE", 0)
    process = Process(world_of(WEB, **in_file(folder)))
    slow, after = SlowSaving(monkeypatch), reloaded(process.world, WEB, MORE, **in_file(folder))
    process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    assert slow.done == []
    process.flows.tick(1.0)
    assert slow.begun.wait(PATIENCE)
    process.flows.tick(1.1)  # one at a time
    preparing = threading.Thread(target=process.flows.prepare, args=(after,))
    preparing.start()
    slow.may_end.set()
    preparing.join(PATIENCE)
    assert slow.done == [("begin", 1), ("end", 1), ("begin", 4), ("end", 4)]
    process.flows.apply(after)
    process.end(handover=False)


def test_once_prepared_nothing_of_the_world_before_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "SAVED_AT_ONCE", 0)
    process = Process(world_of(WEB, **in_file(folder)))
    after = reloaded(process.world, WEB, MORE, **in_file(folder))
    process.flows.apply(with_backend(process.world, KEYS[0], "down"))
    process.flows.prepare(after)
    process.flows.tick(1.0)
    assert len(names(folder)) == 4
    process.flows.apply(after)
    process.flows.apply(followed(after, backends={"web": None}))
    process.flows.tick(1.1)
    process.end(handover=True)
    assert len(names(folder)) == 4


# --- taking over -----------------------------------------------------------------------------------------------------


def test_flows_ids_and_states_are_taken_over(folder: Path) -> None:
    first = Process(world_of(WEB, **in_file(folder)))
    first.open_flows(20)
    first.world.states.drain(("web", KEYS[0]), None)
    first.flows.apply(with_backend(first.world, KEYS[0], "up"))
    first.end(handover=True)

    configured = world_of(MORE, WEB, **in_file(folder))
    second = Process(configured, workers=2)
    assert second.flow_count() == 20
    (taken,) = (line for line in second.logs if line["event"] == "flows taken over")
    assert (taken["flows"], taken["damaged"]) == (20, 0)
    number = second.world.configuration.ids.by_name["web", KEYS[0]]
    assert number == first.world.configuration.ids.by_name["web", KEYS[0]]
    assert number != configured.configuration.ids.by_name["web", KEYS[0]]
    state = second.world.states.of("web", KEYS[0])
    assert (state.state, state.draining) == ("up", True)
    assert len(names(folder)) == 4
    assert second.lifecycle.keeps  # until it runs
    second.stack.close()
    assert (folder / "flows").exists()


def test_a_process_that_took_over_and_runs_takes_all_down(folder: Path) -> None:
    Process(world_of(WEB, **in_file(folder))).end(handover=True)
    second = Process(world_of(WEB, **in_file(folder)))
    second.lifecycle.move(State.RUNNING)
    second.end(handover=False)
    assert list(folder.iterdir()) == []


def test_a_new_file_is_nothing_to_keep(folder: Path) -> None:
    """One that cannot start leaves nothing behind then."""
    process = Process(world_of(WEB, **in_file(folder)))
    assert not process.lifecycle.keeps
    process.stack.close()
    assert list(folder.iterdir()) == []


def test_flows_that_end_with_the_process_before_are_logged(folder: Path) -> None:
    """Those of backends that the new configuration does not have, by the names that they had."""
    settings = in_file(folder, flow_log=str(folder / "log"))
    first = Process(world_of(WEB, **settings))
    first.open_flows(3)
    first.end(handover=True)
    assert [line["event"] for line in lines_in(folder)] == ["start"] * 3
    second = Process(world_of(MORE, **settings))
    ends = lines_in(folder, 6)[3:]
    assert [(line["event"], line["service"], line["backend"]) for line in ends] == [("end", "web", KEYS[0])] * 3
    second.end(handover=False)


# --- the flow log ----------------------------------------------------------------------------------------------------


def logging(folder: Path, flow_count: int) -> Process:
    process = Process(world_of(WEB, flow_log=str(folder / "log")))
    process.open_flows(flow_count)
    return process


def test_the_flow_log_is_written_a_little_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile waits for its turn; a tick begins nothing while it goes on."""
    monkeypatch.setattr(flows, "LOG_TIME", -1.0)
    process = logging(folder, 3 * AT_ONCE - 1)
    for tenths in range(3):
        process.flows.tick(1.0 + tenths / 10)
    assert (len(lines_in(folder, AT_ONCE)), len(process.later)) == (AT_ONCE, 1)
    process.later.pop()()
    assert (len(lines_in(folder, 2 * AT_ONCE)), len(process.later)) == (2 * AT_ONCE, 1)
    process.later.pop()()
    assert (len(lines_in(folder, 3 * AT_ONCE - 1)), len(process.later)) == (3 * AT_ONCE - 1, 0)
    assert {line["event"] for line in lines_in(folder)} == {"start"}


def test_few_lines_are_written_at_once(folder: Path) -> None:
    process = logging(folder, 5)
    process.flows.tick(1.0)
    assert (len(lines_in(folder, 5)), process.later) == (5, [])


def test_a_stop_writes_all_that_is_left_and_every_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LOG_TIME", -1.0)
    process = logging(folder, 3 * AT_ONCE)
    process.flows.tick(1.0)
    process.end(handover=False)
    for function in process.later:
        function()  # comes too late, and does nothing
    events = [line["event"] for line in lines_in(folder)]
    assert events == ["start"] * 3 * AT_ONCE + ["end"] * 3 * AT_ONCE


def test_a_handover_writes_what_is_left_and_ends_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(world_of(WEB, **in_file(folder, flow_log=str(folder / "log"))))
    process.open_flows(7)
    process.end(handover=True)
    assert [line["event"] for line in lines_in(folder)] == ["start"] * 7


def test_the_rest_is_written_by_the_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "LOG_TIME", -1.0)
    world = world_of(WEB, flow_log=str(folder / "log"))

    async def run() -> int:
        data_path, stack = DataPath(), ExitStack()
        part = Flows(data_path, Lifecycle(), 1)
        part.open(stack, world)
        (pipeline,) = data_path.pipelines
        pipeline.publish(world.configuration.services, world.ways.routes)
        pipeline.process([frame(CLIENT[4], 1024 + n, VIP[4], 80) for n in range(5 * AT_ONCE)], flow_clock())
        part.tick(1.0)
        assert len(lines_in(folder, AT_ONCE)) == AT_ONCE
        until = time.monotonic() + PATIENCE
        while len(lines_in(folder)) < 5 * AT_ONCE and time.monotonic() < until:
            await asyncio.sleep(0.001)
        return len(lines_in(folder))

    assert asyncio.run(run()) == 5 * AT_ONCE


class Disk:
    """Where a flow log is: it has ``room`` for so many bytes, and cuts what does not fit as file systems do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self.hangs = threading.Event()  # once it is set, `write` waits for `goes_on`
        self.goes_on = threading.Event()
        monkeypatch.setattr(flows, "FlowLog", partial(FlowLog, write=self.write))

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.hangs.is_set():
            assert self.goes_on.wait(PATIENCE)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, data[: self.room])
        self.room -= written
        return written


def tick_until(process: Process, wanted: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not wanted():
        assert time.monotonic() < until, "it did not happen"
        process.flows.tick(1.0)
        time.sleep(0.001)


def lost(process: Process) -> int:
    """All lines that are counted as missing, as status has them."""
    kept = sum(pipeline.counters()["flow_log_lost"] for pipeline in process.data_path.pipelines)
    return kept + int(process.flows.describe()["lost_lines"]["flow_log_lost"])


def test_a_full_disk_costs_lines_that_are_counted_and_is_told_of_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, room=600)  # a few lines and a piece of the next one
    with structlog.testing.capture_logs() as logs:
        process = logging(folder, 5)
        for count in (1, 2, 3):
            tick_until(process, lambda count=count: lost(process) >= count)  # type: ignore[misc]
            process.open_flows(5 + count)  # one is new
        disk.room = 1 << 20
        process.open_flows(9)
        tick_until(process, lambda: len(logs) > 1)
        process.end(handover=False)
    assert [line["event"] for line in logs] == [
        "flow log not written", "flow log written again; lines are missing",
    ]  # fmt: skip
    assert logs[1]["lost"] == lost(process)
    begun = [line for line in lines_in(folder) if line["event"] == "start"]
    assert len(begun) + lost(process) == 9
    assert lost(process) >= 3


def test_a_disk_that_hangs_holds_nothing_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stay where they are, and are counted where that is full; the end comes all the same."""
    monkeypatch.setattr(flow_log, "MAX_PENDING", 1000)
    monkeypatch.setattr(flow_log, "END_TIME", 0.01)
    disk = Disk(monkeypatch, room=1 << 30)
    disk.hangs.set()
    process = logging(folder, AT_ONCE)
    process.flows.tick(1.0)
    process.open_flows(3 * AT_ONCE)
    for _ in range(5):
        process.flows.tick(1.1)
        while process.later:
            process.later.pop()()
    process.end(handover=False)
    assert lines_in(folder) == []
    disk.goes_on.set()
    assert len(lines_in(folder, AT_ONCE)) == AT_ONCE


def test_the_log_goes_on_in_a_new_file(folder: Path) -> None:
    process = logging(folder, 2)
    process.flows.tick(1.0)
    (folder / "log").rename(folder / "old")
    process.flows.reopen_log()
    process.end(handover=False)
    assert [line["event"] for line in lines_in(folder)] == ["end"] * 2
    Flows(DataPath(), Lifecycle(), 1).reopen_log()  # has none


def test_a_log_that_cannot_be_opened_leaves_nothing_open(folder: Path) -> None:
    stack = ExitStack()
    with pytest.raises(FastlbError, match="flow_log: there is no directory"):
        Flows(DataPath(), Lifecycle(), 1).open(stack, world_of(WEB, flow_log="/nowhere/at/all", **in_file(folder)))
    stack.close()
    assert list(folder.iterdir()) == []


def test_names_of_a_new_world_are_known_to_the_log(folder: Path) -> None:
    process = logging(folder, 0)
    after = reloaded(process.world, MORE, flow_log=str(folder / "log"))
    process.flows.apply(after)
    for pipeline in process.data_path.pipelines:
        pipeline.publish(after.configuration.services, after.ways.routes)
        opened = [frame(CLIENT[4], 5000 + number, VIP[4], 81) for number in range(30)]
        pipeline.process(opened, flow_clock())
    process.flows.tick(1.0)
    assert {line["service"] for line in lines_in(folder, 30)} == {"more"}
