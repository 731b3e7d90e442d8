"""The clock of the flow table."""

from __future__ import annotations

import time

import pytest

from fastlb.model.clock import WRAP, flow_clock, seconds_between


@pytest.mark.parametrize(
    ("earlier", "later", "seconds"),
    [(0, 0, 0.0), (1000, 2500, 1.5), (WRAP - 500, 500, 1.0), (0, WRAP - 1, 4294967.295)],
)
def test_seconds_between(earlier: int, later: int, seconds: float) -> None:
    assert seconds_between(earlier, later) == seconds


def test_the_clock_is_the_monotonic_one() -> None:
    before = time.monotonic_ns() // 1_000_000
    now = flow_clock()
    after = time.monotonic_ns() // 1_000_000
    assert 0 <= now < WRAP
    assert (now - before) % WRAP <= after - before
