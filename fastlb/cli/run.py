"""`fastlb run`: the balancer itself."""

from __future__ import annotations

import argparse

from fastlb.cli.options import Commands, add_command, add_config, add_log_level


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "run", run,
        "start balancing; SIGTERM stops, SIGHUP reads the configuration again (needs root)",
        "SIGUSR2 stops as `fastlb stop --handover` does: guard, VIPs and flows stay for the next `fastlb run`.",
    )  # fmt: skip
    add_config(parser)
    parser.add_argument(
        "--wait", action="store_true",
        help="wait for interfaces that do not exist yet, as at boot, instead of refusing to start",
    )  # fmt: skip
    add_log_level(parser)


def run(arguments: argparse.Namespace) -> None:
    """Balance until a signal ends it."""
    from fastlb.daemon.balancer import Balancer  # only this command needs netlink, eBPF and a log
    from fastlb.observe import log

    log.configure(arguments.log_level)
    Balancer(arguments.config, arguments.wait).run()
