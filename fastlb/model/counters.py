"""Counters by name, as workers, the receive filter and the data path hand them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def add_up(counters: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the sum of each counter, over all workers for example; a counter that one lacks is 0 there."""
    totals: dict[str, int] = {}
    for each in counters:
        for name, value in each.items():
            totals[name] = totals.get(name, 0) + value
    return totals
