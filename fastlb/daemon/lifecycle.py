"""The one state of a balancer, and whether it leaves to the next process what stays over a crash.

                 open            all parts are open        stop, handover, failure      all parts are closed
    LOADED ─────────────► OPENING ─────────────► RUNNING ─────────────► STOPPING ─────────────► STOPPED
                             │                                              ▲
                             └──────────────────────────────────────────────┘
                               a part cannot be opened, or a stop is asked for

What stays over a crash (guard, VIPs, the file of the flow table) is kept when ``keeps`` is True: a handover was asked
for, or this process has taken it over from another one and does not run yet.
"""

from __future__ import annotations

from enum import Enum, auto

from fastlb.errors import FastlbError


class State(Enum):
    """Where a balancer is between its start and its end."""

    LOADED = auto()
    OPENING = auto()
    RUNNING = auto()
    STOPPING = auto()
    STOPPED = auto()


TRANSITIONS = {
    State.LOADED: {State.OPENING},
    State.OPENING: {State.RUNNING, State.STOPPING},
    State.RUNNING: {State.STOPPING},
    State.STOPPING: {State.STOPPED},
    State.STOPPED: set(),
}


class Lifecycle:
    """A balancer's state, which goes forward only, and why it ends."""

    def __init__(self) -> None:
        self.state = State.LOADED
        self.keeps = False  # what stays over a crash is left to the next process
        self.failure: FastlbError | None = None
        self.handover = False  # the stop that was asked for last leaves what stays over a crash
        self._stop_wanted = False

    def move(self, to: State) -> None:
        """Go to the next state; raises ValueError where the drawing has no arrow."""
        if to not in TRANSITIONS[self.state]:
            raise ValueError(f"a balancer does not go from {self.state.name} to {to.name}")
        self.state = to
        if to is State.RUNNING:
            self.keeps = self.handover  # from here on a stop takes everything down, unless it hands over

    def stop(self, handover: bool = False) -> None:
        """Ask for the end; with ``handover``, what stays over a crash stays."""
        self._stop_wanted = True
        self.keeps = self.handover = handover

    def fail(self, error: FastlbError) -> None:
        """Ask for the end because of an error, which `Balancer.run` raises after it; the first one counts."""
        self.failure = self.failure or error

    @property
    def ends(self) -> bool:
        """True if the balancer has been asked to end, or failed."""
        return self._stop_wanted or self.failure is not None
