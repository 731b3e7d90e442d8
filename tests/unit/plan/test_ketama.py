"""Ketama rings: those that others published, a slow model, and how many points a backend has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from fastlb.plan.ketama import MAX_POINTS, build_ring, point_counts
from tests.tables import position_on_ring, ring_points

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ring.json").read_text())


def slow_ring(keys: list[str], counts: list[int], seed: int = 0) -> list[tuple[int, int]]:
    """The description in words, word for word."""
    points = [(key, number) for key, count in zip(keys, counts, strict=True) for number in range(count)]
    return sorted((xxhash.xxh64_intdigest(f"{key}_{number}".encode(), seed), keys.index(key)) for key, number in points)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_published_rings(case: dict[str, Any]) -> None:
    hosts = sorted(case["hosts"])
    ring = build_ring(hosts, [1] * len(hosts), case["ring_size"] // len(hosts), 0)
    assert ring is not None
    assert [[at, hosts[position]] for at, position in ring_points(ring)] == case["ring"]
    for hashed, host in case["lookups"]:
        assert hosts[position_on_ring(ring, hashed)] == host


@pytest.mark.parametrize(("counts", "seed"), [
    ([1], 0), ([0, 1, 0], 0), ([2, 0, 1], 7), ([100, 1, 33], 2**64 - 1), ([256] * 50, 0),
])  # fmt: skip
def test_a_ring_equals_the_model(counts: list[int], seed: int) -> None:
    keys = [f"10.0.0.{at}:80" for at in range(len(counts))]
    ring = build_ring(keys, counts, max(counts), seed)
    assert ring is not None
    assert ring_points(ring) == slow_ring(keys, counts, seed)


def test_rings_of_one_content_are_one() -> None:
    keys = ["10.0.0.1:80", "10.0.0.2:80"]
    ring = build_ring(keys, [1, 1], 10, 0)
    assert build_ring(list(keys), [1, 1], 10, 0) is ring
    assert build_ring(keys, [1, 2], 10, 0) is not ring
    assert build_ring(keys, [0, 0], 10, 0) is None


@pytest.mark.parametrize(("weights", "most", "counts"), [
    ([1], 1, [1]),
    ([7], 1000, [1000]),
    ([1, 1, 1], 1000, [1000] * 3),
    ([1, 1, 0], 1000, [1000, 1000, 0]),  # one is down: the others have what they had
    ([100, 100, 10], 1000, [1000, 1000, 100]),  # and comes back slowly
    ([1, 2, 5], 1000, [200, 400, 1000]),
    ([65535, 1], 64, [64, 1]),
    ([1] * (1 << 15), 1000, [256] * (1 << 15)),  # 2^23 points in all
])  # fmt: skip
def test_points_by_weight(weights: list[int], most: int, counts: list[int]) -> None:
    assert point_counts(weights, most) == counts


@pytest.mark.parametrize(("backends", "most"), [(1, 1 << 16), (128, 1 << 16), (129, 1 << 16), (65534, 1000)])
def test_a_ring_has_no_more_points_than_it_may(backends: int, most: int) -> None:
    counts = point_counts([1] * backends, most)
    assert len(set(counts)) == 1
    assert 0 < counts[0] <= most
    assert sum(counts) <= MAX_POINTS


def test_every_backend_with_a_weight_has_a_point() -> None:
    """However little it is beside the heaviest one."""
    assert point_counts([65535 * 100, 1, 0], 10) == [10, 1, 0]


def test_another_backend_or_weight_moves_no_point_of_the_others() -> None:
    """As long as the heaviest stays."""
    before = build_ring(["a", "b"], [2, 1], 100, 0)
    after = build_ring(["a", "b", "c"], [2, 2, 1], 100, 0)
    assert before is not None
    assert after is not None
    assert set(ring_points(before)) < {(at, position) for at, position in ring_points(after) if position < 2}
