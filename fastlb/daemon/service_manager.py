"""The part that tells a service manager how far the balancer is: systemd's, by the protocol of sd_notify(3).

    RELOADING=1, then READY=1   around each reload, also one that is refused
    READY=1                     when the balancer runs, and all its parts are open
    STOPPING=1                  when it begins to take them down
    STATUS=...                  in words, for `systemctl status`

Without $NOTIFY_SOCKET nobody wants to know, and nothing is done.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import structlog

from fastlb.daemon.world import World
from fastlb.model.names import listed

SEND_TIMEOUT = 1.0  # seconds that a manager may leave its socket full
STATUS_EVERY = 1.0  # seconds between two lines of status at least

log = structlog.get_logger()

Send = Callable[[str], None]
"""Sends one message to the service manager."""


class ServiceManager:
    """Keeps whoever started this process informed, at most once a second beside what must be said at once."""

    def __init__(self, send: Send | None = None) -> None:
        self._send = send or sender(os.environ.get("NOTIFY_SOCKET", ""))
        self._world: World | None = None
        self._is_ready, self._reloads = False, 0
        self._shown = ""
        self._due = 0.0  # when the status may be sent again

    def waits(self, interfaces: Sequence[str]) -> None:
        """Tell what the start waits for."""
        self._tell(f"STATUS=Waiting for interface {listed(interfaces)}")

    def open(self, stack: ExitStack, world: World) -> World:
        """Tell of the end when it comes; until the first tick the balancer is not ready."""
        self._world = world
        stack.callback(self._tell, "STOPPING=1", "STATUS=Stopping")
        return world

    def tick(self, now: float) -> None:
        """Tell that the balancer runs, the first time, and then what has changed of its status."""
        if self._send is None or (self._is_ready and (self._world is None or now < self._due)):
            return
        status = "" if self._world is None else f"STATUS={describe(self._world, now)}"
        self._world, self._due = None, now + STATUS_EVERY
        if not self._is_ready:
            self._is_ready = True
            self._tell("READY=1", status)
        elif status != self._shown:
            self._tell(status)
        self._shown = status

    def apply(self, world: World) -> None:
        """Take note of another world."""
        self._world = world

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Tell that a reload is going on, and that it has ended."""
        self._reloads += 1
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._reloads -= 1
            if not self._reloads:
                self._tell("READY=1")

    def _tell(self, *lines: str) -> None:
        if self._send is not None:
            self._send("\n".join(lines))


def describe(world: World, now: float) -> str:
    """Return in a line what is balanced, and how many backends are not there for new flows."""
    summary = world.configuration.summary()
    states = Counter(state.shown(now) for state in world.states.by_backend.values())
    missing = [f"{word} {states[word]}" for word in ("down", "draining", "drained") if states[word]]
    return f"Balancing: services {summary['services']}, backends {', '.join([str(summary['backends']), *missing])}"


def sender(address: str) -> Send | None:
    """Return what sends to the datagram socket of this address, an abstract one with "@"; None without an address."""
    if not address.startswith(("/", "@")):
        return None
    name = "\0" + address[1:] if address.startswith("@") else address

    def send(message: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(SEND_TIMEOUT)
                connection.sendto(message.encode(), name)
        except OSError as error:
            log.warning("the service manager was not told", socket=address, message=message, error=error.strerror)

    return send
