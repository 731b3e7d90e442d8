"""maglev.pxd and maglev.py: tables that others published, a slow model, and what a table promises."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

import fastlb
from fastlb._core import MaglevTable
from fastlb.plan.maglev import build_table, is_prime

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden/maglev.json").read_text())
TEN = [f"10.0.0.{n}:443" for n in range(1, 11)]


def positions(table: MaglevTable) -> list[int]:
    return memoryview(table.to_bytes()).cast("H").tolist()


@dataclass
class _Turns:
    index: int
    weight: int
    order: Iterator[int]
    target: int = 0


def slow_table(keys: list[str], weights: list[int], size: int, seed: int = 0) -> list[int]:
    """The description in words, word for word; indices into ``keys``."""
    table: list[int | None] = [None] * size
    backends = []
    for index in sorted(range(len(keys)), key=lambda index: keys[index]):
        offset = xxhash.xxh64_intdigest(keys[index].encode(), seed) % size
        skip = xxhash.xxh64_intdigest(keys[index].encode(), (seed + 1) % 2**64) % (size - 1) + 1
        order = iter([(offset + turn * skip) % size for turn in range(size)])
        backends.append(_Turns(index, weights[index], order))
    step = 0
    while None in table:
        step += 1
        for backend in backends:
            if backend.weight and step * backend.weight >= backend.target and None in table:
                backend.target += max(weights)
                table[next(slot for slot in backend.order if table[slot] is None)] = backend.index
    return table  # type: ignore[return-value]


def table_of(turns: list[tuple[int, int, int]], size: int) -> MaglevTable:
    """Return the table of backends whose offset hash, skip hash and weight these are."""
    hashes = array("Q", (hashed for *pair, _ in turns for hashed in pair)).tobytes()
    return MaglevTable(hashes, array("I", (weight for *_, weight in turns)).tobytes(), size)


# --- tables of others ---------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["envoy"], ids=lambda case: case["name"])
def test_envoy(case: dict[str, Any]) -> None:
    names, weights = zip(*case["backends"], strict=True)
    assert list(fastlb.maglev_table(names, weights, case["size"])) == case["table"]


def test_the_worked_example_of_the_paper() -> None:
    paper = GOLDEN["paper"]
    size, offsets_skips = paper["size"], paper["offset_skip"]
    for (offset, skip), permutation in zip(offsets_skips, paper["permutations"], strict=True):
        assert [(offset + turn * skip) % size for turn in range(size)] == permutation
    # A table takes hashes: offset mod M is itself, and the skip is a hash mod (M - 1), plus one.
    turns = [(offset, skip - 1, 1) for offset, skip in offsets_skips]
    assert positions(table_of(turns, size)) == paper["table"]
    without = table_of([turns[0], turns[2]], size)
    assert [(0, 2)[position] for position in positions(without)] == paper["table_without_B1"]


def test_cilium() -> None:
    """Its backends take turns in another order, which those hashes and the published table prove; nearly ours."""
    case = GOLDEN["cilium"]
    size, weights = case["size"], [weight for *_, weight in case["backends"]]
    orders = [iter([(offset + turn * skip) % size for turn in range(size)]) for offset, skip, _ in case["backends"]]
    table: list[int | None] = [None] * size
    targets = [0] * len(weights)
    for step in range(size):
        at = step % len(weights)
        while (step + 1) * weights[at] < targets[at]:
            at = (at + 1) % len(weights)
        targets[at] += sum(weights)
        table[next(slot for slot in orders[at] if table[slot] is None)] = at
    assert table == case["table"]
    ours = positions(table_of([(offset, skip - 1, weight) for offset, skip, weight in case["backends"]], size))
    assert sum(mine != theirs for mine, theirs in zip(ours, table, strict=True)) == 3


# --- against the model --------------------------------------------------------

WEIGHTS = [
    ([1] * 10, 251, 0),
    ([1] * 10, 251, 7),
    ([10, 20, 30, 40, 50, 60, 70, 80, 90, 100], 509, 0),
    ([0, 1, 0, 1, 5, 5, 0, 0, 65535, 1], 251, 0),
    ([65535] + [1] * 9, 251, 2**64 - 1),
    ([3], 2, 0),
    ([1] * 10, 11, 0),
]


@pytest.mark.parametrize(("weights", "size", "seed"), WEIGHTS)
def test_equals_the_model(weights: list[int], size: int, seed: int) -> None:
    names = TEN[: len(weights)]
    random.Random(1).shuffle(names)
    assert list(fastlb.maglev_table(names, weights, size, seed)) == slow_table(names, weights, size, seed)


# --- promises -----------------------------------------------------------------


def test_every_slot_is_taken_in_even_shares() -> None:
    table = fastlb.maglev_table(TEN)
    assert len(table) == 65537
    assert max(Counter(table).values()) - min(Counter(table).values()) <= 1


def test_shares_follow_weights() -> None:
    weights = [1, 2, 3, 4, 5, 6, 7, 8, 9, 55]
    counts = Counter(fastlb.maglev_table(TEN, weights))
    for index, weight in enumerate(weights):
        assert counts[index] == pytest.approx(65537 * weight / sum(weights), rel=0.01)


@pytest.mark.parametrize("weights", [[1] * 10, [3] * 9 + [1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 55], [65535] * 9 + [20_000]])
def test_flows_are_within_2_percent_of_the_slots(weights: list[int]) -> None:
    """Of the share by weight; what is left of it is the hash's own scatter (test_schedule.py)."""
    counts = Counter(fastlb.maglev_table(TEN, weights))
    for index, weight in enumerate(weights):
        assert counts[index] / 65537 == pytest.approx(weight / sum(weights), rel=0.02)


