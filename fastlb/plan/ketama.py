"""Ketama rings (Karger et al., STOC 1997) from backend keys, with the points that Envoy's ring hash gives them.

A backend's i-th point is XXH64(``key_i``); a flow goes to the first point from its hash on. Backends come sorted by
key. Another ``seed`` is that of the hash.

How many points a backend has must not depend on which others are there, else flows would move between those that stay:
the heaviest has as many as the configuration says, the others by weight. (So all get more when the heaviest leaves.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakValueDictionary

from xxhash import xxh64_intdigest

from fastlb._core import KetamaRing

MAX_POINTS = 1 << 23  # of a ring, as Envoy's maximum_ring_size; where backends are so many, each has fewer

_shared: WeakValueDictionary[tuple[object, ...], KetamaRing] = WeakValueDictionary()


def point_counts(weights: Sequence[int], most: int) -> list[int]:
    """Return each backend's points, ``most`` for the heaviest; at least one weight must be above 0."""
    most = max(1, min(most, MAX_POINTS // len(weights)))
    heaviest = max(weights)
    return [-(-most * weight // heaviest) for weight in weights]


@lru_cache(maxsize=1 << 14)
def _hashes(key: str, count: int, seed: int) -> bytes:
    """Return the hashes of a backend's points, as KetamaRing takes them: nearly all that a ring costs."""
    return array("Q", (xxh64_intdigest(f"{key}_{number}".encode(), seed) for number in range(count))).tobytes()


def build_ring(keys: Sequence[str], weights: Sequence[int], most: int, seed: int) -> KetamaRing | None:
    """Return the ring of these backends, with ``most`` points for the heaviest; None when none of them has a weight.

    Rings are shared: as long as one with the same content is in use anywhere, it is not built again.
    """
    if not any(weights):
        return None
    content = (tuple(keys), tuple(weights), most, seed)
    ring = _shared.get(content)
    if ring is None:
        counts = point_counts(weights, most)
        parts = [_hashes(key, max(counts), seed)[: 8 * count] for key, count in zip(keys, counts, strict=True)]
        ring = _shared[content] = KetamaRing(parts)
    return ring
