"""The world that holds, and how all parts go over to the next: as the host and backends change, and by a reload.

One change at a time. What is large is planned beside the event loop, and brought up to date before it is taken over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import structlog

from fastlb.daemon import planner
from fastlb.daemon.parts import Parts
from fastlb.daemon.reloads import Reloads
from fastlb.daemon.world import Marks, World
from fastlb.errors import FastlbError
from fastlb.model.names import BackendName
from fastlb.observe.losses import describe_losses
from fastlb.plan.backends import BackendState
from fastlb.plan.leaving import Leaving, Reloaded, leaving, summary

log = structlog.get_logger()


class Current:
    """Holds the world, and drives all parts from one to the next within the event loop."""

    def __init__(self, path: str, world: World, marks: Marks, parts: Parts) -> None:
        """``path``: of the configuration's file, which a reload reads."""
        self.world = world
        self._path, self._marks, self._parts = path, marks, parts
        self._changing = asyncio.Lock()
        self._timed: set[str] = set()  # services planned since a reload began because of what time brought
        self._reloads = Reloads(self._reload_once)

    async def follow(self) -> None:
        """Have all parts follow what is marked; a failure is logged."""
        async with self._changing:
            marks = self._marks.take()
            self._timed.update(name for name, keys in marks.backends.items() if keys is None)
            world, failure = await planner.plan(self.world, marks), None
            try:
                self._apply(world)
            except FastlbError as error:
                failure = error
            self.world = world
            if failure is not None:
                log.error("a change was not taken over", error=str(failure))

    async def reload(self) -> Reloaded:
        """Go over to what the file says now, and return warnings about it and the flows of backends that it takes out.

        A refusal is logged and raised, and nothing has changed then.
        """
        return await self._reloads.ask()

    async def _reload_once(self) -> Reloaded:
        await self.follow()  # so that the plans that the new ones begin with are those of the states
        self._timed.clear()
        states = self.world.states.copy()
        earlier = dict(states.by_backend)
        try:
            self._parts.flows.reopen_log()  # whatever the file says: logrotate asks for no more than that
            fresh = await planner.beside(planner.reloaded, self._path, self.world, states)
            configs = self.world.configuration.config, fresh.configuration.config
            warnings = await planner.beside(describe_losses, *configs)
            notes = await planner.beside(planner.fresh_notes, self.world, fresh)
            async with self._changing:
                began = dict(self.world.states.by_backend)
                fresh = await planner.caught_up(fresh, self.world, earlier)
                left = await planner.beside(self._leaving, fresh)
                await self._install(fresh, began)
        except FastlbError as error:
            log.error("reload refused; nothing was changed", problems=str(error).splitlines())
            raise
        for service in self._timed:  # the new plans are of the time when the file was read
            self._marks.mark_service(service)
        log.info("reloaded", **self.world.configuration.summary())
        for problem in warnings:
            log.warning("a reload took nearly all away", problem=problem)
        for event, problem in notes:
            log.warning(event, problem=problem)
        if left:
            log.info("flows of backends that left", **summary(left))
        return Reloaded([*warnings, *(f"{event}: {problem}" for event, problem in notes)], left)

    def _leaving(self, fresh: World) -> Sequence[Leaving]:
        """Return the flows of backends that this world has no more; they are counted under the numbers of now."""
        numbers, flows_of = self.world.configuration.ids.by_name, self._parts.data_path.flows_of
        return leaving(self.world.states, fresh.states, lambda name: flows_of(numbers[name]), time.monotonic())

    async def _install(self, world: World, began: Mapping[BackendName, BackendState]) -> None:
        """Go over to another configuration. What takes long with many backends is done beside the event loop: to tell
        the next process of it, and to bring it to the classifier and the pipelines.

        What checks and the operator say in that time is marked, and carried over to the new states: those that differ
        from what they were when it ``began``."""
        parts = self._parts
        try:
            await planner.beside(parts.flows.prepare, world)
            for part in parts.in_order():
                if part is parts.publisher:
                    await planner.beside(part.apply, world)
                else:
                    part.apply(world)
        except FastlbError:
            self._go_back()
            raise
        world.states.catch_up(self.world.states, began, time.monotonic())
        self.world = world

    def _go_back(self) -> None:
        """Have every part hold the world before again, whatever another one makes of it."""
        for part in self._parts.in_order():
            try:
                part.apply(self.world)
            except FastlbError as error:
                log.error("the world before was not taken back", error=str(error))

    def _apply(self, world: World) -> None:
        for part in self._parts.in_order():
            part.apply(world)
