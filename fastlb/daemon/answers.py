"""The part that notices backends that are sent flows and answer none of them: they are wired wrong, mostly.

Their state stays what checks say; that no answers come is told beside it, by status, trace and, once, by the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

import structlog

from fastlb.daemon.world import DataPath, World
from fastlb.model.modes import MODES
from fastlb.model.names import BackendName
from fastlb.observe.changes import Silence, summarize_silence
from fastlb.plan.answers import Answers as Seen
from fastlb.plan.answers import judge
from fastlb.plan.backends import BackendStates

EVERY = 1.0  # seconds from one round over all backends to the next
AT_ONCE = 200  # backends looked at in one tick, in a millisecond or so

log = structlog.get_logger()

Looked = tuple[BackendName, int, str]
"""A backend to look at: its name, its id, and its service's mode."""


class Answers:
    """Looks at the counters of TCP services' backends, some in each tick."""

    def __init__(self, data_path: DataPath) -> None:
        self._data_path = data_path
        self._states = BackendStates()
        self._world: World | None = None
        self._seen: dict[BackendName, Seen] = {}
        self._told: dict[BackendName, bool] = {}  # who was told of, and whether as silent last
        self._round: Iterator[Looked] = iter(())
        self._next = 0.0  # when a round may begin

    def open(self, stack: ExitStack, world: World) -> World:
        """Begin with the counters as they are."""
        self.apply(world)
        return world

    def tick(self, now: float) -> None:
        """Look at some backends, and log those that have fallen silent or answer again."""
        chunk = list(islice(self._round, AT_ONCE))
        if not chunk and now >= self._next:
            self._round, self._next = self._backends(), now + EVERY
            chunk = list(islice(self._round, AT_ONCE))
        changed = [silence for each in chunk if (silence := self._look(*each, now)) is not None]
        for level, event, fields in summarize_silence(changed):
            getattr(log, level)(event, **fields)

    def apply(self, world: World) -> None:
        """Go by another world; after a reload the round begins anew, for ids may be others'."""
        before, self._world, self._states = self._world, world, world.states
        if before is None or world.configuration.ids is not before.configuration.ids:
            self._round = iter(())
            self._seen = {name: seen for name, seen in self._seen.items() if name in self._states.by_backend}
            self._told = {name: silent for name, silent in self._told.items() if name in self._states.by_backend}

    def _backends(self) -> Iterator[Looked]:
        for plan in self._world.configuration.plans if self._world is not None else ():
            if plan.protocol == "tcp":  # over UDP nobody need answer
                for member in plan.members:
                    if not member.removed:
                        yield (plan.name, member.key), member.id, plan.forward

    def _look(self, name: BackendName, number: int, forward: str, now: float) -> Silence | None:
        """Take in a backend's counters; return what there is to tell."""
        state = self._states.by_backend.get(name)
        if state is None:
            return None
        new, answered = self._counted(number)
        seen = Seen(new, answered)  # one that is down is known not to answer, and begins anew
        if state.works(unknown=True):
            seen = judge(self._seen.get(name), new, answered, MODES[forward].sees_replies, now)
        self._seen[name] = seen
        if seen.silent == state.silent:
            return None
        self._states.update(name, replace(state, silent=seen.silent))
        if not self._is_news(name, seen.silent):
            return None
        return Silence(*name, forward, seen.silent, self._unanswered(name, new))

    def _is_news(self, name: BackendName, silent: bool) -> bool:
        """True once for a backend that falls silent, and once when it answers again: more would fill the log where
        some clients get through."""
        before = self._told.get(name)
        if before is (None if silent else True):
            self._told[name] = silent
            return True
        return False

    def _unanswered(self, name: BackendName, new: int) -> int:
        return new - self._seen[name].new

    def _counted(self, number: int) -> tuple[int, int]:
        """Return how many flows a backend was sent, and how often it has answered."""
        stats = [pipeline.backend_stats(number) for pipeline in self._data_path.pipelines]
        answered = sum(each["answered_flows"] + each["reply_packets"] for each in stats)
        return sum(each["new_flows"] for each in stats), answered
