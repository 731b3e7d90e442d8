"""Reloads one after another, however many ask for one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Reloads(Generic[T]):
    """Runs ``once`` for everybody who asks. Who asks while another one waits for its turn shares that turn.

    So the file is always read after somebody asked, and a thousand requests cost no more than two readings.
    """

    def __init__(self, once: Callable[[], Awaitable[T]]) -> None:
        self._once = once
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Task[T] | None = None

    async def ask(self) -> T:
        """Return what ``once`` returned, when the file has been read and holds; raises what it raised."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(self._waiting)

    async def _run(self) -> T:
        async with self._turn:
            self._waiting = None  # whoever asks from now on may have changed the file since
            return await self._once()
