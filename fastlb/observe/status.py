"""What a running data path tells about itself, as one JSON-ready dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from fastlb._core import Pipeline, reason_names, verdict_number
from fastlb.model.counters import add_up
from fastlb.model.modes import MODES
from fastlb.model.net import PROTOCOL_NAMES
from fastlb.model.steps import Steps, finish
from fastlb.plan.backends import BackendState, BackendStates
from fastlb.plan.plan import Member, Plan

Pipelines = Sequence[Pipeline]
"""Those of all workers."""

AT_ONCE = 64  # backends described between two places where the work may be interrupted: less than a millisecond

_FORWARD, _PASS, _DROP = 0, 1, 2


@cache
def verdicts() -> Mapping[str, int]:
    """Return the verdict of every reason: 0 forward, 1 pass, 2 drop."""
    return {name: verdict_number(name) for name in reason_names()}


def split_counters(counters: Mapping[str, int]) -> dict[str, Any]:
    """Return counters by what they count: totals, ``paths`` of forwarded packets, ``passed`` to the host, ``drops``."""
    totals: dict[str, Any] = {name: value for name, value in counters.items() if name not in verdicts()}
    by_verdict: list[dict[str, int]] = [{}, {}, {}]
    for name, verdict in verdicts().items():
        by_verdict[verdict][name] = counters[name]
    return totals | {"paths": by_verdict[_FORWARD], "passed": by_verdict[_PASS], "drops": by_verdict[_DROP]}


def describe_services(
    pipelines: Pipelines, plans: Iterable[Plan], states: BackendStates | None = None, now: float = 0.0
) -> list[dict[str, Any]]:
    """Return each service with its backends, their states ``now``, and what all workers sent to them."""
    return finish(services_in_steps(pipelines, plans, states or BackendStates(), now))


def services_in_steps(
    pipelines: Pipelines, plans: Iterable[Plan], states: BackendStates, now: float
) -> Steps[list[dict[str, Any]]]:
    """Do what `describe_services` does; yields now and then, where an event loop may interrupt it."""
    described = []
    for plan in plans:
        service = _describe_service(pipelines, plan)
        for start in range(0, len(plan.members), AT_ONCE):
            yield
            service["backends"] += [
                _describe_member(pipelines, plan, member, states, now)
                for member in plan.members[start : start + AT_ONCE]
            ]
        described.append(service)
        yield
    return described


def _describe_service(pipelines: Pipelines, plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "vip": str(plan.vip),
        "port": plan.ports if isinstance(plan.ports, int) else str(plan.ports),
        "protocol": plan.protocol,
        "forward": plan.forward,
        "scheduler": plan.scheduler,
        **_count_service(pipelines, plan),
        "backends": [],
    }


def _count_service(pipelines: Pipelines, plan: Plan) -> dict[str, dict[str, int]]:
    """Return the ``paths``, ``drops`` and ``events`` that are not 0.

    The paths conntrack and scheduled are missing: they follow from what the backends count.
    """
    counters = add_up(pipeline.service_counters(plan.slot) for pipeline in pipelines)
    events = add_up(pipeline.service_events(plan.slot) for pipeline in pipelines)
    seen = {name: value for name, value in counters.items() if value}
    return {
        "paths": {name: value for name, value in seen.items() if verdicts()[name] == _FORWARD},
        "drops": {name: value for name, value in seen.items() if verdicts()[name] == _DROP},
        "events": {name: value for name, value in events.items() if value},
    }


def _describe_member(
    pipelines: Pipelines, plan: Plan, member: Member, states: BackendStates, now: float
) -> dict[str, Any]:
    """Return how a backend stands, and its counters.

    ``slow_start``: the part of its weight that a backend has in it. ``response``: the seconds that it takes to answer,
    to flows (as the worker sees it that waits longest) and, as ``check_response``, to checks.
    """
    state = states.of(plan.name, member.key)
    return {
        "backend": member.key,
        "weight": member.target_weight if member.weight else 0,
        "slow_start": member.ramp if member.ramp < 1 else None,
        "state": state.shown(now),
        "reason": state.reason,
        "problem": problem_of(plan, state),
        "drain_remaining": state.remaining(now),
        "response": _response(pipelines, member.id),
        "check_response": state.response or None,
        **_count_backend(pipelines, member.id),
    }


def problem_of(plan: Plan, state: BackendState) -> str | None:
    """Return what is wrong with a backend that checks find to work; None if nothing is known to be."""
    return MODES[plan.forward].silence if state.silent and state.works(unknown=True) else None


def _response(pipelines: Pipelines, backend: int) -> float | None:
    seen = [response for pipeline in pipelines if (response := pipeline.response_time(backend)) is not None]
    return max(seen) if seen else None


def _count_backend(pipelines: Pipelines, backend: int) -> dict[str, int]:
    """Return the sum of what all workers count of a backend."""
    total, *others = (cast("dict[str, int]", pipeline.backend_stats(backend)) for pipeline in pipelines)
    for counted in others:
        for name, value in counted.items():
            total[name] += value
    return total


def describe_flows(pipeline: Pipeline) -> dict[str, Any]:
    """Return how full the flow table is, its memory, and its source ports; any worker's pipeline knows."""
    hot, cold = pipeline.memory()
    return {
        "active": pipeline.flow_count(),
        "entries": pipeline.flow_capacity,
        "hot_bytes": hot,
        "cold_bytes": cold,
        "source_ports": [
            {"version": version, "protocol": PROTOCOL_NAMES[protocol], "taken": taken, "all": every}
            for version, protocol, taken, every in pipeline.source_ports()
        ],
    }


def describe_affinity(pipeline: Pipeline) -> dict[str, int]:
    """Return how many clients are remembered, and how many can be; any worker's pipeline knows."""
    used, entries = pipeline.affinity_slots()
    return {"clients": used, "entries": entries}
