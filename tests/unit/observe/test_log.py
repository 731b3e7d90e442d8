"""The log of a process: JSON lines on standard error, unless that is a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import datetime

import pytest

PROGRAM = """
import structlog
from fastlb.observe import log
log.configure({level!r})
logger = structlog.get_logger()
logger.info("running", interfaces=["eth0"])
logger.warning("backend down", backend="10.0.0.1:80")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed")
"""


def command(level: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(level=level)]


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("info", ["running", "backend down", "failed"]),
        ("warning", ["backend down", "failed"]),
        ("error", ["failed"]),
    ],
)
def test_json_lines(level: str, events: list[str]) -> None:
    done = subprocess.run(command(level), capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == ""
    assert [line["event"] for line in lines] == events
    assert all(datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).tzinfo for line in lines)
    assert "ZeroDivisionError" in lines[-1]["exception"]
    assert (lines[-1]["level"], lines[-1].keys() >= {"event", "level", "timestamp"}) == ("error", True)


def test_a_terminal_gets_readable_lines() -> None:
    controller, terminal = pty.openpty()
    done = subprocess.run(command("warning"), stderr=terminal, timeout=60, check=True)
    os.close(terminal)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert done.returncode == 0
    assert "backend down" in shown
    assert not shown.lstrip().startswith("{")
