"""Ketama rings (Karger et al., STOC 1997) from backend keys, with the points that Envoy's ring hash gives them.

A backend's i-th point is XXH64(``key_i``); a flow goes to the first point from its hash on. Backends come sorted by key
and have points by weight, the one with the least weight a whole number of them. Another ``seed`` is that of the hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakValueDictionary

from xxhash import xxh64_intdigest

from fastlb._core import KetamaRing

MAX_POINTS = 1 << 23  # as Envoy's maximum_ring_size

_shared: WeakValueDictionary[tuple[object, ...], KetamaRing] = WeakValueDictionary()


def ring_points(keys: Sequence[str], weights: Sequence[int], size: int, seed: int = 0) -> list[tuple[int, int]]:
    """The ring of these backends, which come sorted by key: (hash, position), ascending; about ``size`` points.

    Backends without a weight have no point; at least one must have one.
    """
    total = sum(weights)
    least = min(weight for weight in weights if weight) / total
    scale = min(math.ceil(least * size) / least, float(MAX_POINTS))
    points: list[tuple[int, int]] = []
    target = 0.0
    for position, (key, weight) in enumerate(zip(keys, weights, strict=True)):
        target += scale * (weight / total)
        number = 0
        while len(points) < target:
            points.append((xxh64_intdigest(f"{key}_{number}".encode(), seed), position))
            number += 1
    return sorted(points)


def build_ring(keys: Sequence[str], weights: Sequence[int], size: int, seed: int) -> KetamaRing | None:
    """The same for the data path, shared while it is in use anywhere; None when no backend has a weight."""
    if not any(weights):
        return None
    content = (tuple(keys), tuple(weights), size, seed)
    ring = _shared.get(content)
    if ring is None:
        ring = _shared[content] = KetamaRing(ring_points(keys, weights, size, seed))
    return ring
