"""What a feature of the running balancer is: a part. CONTRIBUTING says how to add one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from fastlb.daemon.world import World


class Part(Protocol):
    """A feature that joins the running balancer.

    Parts know neither the balancer nor each other. They get what they share when they are made: `Marks`, `DataPath`
    and `Lifecycle`. All calls come from one thread, and none may take more than a few milliseconds.
    """

    def open(self, stack: ExitStack, world: World) -> World:
        """Begin, and put on the stack what takes it down again; raises FastlbError.

        Returns the world to go on with: mostly the same, but flows that another process has left bring theirs.
        """

    def tick(self, now: float) -> None:
        """Do what is due, several times a second; ``now`` in seconds of the monotonic clock."""

    def apply(self, world: World) -> None:
        """Go over to another world; raises FastlbError when that cannot be: then the one before is applied again."""
