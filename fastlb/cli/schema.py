"""`fastlb schema`: the configuration's JSON Schema."""

from __future__ import annotations

import argparse

from fastlb.cli.options import Commands, add_command
from fastlb.cli.text import print_json
from fastlb.config import json_schema


def add(commands: Commands) -> None:
    """Add the command."""
    add_command(
        commands, "schema", run, "print the JSON Schema of the configuration (for editors)",
        "An editor that knows it completes keys and marks mistakes.",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    print_json(json_schema())
