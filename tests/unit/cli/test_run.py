"""`fastlb run`, as far as it comes without an interface: a process of its own, since it changes signals."""

from __future__ import annotations

import subprocess
import sys
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


def test_the_level_of_the_log() -> None:
    assert parser().parse_args(["run", "-c", "x"]).log_level == "info"
    assert parser().parse_args(["run", "-c", "x", "--log-level", "error"]).log_level == "error"
