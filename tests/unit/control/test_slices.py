"""Long work in slices: the loop has its turns, results and failures come through, and JSON is what json.dumps makes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastlb.control import slices
from fastlb.control.slices import ITEMS, encode, run_in_slices
from fastlb.model.steps import Steps


def count_to(number: int) -> Steps[int]:
    for _ in range(number):
        yield
    return number


async def turns_during(steps: Steps[Any]) -> int:
    """How many turns the event loop has while it runs the steps."""
    turns = 0
    working = asyncio.create_task(run_in_slices(steps))
    while not working.done():
        await asyncio.sleep(0)
        turns += 1
    await working
    return turns


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_the_result(number: int) -> None:
    assert asyncio.run(run_in_slices(count_to(number))) == number


def test_the_loop_has_a_turn_after_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 0.0)
    assert asyncio.run(turns_during(count_to(100))) >= 100


def test_short_work_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 60.0)
    assert asyncio.run(turns_during(count_to(100))) <= 2


def test_a_failure_comes_through() -> None:
    def fail() -> Steps[None]:
        yield
        raise ValueError("in the second step")

    with pytest.raises(ValueError, match="in the second step"):
        asyncio.run(run_in_slices(fail()))


SMALL = {"backend": "10.0.0.1:80", "response": None, "weight": 1, "share": 0.5, "ok": True}
VALUES: list[Any] = [
    None, 1, "ä\n\"", [], {}, [1], {"a": []}, {"a": {}}, (1, 2),
    list(range(ITEMS)), list(range(ITEMS + 1)), list(range(3 * ITEMS)),
    {"ok": True, "result": {"services": [{"name": "web", "backends": [SMALL] * 300}], "counters": {"drops": {"x": 1}}}},
    [{"name": str(number), "backends": [SMALL] * number} for number in range(60)],
    [[1, [2, {"a": [3] * 100}]], {}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[f"value {at}" for at in range(len(VALUES))])
def test_json(value: Any) -> None:
    assert asyncio.run(run_in_slices(encode(value))) == json.dumps(value).encode()


def test_a_long_list_is_encoded_in_many_steps() -> None:
    services = {"services": [{"backends": [SMALL] * 10_000}]}
    assert sum(1 for _ in encode(services)) > 10_000 / ITEMS
