"""Checks backends again and again, beside the packets' path: a task for each backend of a service with a check."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from fastlb.config.schema import Check, Config
from fastlb.health.checks import CheckFailedError, run_check
from fastlb.model.names import BackendName
from fastlb.model.net import Address

Target = tuple[BackendName, Check, Address, int]

Report = Callable[[BackendName, float | None, str], None]
"""Told the backend, the seconds that its check took (None: it failed) and why it failed."""


class Checker:
    """Runs the checks of a configuration, within the running event loop, and reports each result."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._tasks: dict[Target, asyncio.Task[None]] = {}

    def follow(self, config: Config) -> None:
        """Check exactly what this configuration asks for; what was checked the same way before goes on."""
        wanted = targets(config)
        for what in self._tasks.keys() - wanted:
            self._tasks.pop(what).cancel()
        for what in wanted - self._tasks.keys():
            self._tasks[what] = asyncio.create_task(self._check(what))

    def stop(self) -> None:
        """End all checks."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _check(self, what: Target) -> None:
        """The first one at once; then one each interval, each backend at a time of its own."""
        name, check, address, port = what
        delay = random.uniform(0.5, 1) * check.interval
        while True:
            took, why = None, ""
            try:
                took = await run_check(check, address, port)
            except CheckFailedError as error:
                why = str(error)
            # Before Python 3.12, wait_for() loses a cancellation that meets the end of what it waits for.
            if self._tasks.get(what) is not asyncio.current_task():
                return
            self._report(name, took, why)
            await asyncio.sleep(delay)
            delay = check.interval


def targets(config: Config) -> set[Target]:
    """Every backend that is checked: how, and at which address and port."""
    return {
        ((service.name, service.key(backend)), service.check, backend.address, backend.port or service.single_port)
        for service in config.services
        if service.check is not None
        for backend in service.backends
    }
