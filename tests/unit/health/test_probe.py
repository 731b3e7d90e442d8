"""A probe and its connection."""

from __future__ import annotations

from time import monotonic

from fastlb.health.connection import Connection
from fastlb.health.probe import Probe
from fastlb.health.target import Target
from tests.unit.health.loopback import HOST, listening


def test_hanging_up() -> None:
    with listening() as listener:
        target = Target("tcp", HOST, listener.getsockname()[1], 1.0, b"")
        probe = Probe(target)
        probe.hang_up()
        connection = probe.connection = Connection(target, monotonic())
        probe.hang_up()
        assert probe.connection is None
        assert connection.socket.fileno() == -1
        probe.hang_up()
