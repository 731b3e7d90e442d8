"""`fastlb reload`: have a running fastlb read its configuration again."""

from __future__ import annotations

import argparse

from fastlb.cli.options import Commands, add_command, add_socket, socket_of
from fastlb.cli.text import count_of
from fastlb.control.client import call


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
