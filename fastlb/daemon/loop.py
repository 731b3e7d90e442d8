"""The event loop as signals, threads and parts see it: functions are handed over to it, and it is woken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastlb.errors import FastlbError


class Loop:
    """The event loop while it runs; before and after, functions that are handed over run at once."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> asyncio.AbstractEventLoop:
        """Take the running event loop, and return it."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    def end(self) -> None:
        """Let go of it."""
        self._loop = None

    def hand_over(self, function: Callable[[], object]) -> None:
        """Run a function within the event loop, from any thread or signal handler."""
        loop = self._loop
        if loop is None:
            function()
            return
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(function)

    def begin_task(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Do something that takes time; a FastlbError of it was logged by then."""

        async def run() -> None:
            with contextlib.suppress(FastlbError):
                await work()

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def wake(self) -> None:
        """End the `rest` that is going on; called within the loop."""
        self._due.set()

    async def rest(self, seconds: float) -> None:
        """Wait so long, or until `wake`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._due.wait(), seconds)
        self._due.clear()
