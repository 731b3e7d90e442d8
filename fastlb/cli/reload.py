"""`fastlb reload`: have a running fastlb read its configuration again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastlb.cli.options import Commands, add_command, add_socket, socket_of
from fastlb.cli.text import count_of, flows_with_fate
from fastlb.control.client import call

MAX_LINES = 20  # backends that are named


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "reload", run, "read the configuration file again; a file with a mistake changes nothing"
    )
    add_socket(parser)


def run(arguments: argparse.Namespace) -> None:
    """Return when the new configuration holds; raises FastlbError when it is refused."""
    answer = call(socket_of(arguments), "reload")
    print(f"reloaded: {count_of(answer['services'], 'service')}")
    for warning in answer.get("warnings", ()):  # a fastlb that runs may be older
        print(f"warning: {warning}")
    for line in describe_left(answer.get("left", ())):
        print(line)


def describe_left(left: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line a backend that had flows and was taken out; of many, the first."""
    for each in left[:MAX_LINES]:
        yield f"removed: {each['service']} {each['backend']}; {flows_with_fate(each['flows'], each['fate'])}"
    if len(left) > MAX_LINES:
        yield f"and {count_of(len(left) - MAX_LINES, 'backend')} more"
