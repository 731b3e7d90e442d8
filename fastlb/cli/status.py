"""`fastlb status`: counters, workers, services and backends."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastlb.cli.options import Answer, Commands, add_command, add_json, add_socket, socket_of
from fastlb.cli.text import nonzero, print_json, table
from fastlb.control.client import call
from fastlb.model.modes import TWO_WAY

WORKER_COLUMNS = ("core", "packets", "transmitted", "transmitted_xdp", "read_early", "sleeps")
HEADS = ("SERVICE", "VIP", "FORWARD", "BACKEND", "STATE", "WEIGHT", "FLOWS", "NEW", "PACKETS", "REPLIES")
LOST_LINES = ("log_lost", "flow_log_lost")
SERVICE_COUNTERS = ("drops", "paths", "events")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "status", run, "show counters, services and backends",
        "FLOWS are those at this moment; NEW, PACKETS and REPLIES are counted since the start.",
    )  # fmt: skip
    add_json(parser, "print everything as JSON; docs/counters.md explains each counter")
    add_socket(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    status = call(socket_of(arguments), "status")
    if arguments.json:
        print_json(status)
    else:
        print("\n".join(describe(status)))


def describe(status: Answer) -> Iterator[str]:
    """Yield the lines for people."""
    yield from _summary(status)
    yield ""
    yield table(("WORKER", *map(str.upper, WORKER_COLUMNS)), _worker_rows(status["workers"]))
    yield ""
    yield table(HEADS, _backend_rows(status["services"]))
    yield from _by_service(status["services"])


def _summary(status: Answer) -> Iterator[str]:
    counters, flows = status["counters"], status["flows"]
    transmit = ", ".join(f"{name} {value}" for name, value in status["transmit"].items())
    yield (
        f"fastlb {status['version']}, pid {status['pid']}, up {status['uptime']:.0f} s, "
        f"on {', '.join(status['interfaces'])}, transmit {transmit}, "
        f"open blocks {'read' if status['open_blocks'] else 'not read'}"
    )
    yield (
        f"packets {counters['packets']}, forwarded {counters['forwarded']}, transmitted {counters['transmitted']}, "
        f"lost by the ring {counters['ring_drops']}"
    )
    yield (
        f"flows {flows['active']} of {flows['entries']} entries, evicted {counters['flows_evicted']}, "
        f"untracked {counters['flows_untracked']}"
    )
    yield from _source_ports(flows["source_ports"])
    yield from _affinity(status["affinity"], counters["affine"])
    yield f"drops {nonzero(counters['drops'])}"
    yield f"passed to the host {nonzero(counters['passed'])}"
    if lost := {name: counters.get(name, 0) for name in LOST_LINES if counters.get(name)}:
        yield f"lines that could not be written: {nonzero(lost)}"


def _source_ports(pools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for ports in pools:
        yield f"source ports IPv{ports['version']} {ports['protocol']}: {ports['taken']} of {ports['all']} taken"


def _affinity(sticky: Mapping[str, int], flows: int) -> Iterator[str]:
    """Yield nothing where no service has affinity."""
    if sticky["clients"] or flows:
        yield (
            f"affinity {sticky['clients']} clients remembered, room for {sticky['entries']}; "
            f"{flows} new flows by affinity"
        )


def _worker_rows(workers: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[object]]:
    for number, worker in enumerate(workers):
        yield (number, *(worker[column] for column in WORKER_COLUMNS))


def _backend_rows(services: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[object]]:
    """Yield a row a backend; a service without any has one of dashes."""
    for service in services:
        named = (
            service["name"],
            f"{service['vip']} {service['port']}/{service['protocol']}",
            service["forward"],
        )
        for backend in service["backends"]:
            replies = backend["reply_packets"] if service["forward"] in TWO_WAY else "-"
            counts = (backend["weight"], backend["active_flows"], backend["new_flows"], backend["packets"], replies)
            yield (*named, backend["backend"], state_of(backend), *counts)
        if not service["backends"]:
            yield (*named, *["-"] * (len(HEADS) - len(named)))


def state_of(backend: Mapping[str, Any]) -> str:
    """Return a backend's state, with the reason, the problem, the time left of its drain, or how far its slow start
    is."""
    left, ramp = backend.get("drain_remaining"), backend.get("slow_start")
    if backend["state"] == "down" and backend["reason"]:
        return f"down: {backend['reason']}"
    if backend.get("problem"):
        return f"{backend['state']}, {backend['problem']}"
    if left:
        return f"{backend['state']}, {left:.0f} s left"
    return f"{backend['state']}, {ramp:.0%}" if ramp is not None else str(backend["state"])


def _by_service(services: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table of services that dropped packets, forwarded some by rare paths, or had events with new flows."""
    rows = [
        (service["name"], *(nonzero(service[each]) for each in SERVICE_COUNTERS))
        for service in services
        if any(service[each] for each in SERVICE_COUNTERS)
    ]
    if rows:
        yield ""
        yield table(("SERVICE", *map(str.upper, SERVICE_COUNTERS)), rows)
