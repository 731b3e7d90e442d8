"""What signals mean to a balancer. SIGHUP is held until it runs: fastlb/__main__.py begins that.

    SIGTERM, SIGINT   stop, and take everything down
    SIGUSR2           stop, and leave to the next process what stays over a crash: the unit's KillSignal
    SIGHUP            read the configuration again
"""

from __future__ import annotations

import signal
from collections.abc import Callable

STOPS = {signal.SIGTERM: False, signal.SIGINT: False, signal.SIGUSR2: True}
"""The signals that stop a balancer, and whether it is a handover."""


def on_stop(stop: Callable[[bool], object]) -> None:
    """Have the signals that stop call this from now on, with True for a handover."""
    for number in STOPS:
        signal.signal(number, lambda number, _: stop(STOPS[signal.Signals(number)]))


def hold_reload() -> None:
    """Let SIGHUP wait until `on_reload`. Threads that are started meanwhile never get it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def on_reload(reload: Callable[[], object]) -> None:
    """Have SIGHUP call this from now on, at once if one has come while it was held."""
    signal.signal(signal.SIGHUP, lambda *_: reload())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def ignore() -> None:
    """Ignore all of them: what is being taken down must not be cut short."""
    for number in (*STOPS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
