"""A control server in this process' event loop, and blocking clients beside it in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
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
