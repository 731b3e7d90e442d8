"""The order in which backends take turns, smooth and by weight: rr and wrr, and what random and p2c draw from."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from weakref import WeakValueDictionary

from fastlb._core import SmoothWrr

MAX_TURNS = 1 << 16  # where weights add up to more, they are scaled down to about so many turns

_shared: WeakValueDictionary[tuple[int, ...], SmoothWrr] = WeakValueDictionary()


def turns(weights: Sequence[int]) -> list[int]:
    """Return positions, each as often as its weight says (less what all have in common) and as evenly spread as can be.

    The k-th of a backend's w turns is due at (k + ½) / w of the round, and the earliest is next. A share is exact while
    the weights, less their common divisor, add up to no more than MAX_TURNS; else it errs by less than one turn.
    """
    common = math.gcd(*weights)
    counts = [weight // common for weight in weights] if common else []
    total = sum(counts)
    if total > MAX_TURNS:
        counts = [max(1, round(count * MAX_TURNS / total)) if count else 0 for count in counts]
    if max(counts, default=0) <= 1:  # equal weights: each once, in order
        return [position for position, count in enumerate(counts) if count]
    due = [(0.5 / count, position, 0) for position, count in enumerate(counts) if count]
    heapq.heapify(due)
    order = []
    for _ in range(sum(counts)):
        _, position, taken = due[0]
        order.append(position)
        heapq.heapreplace(due, ((taken + 1.5) / counts[position], position, taken + 1))
    return order


def build_rotation(weights: Sequence[int]) -> SmoothWrr | None:
    """Return the turns for the data path, shared while they are in use anywhere; None when no backend has a weight."""
    content = tuple(weights)
    if not any(content):
        return None
    rotation = _shared.get(content)
    if rotation is None:
        rotation = _shared[content] = SmoothWrr(turns(content))
    return rotation
