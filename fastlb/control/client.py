"""Asks a running fastlb over its control socket. What goes over it: server.py."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any

from fastlb.errors import ControlError

TIMEOUT = 10.0  # seconds without a byte of the answer
END_TIMEOUT = 20.0  # seconds for a fastlb that was told to stop
LOOK_EVERY, ASK_EVERY = 0.01, 0.5  # seconds; one that ends takes no more connections out of its socket's queue


class RefusedError(ControlError):
    """A running fastlb refused a command; the exit code is that of the error it met."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def call(path: str, command: str, **arguments: Any) -> Any:
    """Send one command to the fastlb that answers on ``path`` and return its result.

    Raises RefusedError when it refuses, ControlError when it does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(path)
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = connection.makefile("rb").readline()
        except OSError as error:
            raise ControlError(_explain(path, error)) from error
    if not line.endswith(b"\n"):
        raise ControlError(f"the fastlb on {path} closed the connection without an answer")
    answer = json.loads(line)
    if not answer["ok"]:
        raise RefusedError(answer["error"], answer.get("exit_code", ControlError.exit_code))
    return answer["result"]


def is_answered(path: str | os.PathLike[str]) -> bool:
    """Return whether somebody listens on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def wait_for_end(path: str) -> None:
    """Wait until the fastlb on ``path``, which was told to stop, has taken everything down; raises ControlError."""
    end = time.monotonic() + END_TIMEOUT
    ask = time.monotonic() + ASK_EVERY
    while os.path.exists(path):
        now = time.monotonic()
        if now > ask:
            if not is_answered(path):
                return
            ask = now + ASK_EVERY
        if now > end:
            raise ControlError(f"the fastlb on {path} has not ended after {END_TIMEOUT:.0f} s; its log may say why")
        time.sleep(LOOK_EVERY)


def _explain(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return f"no fastlb is running on {path}; is it the right --socket or -c?"
    return f"cannot talk to fastlb on {path}: {error.strerror or error}"
