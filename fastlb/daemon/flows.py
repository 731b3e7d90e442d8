"""The part that keeps flows: the table in its file, the pipelines over it, the flow log, what the next process gets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import structlog

from fastlb._core import FlowMemory, Pipeline
from fastlb.daemon.configuration import Configuration
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.world import DataPath, World
from fastlb.model.steps import Steps
from fastlb.observe.flow_log import FlowLog
from fastlb.observe.lines import Words
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.saved import restored_states, saved_services, saved_states
from fastlb.plan.ways import find_ways
from fastlb.workers import flow_file
from fastlb.workers.flow_file import FlowFile, FlowFileError
from fastlb.workers.workers import open_pipelines

FORGOTTEN_AT_ONCE = 4096  # buckets, of up to four flows each, that end before the flow log is written
SAVED_AT_ONCE = 1000  # backends whose states are written in the event loop; more are written in a thread
SAVE_EVERY = 1.0  # seconds between two of those, so that a failing rack does not write all states ten times a second

LOG_TIME, LOG_REST = 0.005, 0.001  # seconds of writing the flow log at a time, and until it goes on

Later = Callable[[float, Callable[[], None]], object]
"""Calls a function within the event loop, so many seconds later."""

log = structlog.get_logger()


def _later(seconds: float, function: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, function)


class Flows:
    """Opens the pipelines of all workers over one flow table, and has it outlive this process."""

    def __init__(self, data_path: DataPath, lifecycle: Lifecycle, workers: int, later: Later = _later) -> None:
        self._data_path, self._lifecycle, self._workers = data_path, lifecycle, workers
        self._later = later
        self._file: FlowFile | None = None
        self._log: _PacedLog | None = None
        self._services: list[dict[str, Any]] = []  # as `saved_services` gave them for the configuration that holds
        self._applied: World | None = None
        self._thread = ThreadPoolExecutor(1, "fastlb-save")
        self._saving: Future[None] | None = None
        self._unsaved = False  # states differ from what was saved last
        self._save_at = 0.0  # when many may be written again
        self._deciding = threading.Lock()  # who saves next: `prepare` in its thread, or the event loop
        self._prepared: BackendIds | None = None  # ids that the file has, before the data path hears of them

    def open(self, stack: ExitStack, world: World) -> World:
        """Open flow log, file and pipelines, with the flows that another process has left; raises FastlbError."""
        config = world.configuration.config
        stack.callback(self._thread.shutdown)
        if config.flow_log is not None:
            self._log = _PacedLog(config.flow_log, self._later)
            stack.callback(self._close_log)
            self._log.file.know(world.configuration.plans)
        self._file = flow_file.open_file(config, self._saved(world))
        stack.callback(self.close_file)
        memory = None
        if self._file is not None:
            world, memory = self._take_over(self._file, world)
            memory = memory or self._file.memory(config)
        self._data_path.pipelines += open_pipelines(config, self._workers, memory)
        self._applied = world
        return world

    def tick(self, now: float) -> None:
        """Write the flow log, and what has changed of states, unless that is being done."""
        if self._log is not None:
            self._log.begin(self._data_path.pipelines)
        self._save_if_due()

    def apply(self, world: World) -> None:
        """Tell the next process of new ids before the data path hears of them; raises FlowFileError."""
        before = self._applied
        if self._prepared is not None or before is None or world.configuration.ids is not before.configuration.ids:
            if self._log is not None:
                self._log.file.know(world.configuration.plans)
            if self._prepared is not world.configuration.ids:
                self.prepare(world)
            self._prepared = None
        elif world.configuration.services is not before.configuration.services:
            self._unsaved = True
        self._applied = world
        if len(world.states.by_backend) <= SAVED_AT_ONCE:
            self._save_if_due()

    def prepare(self, world: World) -> None:
        """Tell the next process of the ids of a world that will be applied; from any thread. Raises FlowFileError."""
        before = self._prepared, self._services
        with self._deciding:
            self._prepared = world.configuration.ids  # no states of the world before are saved from now on
        self._wait()
        self._services = saved_services(world.configuration.config)
        try:
            self._save(world)
        except FlowFileError:
            self._prepared, self._services = before
            raise

    def reopen_log(self) -> None:
        """Go on in a new file, when the old one was renamed; raises FastlbError, and the old one stays in use."""
        if self._log is not None:
            self._log.file.reopen()

    def describe(self) -> dict[str, Any]:
        """Return where the flow table is kept, and what the flow log's file did not take, for `fastlb status`."""
        return {
            "flow_file": str(self._file.path) if self._file is not None else None,
            "lost_lines": {"flow_log_lost": 0 if self._log is None else self._log.file.lost},
        }

    def close_file(self) -> None:
        """Let go of the file; a handover leaves it with all that the next process must know."""
        if self._file is None:
            return
        self._wait()
        if self._unsaved and self._applied is not None and self._lifecycle.keeps:
            self._try_to_save(self._saved(self._applied))
        self._file.close(keep=self._lifecycle.keeps)

    def _take_over(self, file: FlowFile, world: World) -> tuple[World, FlowMemory | None]:
        """Return the world and the flows as if this configuration came by a reload of the one that another process
        had; None: it has left no flows that can be used."""
        if file.found is None:
            return world, None
        config, now = world.configuration.config, time.monotonic()
        ids, states = BackendIds.restored(file.found["ids"], now), restored_states(file.found, now)
        states.apply_config(config, now)
        configuration = Configuration.of(config, ids, states, now)
        memory = file.take_over(config, configuration.services, ids.highest)
        if self._log is not None and memory is not None:
            self._log.file.know_names(ids.by_name)
            self._log.file.know(configuration.plans)
            self._log.drain([memory])
            if memory.unlogged:
                log.error("flow log not written", error="more flows end than fit", lines=memory.unlogged)
        ways = find_ways(config, configuration.plans, world.view, world.path_mtus)
        world = replace(world, configuration=configuration, states=states, ways=ways)
        self._save(world)
        self._lifecycle.keeps = memory is not None
        return world, memory

    # --- what the next process gets --------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        with self._deciding:
            saves = self._prepared is not None or (self._saving is not None and not self._saving.done())
            if self._unsaved and not saves and self._applied is not None and time.monotonic() >= self._save_at:
                self._save_states(self._applied)

    def _saved(self, world: World) -> dict[str, Any]:
        self._services = self._services or saved_services(world.configuration.config)
        return {"ids": world.configuration.ids.saved(), **saved_states(world.states, self._services)}

    def _save(self, world: World) -> None:
        """Write all at once; raises FlowFileError."""
        if self._file is not None:
            self._file.save(self._saved(world))
            self._unsaved = False

    def _save_states(self, world: World) -> None:
        """Write states where no id is new: what cannot be written costs no more than what it says."""
        self._unsaved = False
        if self._file is None:
            return
        if len(world.states.by_backend) <= SAVED_AT_ONCE:
            self._try_to_save(self._saved(world))
            return
        self._save_at = time.monotonic() + SAVE_EVERY
        ids, states, services = world.configuration.ids, world.states.copy(), self._services
        self._saving = self._thread.submit(self._save_copy, ids, states, services)

    def _save_copy(self, ids: BackendIds, states: BackendStates, services: list[dict[str, Any]]) -> None:
        self._try_to_save({"ids": ids.saved(), **saved_states(states, services)})

    def _try_to_save(self, saved: Mapping[str, Any]) -> None:
        assert self._file is not None, "there is a file"
        try:
            self._file.save(saved)
        except FlowFileError as error:
            log.error("the next process will not know the states of backends", error=str(error))

    def _wait(self) -> None:
        saving = self._saving
        if saving is not None:
            saving.result()

    def _close_log(self) -> None:
        """Write what came last; with this process all flows end, unless another one goes on with them."""
        assert self._log is not None, "it was opened"
        writes = self._log.drain(self._data_path.pipelines)
        goes_on = self._lifecycle.keeps and self._file is not None
        for pipeline in () if goes_on else self._data_path.pipelines:
            bucket: int | None = 0
            while bucket is not None and writes:
                bucket = pipeline.forget_flows(bucket, FORGOTTEN_AT_ONCE)
                writes = self._log.drain([pipeline])
        self._log.file.close()


