"""The `fastlb` command, also as `python -m fastlb`. The first thing that it does is to hold signals."""

from __future__ import annotations

import os
import signal
import sys

ENDS_EARLY = {signal.SIGTERM: 0, signal.SIGUSR2: 0, signal.SIGINT: 128 + signal.SIGINT}
"""The signals that end `fastlb run` while it has opened nothing yet, and its exit codes then."""


def main() -> int:
    """Run the command that the command line names; return the exit code."""
    if sys.argv[1:2] == ["run"]:
        hold_signals()
    from fastlb.cli.main import main as run_command  # takes a tenth of a second, and a balancer ten times that

    return run_command()


def hold_signals() -> None:
    """Keep a signal from killing a balancer that is being loaded, which takes seconds with many backends.

    A SIGHUP waits until the balancer runs, and has it read its file again then. The others end it at once, as a clean
    stop: nothing is open until the balancer sets its own handlers (fastlb/daemon/signals.py).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    for number in ENDS_EARLY:
        signal.signal(number, lambda number, _: os._exit(ENDS_EARLY[signal.Signals(number)]))


if __name__ == "__main__":
    raise SystemExit(main())
