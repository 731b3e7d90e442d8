"""What a thread needs that waits for descriptors, for points in time, and for a word from other threads."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence

Action = Callable[[], None]


class Agenda:
    """Actions, and when each is due (monotonic seconds); together they run in the order of ``actions``."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = actions
        self._due: dict[Action, float] = {}

    def add(self, action: Action, at: float) -> None:
        """Run an action at that time at the latest; one that is due earlier stays so."""
        self._due[action] = min(at, self._due.get(action, math.inf))

    def rest(self, now: float) -> float:
        """Return the seconds until something is due: 0 at least, infinite when there is nothing."""
        return max(0.0, min(self._due.values(), default=math.inf) - now)

    def due(self, clock: Callable[[], float]) -> Iterator[Action]:
        """Take out and yield what is due, each action once at most; the clock is asked anew before each."""
        for action in self._actions:
            if self._due.get(action, math.inf) <= clock():
                del self._due[action]
                yield action


class WakeUp:
    """A descriptor that becomes readable when another thread calls `ring`, even in the moment in which it is closed."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._lock = threading.Lock()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        """Wake the thread; nothing happens when it has closed this."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Have the descriptor wait for the next `ring`."""
        os.eventfd_read(self.fd)

    def close(self) -> None:
        """Close the descriptor; closing twice is fine."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
