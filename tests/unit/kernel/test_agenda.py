"""agenda.py: what is due when, and words from other threads."""

from __future__ import annotations

import math
import select
import threading

import pytest

from fastlb.kernel.agenda import Agenda, WakeUp


def first() -> None:
    """An action."""


def second() -> None:
    """Another one."""


@pytest.mark.parametrize(
    ("added", "now", "due", "rest"),
    [
        ([], 5.0, [], math.inf),
        ([(first, 5.0)], 4.0, [], 1.0),
        ([(first, 5.0)], 5.0, [first], math.inf),
        ([(second, 1.0), (first, 2.0)], 5.0, [first, second], math.inf),  # in the order of the actions
        ([(second, 1.0), (first, 9.0)], 5.0, [second], 4.0),
        ([(first, 9.0), (first, 3.0)], 5.0, [first], math.inf),  # the earlier one holds
        ([(first, 3.0), (first, 9.0)], 5.0, [first], math.inf),
    ],
)
def test_what_is_due(added: list[tuple[object, float]], now: float, due: list[object], rest: float) -> None:
    agenda = Agenda([first, second])
    for action, at in added:
        agenda.add(action, at)  # type: ignore[arg-type]
    assert list(agenda.due(lambda: now)) == due
    assert agenda.rest(now) == rest


def test_what_is_overdue_has_no_rest() -> None:
    agenda = Agenda([first])
    agenda.add(first, 1.0)
    assert agenda.rest(5.0) == 0.0


def test_an_action_that_puts_itself_on_again_runs_once_a_turn() -> None:
    agenda = Agenda([first, second])
    agenda.add(first, 0.0)
    seen = []
    for action in agenda.due(lambda: 1.0):
        seen.append(action)
        agenda.add(action, 0.0)
    assert seen == [first]
    assert agenda.rest(1.0) == 0.0


def test_a_word_from_another_thread() -> None:
    wake = WakeUp()
    poll = select.poll()
    poll.register(wake.fd, select.POLLIN)
    assert poll.poll(0) == []
    thread = threading.Thread(target=wake.ring)
    thread.start()
    assert [fd for fd, _ in poll.poll(10_000)] == [wake.fd]
    thread.join()
    wake.ring()
    wake.clear()
    assert poll.poll(0) == []
    wake.close()


def test_after_the_end_nobody_is_woken() -> None:
    wake = WakeUp()
    wake.close()
    wake.close()
    wake.ring()
    assert wake.fd == -1
