"""The `fastlb` command. Exit codes: 0 fine, 1 runtime failure, 2 usage or invalid configuration."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from fastlb.cli import standard_files
from fastlb.cli.options import ENVIRONMENT
from fastlb.errors import FastlbError
from fastlb.model.names import DEFAULT_CONTROL
from fastlb.version import __version__

COMMANDS = {
    "run": "run",
    "check": "check",
    "status": "status",
    "conns": "conns",
    "trace": "trace",
    "drain": "drain",
    "enable": "drain",
    "weight": "drain",
    "reload": "reload",
    "stop": "stop",
    "schema": "schema",
    "guard": "guard",
    "decap": "decap",
}
"""The commands, in the order of --help, and their modules here. Each has `add(commands)`, which adds its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    standard_files.secure()
    words = sys.argv[1:] if argv is None else argv
    try:
        _run(words)
    except FastlbError as error:
        for line in str(error).splitlines():
            print(f"fastlb: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `fastlb schema | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # everything else that can go wrong has become a FastlbError
        print(f"fastlb: cannot write the output: {error.strerror}", file=sys.stderr)
        os._exit(1)  # without a last attempt to write it
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _run(words: Sequence[str]) -> None:
    try:
        arguments = parser(*words[:1]).parse_args(words)
        arguments.run(arguments)
    finally:  # after --help, too
        sys.stdout.flush()


def parser(first: str = "") -> argparse.ArgumentParser:
    """Return the parser of the command line; what it parses has ``run``, which takes the arguments.

    When the first word is a command, only its module is imported: the others' would take longer than it.
    """
    made = argparse.ArgumentParser(
        prog="fastlb", allow_abbrev=False,
        description="A layer-4 load balancer for Linux.",
        epilog="run, check, schema, guard and decap work on their own. All other commands ask a running fastlb over "
        "its control socket: --socket PATH names it, or -c FILE, the configuration that runs, or the environment "
        f"variable {ENVIRONMENT}; otherwise it is {DEFAULT_CONTROL}. `fastlb COMMAND --help` explains a command.",
    )  # fmt: skip
    made.add_argument("--version", action="version", version=f"fastlb {__version__}")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    modules = [COMMANDS[first]] if first in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in modules:
        import_module(f"fastlb.cli.{module}").add(commands)
    return made
