"""Sums of named counters."""

from __future__ import annotations

import pytest

from fastlb.model.counters import add_up


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        ([], {}),
        ([{"packets": 3}], {"packets": 3}),
        ([{"packets": 3, "bytes": 90}, {"packets": 4, "drops": 1}], {"packets": 7, "bytes": 90, "drops": 1}),
    ],
)
def test_sums(counters: list[dict[str, int]], expected: dict[str, int]) -> None:
    assert add_up(counters) == expected
