"""The part that knows how backends stand: health checks, the operator's word, slow starts, ends of drains."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Protocol

import structlog

from fastlb.config.load import Config
from fastlb.daemon.world import DataPath, Marks, World
from fastlb.health.checker import Checker
from fastlb.health.results import CheckResult, OnTrouble, Report
from fastlb.model.modes import SCHEDULERS
from fastlb.model.names import BackendName
from fastlb.observe.changes import Change, summarize_changes, summarize_takers
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Plan

DROP_EVERY = 1.0  # seconds between looks at the flows of removed backends
RESPONSES_EVERY = 5.0  # seconds between plans by the response times of checks

log = structlog.get_logger()


class Checks(Protocol):
    """What runs health checks: a `Checker`."""

    def apply_config(self, config: Config, changed: Collection[str] | None = None) -> None: ...
    def close(self) -> None: ...


class Backends:
    """Takes in what checks, time and the operator say of backends, and marks those for whom a plan is due.

    What has changed is logged after the data path has followed: `apply` does both in this order.
    """

    def __init__(
        self, data_path: DataPath, marks: Marks, checks: Callable[[Report, OnTrouble], Checks] = Checker
    ) -> None:
        self._data_path, self._marks = data_path, marks
        self._checks = checks(self._checked, self._could_not_check)
        self._states, self._ids = BackendStates(), BackendIds()
        self._changes: list[Change] = []  # not logged yet
        self._drained: list[BackendName] = []  # likewise
        self._looked = self._responses_at = time.monotonic()  # when drains and slow starts were last looked at
        self._drop_at = 0.0
        self._plans: Sequence[Plan] = ()
        self._idle: dict[str, None] = {}  # services of which no backend takes new flows, as they were told of

    def open(self, stack: ExitStack, world: World) -> World:
        """Begin to check what the world configures, within the running event loop."""
        stack.callback(self._checks.close)
        self._go_by(world)
        self._tell_of_takers(world)
        self._checks.apply_config(world.configuration.config)
        return world

    def tick(self, now: float) -> None:
        """Mark what time brings: steps of slow starts, ends of drains, response times, removed ones without flows."""
        self._drained += self._states.drains_ended(self._looked, now)
        if due := self._states.due(self._looked, now):
            for service in due:
                self._marks.mark_service(service)
        if due or not self._states.slow:
            self._looked = now
        if now - self._responses_at >= RESPONSES_EVERY:
            self._responses_at = now
            self._mark_responses()
        if now - self._drop_at >= DROP_EVERY:
            self._drop_at = now
            self._drop_removed(now)

    def apply(self, world: World) -> None:
        """Check what this world configures, and log the changes that the data path has followed by now."""
        before = self._states.config
        self._go_by(world)
        if world.states.config is not before:
            self._checks.apply_config(world.states.config)
        drained, self._drained, changes, self._changes = self._drained, [], self._changes, []
        for service, backend in drained:
            log.info("drained", service=service, backend=backend)
        for level, event, fields in summarize_changes(changes):
            getattr(log, level)(event, **fields)
        self._tell_of_takers(world)

    def _tell_of_takers(self, world: World) -> None:
        """Log services that have lost their last backend for new flows, and those that have one again."""
        if world.configuration.plans is self._plans:
            return
        self._plans, before = world.configuration.plans, self._idle
        self._idle = {plan.name: None for plan in self._plans if not plan.takers}
        again = [name for name in before if name in world.states.services and name not in self._idle]
        lost = [name for name in self._idle if name not in before]
        for level, event, fields in (*summarize_takers(lost, some=False), *summarize_takers(again, some=True)):
            getattr(log, level)(event, **fields)

    # --- the operator ------------------------------------------------------------------------------------------

    def drain(self, name: BackendName, seconds: float | None) -> None:
        """Give a backend no new flows; after so many seconds (None: never) the flows that it still has go."""
        self._states.drain(name, None if seconds is None else time.monotonic() + seconds)
        self._marks.mark(name)

    def enable(self, name: BackendName) -> None:
        """Undo `drain` and `set_weight`."""
        self._states.enable(name, time.monotonic())
        self._marks.mark(name)

    def set_weight(self, name: BackendName, weight: int) -> None:
        """Give a backend another weight than the configuration's."""
        self._states.set_weight(name, weight, time.monotonic())
        self._marks.mark(name)

    # --- checks and time ---------------------------------------------------------------------------------------

    def _go_by(self, world: World) -> None:
        self._states, self._ids = world.states, world.configuration.ids

    def _checked(self, results: Sequence[CheckResult]) -> None:
        now = time.monotonic()
        for name, seconds, reason in results:
            service = self._states.services.get(name[0])
            if service is None or not self._states.checked(service, name[1], seconds, reason, now):
                continue
            state = self._states.of(*name).state
            self._marks.mark(name)
            self._changes.append(Change(*name, state, reason))
            if state == "up":
                self._forget_response(name)
        if self._changes:
            self._marks.wake()

    def _could_not_check(self, error: Exception, count: int) -> None:
        log.warning("backends could not be checked; their states stay", reason=str(error), count=count)

    def _forget_response(self, name: BackendName) -> None:
        number = self._ids.by_name.get(name)
        if number is not None:
            for pipeline in self._data_path.pipelines:
                pipeline.forget_response(number)

    def _mark_responses(self) -> None:
        for name, service in self._states.services.items():
            if service.check is not None and SCHEDULERS[service.scheduler].by_response:
                self._marks.mark_service(name)

    def _drop_removed(self, now: float) -> None:
        """Forget backends that the configuration gave up, once the last of their flows is over."""
        if not self._states.removed:
            return
        over = self._states.drop_removed(lambda name: self._data_path.flows_of(self._ids.by_name[name]), now)
        if over:
            self._marks.removed.update(service for service, _ in over)
            log.info("removed backends have no flows any more", backends=[" ".join(name) for name in over])
