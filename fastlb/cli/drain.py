"""`fastlb drain`, `weight` and `enable`: the operator's word about one backend."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from fastlb.cli.options import Commands, Run, add_command, add_socket, number, socket_of
from fastlb.cli.text import FATES, flows_with_fate
from fastlb.control.client import call
from fastlb.errors import FastlbError

MAX_WEIGHT = 65535
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def add(commands: Commands) -> None:
    """Add the three commands."""
    drain = _add(
        commands, "drain", run_drain,
        "send no new flows to a backend; its flows stay until they end",
        "It lasts until `fastlb enable`, over reloads too. See docs/backends.md.",
    )  # fmt: skip
    drain.add_argument(
        "--deadline", type=deadline, metavar="TIME",
        help="such as 5m: after this time the remaining flows are moved or reset, as the service's on_leave says",
    )  # fmt: skip
    add_socket(drain)
    add_socket(_add(commands, "enable", run_enable, "undo drain and weight"))
    weight = _add(
        commands, "weight", run_weight,
        "change a backend's weight until `enable`, or until a clean stop",
    )  # fmt: skip
    weight.add_argument(
        "number", metavar="N", type=number(0, MAX_WEIGHT),
        help=f"the new weight, 0 to {MAX_WEIGHT}; with 0 it gets no new flows",
    )  # fmt: skip
    add_socket(weight)


def _add(commands: Commands, name: str, run: Run, summary: str, more: str = "") -> argparse.ArgumentParser:
    parser = add_command(commands, name, run, summary, more)
    parser.add_argument("service", metavar="SERVICE", help="the service's name")
    parser.add_argument(
        "backend", metavar="BACKEND",
        help="the backend's address, or address:port ([address]:port for IPv6)",
    )  # fmt: skip
    return parser


def deadline(text: str) -> float:
    """Return seconds, from "5m" or "300"; for argparse."""
    from fastlb.config import drain_time  # pydantic, which only this option needs

    try:
        return drain_time(float(text) if _NUMBER.fullmatch(text) else text)
    except FastlbError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_drain(arguments: argparse.Namespace) -> None:
    """Send no new flows to a backend."""
    _change(arguments, "draining", "drain", True, deadline=arguments.deadline)


def run_enable(arguments: argparse.Namespace) -> None:
    """Undo drain and weight."""
    _change(arguments, "enabled", "enable", False)


def run_weight(arguments: argparse.Namespace) -> None:
    """Give a backend another weight."""
    _change(arguments, f"weight {arguments.number}", "weight", arguments.number == 0, weight=arguments.number)


def _change(
    arguments: argparse.Namespace, done: str, command: str, leaves: bool, **more: float | None
) -> None:
    """Have a backend changed, and print its service, its key, and what follows for flows, its own if it ``leaves``."""
    answer = call(socket_of(arguments), command, service=arguments.service, backend=arguments.backend, **more)
    flows = flows_in_words(answer) if leaves else ""
    print(f"{done}: {answer['service']} {answer['backend']}{flows}")
    if answer.get("takers") == 0:
        print(f"no backend of {answer['service']} takes new flows now")


def flows_in_words(answer: Mapping[str, Any]) -> str:
    """Return what becomes of the flows of a backend; nothing where it has none."""
    if not answer.get("flows"):
        return ""
    said = f"; {flows_with_fate(answer['flows'], answer['fate'])}"
    later = answer.get("after_deadline")
    return said if later in (None, answer["fate"]) else f"{said}; at the deadline, those left {FATES[later][1]}"
