"""`fastlb conns`: the flows that there are, or how many.

The table is read in slices, one for each request on the control socket, and whoever asks says where the next one
begins. So even ten million flows hold up neither the event loop nor a worker, and a reader that goes away leaves
nothing behind.

    {"command": "conns", "service": "web", "start": 0, "room": 100}
        ->  {"flows": [{...}, ...], "next": 131072}         next: null at the end of the table
    {"command": "conns", "count": true, "start": 0}
        ->  {"counts": [{"service": ..., "backend": ..., "states": {"established": 12}}], "next": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from fastlb._core import FlowWalk, Pipeline, flow_states
from fastlb.errors import FastlbError
from fastlb.model.net import PROTOCOL_NAMES, Network, endpoint_text
from fastlb.plan.plan import Member, Plan

SLICE = 1 << 17  # entries that one request reads: a few milliseconds
MAX_ROOM = 1000  # flows in one answer
STATES = flow_states()

Ask = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Sends a request, and returns its answer."""

Placed = tuple[Plan, Member]
"""A backend, after the service that it belongs to."""


# --- the balancer's side ---------------------------------------------------------------------------------------------


def answer(pipeline: Pipeline, plans: Sequence[Plan], request: Mapping[str, Any], now_ms: int) -> dict[str, Any]:
    """Return the flows in one slice of the table, or their numbers, and where the next slice begins.

    ``now_ms``: the workers' clock. Raises FastlbError for a filter that no flow can fit.
    """
    placed = {member.id: (plan, member) for plan in plans for member in plan.members}
    walk = FlowWalk(pipeline, _wanted(placed, plans, request), _client(request), _states(request))
    start = _number(request, "start", 0, 1 << 40)
    if request.get("count"):
        counts, after = walk.counts(start, SLICE, now_ms)
        return {"counts": list(_counted(placed, counts)), "next": after}
    rows, after = walk.rows(start, SLICE, _number(request, "room", MAX_ROOM, MAX_ROOM), now_ms)
    return {"flows": [_described(placed[row[5]], row) for row in rows if row[5] in placed], "next": after}


def _wanted(placed: Mapping[int, Placed], plans: Sequence[Plan], request: Mapping[str, Any]) -> list[int] | None:
    """Return the ids of the backends that the request names; None for all."""
    service, backend = request.get("service"), request.get("backend")
    if service is not None and service not in {plan.name for plan in plans}:
        raise FastlbError(f'there is no service "{service}"; there are: {_listed(plan.name for plan in plans)}')
    if service is None and backend is None:
        return None
    members = [member for plan, member in placed.values() if service in (None, plan.name)]
    named = [member.id for member in members if backend is None or backend in _names(member)]
    if not named and backend is not None:
        where = f"service {service}" if service else "any service"
        raise FastlbError(f'there is no backend "{backend}" in {where}; there are: '
                          f"{_listed(member.key for member in members)}")  # fmt: skip
    return named


def _names(member: Member) -> tuple[str, str, str]:
    return member.key, str(member.address), f"[{member.address}]"


def _client(request: Mapping[str, Any]) -> Network | None:
    client = request.get("client")
    try:
        return None if client is None else ip_network(client)
    except ValueError as error:
        raise FastlbError(f"client: {error}; it is an address, or a prefix like 198.51.100.0/24") from None


def _states(request: Mapping[str, Any]) -> list[str] | None:
    state = request.get("state")
    if state is not None and state not in STATES:
        raise FastlbError(f'there is no state "{state}"; there are: {_listed(STATES)}')
    return None if state is None else [state]


def _number(request: Mapping[str, Any], key: str, default: int, most: int) -> int:
    number = request.get(key, default)
    if not isinstance(number, int) or not 0 <= number <= most:
        raise FastlbError(f"{key} is a whole number from 0 to {most}, not {number!r}")
    return number


def _listed(names: Iterator[str] | Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


def _described(placed: Placed, row: tuple[Any, ...]) -> dict[str, Any]:
    plan, member = placed
    protocol, client, client_port, vip, vip_port, _, state, age, idle, source, source_port = row
    return {
        "service": plan.name,
        "protocol": PROTOCOL_NAMES[protocol],
        "client": endpoint_text(client, client_port),
        "vip": endpoint_text(vip, vip_port),
        "backend": member.key,
        "source": endpoint_text(source, source_port) if source else None,
        "state": state,
        "age": age / 1000,
        "idle": idle / 1000,
    }


def _counted(placed: Mapping[int, Placed], counts: Mapping[tuple[int, str], int]) -> Iterator[dict[str, Any]]:
    by_backend: dict[int, dict[str, int]] = {}
    for (number, state), flows in counts.items():
        by_backend.setdefault(number, {})[state] = flows
    for number, states in by_backend.items():
        if number in placed:
            plan, member = placed[number]
            yield {"service": plan.name, "backend": member.key, "states": states}


# --- the side of whoever asks ----------------------------------------------------------------------------------------


def collect(ask: Ask, filters: Mapping[str, Any], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Return the first ``limit`` flows that fit the filters, and whether there are more."""
    flows: list[dict[str, Any]] = []
    start: int | None = 0
    while start is not None and len(flows) <= limit:
        answered = ask({**filters, "start": start, "room": min(MAX_ROOM, limit + 1 - len(flows))})
        flows += answered["flows"]
        start = answered["next"]
    return flows[:limit], len(flows) > limit


def count(ask: Ask, filters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how many flows fit the filters: ``flows`` and ``states`` by service and backend, in the order of both."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    start: int | None = 0
    while start is not None:
        answered = ask({**filters, "count": True, "start": start})
        for row in answered["counts"]:
            states = found.setdefault((row["service"], row["backend"]), {})
            for state, flows in row["states"].items():
                states[state] = states.get(state, 0) + flows
        start = answered["next"]
    return [
        {"service": service, "backend": backend, "flows": sum(states.values()), "states": dict(sorted(states.items()))}
        for (service, backend), states in sorted(found.items())
    ]
