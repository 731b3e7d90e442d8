"""Commands whose standard files are closed, full, or of an encoding that lacks letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FASTLB = [sys.executable, "-m", "fastlb"]
CLOSED = "cannot write the output: Bad file descriptor"


def run(words: list[str], how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with redirections, as a shell would."""
    script = f'exec "$@" {how}'
    return subprocess.run(
        ["sh", "-c", script, "sh", *FASTLB, *words], env={**os.environ, **environment},
        capture_output=True, text=True, errors="replace", timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "how", "code", "says"),
    [
        (["schema"], "<&-", 0, ""),
        (["schema"], "2>&-", 0, ""),
        (["schema"], ">&-", 1, CLOSED),
        (["schema"], "<&- >&- 2>&-", 1, ""),
        (["check", "-c", "/none"], ">&-", 2, "it cannot be read"),
        (["check", "-c", "/none"], "2>&-", 2, ""),
        (["check", "-c", "/none"], "2>/dev/full", 2, ""),
        (["dance"], "2>/dev/full", 2, ""),
        (["schema"], ">/dev/full", 1, "No space left on device"),
        (["status", "--socket", "/none"], "<&- >&- 2>&-", 1, ""),
    ],
)
def test_closed_and_full_ones(words: list[str], how: str, code: int, says: str) -> None:
    done = run(words, how)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_one_is_nobody_else_s_place() -> None:
    """A file that the process opens later must not get what is meant for standard output."""
    look = (
        "import os, sys\nfrom fastlb.cli import standard_files\nstandard_files.secure()\n"
        "number = os.open('/dev/null', os.O_RDWR)\nsys.exit(number)"
    )
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", look], timeout=60)
    assert done.returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_encoding_lacks(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "Lastverteiler-für-☃.yaml"
    path.write_text("services: []\n")
    done = run(["check", "-c", str(path)], "", PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "\\u2603.yaml: valid" in done.stdout
