"""The flow log: one JSON object a line for the beginning and for the end of each flow in the NAT modes.

Both lines of a flow name its tuple before translation (client, VIP) and after it (source, backend), so that either can
be found by what a server's own log shows. `time` is when the flow began, or when its last packet came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from fastlb._core import FlowMemory, Pipeline
from fastlb.errors import FastlbError
from fastlb.model.clock import flow_clock, seconds_between
from fastlb.model.names import BackendName
from fastlb.model.net import PROTOCOL_NAMES, Address, endpoint_text, parse_endpoint
from fastlb.plan.plan import Plan

MOST = 20_000  # lines of each worker at a time, so that writing them holds up nothing else for long


class FlowLog:
    """An open log, to which `write` is called again and again."""

    def __init__(self, path: str) -> None:
        """Raises FastlbError when the file cannot be written."""
        self._path = path
        self._names: dict[int, tuple[str, Address, int]] = {}
        self._file = self._open()

    def _open(self) -> TextIO:
        check_place(self._path)
        try:
            return open(self._path, "a", encoding="ascii")
        except OSError as error:
            raise FastlbError(f"flow_log: {self._path}: {error.strerror}") from None

    def reopen(self) -> None:
        """Go on in a new file, when the old one was renamed; FastlbError leaves the old one in use."""
        fresh = self._open()
        self._file.close()
        self._file = fresh

    def know(self, plans: Iterable[Plan]) -> None:
        """Backends whose flows may end from now on. Those that left stay known: their flows end later."""
        for plan in plans:
            for member in plan.members:
                self._names[member.id] = (plan.name, member.address, member.port)

    def know_names(self, backends: Mapping[BackendName, int]) -> None:
        """The same of another process' backends, by service and key, with the ids that they had."""
        for (service, key), number in backends.items():
            self._names[number] = service, *parse_endpoint(key)

    def write(self, whose: Iterable[Pipeline | FlowMemory]) -> int:
        """What began and ended since the last call, but no more than MOST lines of each; how many lines it was."""
        now = datetime.now(timezone.utc).timestamp()
        clock = flow_clock()
        lines = 0
        for each in whose:
            for event in each.take_logged(MOST):
                self._file.write(json.dumps(self._line(event, now, clock)) + "\n")
                lines += 1
        self._file.flush()
        return lines

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
        self._file.close()


def check_place(path: str) -> None:
    """Raises FastlbError where there can be no log: another program would have to read a pipe before it can be opened,
    and all the time after."""
    if not Path(path).parent.is_dir():
        raise FastlbError(f"flow_log: there is no directory {Path(path).parent}")
    if Path(path).exists() and not Path(path).is_file():
        raise FastlbError(f"flow_log: {path} is no ordinary file")


def _time_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
