"""The world that holds, and how all parts go over to the next: as the host and backends change, and by a reload.

One change at a time. What is large is planned beside the event loop, and brought up to date before it is taken over.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from fastlb.daemon import planner
from fastlb.daemon.parts import Parts
from fastlb.daemon.reloads import Reloads
from fastlb.daemon.world import Marks, World
from fastlb.errors import FastlbError

log = structlog.get_logger()


class Current:
    """Holds the world, and drives all parts from one to the next within the event loop."""

    def __init__(self, path: str, world: World, marks: Marks, parts: Parts) -> None:
        """``path``: of the configuration's file, which a reload reads."""
        self.world = world
        self._path, self._marks, self._parts = path, marks, parts
        self._changing = asyncio.Lock()
        self._reloads = Reloads(self._reload_once)

    async def follow(self) -> None:
        """Have all parts follow what is marked; a failure is logged."""
        async with self._changing:
            world = await planner.plan(self.world, self._marks.take())
            try:
                self._apply(world)
            except FastlbError as error:
                log.error("a change was not taken over", error=str(error))
            self.world = world

    async def reload(self) -> None:
        """Go over to what the file says now; a refusal is logged and raised, and nothing has changed then."""
        await self._reloads.ask()

    async def _reload_once(self) -> None:
        states = self.world.states.copy()
        earlier = dict(states.by_backend)
        try:
            fresh = await planner.beside(planner.reloaded, self._path, self.world, states)
            async with self._changing:
                await self._install(planner.caught_up(fresh, self.world, earlier))
        except FastlbError as error:
            log.error("reload refused; nothing was changed", problems=str(error).splitlines())
            raise
        log.info("reloaded", **self.world.configuration.summary())

    async def _install(self, world: World) -> None:
        """Go over to another configuration. What takes long with many backends is done beside the event loop: to tell
        the next process of it, and to bring it to the classifier and the pipelines.

        What checks and the operator say in that time is marked, and carried over to the new states."""
        parts, earlier = self._parts, dict(self.world.states.by_backend)
        try:
            parts.flows.reopen_log()
            await planner.beside(parts.flows.prepare, world)
            for part in parts.in_order():
                if part is parts.publisher:
                    await planner.beside(part.apply, world)
                else:
                    part.apply(world)
        except FastlbError:
            self._go_back()
            raise
        world.states.catch_up(self.world.states, earlier, time.monotonic())
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
