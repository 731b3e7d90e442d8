"""machine.h: an assertion ends the program in every build profile but release."""

from __future__ import annotations

import ast
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
#include "machine.h"
int main(int count, char **arguments) {
    int alone = count == 1;
    (void)arguments;
    fastlb_must(alone);
    return 0;
}
"""


def profile(name: str) -> tuple[list[str], list[str]]:
    """Compiler and linker flags of setup.py, read as text: importing it would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PROFILES":
            table: dict[str, Any] = ast.literal_eval(node.value)  # type: ignore[arg-type]
            return table[name][1], table[name][2]
    raise AssertionError("setup.py has no PROFILES")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("release", 0),
        ("quick", -signal.SIGABRT),
        ("debug", -signal.SIGABRT),
        ("coverage", -signal.SIGABRT),
        ("asan", -signal.SIGABRT),
    ],
)
def test_must(name: str, broken: int, tmp_path: Path) -> None:
    cflags, ldflags = profile(name)
    (tmp_path / "program.c").write_text(PROGRAM)
    include = f"-I{ROOT / 'fastlb/dataplane'}"
    compiler = [*shlex.split(os.environ.get("CC", "cc")), "-Wall", "-Wextra", "-Werror", include]
    subprocess.run([*compiler, *cflags, "program.c", "-o", "program", *ldflags], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "program"], cwd=tmp_path).returncode == 0
    assert subprocess.run([tmp_path / "program", "more"], cwd=tmp_path, stderr=subprocess.DEVNULL).returncode == broken
