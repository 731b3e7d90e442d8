"""The gate of tools/nogil_gate.py, on C that the installed Cython writes from small samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).parents[3] / "tools" / "nogil_gate.py"

STAGE = """
cdef struct Pair:
    int left
    int right

cdef inline int half(int x) noexcept nogil:
    return x // 2
"""
RAISING_STAGE = """
cdef struct Pair:
    int left
    int right

cdef inline int checked(int x) except? -1 nogil:
    if x < 0:
        raise ValueError(x)
    return x
"""

CLEAN_CALL = """
from fastlb.dataplane.stage cimport half
def edge(list x):
    return half(x[0])
"""
CONVERTS_AT_THE_EDGE = """
from fastlb.dataplane.stage cimport half, Pair
def edge(int x):
    cdef Pair pair = Pair(half(x), half(x))
    return pair
"""
CALLS_A_RAISER = """
from fastlb.dataplane.raising cimport checked
cdef int twice(int x) noexcept nogil:
    return checked(x) + checked(x)
def edge(int x):
    return twice(x)
"""
LONG_SIGNATURE = """
from fastlb.dataplane.stage cimport half
cdef int first_line_of_the_body_is_far(int x,
                                       int y) noexcept nogil:
    with gil:
        print(x)
    return half(y)
def edge(int x):
    return first_line_of_the_body_is_far(x, x)
"""
REACHED = """
from fastlb.dataplane.stage cimport half
cdef int helper(int x) noexcept:
    return [x][0]
cdef int loop(int x) noexcept nogil:
    with gil:
        return helper(half(x))
def edge(int x):
    return loop(x)
"""
EDGE_ONLY = """
def edge(int x):
    return [x]
"""


def generate(directory: Path, module: str) -> Path:
    """Runs Cython as the release build does; the file with the generated C."""
    (directory / "fastlb/dataplane").mkdir(parents=True)
    (directory / "fastlb/__init__.py").touch()
    (directory / "fastlb/dataplane/stage.pxd").write_text(STAGE)
    (directory / "fastlb/dataplane/raising.pxd").write_text(RAISING_STAGE)
    (directory / "fastlb/_core.pyx").write_text(module)
    command = [sys.executable, "-m", "cython", "-3", "-X", "cdivision=True", "fastlb/_core.pyx"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return directory / "fastlb/_core.c"


def gate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, GATE, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "checked", "guilty"),
    [
        pytest.param(CLEAN_CALL, 1, {}, id="clean"),
        pytest.param(CONVERTS_AT_THE_EDGE, 1, {}, id="a struct becomes a dict outside the path"),
        pytest.param(
            CALLS_A_RAISER,
            2,
            {"checked": "__Pyx_AddTraceback", "twice": "__Pyx_ErrOccurredWithGIL"},
            id="calls a function that may raise",
        ),
        pytest.param(
            LONG_SIGNATURE,
            2,
            {"first_line_of_the_body_is_far": "__Pyx_PyGILState_Ensure"},
            id="nogil on the second line of the signature",
        ),
        pytest.param(
            REACHED,
            3,
            {"loop": "__Pyx_PyGILState_Ensure", "helper": "PyList_New"},
            id="Python in a function that the path reaches",
        ),
    ],
)
def test_finds_what_touches_python(tmp_path: Path, module: str, checked: int, guilty: dict[str, str]) -> None:
    result = gate(generate(tmp_path, module), "--minimum", 1)
    assert f": {checked} functions of the packet path, {len(guilty)} touch Python" in result.stdout
    assert result.returncode == (1 if guilty else 0)
    reported = result.stderr.splitlines()
    assert len(reported) == len(guilty)
    for name, reason in guilty.items():
        assert any(f"_{name}: " in line and reason in line for line in reported), (name, reported)


def test_refuses_to_guard_nothing(tmp_path: Path) -> None:
    generated = generate(tmp_path, EDGE_ONLY)
    for minimum in (0, 20):
        result = gate(generated, "--minimum", minimum)
        assert result.returncode == 1
        assert "nogil gate: 0 functions" in result.stdout


def test_says_when_nothing_was_built(tmp_path: Path) -> None:
    result = gate(tmp_path / "_core.c")
    assert (result.returncode, result.stderr) == (
        1,
        f"nogil gate: {tmp_path / '_core.c'}: No such file or directory; build first (make build)\n",
    )
