"""The wheel of due times, beside a list that is sorted anew each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb.health.wheel import SLOT, Wheel


def test_things_come_when_they_are_due() -> None:
    wheel: Wheel[str] = Wheel()
    assert wheel.next_due() is None
    assert wheel.take_due(1e9, 10) == []
    for thing, due in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        wheel.put(thing, due)
    assert wheel.next_due() == pytest.approx(1.0 + SLOT)
    assert wheel.take_due(0.9, 10) == []
    assert wheel.take_due(2.5, 10) == ["a", "b"]
    assert len(wheel) == 1
    assert wheel.take_due(9.0, 10) == ["c"]
    assert wheel.next_due() is None


def test_nothing_comes_before_its_time() -> None:
    wheel: Wheel[int] = Wheel()
    for number in range(100):
        wheel.put(number, number / 1000)
        due = wheel.due_of(number)
        assert due is not None
        assert number / 1000 < due <= number / 1000 + SLOT + 1e-9


def test_a_thing_is_in_once() -> None:
    wheel: Wheel[str] = Wheel()
    wheel.put("a", 5.0)
    wheel.put("a", 1.0)
    wheel.put("a", 1.0)
    assert len(wheel) == 1
    assert wheel.take_due(2.0, 10) == ["a"]
    assert wheel.take_due(9.0, 10) == []
    wheel.put("a", 3.0)
    wheel.discard("a")
    wheel.discard("a")
    assert wheel.due_of("a") is None
    assert wheel.next_due() is None


def test_no_more_than_asked_for() -> None:
    wheel: Wheel[int] = Wheel()
    for number in range(10):
        wheel.put(number, 1.0)
    first = wheel.take_due(2.0, 4)
    assert len(first) == 4
    assert sorted(first + wheel.take_due(2.0, 100)) == list(range(10))


STEPS = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.floats(0, 2))), max_size=60)


@given(steps=STEPS, looks=st.lists(st.floats(0, 3), max_size=5))
def test_it_is_a_sorted_list(steps: list[tuple[int, float | None]], looks: list[float]) -> None:
    wheel: Wheel[int] = Wheel()
    slow: dict[int, float] = {}
    for thing, due in steps:
        if due is None:
            wheel.discard(thing)
            slow.pop(thing, None)
        else:
            wheel.put(thing, due)
            slow[thing] = wheel.due_of(thing) or 0.0
    for now in sorted(looks):
        due_now = [thing for thing, due in slow.items() if due <= now]
        assert sorted(wheel.take_due(now, 100)) == sorted(due_now)
        for thing in due_now:
            del slow[thing]
        assert wheel.next_due() == min(slow.values(), default=None)
