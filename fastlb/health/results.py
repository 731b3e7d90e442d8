"""What checks found out, and what kept them from it, told together and not one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastlb.health.connection import Outcome
from fastlb.health.probe import Probe
from fastlb.model.names import BackendName

BATCH = 0.015  # seconds for which results are collected
TROUBLE_EVERY = 10.0  # seconds between two tellings of trouble


class CheckResult(NamedTuple):
    """What one check found out about one backend: the seconds that it took; or None, and why it failed."""

    backend: BackendName
    seconds: float | None
    reason: str


Report = Callable[[Sequence[CheckResult]], None]
OnTrouble = Callable[[Exception, int], None]


class Results:
    """Collects the ends of checks, and reports them at most every BATCH seconds."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._ended: list[tuple[Probe, Outcome]] = []

    def add(self, probe: Probe, outcome: Outcome) -> None:
        """Note the end of a check. Called within the event loop."""
        if not self._ended:
            asyncio.get_running_loop().call_later(BATCH, self._flush)
        self._ended.append((probe, outcome))

    def _flush(self) -> None:
        """Report to those who use the probes now: who was taken out meanwhile is not among them."""
        ended, self._ended = self._ended, []
        results = [CheckResult(name, *outcome) for probe, outcome in ended for name in probe.members]
        if results:
            self._report(results)


class Troubles:
    """Counts what kept this host from asking, and tells of it at most every TROUBLE_EVERY seconds."""

    def __init__(self, tell: OnTrouble) -> None:
        self._tell = tell
        self._count = 0
        self._told_at: float | None = None

    def add(self, error: Exception, now: float) -> None:
        """Note that a backend could not be asked, for this reason."""
        self._count += 1
        if self._told_at is None or now - self._told_at >= TROUBLE_EVERY:
            self._told_at, count, self._count = now, self._count, 0
            self._tell(error, count)
