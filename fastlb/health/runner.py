"""Begins checks when they are due and follows them to their ends: one timer, and one epoll for all sockets.

A probe is in the wheel while it waits, due when its check begins, and while the check runs, due at its deadline:

    waiting ──► running ──► waiting an interval, from the end on
       ▲           │
       ├───────────┤ asked again at once: this process looked much too late
       └───────────┘ asked again after a PAUSE: this host could not ask

At most one check of a probe runs. Where only so many may run, the others stand in a queue.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
from collections.abc import Callable

from fastlb.health.connection import LOCAL_ERRORS, Connection, Outcome, no_answer
from fastlb.health.probe import Probe
from fastlb.health.wheel import Wheel

START_RATE = 4000.0  # first checks a second: a few backends are checked at once, thousands one after the other
MAX_AT_ONCE = 64  # beginnings, deadlines or events in one turn of the loop: two or three milliseconds
LATE = 0.5  # seconds behind its deadline from which on a check without an answer counts for nothing
MAX_AGAIN = 1  # times in a row: the kernel had no answer either, so that a dead backend must not stay up for long
PAUSE = 1.0  # seconds until a backend is asked that this host could not ask
READS, WRITES = select.EPOLLIN, select.EPOLLOUT

OnEnd = Callable[[Probe, Outcome], None]
OnTrouble = Callable[[Exception, float], None]


class Runner:
    """Checks probes within an event loop, and calls ``on_end`` for each verdict, ``on_trouble`` where there is none."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_end: OnEnd, on_trouble: OnTrouble, max_running: int
    ) -> None:
        self._loop, self._on_end, self._on_trouble, self._max_running = loop, on_end, on_trouble, max_running
        self._wheel: Wheel[Probe] = Wheel()
        self._running: dict[int, Probe] = {}  # by the descriptor of its socket
        self._queue: dict[Probe, None] = {}  # in order: those that are due, while as many run as may
        self._next_first = 0.0  # when the next new probe may begin
        self._timer: asyncio.TimerHandle | None = None
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._look)

    def close(self) -> None:
        """End all checks, without a verdict."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._timer is not None:
            self._timer.cancel()
        for probe in self._running.values():
            probe.hang_up()
        self._epoll.close()

    # --- what shall be checked -------------------------------------------------------------------------------

    def add(self, probe: Probe) -> None:
        """Check soon, and then again and again; what is added together begins one after the other."""
        begins = max(self._loop.time(), self._next_first)
        self._next_first = begins + 1 / START_RATE
        self._put_if_earlier(probe, begins)

    def hasten(self, probe: Probe) -> None:
        """Have a probe wait for no longer than its interval, which may have become shorter."""
        self._put_if_earlier(probe, self._loop.time() + probe.interval)

    def remove(self, probe: Probe) -> None:
        """Check no more. A check that is running ends without a verdict."""
        self._end(probe)
        self._wheel.discard(probe)
        self._queue.pop(probe, None)

    def _put_if_earlier(self, probe: Probe, begins: float) -> None:
        due = self._wheel.due_of(probe)
        if probe.connection is None and probe not in self._queue and (due is None or begins < due):
            self._put(probe, begins)

    # --- time ------------------------------------------------------------------------------------------------

    def _put(self, probe: Probe, due: float) -> None:
        self._wheel.put(probe, due)
        self._set_timer()

    def _set_timer(self) -> None:
        """Have the timer go off when the next probe is due, or before."""
        due = self._wheel.next_due()
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        """Do what is due. What is left for the next turn of the loop comes after what sockets have to tell."""
        self._timer = None
        for probe in self._wheel.take_due(self._loop.time(), MAX_AT_ONCE):
            if probe.connection is None:
                self._begin(probe)
            else:
                self._go_on(probe, probe.connection)
        self._set_timer()

    # --- one check -------------------------------------------------------------------------------------------

    def _begin(self, probe: Probe) -> None:
        if len(self._running) >= self._max_running:
            self._queue[probe] = None
            return
        now = self._loop.time()
        try:
            probe.connection = Connection(probe.target, now)
            descriptor = probe.connection.socket.fileno()
            self._running[descriptor] = probe
            self._epoll.register(descriptor, WRITES)
        except Exception as error:
            self._failed(probe, error, now)
        else:
            self._put(probe, probe.connection.deadline)

    def _look(self) -> None:
        """Go on with the checks whose sockets have something to tell."""
        for descriptor, _ in self._epoll.poll(0, MAX_AT_ONCE):
            probe = self._running.get(descriptor)
            if probe is not None and probe.connection is not None:
                self._go_on(probe, probe.connection)

    def _go_on(self, probe: Probe, connection: Connection) -> None:
        """Look what has come, and whether it is too late for more. Whatever one check meets, the others go on."""
        now = self._loop.time()
        try:
            did_read = connection.reads
            outcome = connection.advance(now)
            if outcome is not None:
                self._ended(probe, outcome, now)
            elif now >= connection.deadline:
                self._out_of_time(probe, connection.deadline, now)
            else:
                if connection.reads and not did_read:
                    self._epoll.modify(connection.socket.fileno(), READS)
                self._wheel.put(probe, connection.deadline)
        except Exception as error:
            self._failed(probe, error, now)

    def _out_of_time(self, probe: Probe, deadline: float, now: float) -> None:
        """Call a check failed, unless this process stood still: then what it asked may have been hampered, too."""
        if now - deadline > LATE and probe.again < MAX_AGAIN:
            probe.again += 1
            self._end(probe)
            self._put(probe, now)
        else:
            self._ended(probe, no_answer(probe.target), deadline)

    def _failed(self, probe: Probe, error: Exception, now: float) -> None:
        """Tell an error of the backend, or of the way there, from one that says nothing about it."""
        if isinstance(error, OSError) and error.errno is not None and error.errno not in LOCAL_ERRORS:
            self._ended(probe, Outcome(None, os.strerror(error.errno)), now)
        else:
            self._end(probe)
            self._put(probe, now + PAUSE)
            self._tell(lambda: self._on_trouble(error, now))

    def _ended(self, probe: Probe, outcome: Outcome, when: float) -> None:
        """Report a verdict, and wait for the next check; after the first one each probe comes to a time of its own."""
        self._end(probe)
        share = random.uniform(0.5, 1) if probe.is_first else 1.0
        probe.is_first, probe.again = False, 0
        self._put(probe, when + share * probe.interval)
        self._tell(lambda: self._on_end(probe, outcome))

    def _tell(self, tell: Callable[[], None]) -> None:
        """Tell of a check. What goes wrong with whoever is told is no fault of the check, and ends none."""
        try:
            tell()
        except Exception as error:
            self._loop.call_exception_handler({"message": "the end of a check was not taken in", "exception": error})

    def _end(self, probe: Probe) -> None:
        """Close the connection, if there is one, and let the next in the queue begin."""
        if probe.connection is None:
            return
        self._running.pop(probe.connection.socket.fileno(), None)
        probe.hang_up()
        if self._queue:
            following = next(iter(self._queue))
            del self._queue[following]
            self._put(following, self._loop.time())
