"""The part that hears what routers say of the ways to backends: that a tunnel's packet did not fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from socket import socket

import structlog

from fastlb.daemon.world import Marks, World
from fastlb.kernel import icmp
from fastlb.model.net import Address
from fastlb.plan.pathmtu import PathMtus, Tunnels

log = structlog.get_logger()


class PathMtuErrors:
    """Listens for ICMP errors, and marks path MTUs once a tick, whatever routers say, or somebody in their name."""

    def __init__(
        self,
        marks: Marks,
        listen: Callable[[int], socket | None] = icmp.listen,
        read: Callable[[socket], list[bytes]] = icmp.read,
    ) -> None:
        self._marks, self._listen, self._read = marks, listen, read
        self._heard = PathMtus()
        self._tunnels: Tunnels = {}
        self._narrower: set[Address] = set()  # backends the way to which has become so since the last tick
        self.listeners: dict[int, socket] = {}  # by IP version; the event loop calls `hear` when one has something

    def open(self, stack: ExitStack, world: World) -> World:
        """Listen in each IP version that the kernel has; raises KernelError."""
        for version in (4, 6):
            listener = self._listen(version)
            if listener is not None:
                self.listeners[version] = stack.enter_context(listener)
        self.apply(world)
        return world

    def hear(self, version: int) -> None:
        """Take in what routers have said; clients are told from the next tick on."""
        for error in self._read(self.listeners[version]):
            backend = self._heard.hear(error, version, self._tunnels, time.monotonic())
            if backend is not None:
                self._narrower.add(backend)

    def tick(self, now: float) -> None:
        """Mark what was heard since the last tick, and what is too old to hold."""
        known = self._heard.known()
        narrower = sorted(self._narrower, key=str)
        if self._heard.forget(now) or narrower:
            self._narrower.clear()
            self._marks.path_mtus = dict(self._heard.known())
        for backend in narrower:
            log.info("the way to a backend is narrower", backend=str(backend), mtu=known[backend])

    def apply(self, world: World) -> None:
        """Believe errors about the tunnels of this world only."""
        self._tunnels = world.ways.tunnels
