"""Long work in slices: the loop has its turns, and results and failures come through."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastlb.control import slices
from fastlb.control.slices import run_in_slices
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
