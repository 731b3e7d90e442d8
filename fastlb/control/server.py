"""The control socket: one JSON object a line in, one out, over a Unix stream socket that only its owner may open.

    {"command": "status"}  ->  {"ok": true, "result": {...}}   or   {"ok": false, "error": "...", "exit_code": 2}
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from inspect import isawaitable
from pathlib import Path
from typing import Any

import structlog

from fastlb.control.client import is_answered
from fastlb.control.requests import check_arguments, parse_request
from fastlb.control.slices import run_in_slices
from fastlb.errors import ControlError, FastlbError
from fastlb.model.encoding import encode

LINE_LIMIT = 1 << 16  # bytes of a request
FOLDER_MODE = 0o755  # of directories that are made; a umask may take more away, and none lets others write

Command = Callable[[Mapping[str, Any]], Any]
"""Takes a request and returns its result, or an awaitable of it; raises FastlbError to refuse."""

log = structlog.get_logger()


class ControlServer:
    """Answers commands on ``path`` from within the running event loop."""

    def __init__(self, path: str, commands: Mapping[str, Command]) -> None:
        self._path = Path(path)
        self._commands = commands
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._made: list[Path] = []  # the directories that were not there before, innermost first

    def bind(self) -> None:
        """Take the path, which also keeps a second fastlb with the same configuration out; raises ControlError.

        A socket that nobody answers on is left over from a crash, and is replaced.
        """
        check_path(self._path)
        if is_answered(self._path):
            raise ControlError(f"another fastlb is running: it answers on {self._path}")
        try:
            self._made = [folder for folder in self._path.parents if not folder.exists()]
            for folder in reversed(self._made):
                folder.mkdir(FOLDER_MODE, exist_ok=True)
            if self._path.is_socket():
                self._path.unlink()
            self._socket = _listen(self._path)
        except OSError as error:
            raise ControlError(f"cannot open the control socket {self._path}: {error.strerror}") from error

    async def serve(self) -> None:
        """Start to answer."""
        self._server = await asyncio.start_unix_server(self._converse, sock=self._socket, limit=LINE_LIMIT)

    def close(self) -> None:
        """Stop answering and remove the socket."""
        if self._server is not None:
            self._server.close()
        if self._socket is not None:
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            self._socket = None
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else put a file there
                folder.rmdir()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError, asyncio.CancelledError):  # the last: fastlb stops
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(await run_in_slices(encode(answer)) + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        name = ""
        try:
            request = parse_request(line)
            name = self._name_of(request)
            check_arguments(name, request)
            result = self._commands[name](request)
            return {"ok": True, "result": await result if isawaitable(result) else result}
        except FastlbError as error:
            return {"ok": False, "error": str(error), "exit_code": error.exit_code}
        except Exception as error:  # a fault of fastlb's own: whoever asks must not wait in vain
            log.exception("a command failed", command=name)
            return {"ok": False, "error": f"fastlb failed at this: {type(error).__name__}: {error}", "exit_code": 1}

    def _name_of(self, request: Mapping[str, Any]) -> str:
        """Return the name of the command that is asked for; raises ControlError where there is none of this name."""
        name = request.get("command")
        if not isinstance(name, str) or name not in self._commands:
            raise ControlError(f"unknown request; commands are: {', '.join(sorted(self._commands))}")
        return name


def _listen(path: Path) -> socket.socket:
    """Return a socket that listens at the path, and that only its owner may open; raises OSError."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        opened.bind(str(path))
        opened.listen()
    except OSError:
        opened.close()
        raise
    finally:
        os.umask(mask)
    return opened


def check_path(path: Path) -> None:
    """Raise ControlError where something else is that is not a socket: it is not fastlb's to replace."""
    if path.exists() and not path.is_socket():
        raise ControlError(f"control: {path} is there, and is no socket; give another path")
