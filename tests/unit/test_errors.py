"""The tree of exceptions: exit codes, and what a fault in a configuration says."""

from __future__ import annotations

import pytest

from fastlb.errors import ConfigError, ControlError, FastlbError, KernelError, Problem


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(FastlbError("a"), 1), (KernelError("a"), 1), (ControlError("a"), 1), (ConfigError.at("", "a", "b"), 2)],
)
def test_exit_codes(error: FastlbError, exit_code: int) -> None:
    assert isinstance(error, FastlbError)
    assert error.exit_code == exit_code


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem("fastlb.yaml:12", "flows", "is too much"), "fastlb.yaml:12: flows: is too much"),
        (Problem("", "flows", "is too much"), "flows: is too much"),
        (Problem("fastlb.yaml:1", "", "is empty"), "fastlb.yaml:1: is empty"),
    ],
)
def test_problems(problem: Problem, expected: str) -> None:
    assert str(problem) == expected


def test_every_problem_has_a_line() -> None:
    problems = [Problem("a:1", "flows", "one"), Problem("a:2", "ring", "two")]
    error = ConfigError(problems)
    assert error.problems == problems
    assert str(error) == "a:1: flows: one\na:2: ring: two"
