"""How late the event loop is: a timer that notes how long after its time it is called.

What the loop does at once, everything else waits for, so this is also how long a command or a result may wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

PERIOD = 0.05  # seconds from one look to the next
WINDOW = 30.0  # seconds that are remembered
PERCENTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


class Delays:
    """The delays of the last WINDOW seconds, one for each PERIOD.

    While the loop is held up for long, looks are left out. They are counted as if they had been waiting too, or a
    second in which nothing happened would be one look among hundreds.
    """

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=round(WINDOW / PERIOD))

    def add(self, late: float) -> None:
        """Note that a look was so many seconds late."""
        looks = min(int(max(0.0, late) / PERIOD), self._kept.maxlen or 0)
        self._kept.extend(late - left_out * PERIOD for left_out in range(looks, 0, -1))
        self._kept.append(max(0.0, late))

    def summary(self) -> Mapping[str, float]:
        """Return the PERCENTILES in seconds, by name; all 0 before the first look."""
        ordered = sorted(self._kept) or [0.0]
        last = len(ordered) - 1
        return {name: round(ordered[round(share * last)], 6) for name, share in PERCENTILES.items()}


class LoopLag:
    """Measures the running event loop from `open` to `close`."""

    def __init__(self) -> None:
        self._delays = Delays()
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin to measure the loop that is running."""
        self._wait(asyncio.get_running_loop())

    def summary(self) -> Mapping[str, float]:
        """Return the median, the 99th percentile and the maximum of the last WINDOW, in seconds."""
        return self._delays.summary()

    def close(self) -> None:
        """End measuring; it may begin again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_at(loop.time() + PERIOD, self._look, loop, loop.time() + PERIOD)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._delays.add(loop.time() - due)
        self._wait(loop)
