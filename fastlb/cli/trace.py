"""`fastlb trace`: which backend a packet would get, and why."""

from __future__ import annotations

import argparse

from fastlb.cli.options import Commands, add_command, add_json, add_socket, socket_of
from fastlb.cli.text import print_json
from fastlb.config import load_config
from fastlb.control.client import call
from fastlb.observe.explanation import lines_of, parse_tuple
from fastlb.observe.trace import explain_offline


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "trace", run, "show which backend a client's packet would get, and why",
        "It follows a packet from SRC to DST through a running fastlb, or with --offline through a configuration, as "
        "if fastlb had just started. Nothing is sent, and nothing is changed. See docs/trace.md.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SRC:PORT", help="the client, as 198.51.100.7:40000 or [2001:db8::7]:40000")
    parser.add_argument("destination", metavar="DST:PORT/PROTO", help="the VIP, as 203.0.113.10:443/tcp")
    parser.add_argument(
        "--offline", action="store_true", help="answer from the file of -c alone; no fastlb needs to run"
    )
    add_json(parser, "print every step with its facts as JSON")
    add_socket(parser)
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Print the steps."""
    if arguments.offline and not arguments.config:
        arguments.refuse("--offline needs a configuration: -c FILE")
    try:
        packet = parse_tuple(arguments.source, arguments.destination)
    except ValueError as error:
        arguments.refuse(str(error))
    if arguments.offline:
        explained = explain_offline(load_config(arguments.config), packet).as_json()
    else:
        asked = {"source": arguments.source, "destination": arguments.destination}
        explained = call(socket_of(arguments), "trace", **asked)
    if arguments.json:
        print_json(explained)
    else:
        print("\n".join(lines_of(explained)))
