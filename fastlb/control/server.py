"""The control socket: one JSON object a line in, one out, over a Unix stream socket that only its owner may open.

    {"command": "status"}  ->  {"ok": true, "result": {...}}   or   {"ok": false, "error": "...", "exit_code": 2}
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlb.errors import ControlError, FastlbError

LINE_LIMIT = 1 << 16  # bytes of a request
TIMEOUT = 10.0  # seconds that a client waits for an answer
END_TIMEOUT = 20.0  # and for the end of a fastlb that was told to stop
LOOK_EVERY, ASK_EVERY = 0.01, 0.5  # seconds; one that ends takes no more connections out of its socket's queue


class RefusedError(ControlError):
    """A running fastlb refused a command; the exit code is that of the error it met."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


Command = Callable[[Mapping[str, Any]], Any]


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
        check_place(self._path)
        if _answers(self._path):
            raise ControlError(f"another fastlb is running: it answers on {self._path}")
        try:
            self._made = [folder for folder in self._path.parents if not folder.exists()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_socket():
                self._path.unlink()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            mask = os.umask(0o177)
            try:
                self._socket.bind(str(self._path))
            finally:
                os.umask(mask)
            self._socket.listen()
        except OSError as error:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
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
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError):
            return {"ok": False, "error": f"unknown request; commands are: {', '.join(sorted(self._commands))}"}
        try:
            return {"ok": True, "result": command(request)}
        except FastlbError as error:
            return {"ok": False, "error": str(error), "exit_code": error.exit_code}


def check_place(path: Path) -> None:
    """Raises ControlError where something else is that is not a socket: it is not fastlb's to replace."""
    if path.exists() and not path.is_socket():
        raise ControlError(f"control: {path} is there, and is no socket; give another path")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def call(path: str, command: str, **arguments: Any) -> Any:
    """Send one command to the fastlb that answers on ``path`` and return its result; raises ControlError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(path)
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = connection.makefile("rb").readline()
        except OSError as error:
            raise ControlError(_explain(path, error)) from error
    if not line:
        raise ControlError(f"the fastlb on {path} closed the connection without an answer")
    answer = json.loads(line)
    if not answer["ok"]:
        raise RefusedError(answer["error"], answer.get("exit_code", ControlError.exit_code))
    return answer["result"]


def wait_for_end(path: str) -> None:
    """Wait until the fastlb on ``path``, which was told to stop, has taken everything down; raises ControlError."""
    end = time.monotonic() + END_TIMEOUT
    ask = time.monotonic() + ASK_EVERY
    while os.path.exists(path):
        now = time.monotonic()
        if now > ask:
            if not _answers(Path(path)):
                return
            ask = now + ASK_EVERY
        if now > end:
            raise ControlError(f"the fastlb on {path} has not ended after {END_TIMEOUT:.0f} s; its log may say why")
        time.sleep(LOOK_EVERY)


def _explain(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return f"no fastlb is running on {path}; is it the right --socket or -c?"
    return f"cannot talk to fastlb on {path}: {error.strerror or error}"
