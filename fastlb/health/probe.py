"""One target that is being checked, and on whose behalf."""

from __future__ import annotations

from fastlb.health.connection import Connection
from fastlb.health.target import Target
from fastlb.model.names import BackendName


class Probe:
    """A target, and who wants to know of it: backends with the intervals of their services, in seconds."""

    __slots__ = ("again", "connection", "interval", "is_first", "members", "target")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.members: dict[BackendName, float] = {}
        self.interval = 0.0  # the shortest of them
        self.connection: Connection | None = None  # while a check is running
        self.is_first = True  # until a check has ended
        self.again = 0  # checks in a row that counted for nothing, since this process stood still

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
