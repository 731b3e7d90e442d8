"""What the next process must know of the states of backends, to go on as after a reload. Pure.

It is written to the flow file as JSON. Times are those of the monotonic clock, which goes on while the host runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastlb.config import Backend, Config, Service
from fastlb.plan.backends import KEPT_BY, BackendState, BackendStates, Removed

SAVED = ("state", "draining", "deadline", "weight", "slow_since", "left")  # of a state
_FIRST = BackendState()


def saved_services(config: Config) -> list[dict[str, Any]]:
    """Return what of the configuration's services decides over removed backends; it changes with a reload only."""
    kept = {"name", *KEPT_BY, "backends"}
    return [service.model_dump(mode="json", include=kept) for service in config.services]


def saved_states(states: BackendStates, services: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the states, for JSON; ``services``: as `saved_services` gave them for this configuration, if known."""
    stand = [[*name, mark] for name, state in states.by_backend.items() if (mark := _mark(state))]
    removed = [
        [service, key, each.backend.model_dump(mode="json"), _mark(each.state)]
        for service, gone in states.removed.items()
        for key, each in gone.items()
    ]
    return {"services": saved_services(states.config) if services is None else services,
            "stand": stand, "removed": removed}  # fmt: skip


def restored_states(saved: Mapping[str, Any], now: float) -> BackendStates:
    """Return what `saved_states` gave, perhaps in another process.

    What a fastlb has written that configured services otherwise gives none.
    """
    states = BackendStates()
    try:
        services = tuple(map(Service.model_validate, saved["services"]))
        states.apply_config(Config.model_construct(services=services), now)
        for service, key, mark in saved["stand"]:
            states.update((service, key), BackendState(**mark))
        for service, key, backend, mark in saved["removed"]:
            gone = Removed(Backend.model_validate(backend), BackendState(**mark))
            states.removed.setdefault(service, {})[key] = gone
    except (KeyError, TypeError, ValidationError):
        return BackendStates()
    states.timed = {name for name, state in states.by_backend.items() if state.deadline is not None}
    return states


def _mark(state: BackendState) -> dict[str, Any]:
    """Return what differs from the first state that a backend has."""
    return {name: getattr(state, name) for name in SAVED if getattr(state, name) != getattr(_FIRST, name)}
