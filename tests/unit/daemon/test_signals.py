"""signals.py: what stops, what hands over, and a SIGHUP that waits for who takes it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from fastlb.daemon import signals

ALL = (*signals.STOPS, signal.SIGHUP)


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def test_stops() -> None:
    got: list[bool] = []
    signals.on_stop(got.append)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.raise_signal(number)
    assert got == [False, False, True]


def test_a_reload_is_held_until_somebody_takes_it() -> None:
    got: list[str] = []
    signal.signal(signal.SIGHUP, lambda *_: got.append("too early"))
    signals.hold_reload()
    for _ in range(2):
        signal.raise_signal(signal.SIGHUP)
    assert got == []
    signals.on_reload(lambda: got.append("reload"))
    assert got == ["reload"]
    signal.raise_signal(signal.SIGHUP)
    assert got == ["reload"] * 2


def test_all_are_ignored() -> None:
    """One that was held, too."""
    signals.hold_reload()
    signal.raise_signal(signal.SIGHUP)
    signals.ignore()
    for number in ALL:
        signal.raise_signal(number)
    assert {signal.getsignal(number) for number in ALL} == {signal.SIG_IGN}
    assert signal.sigpending() == set()
