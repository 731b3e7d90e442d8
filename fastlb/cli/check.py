"""`fastlb check`: is a configuration right, and does it suit this host?"""

from __future__ import annotations

import argparse

from fastlb.cli.options import Commands, add_command, add_config, add_json
from fastlb.cli.text import count_of, print_json
from fastlb.config import load_config
from fastlb.config.notes import config_notes


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "check", run, "check a configuration file and list everything that is wrong")
    add_config(parser)
    parser.add_argument(
        "--host", action="store_true",
        help="also check it against this host: its interfaces, routes, addresses, memory and files",
    )  # fmt: skip
    add_json(parser, "print the configuration as JSON, every default filled in")


def run(arguments: argparse.Namespace) -> None:
    """Print what the configuration holds, and what may be a mistake; raises FastlbError for what is one."""
    config = load_config(arguments.config)
    notes = list(config_notes(config))
    if arguments.host:
        from fastlb.daemon.preflight import check_this_host  # netlink, which embedding does without

        notes += check_this_host(arguments.config, config)
    if arguments.json:
        print_json(config.model_dump(mode="json"))
        return
    if not config.interfaces:
        notes.append("`interfaces` is empty: enough for embedding, but fastlb run needs at least one")
    backends = sum(len(service.backends) for service in config.services)
    print(f"{arguments.config}: valid, {count_of(len(config.services), 'service')}, {count_of(backends, 'backend')}")
    for note in notes:
        print(f"note: {note}")
