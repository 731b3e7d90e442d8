"""What several commands have in common: their arguments, and how they find a running fastlb."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeAlias

from fastlb.control.locate import socket_of_process
from fastlb.model.names import DEFAULT_CONTROL

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

ENVIRONMENT = "FASTLB_CONTROL"
Run = Callable[[argparse.Namespace], None]


def add_command(commands: Commands, name: str, run: Run, summary: str, more: str = "") -> argparse.ArgumentParser:
    """Add a command; ``summary`` is its line in `fastlb --help`, and with ``more`` the text of its own --help."""
    text = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=f"{text} {more}".strip())
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add -c to a command that cannot do without a configuration."""
    parser.add_argument(
        "-c", "--config", required=True, metavar="FILE",
        help="the configuration file (YAML; docs/configuration.md explains every key)",
    )  # fmt: skip


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """Add --log-level to a command that runs for long."""
    parser.add_argument(
        "--log-level", choices=("info", "warning", "error"), default="info",
        help="the least severe messages to log (default: info)",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser, what: str = "print as JSON") -> None:
    """Add --json, for programs."""
    parser.add_argument("--json", action="store_true", help=what)


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add what names the running fastlb that a command asks."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket", metavar="PATH",
        help=f"the control socket of the running fastlb (default: ${ENVIRONMENT}, or {DEFAULT_CONTROL})",
    )  # fmt: skip
    where.add_argument(
        "-c", "--config", metavar="FILE",
        help="the configuration that the running fastlb uses; its `control` names the socket",
    )  # fmt: skip
    where.add_argument(
        "--pid", type=number(1, (1 << 31) - 1), metavar="PID",
        help="the process of the running fastlb, whatever its configuration says by now",
    )  # fmt: skip


def socket_of(arguments: argparse.Namespace) -> str:
    """Return the control socket: by --pid, -c, --socket, the environment or the default.

    Raises ConfigError for -c, ControlError for --pid.
    """
    if arguments.pid:
        return socket_of_process(arguments.pid)
    if arguments.config:
        from fastlb.config import control_path  # pydantic takes longer than most commands

        return control_path(arguments.config)
    return arguments.socket or os.environ.get(ENVIRONMENT) or DEFAULT_CONTROL


def number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``least`` to ``most``, for argparse; 0x10 is 16."""

    def parse(text: str) -> int:
        if not text.isascii():  # int() takes the digits of other scripts
            raise ValueError("invalid literal")
        value = int(text, 0)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in {least}..{most}")
        return value

    parse.__name__ = "number"  # "invalid number value: 'x'"
    return parse


Answer = dict[str, Any]
"""What a running fastlb answers."""
