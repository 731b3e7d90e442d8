"""`fastlb stop`: end a running fastlb, for good or for the next one to go on."""

from __future__ import annotations

import argparse

from fastlb.cli.options import Answer, Commands, add_command, add_socket, socket_of
from fastlb.cli.text import count_of
from fastlb.control.client import call, wait_for_end


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "stop", run, "stop, and wait until it has stopped")
    parser.add_argument(
        "--handover", action="store_true",
        help="for a restart or an upgrade: keep guard, VIPs and flows in place for the next `fastlb run`",
    )  # fmt: skip
    add_socket(parser)


def run(arguments: argparse.Namespace) -> None:
    """Return when it has stopped; raises ControlError when it does not."""
    path = socket_of(arguments)
    kept = call(path, "stop", handover=arguments.handover)
    wait_for_end(path)
    print(f"stopped; kept for the next run: {describe_kept(kept)}" if arguments.handover else "stopped")


def describe_kept(kept: Answer) -> str:
    """Return in words what stays on the host until the next run takes it over."""
    vips = [f"VIPs {', '.join(kept['vips'])}"] if kept["vips"] else []
    flows = f"{count_of(kept['flows'], 'flow')} in {kept['flow_file']}" if kept["flow_file"] else "no flow"
    return "; ".join([f"the guard on {', '.join(kept['interfaces'])}", *vips, flows])
