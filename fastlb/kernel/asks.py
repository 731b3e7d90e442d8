"""Which next hops the kernel is asked to resolve, and when: a few at a time, those that are missing or in doubt.

ARP and ND (RFC 826, RFC 4861) stay with the kernel, but fastlb's own packets bypass its neighbour table: without being
asked the kernel would neither resolve a backend nor notice that it moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fastlb.model.hostview import NextHop

ASK_INTERVAL = 2.0
"""Seconds between requests (NTF_USE) to resolve a wanted next hop that is missing, FAILED or STALE.

A host that moved to another MAC without saying so is noticed after what remains of REACHABLE (15 to 45 s by
default, RFC 4861 section 6.3.2), this interval, the kernel's DELAY (5 s) and three probes (1 s each).
"""
ASK_BATCH = 128  # requests a tick: thousands of next hops must not meet the wire at once
ASK_TICK = 0.02  # seconds: 6,400 requests a second


class Neighbours(Protocol):
    """What is known of next hops."""

    def should_ask(self, hop: NextHop) -> bool:
        """Return True if the kernel does not know for sure where this next hop is, and could find out."""


class Asks:
    """A queue without doubles, so that filling it up again cannot starve its tail."""

    def __init__(self) -> None:
        self.wanted: frozenset[NextHop] = frozenset()
        self.allowed_at = 0.0  # not earlier than then, on the monotonic clock
        self._queue: dict[NextHop, None] = {}

    def want(self, next_hops: Iterable[NextHop]) -> None:
        """Keep exactly these resolved. From any thread."""
        self.wanted = frozenset(next_hops)

    def fill(self, known: Neighbours) -> bool:
        """Put every wanted next hop that is missing or in doubt into the queue; returns whether any is in it."""
        self._queue.update((hop, None) for hop in self.wanted if known.should_ask(hop))
        return bool(self._queue)

    def take(self, known: Neighbours, now: float) -> list[NextHop]:
        """Take the next ASK_BATCH out of the queue, and return those that still have to be asked for."""
        batch = list(self._queue)[:ASK_BATCH]
        for hop in batch:
            del self._queue[hop]
        self.allowed_at = now + ASK_TICK
        return [hop for hop in batch if hop in self.wanted and known.should_ask(hop)]

    def __bool__(self) -> bool:
        return bool(self._queue)
