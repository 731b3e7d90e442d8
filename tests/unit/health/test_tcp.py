"""The check by TCP connection alone."""

from __future__ import annotations

from time import monotonic

import pytest

from fastlb.health.connection import Connection
from fastlb.health.target import Target
from fastlb.health.tcp import TCP
from tests.unit.health.loopback import HOST, listening, wait_for


def test_nothing_is_sent() -> None:
    """The server's application sees no connection, or one that was reset, and not a byte."""
    assert TCP.request is None
    with listening() as listener:
        connection = Connection(Target("tcp", HOST, listener.getsockname()[1], 1.0, b""), monotonic())
        try:
            outcome = wait_for(lambda: connection.advance(monotonic()))
        finally:
            connection.close()
        assert outcome.seconds is not None
        listener.setblocking(False)
        with pytest.raises((BlockingIOError, ConnectionResetError)):
            listener.accept()[0].recv(100)
