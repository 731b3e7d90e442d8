"""`fastlb run`: the balancer itself."""

from __future__ import annotations

import argparse
import signal

from fastlb.cli.options import Commands, add_command, add_config, add_log_level


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "run", run,
        "start balancing; SIGTERM stops, SIGHUP reads the configuration again (needs root)",
    )  # fmt: skip
    add_config(parser)
    add_log_level(parser)


def run(arguments: argparse.Namespace) -> None:
    """Balance until a signal ends it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    from fastlb.daemon.balancer import Balancer  # only this command needs netlink, eBPF and a log
    from fastlb.observe import log

    log.configure(arguments.log_level)
    Balancer(arguments.config).run()
