"""What the log says when the states of backends change: a line each of a few, one line of many. Pure.

A rack that loses its power takes thousands of backends down within one tick. Somebody who reads the log then wants the
number, some names and the reason, and not thousands of lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from fastlb.model.modes import MODES

MAX_LINES = 5  # changes to one state that get a line each
MAX_NAMES = 3  # backends that the one line of more changes names

Level = Literal["info", "warning"]
Event = tuple[Level, str, dict[str, Any]]
"""A level of the log, the event, and its fields."""


class Change(NamedTuple):
    """A backend's new state; ``reason``: why its last check failed, or ""."""

    service: str
    backend: str
    state: str
    reason: str = ""


def summarize_changes(changes: Iterable[Change]) -> Iterator[Event]:
    """Yield what to log of the changes of one tick, in the order in which their states were first met.

    Up to MAX_LINES changes to one state are a line each. More are one line, which has their ``count``, the first of
    the ``backends``, the number of ``services`` and the most frequent ``reason``.
    """
    by_state: dict[str, list[Change]] = {}
    for change in changes:
        by_state.setdefault(change.state, []).append(change)
    for state, alike in by_state.items():
        if len(alike) <= MAX_LINES:
            yield from map(_describe_one, alike)
        else:
            yield _describe_many(state, alike)


def summarize_takers(services: Sequence[str], some: bool) -> Iterator[Event]:
    """Yield what to log of services for which no backend takes new flows from now on, or ``some`` does again."""
    level: Level = "info" if some else "warning"
    event = "backends take new flows again" if some else "no backend takes new flows"
    if len(services) <= MAX_LINES:
        for name in services:
            yield level, event, {"service": name}
    else:
        yield level, event, {"count": len(services), "services": list(services[:MAX_NAMES])}


class Silence(NamedTuple):
    """A backend that is ``silent``, or answers again; ``flows``: those that were not answered."""

    service: str
    backend: str
    forward: str
    silent: bool
    flows: int


def summarize_silence(changes: Iterable[Silence]) -> Iterator[Event]:
    """Yield what to log of backends of which no answers come, and of those that answer again: one line of many."""
    by_event: dict[tuple[str, bool], list[Silence]] = {}
    for change in changes:
        by_event.setdefault((change.forward, change.silent), []).append(change)
    for (forward, silent), alike in by_event.items():
        level: Level = "warning" if silent else "info"
        event = MODES[forward].silence if silent else "flows are answered again"
        hint = {"hint": MODES[forward].wiring} if silent else {}
        if len(alike) > MAX_LINES:
            named = [f"{each.service} {each.backend}" for each in alike[:MAX_NAMES]]
            yield level, event, {"count": len(alike), "backends": named} | hint
            continue
        for each in alike:
            flows = {"flows": each.flows} if silent else {}
            yield level, event, {"service": each.service, "backend": each.backend} | flows | hint


def _level(state: str) -> Level:
    return "warning" if state == "down" else "info"


def _describe_one(change: Change) -> Event:
    why = {"reason": change.reason} if change.reason else {}
    return _level(change.state), f"backend {change.state}", {"service": change.service, "backend": change.backend} | why


def _describe_many(state: str, changes: Sequence[Change]) -> Event:
    reasons = Counter(change.reason for change in changes if change.reason)
    fields: dict[str, Any] = {
        "count": len(changes),
        "services": len({change.service for change in changes}),
        "backends": [f"{change.service} {change.backend}" for change in changes[:MAX_NAMES]],
    }
    if reasons:
        fields["reason"], fields["with_this_reason"] = reasons.most_common(1)[0]
    return _level(state), f"backends {state}", fields
