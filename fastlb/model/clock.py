"""The clock of the flow table: milliseconds of the monotonic clock, of which an entry keeps 32 bits.

Differences are taken modulo 2**32, so they are right for anything that is less than 49 days old.
"""

from __future__ import annotations

import time

WRAP = 1 << 32


def flow_clock() -> int:
    """Return the milliseconds that workers write into entries now."""
    return time.monotonic_ns() // 1_000_000 % WRAP


def seconds_between(earlier: int, later: int) -> float:
    """Return the seconds from one reading of the clock to a later one."""
    return (later - earlier) % WRAP / 1000
