"""What is due when, for thousands of things at once: a dict of slots of time, and a heap of the slots' numbers.

    now                                    a slot is SLOT seconds long; what is in it is due at its end
     │ 17 │ 18 │    │    │ 21 │  ...
       a,d   b             c               slots that hold nothing do not exist

Putting a thing in, moving it and taking it out cost the same for ten things and for ten thousand.
"""

from __future__ import annotations

import heapq
import math
from typing import Generic, TypeVar

SLOT = 0.01  # seconds

T = TypeVar("T")


class Wheel(Generic[T]):
    """Things by the time when they are due; each at one time. It has no clock of its own."""

    def __init__(self) -> None:
        self._slot_of: dict[T, int] = {}
        self._slots: dict[int, set[T]] = {}
        self._order: list[int] = []  # a heap of the keys of _slots

    def __len__(self) -> int:
        return len(self._slot_of)

    def put(self, thing: T, due: float) -> None:
        """Make a thing due at the end of the slot in which ``due`` lies, and at no other time."""
        slot = math.floor(due / SLOT) + 1
        if self._slot_of.get(thing) == slot:
            return
        self.discard(thing)
        self._slot_of[thing] = slot
        if slot not in self._slots:
            self._slots[slot] = set()
            heapq.heappush(self._order, slot)
        self._slots[slot].add(thing)

    def discard(self, thing: T) -> None:
        """Take a thing out, if it is in."""
        slot = self._slot_of.pop(thing, None)
        if slot is not None:
            self._slots[slot].discard(thing)

    def due_of(self, thing: T) -> float | None:
        """Return when a thing is due; None if it is not in."""
        slot = self._slot_of.get(thing)
        return None if slot is None else slot * SLOT

    def next_due(self) -> float | None:
        """Return when the first things are due; None if there are none."""
        while self._order and not self._slots[self._order[0]]:
            del self._slots[heapq.heappop(self._order)]
        return self._order[0] * SLOT if self._order else None

    def take_due(self, now: float, most: int) -> list[T]:
        """Take out and return what is due by now, the earliest first, and not more than ``most``."""
        taken: list[T] = []
        while len(taken) < most and (due := self.next_due()) is not None and due <= now:
            things = self._slots[self._order[0]]
            while things and len(taken) < most:
                thing = things.pop()
                del self._slot_of[thing]
                taken.append(thing)
        return taken
