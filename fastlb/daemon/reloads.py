"""Reloads one after another, however many ask for one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Reloads:
    """Runs ``once`` for everybody who asks. Who asks while another one waits for its turn shares that turn.

    So the file is always read after somebody asked, and a thousand requests cost no more than two readings.
    """

    def __init__(self, once: Callable[[], Awaitable[None]]) -> None:
        self._once = once
        self._turn = asyncio.Lock()
        self._waiting: asyncio.Task[None] | None = None

    async def ask(self) -> None:
        """Return when the file has been read and holds; raises what ``once`` raised."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._run())
        await asyncio.shield(self._waiting)

    async def _run(self) -> None:
        async with self._turn:
            self._waiting = None  # whoever asks from now on may have changed the file since
            await self._once()
