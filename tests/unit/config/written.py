"""Helpers: configurations as text and as dicts, and the problems that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastlb.config import Config, load_config
from fastlb.errors import ConfigError

ROOT = Path(__file__).parents[3]

EXAMPLE = ROOT / "examples/fastlb.yaml"


# Six lines: a service whose backends follow from line 7 on.
NAT = """\
services:
  - name: web
    vip: 203.0.113.10
    port: 80
    protocol: tcp
    forward: nat
"""

DSR = NAT.replace("nat", "dsr")


def service(**changes: object) -> dict[str, Any]:
    """A valid service as a dict, with some keys changed."""
    plain = {"name": "web", "vip": "203.0.113.10", "port": 80, "protocol": "tcp", "forward": "nat"}
    return {**plain, **changes}


def problems_in(text: str | bytes, directory: Path) -> list[tuple[int, str, str]]:
    """(line, key path, message) of each Problem that a file with this text has; line 0 when there is none."""
    file = directory / "fastlb.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    found = []
    for problem in caught.value.problems:
        name, _, line = problem.where.removeprefix(str(directory)).partition(":")
        assert name == "/fastlb.yaml"
        found.append((int(line or 0), problem.path, problem.message))
    return found


def messages_of(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(key path, message) of each Problem of a dict."""
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data)
    assert {problem.where for problem in caught.value.problems} == {""}
    return [(problem.path, problem.message) for problem in caught.value.problems]
