"""The order in which backends take turns."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from fastlb.plan.smooth_wrr import MAX_TURNS, build_rotation, turns

# Weights; positions in their order
ORDERS: list[tuple[list[int], list[int]]] = [
    ([1], [0]),
    ([7], [0]),
    ([1, 1, 1], [0, 1, 2]),
    ([4, 0, 4], [0, 2]),
    ([0, 0, 5], [2]),
    ([2, 1], [0, 1, 0]),
    ([1, 2], [1, 0, 1]),
    ([3, 1], [0, 0, 1, 0]),
    ([5, 1, 1], [0, 0, 0, 1, 2, 0, 0]),
    ([100, 200, 300], [2, 1, 0, 2, 1, 2]),
    ([], []),
    ([0, 0], []),
]


@pytest.mark.parametrize(("weights", "order"), ORDERS)
def test_the_order(weights: list[int], order: list[int]) -> None:
    assert turns(weights) == order


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [5, 1, 1], [0, 3, 0, 7], [65535, 1], [100, 200, 300], [9] * 40])
def test_turns_are_exact_and_spread(weights: list[int]) -> None:
    order = turns(weights)
    whole = len(order)
    for position, weight in enumerate(weights):
        places = [at for at, taken in enumerate(order) if taken == position]
        assert len(places) * sum(weights) == weight * whole
        gaps = [after - before for before, after in pairwise(places)]
        assert all(abs(gap - whole / len(places)) <= len(weights) for gap in gaps)


def test_turns_of_large_weights_are_scaled() -> None:
    order = Counter(turns([65535, 65534, 1]))
    assert sum(order.values()) <= MAX_TURNS + 3
    assert order[2] == 1
    assert order[0] / sum(order.values()) == pytest.approx(0.5, abs=0.001)


def test_the_least_weight_has_a_turn_in_a_scaled_round() -> None:
    """And a backend without one has none, however many there are."""
    weights = [65535] * 20 + [1, 0] * 100
    taken = Counter(turns(weights))
    assert {taken[at] for at in range(20, 220, 2)} == {1}
    assert not any(taken[at] for at in range(21, 220, 2))
    assert sum(taken.values()) <= MAX_TURNS + 120  # each errs by less than one turn


def test_a_rotation_of_one_content_is_one() -> None:
    rotation = build_rotation([1, 2])
    assert rotation is not None
    assert rotation.size == 3
    assert build_rotation((1, 2)) is rotation
    assert build_rotation([2, 1]) is not rotation


@pytest.mark.parametrize("weights", [[], [0], [0, 0, 0]])
def test_without_a_weight_there_is_no_rotation(weights: list[int]) -> None:
    assert build_rotation(weights) is None
