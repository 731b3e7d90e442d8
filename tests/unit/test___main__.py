"""__main__.py: signals are held before anything else is loaded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastlb import __main__

# Where `fastlb.cli.main` would be loaded there is a command that gets a signal.
WITH_SIGNAL = """
import os, sys, types
sys.modules["fastlb.cli.main"] = command = types.ModuleType("main")
command.main = lambda: os.kill(os.getpid(), int(sys.argv[2])) or 77
before = set(sys.modules)
import fastlb.__main__
assert not {"argparse", "dataclasses"} & (sys.modules.keys() - before)  # which take as long as the interpreter
sys.exit(fastlb.__main__.main())
"""


@pytest.mark.parametrize(("command", "number", "code"), [
    ("run", signal.SIGHUP, 77), ("run", signal.SIGTERM, 0), ("run", signal.SIGUSR2, 0), ("run", signal.SIGINT, 130),
    ("status", signal.SIGHUP, -signal.SIGHUP), ("status", signal.SIGTERM, -signal.SIGTERM),
])  # fmt: skip
def test_signals_before_the_command_is_loaded(command: str, number: signal.Signals, code: int) -> None:
    """Commands that end by themselves die of signals as everywhere."""
    done = subprocess.run([sys.executable, "-c", WITH_SIGNAL, command, str(int(number))], check=False)
    assert done.returncode == code


def test_the_command_is_this_module() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nfastlb = "{__main__.__name__}:main"\n' in project
