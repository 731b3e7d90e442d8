"""What a running data path tells about itself, as one JSON-ready dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastlb._core import Pipeline, reason_names, verdict_number
from fastlb.model.counters import add_up
from fastlb.model.net import PROTOCOL_NAMES
from fastlb.plan.backends import Standings
from fastlb.plan.plan import Member, Plan

Pipelines = Sequence[Pipeline]
"""Those of all workers."""

_FORWARD, _PASS, _DROP = 0, 1, 2


def split_counters(counters: Mapping[str, int]) -> dict[str, Any]:
    """Counters by what they count: totals, ``paths`` of forwarded packets, ``passed`` to the host, ``drops``."""
    names = reason_names()
    totals: dict[str, Any] = {name: value for name, value in counters.items() if name not in names}
    by_verdict: list[dict[str, int]] = [{}, {}, {}]
    for name in names:
        by_verdict[verdict_number(name)][name] = counters[name]
    return totals | {"paths": by_verdict[0], "passed": by_verdict[_PASS], "drops": by_verdict[_DROP]}


def describe_services(
    pipelines: Sequence[Pipeline], plans: Iterable[Plan], standings: Standings | None = None, now: float = 0.0
) -> list[dict[str, Any]]:
    """Each service with its backends, how they stand ``now``, and what all workers sent to them: packets, bytes,
    flows."""
    standings = standings or Standings()
    return [
        {
            "name": plan.name,
            "vip": str(plan.vip),
            "port": plan.ports if isinstance(plan.ports, int) else str(plan.ports),
            "protocol": plan.protocol,
            "forward": plan.forward,
            "scheduler": plan.scheduler,
            **_count_service(pipelines, plan),
            "backends": [
                _describe_member(pipelines, plan, member, standings, now)
                | add_up(pipeline.backend_stats(member.id) for pipeline in pipelines)
                for member in plan.members
            ],
        }
        for plan in plans
    ]


def _count_service(pipelines: Sequence[Pipeline], plan: Plan) -> dict[str, dict[str, int]]:
    """``paths``, ``drops`` and ``events`` that are not 0; conntrack and scheduled follow from the backends."""
    counters = add_up(pipeline.service_counters(plan.slot) for pipeline in pipelines)
    events = add_up(pipeline.service_events(plan.slot) for pipeline in pipelines)
    seen = {name: value for name, value in counters.items() if value}
    return {
        "paths": {name: value for name, value in seen.items() if verdict_number(name) == _FORWARD},
        "drops": {name: value for name, value in seen.items() if verdict_number(name) == _DROP},
        "events": {name: value for name, value in events.items() if value},
    }


def _describe_member(
    pipelines: Sequence[Pipeline], plan: Plan, member: Member, standings: Standings, now: float
) -> dict[str, Any]:
    """``slow_start``: the part of its weight that a backend has in it. ``response``: the seconds that backends take to
    answer, to flows (the slowest worker's word) and to checks."""
    standing = standings.of(plan.name, member.key)
    seen = [pipeline.response_time(member.id) for pipeline in pipelines]
    return {
        "backend": member.key,
        "weight": member.full if member.weight else 0,
        "slow_start": member.ramp if member.ramp < 1 else None,
        "state": standing.shown(now),
        "reason": standing.reason,
        "drain_remaining": standing.remaining(now),
        "response": max((each for each in seen if each is not None), default=None),
        "check_response": standing.response or None,
    }


def describe_flows(pipeline: Pipeline) -> dict[str, Any]:
    """How full the flow table is, what it costs, how many source ports are taken; any worker's pipeline knows."""
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
    """How many clients are remembered, of how many; any worker's pipeline knows."""
    used, entries = pipeline.affinity_slots()
    return {"clients": used, "entries": entries}
