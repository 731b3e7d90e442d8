"""Processes of `fastlb` that need not import everything first, which is most of the processor time of a start.

A server process has imported what ``fastlb run`` imports and nothing else; each start forks it, enters the namespace
and calls the command's main(), as `python -m fastlb` would. What wants another environment or fewer privileges is
started as a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyroute2 import netns

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["fastlb.cli.run", "fastlb.daemon.balancer", "fastlb.observe.log"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(MODULES)


class Forked:
    """A running command: what tests use of `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], namespace: str, log: Path) -> None:
        self._process = _context.Process(target=_run, args=(list(words), namespace, str(log)), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Look whether it has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; subprocess.TimeoutExpired when it does not end in time."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("fastlb", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()


def _run(words: list[str], namespace: str, log: str) -> None:
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in enumerate((nothing, output, output)):
        os.dup2(source, descriptor)
    netns.setns(namespace, 0)
    from fastlb.cli.main import main
    from fastlb.observe import log as log_file

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    log_file.finish()
    os._exit(code)
