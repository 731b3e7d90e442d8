"""Limits of open files, on processes that may change them: children of the test."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastlb.kernel import limits

IN_A_CHILD = """
import resource
from fastlb.kernel import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
print(limits.raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE), limits.hard_file_limit())
print(limits.raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
limits.restore_file_limit(256)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
limits.restore_file_limit(10_000)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_raised_to_the_hard_limit_and_restored() -> None:
    ran = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["256 512 512 512", "512 512 512", "256 512", "512 512"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its input to end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


def test_a_child_gets_the_former_limit(child: subprocess.Popen[bytes]) -> None:
    _, hard = resource.prlimit(child.pid, resource.RLIMIT_NOFILE)
    limits.restore_file_limit(200, child.pid)
    assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (200, hard)


def test_a_child_that_has_ended(child: subprocess.Popen[bytes]) -> None:
    child.communicate()
    with pytest.raises(ProcessLookupError):
        limits.restore_file_limit(200, child.pid)


@pytest.mark.parametrize(("targets", "rings", "need"), [(0, 1, 68), (10_000, 2, 10_072), (1, 16, 129)])
def test_what_is_needed(targets: int, rings: int, need: int) -> None:
    assert limits.file_need(targets, rings) == need


def test_what_is_missing_is_said() -> None:
    assert limits.file_shortage(1024, 1024) is None
    said = limits.file_shortage(10_072, 4096)
    assert said is not None
    for word in ("10072", "4096", "LimitNOFILE=10072"):
        assert word in said
