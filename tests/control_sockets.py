"""Control servers for tests: in an event loop beside what asks them, or in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fastlb.control.server import Command, ControlServer

T = TypeVar("T")


def beside_a_server(path: Path, commands: Mapping[str, Command], ask: Callable[[], Awaitable[T]]) -> T:
    """Return what ``ask`` returns, which runs while a server answers ``commands`` on ``path``."""

    async def serve() -> T:
        server = ControlServer(str(path), commands)
        server.bind()
        try:
            await server.serve()
            return await ask()
        finally:
            server.close()

    return asyncio.run(serve())


@contextmanager
def serving(path: Path, commands: Mapping[str, Command]) -> Iterator[None]:
    """Answer ``commands`` on ``path`` in a thread, for blocking clients in this one."""
    started = threading.Event()
    ended: list[Callable[[], object]] = []

    async def wait() -> None:
        end, loop = asyncio.Event(), asyncio.get_running_loop()
        ended.append(lambda: loop.call_soon_threadsafe(end.set))
        started.set()
        await end.wait()

    thread = threading.Thread(target=beside_a_server, args=(path, commands, wait))
    thread.start()
    started.wait(10)
    try:
        yield
    finally:
        ended[0]()
        thread.join()
