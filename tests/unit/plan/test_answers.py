"""answers.py: when a backend counts as silent, by what its counters say from one look to the next."""

from __future__ import annotations

import pytest

from fastlb.plan.answers import LEAST_FLOWS, PATIENCE, Answers, judge

SOON, LATER = 1.0, 1.0 + PATIENCE

# looks: (time, flows that it was sent, answers), of a backend in a two-way mode; is it silent after the last one?
LOOKS: list[tuple[list[tuple[float, int, int]], bool]] = [
    ([(0, 0, 0)], False),
    ([(0, 0, 0), (SOON, 9, 0)], False),  # they may be answered yet
    ([(0, 0, 0), (SOON, 9, 0), (LATER - 0.1, 9, 0)], False),
    ([(0, 0, 0), (SOON, 9, 0), (LATER, 9, 0)], True),
    ([(0, 0, 0), (SOON, 9, 0), (LATER, 9, 0), (50, 9, 0)], True),  # until it answers
    ([(0, 0, 0), (SOON, 9, 0), (LATER, 9, 0), (50, 9, 1)], False),
    ([(0, 0, 0), (SOON, 9, 0), (LATER, 9, 1)], False),
    ([(0, 0, 0), (SOON, 9, 1), (LATER, 9, 2), (50, 9, 2)], False),  # no flow that is new
    ([(0, 0, 0), (SOON, 1, 0), (50, 1, 0)], False),  # a single flow proves nothing
    ([(0, 0, 0), (SOON, 1, 0), (50, 2, 0), (51, 2, 0)], False),
    ([(0, 0, 0), (SOON, 1, 0), (50, 2, 0), (50 + PATIENCE, 2, 0)], True),
    ([(0, 100, 70), (SOON, 109, 70), (LATER, 109, 70)], True),  # it answered before
    ([(0, 100, 70), (SOON, 109, 70), (LATER, 3, 70)], False),  # another backend has its number
]


@pytest.mark.parametrize(("looks", "silent"), LOOKS)
def test_looks(looks: list[tuple[float, int, int]], silent: bool) -> None:
    seen = None
    for now, new, answered in looks:
        seen = judge(seen, new, answered, True, now)
    assert seen is not None
    assert seen.silent == silent


@pytest.mark.parametrize("two_way", [True, False])
def test_how_many_flows_it_takes(two_way: bool) -> None:
    for flows, silent in ((LEAST_FLOWS[two_way] - 1, False), (LEAST_FLOWS[two_way], True)):
        seen = judge(judge(None, 0, 0, two_way, 0.0), flows, 0, two_way, SOON)
        assert judge(seen, flows, 0, two_way, LATER).silent == silent


def test_what_is_kept_is_what_it_was_when_it_answered_last() -> None:
    assert judge(Answers(5, 5), 6, 5, True, 1.0) == Answers(5, 5)
    assert judge(Answers(5, 5), 7, 5, True, 1.0) == Answers(5, 5, since=1.0)
    assert judge(Answers(5, 5, since=1.0, silent=True), 9, 6, True, 9.0) == Answers(9, 6)
