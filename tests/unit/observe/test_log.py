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


# --- a log that cannot be written ------------------------------------------------------------------------------------

BUSY = """
import sys, threading, time, structlog
from fastlb.observe import log
log.configure("info")
logger = structlog.get_logger()
began = time.monotonic()
for number in range(20000):
    logger.info("a line", number=number)
print("through", file=sys.stderr, flush=True)
threading.Thread(target=lambda: 1 / 0).start()
deadline = time.monotonic() + 20
while not log.lost() and time.monotonic() < deadline:
    time.sleep(0.001)
print(log.lost() > 0, flush=True)
"""


@pytest.mark.parametrize("how", ["full disk", "reader gone", "reader asleep", "closed"])
def test_who_logs_neither_waits_nor_fails(how: str) -> None:
    """Nor does the end of the process; what is lost is counted."""
    reading, writing = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    if how == "reader gone":
        os.close(reading)
    program = [sys.executable, "-c", f"from fastlb.cli import standard_files\nstandard_files.secure()\n{BUSY}"]
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", *program] if how == "closed" else program
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=full if how == "full disk" else writing, timeout=60, check=False
    )
    for descriptor in (writing, full, *([] if how == "reader gone" else [reading])):
        os.close(descriptor)
    assert (done.returncode, done.stdout) == (0, b"True\n")


def test_what_is_printed_comes_in_whole_lines_and_in_any_encoding() -> None:
    look = (
        "import sys\nfrom fastlb.observe import log\nlog.configure()\n"
        "sys.stderr.write('one ')\nsys.stderr.write('line \\u2603\\nanother\\n')\n1 / 0"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(b"one line \\u2603\nanother\nTraceback")
    assert done.stderr.endswith(b"ZeroDivisionError: division by zero\n")


def test_that_lines_were_lost_is_told_once_the_reader_reads() -> None:
    reading, writing = os.pipe()
    running = subprocess.Popen(
        [sys.executable, "-c", BUSY + "\nlog.END_TIME = 20\n"], stdout=subprocess.PIPE, stderr=writing
    )
    os.close(writing)
    assert running.stdout is not None
    assert running.stdout.readline() == b"True\n"
    with open(reading) as reader:
        events = [json.loads(line) for line in reader.read().splitlines() if line.startswith("{")]
    assert running.wait(60) == 0
    running.stdout.close()
    told = [line for line in events if line["event"].startswith("log lines are missing")]
    assert told
    assert (told[0]["level"], told[0]["lost"] > 0) == ("warning", True)
