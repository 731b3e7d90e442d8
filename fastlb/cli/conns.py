"""`fastlb conns`: the flows, or how many there are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fastlb.cli.options import Commands, add_command, add_json, add_socket, number, socket_of
from fastlb.cli.text import nonzero, print_json, table
from fastlb.control.client import call
from fastlb.observe.flows import STATES, collect, count

COLUMNS = ("service", "protocol", "client", "vip", "backend", "source", "state", "age", "idle")
FILTERS = ("service", "backend", "client", "state")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "conns", run, "list the flows (connections), or count them",
        "AGE and IDLE are in seconds. See docs/trace.md.",
    )  # fmt: skip
    parser.add_argument("--service", metavar="NAME", help="only flows of this service")
    parser.add_argument("--backend", metavar="ADDR[:PORT]", help="only flows to this backend")
    parser.add_argument(
        "--client", metavar="ADDR",
        help="only flows from this client address or prefix, such as 198.51.100.0/24",
    )  # fmt: skip
    parser.add_argument("--state", choices=STATES, help="only flows in this state")
    parser.add_argument(
        "--count", action="store_true",
        help="count the flows by service, backend and state, instead of listing them",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=number(1, 1 << 30), default=100, metavar="N", help="list at most N flows (default: 100)"
    )
    add_json(parser)
    add_socket(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the flows that fit the filters, or their numbers."""
    filters = {name: getattr(arguments, name) for name in FILTERS}
    path = socket_of(arguments)

    def ask(request: Mapping[str, Any]) -> Any:
        return call(path, "conns", **request)

    if arguments.count:
        counts = count(ask, filters)
        print_json(counts) if arguments.json else print(describe_counts(counts))
        return
    flows, more = collect(ask, filters, arguments.limit)
    if arguments.json:
        print_json({"flows": flows, "more": more})
        return
    print(describe(flows))
    if more:
        print(f"there are more than {arguments.limit}: --limit shows more, --count counts them")


def describe(flows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of flows."""
    return table(map(str.upper, COLUMNS), map(_row, flows))


def _row(flow: Mapping[str, Any]) -> Sequence[object]:
    shown = {**flow, "source": flow["source"] or "-", "age": f"{flow['age']:.1f}", "idle": f"{flow['idle']:.1f}"}
    return [shown[column] for column in COLUMNS]


def describe_counts(counts: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of numbers of flows, with their total."""
    rows = [(row["service"], row["backend"], row["flows"], nonzero(row["states"])) for row in counts]
    rows.append(("", "total", sum(row["flows"] for row in counts), ""))
    return table(("SERVICE", "BACKEND", "FLOWS", "STATES"), rows)
