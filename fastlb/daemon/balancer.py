"""`fastlb run`: parts opened in order, driven by one event loop, taken down in reverse.

It may leave guard, VIPs and flow table to the next process (`fastlb stop --handover`), as a crash does. The next one
takes them over; when it fails before it runs, it leaves them in its turn.

Threads: the workers (packets, without the GIL), the mirror of the kernel's tables, those that plan and save beside the
event loop, and the event loop itself. Everything that changes the data path happens in there, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import ExitStack
from typing import Any

import structlog

from fastlb._core import Pipeline
from fastlb.control.commands import Commands
from fastlb.control.server import ControlServer
from fastlb.daemon import signals
from fastlb.daemon.backends import Backends
from fastlb.daemon.configuration import Configuration
from fastlb.daemon.current import Current
from fastlb.daemon.lifecycle import Lifecycle, State
from fastlb.daemon.loop import Loop
from fastlb.daemon.memory import check_memory
from fastlb.daemon.parts import Parts
from fastlb.daemon.preflight import (
    check_host,
    check_privileges,
    check_runnable,
    missing_interfaces,
    plan_cores,
    warn,
)
from fastlb.daemon.world import Marks, World
from fastlb.health.lag import LoopLag
from fastlb.kernel.limits import raise_file_limit
from fastlb.model.hostview import KernelView
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.leaving import Reloaded
from fastlb.plan.ways import find_ways

TICK = 0.1  # seconds between the ticks of all parts
REST = 0.02  # seconds between two plans: what changes within them is planned together
FIRST_NEIGHBOURS = 1.0  # seconds that the start waits for next hops to be resolved
LOOK_EVERY = 0.05  # seconds between two looks whether an interface has come

log = structlog.get_logger()


class Balancer:
    """A balancer: its parts, its lifecycle, and the world that they go by. `Commands` drives it."""

    def __init__(self, path: str, waits: bool = False) -> None:
        """Read the configuration; raises ConfigError. ``waits``: the start waits for interfaces that come late."""
        self._path, self._waits = path, waits
        self._states = BackendStates()
        self._configuration = Configuration.load(path, BackendIds(), self._states)
        self.started = time.monotonic()
        self.lifecycle, self._lag = Lifecycle(), LoopLag()
        self._loop = Loop()
        self._marks = Marks(wake=self._loop.wake)

    def run(self) -> None:
        """Balance until SIGTERM or SIGINT has come and everything is taken down.

        Raises FastlbError when the balancer cannot start, or fails; nothing is left behind then that it has made.
        """
        signals.hold_reload()  # until it runs
        config = self._configuration.config
        check_runnable(self._path, config)
        check_privileges()
        cores = plan_cores(config)
        check_memory(config, len(cores.workers))
        raise_file_limit()
        signals.on_stop(self.stop)
        self.parts = Parts.make(self.lifecycle, self._marks, cores, self._loop.hand_over, self._abandon)
        self.lifecycle.move(State.OPENING)
        with ExitStack() as stack:
            try:
                if self._open(stack):
                    asyncio.run(self._serve())
            finally:
                signals.ignore()  # another one must not cut the taking down short
                self.lifecycle.move(State.STOPPING)
        self.lifecycle.move(State.STOPPED)
        if self.lifecycle.failure is not None:
            raise self.lifecycle.failure
        log.info("stopped; guard, VIPs and flows stay" if self.lifecycle.keeps else "stopped")

    def stop(self, handover: bool = False) -> None:
        """Have ``run`` return; with ``handover``, what stays over a crash stays."""
        self.lifecycle.stop(handover)
        self._loop.hand_over(self._loop.wake)

    def _open(self, stack: ExitStack) -> bool:
        """Open all but what needs the event loop; False when a stop was asked for, which is looked at between parts."""
        config = self._configuration.config
        self._control = ControlServer(config.control, Commands(self).by_name())
        stack.callback(self._control.close)
        self._control.bind()
        self.parts.host.claim_interfaces(stack, config.interfaces)
        view = self._wait_for_interfaces(self.parts.host.start(stack))
        if self.lifecycle.ends:
            return False
        check_host(config, self._configuration.plans, view)
        ways = find_ways(config, self._configuration.plans, view, {})
        world = World(self._configuration, view, self._states, {}, ways)
        for part in self.parts.before_the_loop():
            if self.lifecycle.ends:
                break
            world = part.open(stack, world)
        self._current = Current(self._path, world, self._marks, self.parts)
        if self.lifecycle.ends:
            self.lifecycle.keeps = self.lifecycle.handover
        return not self.lifecycle.ends

    def _wait_for_interfaces(self, view: KernelView) -> KernelView:
        """Return a view of the host that has all interfaces, when they are there or a stop was asked for."""
        config = self._configuration.config
        missing = missing_interfaces(config, view) if self._waits else []
        if missing:
            there = sorted(link.name for link in view.links.values())
            log.warning("waiting for interfaces that do not exist yet", interfaces=missing, there=there)
            self.parts.manager.waits(missing)
        while missing and not self.lifecycle.ends:
            time.sleep(LOOK_EVERY)
            view = self._marks.view or view
            missing = missing_interfaces(config, view)
        return view

    # --- the event loop ------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = self._loop.begin()
        self.lifecycle.move(State.RUNNING)
        with ExitStack() as stack:
            stack.callback(self._loop.end)
            await self._first_neighbours()
            warn(self.world.configuration.config, self.world.configuration.plans, self.world.view, len(self.pipelines))
            await self._control.serve()
            for version, listener in self.parts.path_mtus.listeners.items():
                loop.add_reader(listener, self.parts.path_mtus.hear, version)
            self.parts.backends.open(stack, self.world)
            self.parts.answers.open(stack, self.world)
            self._tell_that_it_runs()
            self._lag.open()
            stack.callback(self._lag.close)
            signals.on_reload(lambda: self._loop.hand_over(lambda: self._loop.begin_task(self.reload)))
            while not self.lifecycle.ends:
                await self._turn()

    async def _turn(self) -> None:
        """One tick of all parts, and plans for what was marked until then."""
        tick = time.monotonic() + TICK
        for part in self.parts.in_order():
            part.tick(time.monotonic())
        while not self.lifecycle.ends and (left := tick - time.monotonic()) > 0:
            await self._loop.rest(left)
            if self._marks.due:
                await self.follow()
                await asyncio.sleep(REST)

    async def _first_neighbours(self) -> None:
        """Wait a little for the kernel to resolve the next hops, so that the first packets find them."""
        until = time.monotonic() + FIRST_NEIGHBOURS
        while True:
            if self._marks.due:
                await self.follow()
            if self.world.ways.next_hops <= self.world.view.neighbours.keys() or time.monotonic() > until:
                return
            await asyncio.sleep(REST)

    def _tell_that_it_runs(self) -> None:
        gc.freeze()  # what is there now stays: no collection looks at it again, which would hold up the event loop
        described = self.describe()
        shown = {name: described[name] for name in ("interfaces", "open_blocks", "transmit", "flow_file")}
        log.info("running", workers=len(described["workers"]), **shown, **self.world.configuration.summary())

    @property
    def world(self) -> World:
        """The world that holds."""
        return self._current.world

    @property
    def pipelines(self) -> list[Pipeline]:
        """The pipelines of all workers."""
        return self.parts.data_path.pipelines

    @property
    def operator(self) -> Backends:
        """Who takes the operator's word about backends."""
        return self.parts.backends

    # --- what commands and signals ask for -------------------------------------------------------------------

    async def follow(self) -> None:
        """Have the data path follow what has changed about backends."""
        await self._current.follow()

    async def reload(self) -> Reloaded:
        """Go over to what the configuration's file says now, or raise FastlbError; return what is to be told of it."""
        with self.parts.manager.reloading():
            return await self._current.reload()

    def describe(self) -> dict[str, Any]:
        """Return what parts tell of themselves, for `fastlb status`."""
        own = {"interfaces": list(self.world.configuration.config.interfaces), "event_loop": self._lag.summary()}
        told = self.parts.packet_path.describe(self.world) | self.parts.flows.describe() | self.parts.vips.describe()
        return own | told

    def _abandon(self) -> None:
        """What must not wait for workers that do not stop."""
        self.parts.vips.give_up()
        self.parts.flows.close_file()
        self._control.close()
