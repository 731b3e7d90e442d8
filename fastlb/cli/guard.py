"""`fastlb guard`: what a crash left in the kernel."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastlb.cli.options import Commands, add_command, add_json
from fastlb.cli.text import print_json, table
from fastlb.config import load_config

if TYPE_CHECKING:  # netlink and eBPF, which only a run of this command needs
    from fastlb.daemon.leftovers import Leftover

FileRow = tuple[str, int, str]
"""A flow file's path, its bytes, and its state."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "guard", run,
        "show or remove what a crash left in the kernel: packet filters (guards), VIPs, flow files",
        "The guard is a filter at an interface's ingress: it keeps packets to VIPs from the host, which would answer "
        "them with RST. It stays after a crash, for the next `fastlb run` to take over.",
    )  # fmt: skip
    parser.add_argument(
        "action", choices=("show", "remove"),
        help="remove refuses, and removes nothing, while a running fastlb uses any of it",
    )  # fmt: skip
    add_json(parser, "print what was found as JSON")
    parser.add_argument("-c", "--config", metavar="FILE", help="also look for the flow file of this configuration")


def run(arguments: argparse.Namespace) -> None:
    """Print what was found, or removed. Raises FastlbError when it is in use."""
    from fastlb.daemon import leftovers

    config = load_config(arguments.config) if arguments.config else None
    found, files = leftovers.remove(config) if arguments.action == "remove" else leftovers.show(config)
    if arguments.json:
        print_json({"interfaces": [asdict(each) for each in found], "flow_files": [asdict(each) for each in files]})
    elif not found and not files:
        print("nothing is left over: there is no guard, VIP or flow file of fastlb here")
    elif arguments.action == "remove":
        print(f"removed from: {', '.join([*(each.interface for each in found), *(each.path for each in files)])}")
    else:
        print("\n\n".join(describe(found, [(each.path, each.bytes, each.state) for each in files])))


def describe(found: Sequence[Leftover], files: Iterable[FileRow]) -> Iterator[str]:
    """Yield a table of interfaces and one of flow files, whichever there are."""
    if found:
        rows = (
            (each.interface, each.program_id or "-", ", ".join(each.vips) or "-",
             "in use" if each.in_use else "left over")
            for each in found
        )  # fmt: skip
        yield table(("INTERFACE", "PROGRAM", "VIPS", "STATE"), rows)
    if sized := [(path, f"{size >> 20} MiB", state) for path, size, state in files]:
        yield table(("FLOW FILE", "SIZE", "STATE"), sized)
