"""tools/coverage_lines.py, on a small extension that the installed Cython and compiler make, and that has run a bit."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "coverage_lines.py"
STAGE = """\
cdef inline int half(int x) noexcept nogil:
    if x < 0:
        return 0
    return x // 2

cdef inline int never(int x) noexcept nogil:
    x += 1
    x += 2
    return x
"""
SAMPLE = """\
from fastlb.dataplane.stage cimport half, never

def edge(int x, text="", *more):
    if x > 100:
        raise ValueError(x)
    elif x == 100:
        return never(x)
    return [half(y)
            for y in range(x)]
"""
REPORT = """\
file                        lines  ran %  not run
fastlb/dataplane/stage.pxd      8   37.5  3, 6-9
sample.pyx                      7   71.4  5, 7
fastlb/dataplane/: 37.5 % of its lines ran; the floor is {} %
"""


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def report(tree: Path, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, TOOL, *options, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree in which the extension was built and called."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "fastlb/dataplane").mkdir(parents=True)
    (tree / "fastlb/dataplane/stage.pxd").write_text(STAGE)
    (tree / "sample.pyx").write_text(SAMPLE)
    run(sys.executable, "-m", "cython", "-3", "-Xcdivision=True", "sample.pyx", cwd=tree)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    include = f"-I{sysconfig.get_path('include')}"
    run(*compiler, "--coverage", "-O0", "-fPIC", "-shared", include, "-o", "sample.so", "sample.c", cwd=tree)
    run(sys.executable, "-c", "import sample; sample.edge(4)", cwd=tree)
    return tree


@pytest.mark.parametrize(("floor", "exit_code"), [("37", 0), ("38", 1)])
def test_tells_what_ran_and_holds_the_floor(tree: Path, floor: str, exit_code: int) -> None:
    assert report(tree, "--floor", floor) == (exit_code, REPORT.format(floor), "")


def test_nothing_counted_is_a_failure(tmp_path: Path) -> None:
    code, printed, complaint = report(tmp_path)
    assert (code, printed) == (1, "")
    assert "no counters" in complaint


def test_says_when_gcov_is_missing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCOV", "gcov-of-no-compiler")
    code, printed, complaint = report(tree)
    assert (code, printed) == (1, "")
    assert "gcov-of-no-compiler" in complaint