@pytest.mark.parametrize("highest", [65535, 65535 * 100, (1 << 32) - 1])
def test_weights_whose_sums_and_products_overflow_32_bits(highest: int) -> None:
    weights = [highest] * 5 + [highest // 3] * 4 + [0]
    assert list(fastlb.maglev_table(TEN, weights, 509)) == slow_table(TEN, weights, 509)


def test_weight_zero_takes_nothing() -> None:
    assert 3 not in fastlb.maglev_table(TEN, [1, 1, 1, 0, 1, 1, 1, 1, 1, 1], 251)
    with_nobody = fastlb.maglev_table(TEN[:3] + TEN[4:], size=251)
    shifted = [index + (index >= 3) for index in with_nobody]
    assert list(fastlb.maglev_table(TEN, [1, 1, 1, 0, 1, 1, 1, 1, 1, 1], 251)) == shifted


def test_the_order_of_names_decides_nothing() -> None:
    expected = [TEN[index] for index in fastlb.maglev_table(TEN, size=2039)]
    for seed in range(5):
        shuffled = random.Random(seed).sample(TEN, len(TEN))
        assert [shuffled[index] for index in fastlb.maglev_table(shuffled, size=2039)] == expected


def test_a_multiple_of_the_weights_is_the_same_table() -> None:
    weights = [1, 2, 3, 1, 2, 3, 1, 2, 3, 4]
    assert fastlb.maglev_table(TEN, weights, 509) == fastlb.maglev_table(TEN, [w * 100 for w in weights], 509)


def test_seeds_make_different_tables() -> None:
    assert fastlb.maglev_table(TEN, seed=0) != fastlb.maglev_table(TEN, seed=1)


@pytest.mark.parametrize("gone", [0, 4, 9])
def test_removal_disrupts_little(gone: int) -> None:
    """The paper's section 5.3: few slots move other than those of the backend that left."""
    hundred = [f"10.0.{n}.1:80" for n in range(100)]
    before = [hundred[index] for index in fastlb.maglev_table(hundred)]
    rest = hundred[:gone] + hundred[gone + 1 :]
    after = [rest[index] for index in fastlb.maglev_table(rest)]
    moved = sum(a != b for a, b in zip(before, after, strict=True) if a != hundred[gone])
    assert moved < 0.02 * len(before)


# --- sharing, and what is refused ---------------------------------------------


def test_equal_contents_are_one_table() -> None:
    first = build_table(TEN, [1] * 10, 251, 0)
    assert build_table(list(TEN), (1,) * 10, 251, 0) is first
    assert build_table(TEN, [2] + [1] * 9, 251, 0) is not first
    assert build_table(TEN, [1] * 10, 251, 1) is not first
    assert build_table(TEN, [1] * 10, 509, 0) is not first


def test_without_a_weight_there_is_no_table() -> None:
    assert build_table([], [], 251, 0) is None
    assert build_table(["a"], [0], 251, 0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "at least one name needs a weight above 0"),
        ({"names": ["a", "b"], "weights": [0, 0]}, "at least one name needs a weight above 0"),
        ({"names": ["a", "a"]}, "names must be unique"),
        ({"names": ["a"], "weights": [1, 2]}, "1 names but 2 weights"),
        ({"names": ["a"], "weights": [-1]}, "weights must be in 0..4294967295"),
        ({"names": ["a"], "weights": [1 << 32]}, "weights must be in 0..4294967295"),
        ({"names": ["a"], "size": 65536}, "size must be a prime of at least 1 and below 2097152, not 65536"),
        ({"names": ["a"], "size": 2097169}, "size must be a prime of at least 1 and below 2097152, not 2097169"),
        ({"names": ["a"], "size": 1}, "size must be a prime"),
        ({"names": ["a", "b", "c"], "size": 2}, "size must be a prime of at least 3"),
        ({"names": ["a"], "seed": -1}, "seed must be in 0..2**64-1"),
        ({"names": ["a"], "seed": 1 << 64}, "seed must be in 0..2**64-1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fastlb.maglev_table(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "a Maglev table takes 1 to 65534 backends, not 0"),
        ([(0, 0, 1)] * 65535, "a Maglev table takes 1 to 65534 backends, not 65535"),
        ([(0, 0, 0)], "a Maglev table needs a backend with a weight above 0"),
    ],
    ids=["none", "too many", "no weight"],
)
def test_the_table_itself_refuses(turns: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        table_of(turns, 131071)
    assert str(caught.value) == message


def test_the_configurable_sizes_are_prime() -> None:
    from fastlb.config.fields import MAGLEV_SIZES

    assert all(map(is_prime, MAGLEV_SIZES))
    assert [number for number in range(30) if is_prime(number)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
