"""`fastlb run`, as far as it comes without an interface: a process of its own, since it changes signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlb.cli.main import parser


def run(path: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "fastlb", "run", "-c", str(path)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("services: []\n", "interfaces: fastlb run needs at least one interface"),
        ("flows: many\n", "flows: "),
    ],
)
def test_a_configuration_that_cannot_run(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text(text)
    done = run(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


EARLY = [(signal.SIGTERM, 0), (signal.SIGUSR2, 0), (signal.SIGINT, 130)]


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A fastlb that reads its configuration for as long as the test wants."""
    path = tmp_path / "fastlb.yaml"
    os.mkfifo(path)
    with subprocess.Popen([sys.executable, "-m", "fastlb", "run", "-c", str(path)], stderr=subprocess.PIPE) as process:
        try:
            yield process, path
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), EARLY)
def test_a_stop_while_the_configuration_is_read(
    reading: tuple[subprocess.Popen[bytes], Path], number: signal.Signals, code: int
) -> None:
    """It ends at once, with no word and nothing left."""
    process, path = reading
    with path.open("w"):  # which returns when the other end is open
        process.send_signal(number)
        assert process.wait(60) == code
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_reload_while_the_configuration_is_read(reading: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, path = reading
    with path.open("w") as file:
        process.send_signal(signal.SIGHUP)
        file.write("flows: many\n")
    assert process.wait(60) == 2


def test_the_level_of_the_log() -> None:
    assert parser().parse_args(["run", "-c", "x"]).log_level == "info"
    assert parser().parse_args(["run", "-c", "x", "--log-level", "error"]).log_level == "error"


def test_waiting_must_be_asked_for() -> None:
    assert not parser().parse_args(["run", "-c", "x"]).wait
    assert parser().parse_args(["run", "-c", "x", "--wait"]).wait