class _PacedLog:
    """The flow log as the event loop writes it, a little at a time; that lines are missing is told of."""

    def __init__(self, path: str, later: Later) -> None:
        """Raise FastlbError when the file cannot be opened."""
        self.file, self._later = FlowLog(path, Words(self._tell_of_failure, self._tell_of_lost)), later
        self._steps: Steps[int] | None = None  # of what `begin` has begun

    def begin(self, whose: Sequence[Pipeline | FlowMemory]) -> None:
        """Begin to write what there is, unless that is going on: LOG_TIME at a time, the event loop between."""
        if self._steps is None:
            self._steps = self.file.write_in_steps(whose)
            self._go_on()

    def drain(self, whose: Sequence[Pipeline | FlowMemory]) -> bool:
        """Write until nothing is left, or the file takes no more: False; what `begin` has begun ends with it."""
        self._steps = None
        return self.file.write_all(whose)

    def _go_on(self) -> None:
        until = time.monotonic() + LOG_TIME
        for _ in self._steps or ():
            if time.monotonic() > until:
                self._later(LOG_REST, self._go_on)
                return
        self._steps = None

    def _tell_of_failure(self, error: OSError) -> None:
        log.error("flow log not written", error=str(error))

    def _tell_of_lost(self, lost: int) -> bytes:
        log.warning("flow log written again; lines are missing", lost=lost)
        return b""
