"""The flow log: one JSON object a line for the beginning and for the end of each flow in the NAT modes.

Both lines of a flow name its tuple before translation (client, VIP) and after it (source, backend), so that either can
be found by what a server's own log shows. `time` is when the flow began, or when its last packet came.

A thread writes the file (lines.py). While that does not keep up, events stay with the pipelines, which count those that
they have no room for; lines that the file refuses, as on a full disk, are counted here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastlb._core import FlowMemory, Pipeline
from fastlb.errors import FastlbError
from fastlb.model.clock import flow_clock, seconds_between
from fastlb.model.names import BackendName
from fastlb.model.net import PROTOCOL_NAMES, Address, endpoint_text, parse_endpoint
from fastlb.model.steps import Steps, finish
from fastlb.observe.lines import SILENT, LineFile, LineWriter, Words, Write
from fastlb.plan.plan import Plan

MAX_LINES = 20_000  # of each worker in one `write`
FILE_MODE = 0o644  # of a new file, less what the umask takes away
AT_ONCE = 100  # lines between two places where writing may be interrupted: about a millisecond
MAX_PENDING = 1 << 20  # bytes that wait for the file
END_TIME = 1.0  # seconds that whoever writes the last lines waits for a file that takes none


class FlowLog:
    """An open log, to which `write` is called again and again."""

    def __init__(self, path: str, words: Words = SILENT, write: Write = os.write) -> None:
        """Raise FastlbError when the file cannot be opened. ``words`` tell of failures, ``write`` writes to it."""
        self._path, self._write_bytes = path, write
        self._names: dict[int, tuple[str, Address, int]] = {}
        self._writer = LineWriter(self._open(), "fastlb-flow-log", MAX_PENDING, words)

    def _open(self) -> LineFile:
        check_path(self._path)
        try:
            return LineFile(_open_for_its_owner(self._path), self._write_bytes)
        except OSError as error:
            raise FastlbError(f"flow_log: {self._path}: {error.strerror}") from None

    @property
    def lost(self) -> int:
        """Lines that the file did not take."""
        return self._writer.lost

    def reopen(self) -> None:
        """Go on in a new file, when the old one was renamed; FastlbError leaves the old one in use."""
        self._writer.change_file(self._open())

    def know(self, plans: Iterable[Plan]) -> None:
        """Learn the names of backends whose flows may end from now on.

        Those that left stay known, since their flows end later.
        """
        for plan in plans:
            for member in plan.members:
                self._names[member.id] = (plan.name, member.address, member.port)

    def know_names(self, backends: Mapping[BackendName, int]) -> None:
        """Learn the names of another process' backends, by service and key, with the ids that they had."""
        for (service, key), number in backends.items():
            self._names[number] = service, *parse_endpoint(key)

    def write(self, sources: Iterable[Pipeline | FlowMemory]) -> int:
        """Have written what began and ended since the last call, up to MAX_LINES of each source, and as long as there
        is room for it; returns how many lines."""
        return finish(self.write_in_steps(sources))

    def write_in_steps(self, sources: Iterable[Pipeline | FlowMemory]) -> Steps[int]:
        """Do what `write` does; yields now and then, where an event loop may interrupt it, or go no further: nothing
        has been taken then that is not written."""
        lines = 0
        for source in sources:
            for _ in range(MAX_LINES // AT_ONCE):
                taken = self._write_some(source) if self._writer.has_room else 0
                lines += taken
                if taken < AT_ONCE:
                    break
                yield
        return lines

    def write_all(self, sources: Iterable[Pipeline | FlowMemory]) -> bool:
        """Have written all that there is, and wait for the file; False when that takes no lines."""
        sources = list(sources)
        while self._writer.wait_for_room(END_TIME) and not self._writer.fails:
            if not self.write(sources):
                return True
        return False

    def wait_until_written(self) -> bool:
        """Wait until the file has all lines, so long as END_TIME at most; True if it has."""
        return self._writer.wait_until_written(END_TIME)

    def _write_some(self, source: Pipeline | FlowMemory) -> int:
        """Have up to AT_ONCE lines written; return how many."""
        events = source.take_logged(AT_ONCE)
        now, clock = datetime.now(timezone.utc).timestamp(), flow_clock()
        if events:
            self._writer.put("".join(json.dumps(self._line(event, now, clock)) + "\n" for event in events).encode())
        return len(events)

    def _line(self, event: tuple[Any, ...], now: float, clock: int) -> dict[str, Any]:
        began, when, since, protocol, client, cport, vip, vport, source, sport, backend, state = event
        service, address, port = self._names.get(backend, ("?", "?", 0))
        line = {
            "event": "start" if began else "end",
            "time": _time_of(now - seconds_between(when, clock)),
            "service": service,
            "protocol": PROTOCOL_NAMES[protocol],
            "client": endpoint_text(client, cport),
            "vip": endpoint_text(vip, vport),
            "source": endpoint_text(source or client, sport or cport),
            "backend": endpoint_text(address, port or vport),
            "state": state,
        }
        return line if began else line | {"seconds": seconds_between(since, when)}

    def close(self) -> None:
        """Close the file, when it has all lines or takes no more."""
        self._writer.close_and_wait(END_TIME)


def _open_for_its_owner(path: str) -> int:
    """Open a file that, when it is new, nobody but its owner may write, whatever the umask leaves to others."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, FILE_MODE)


def check_path(path: str) -> None:
    """Raise FastlbError where there can be no log.

    A pipe is refused: another program would have to read it before it can be opened, and all the time after.
    """
    if not Path(path).parent.is_dir():
        raise FastlbError(f"flow_log: there is no directory {Path(path).parent}")
    if Path(path).exists() and not Path(path).is_file():
        raise FastlbError(f"flow_log: {path} is no ordinary file")


def _time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
