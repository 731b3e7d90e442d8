"""lifecycle.py: every arrow of the drawing, none that is not there, and what is left to the next process."""

from __future__ import annotations

from itertools import product

import pytest

from fastlb.daemon.lifecycle import TRANSITIONS, Lifecycle, State
from fastlb.errors import FastlbError

ARROWS = {
    (State.LOADED, State.OPENING),
    (State.OPENING, State.RUNNING),
    (State.OPENING, State.STOPPING),
    (State.RUNNING, State.STOPPING),
    (State.STOPPING, State.STOPPED),
}
WAY_TO = {
    State.LOADED: [],
    State.OPENING: [State.OPENING],
    State.RUNNING: [State.OPENING, State.RUNNING],
    State.STOPPING: [State.OPENING, State.STOPPING],
    State.STOPPED: [State.OPENING, State.STOPPING, State.STOPPED],
}


def lifecycle_in(state: State) -> Lifecycle:
    lifecycle = Lifecycle()
    for each in WAY_TO[state]:
        lifecycle.move(each)
    return lifecycle


def test_the_table_has_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


@pytest.mark.parametrize(("of", "to"), list(product(State, State)))
def test_arrows(of: State, to: State) -> None:
    lifecycle = lifecycle_in(of)
    if (of, to) in ARROWS:
        lifecycle.move(to)
        assert lifecycle.state is to
        return
    with pytest.raises(ValueError, match=f"^a balancer does not go from {of.name} to {to.name}$"):
        lifecycle.move(to)
    assert lifecycle.state is of


@pytest.mark.parametrize("handover", [False, True])
def test_a_stop(handover: bool) -> None:
    lifecycle = lifecycle_in(State.RUNNING)
    assert not lifecycle.ends
    lifecycle.stop(handover)
    assert (lifecycle.ends, lifecycle.keeps, lifecycle.failure) == (True, handover, None)


def test_a_stop_after_a_handover_takes_all_down() -> None:
    lifecycle = lifecycle_in(State.RUNNING)
    lifecycle.stop(handover=True)
    lifecycle.stop()
    assert not lifecycle.keeps


def test_a_handover_before_the_balancer_runs_is_one() -> None:
    lifecycle = lifecycle_in(State.OPENING)
    lifecycle.stop(handover=True)
    lifecycle.move(State.RUNNING)
    assert (lifecycle.keeps, lifecycle.handover) == (True, True)


def test_what_was_taken_over_is_kept_until_the_balancer_runs() -> None:
    lifecycle = lifecycle_in(State.OPENING)
    lifecycle.keeps = True
    lifecycle.move(State.RUNNING)
    assert not lifecycle.keeps
    failing = lifecycle_in(State.OPENING)
    failing.keeps = True
    failing.move(State.STOPPING)
    assert failing.keeps


def test_the_first_failure_counts() -> None:
    lifecycle = lifecycle_in(State.RUNNING)
    first = FastlbError("first")
    for error in (first, FastlbError("second")):
        lifecycle.fail(error)
    assert lifecycle.ends
    assert lifecycle.failure is first
