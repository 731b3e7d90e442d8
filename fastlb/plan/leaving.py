"""What becomes of the flows of backends that drain, or that a reload takes out: they stay, move or end. Pure.

stay: their packets go to the backend that they have. move: each goes to another backend with its next packet, which
does not know a TCP connection. end: nobody gets them any more, or their client gets a RST.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastlb.config import Service
from fastlb.model.names import BackendName
from fastlb.plan.backends import KEPT_BY, BackendState, BackendStates

FATES = {"all": "stay", "except_syn": "stay", "none": "move", "to_reset": "end"}
"""What becomes of flows, by the flow policy of their backend."""

MAX_NAMES = 3  # backends that a line of the log names


class Leaving(NamedTuple):
    """The flows of a backend that leaves, and their fate: stay, move or end."""

    service: str
    backend: str
    flows: int
    fate: str


class Reloaded(NamedTuple):
    """What is to be told of a reload: warnings, and the flows of backends that it took out."""

    warnings: Sequence[str]
    left: Sequence[Leaving]


def fate_of(state: BackendState, service: Service, now: float) -> str:
    """Return what becomes of the flows of a backend in this state."""
    return FATES[state.flow_policy(service, now)]


def fate_after_drain(state: BackendState, service: Service, now: float) -> str | None:
    """Return what becomes of the flows that are left when a drain's deadline passes; None without a deadline."""
    if state.remaining(now) is None:
        return None
    return fate_of(replace(state, deadline=now), service, now)


def leaving(
    before: BackendStates, after: BackendStates, flows: Callable[[BackendName], int], now: float
) -> list[Leaving]:
    """Return the backends that have flows, and that a reload takes out; ``flows`` counts those that are not over.

    Those of a service that goes, or whose VIP, port, protocol or mode changes, are among them.
    """
    found = (Leaving(*name, flows(name), fate) for name, fate in _fates(before, after, now))
    return [each for each in found if each.flows]


def _fates(before: BackendStates, after: BackendStates, now: float) -> Iterator[tuple[BackendName, str]]:
    changed = {name for name, was in before.services.items() if _is_another(was, after.services.get(name))}
    for name in before.by_backend:
        service, key = name
        if service in changed:
            yield name, "end"
        elif name not in after.by_backend:
            kept = after.removed.get(service, {}).get(key)
            yield name, "move" if kept is None else fate_of(kept.state, after.services[service], now)


def _is_another(was: Service, service: Service | None) -> bool:
    """True if a service of this name has none of the flows that it had before."""
    return service is None or any(getattr(was, key) != getattr(service, key) for key in KEPT_BY)


def summary(left: Sequence[Leaving]) -> dict[str, Any]:
    """Return it for one line of the log: how many flows stay, move and end, and the first of the backends."""
    return {**totals(left), "count": len(left), "backends": [f"{each[0]} {each[1]}" for each in left[:MAX_NAMES]]}


def totals(left: Iterable[Leaving]) -> dict[str, int]:
    """Return how many flows stay, move and end; without those that are 0."""
    counted: Counter[str] = Counter()
    for each in left:
        counted[each.fate] += each.flows
    return dict(counted)
