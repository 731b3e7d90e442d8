"""Does a backend answer the flows that it is sent? Two of its counters tell, looked at again and again. Pure.

In the two-way modes a backend whose replies take another way than through this host passes its checks, and no client
gets through to it. In the others a backend that does not hold the VIP, or does not unwrap the tunnel, does so too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PATIENCE = 3.0  # seconds that flows may wait for their first answer: a SYN is sent again after one, and after three
LEAST_FLOWS = {True: 2, False: 5}  # without an answer, by two_way; forged SYNs look so where replies are not seen


@dataclass(frozen=True)
class Answers:
    """What the counters of a backend said when it last answered.

    ``new``: flows that it had been sent by then. ``answered``: what it had answered. ``since``: when enough flows had
    got no answer from then on; None until there are. ``silent``: they have waited for long enough.
    """

    new: int
    answered: int
    since: float | None = None
    silent: bool = False


def judge(before: Answers | None, new: int, answered: int, two_way: bool, now: float) -> Answers:
    """Return what follows when a backend's counters say so ``now``; both only grow, unless another backend has them."""
    if before is None or answered != before.answered or new < before.new:
        return Answers(new, answered)
    if new - before.new < LEAST_FLOWS[two_way]:
        return before
    if before.since is None:
        return replace(before, since=now)
    return replace(before, silent=True) if now - before.since >= PATIENCE else before
