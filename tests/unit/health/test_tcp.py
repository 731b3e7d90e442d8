"""The check by TCP connection alone."""

from __future__ import annotations

from time import monotonic

import pytest

from fastlb.health.connection import Connection
from fastlb.health.target import Target
from fastlb.health.tcp import TCP
from tests.unit.health.loopback import HOST, listening, wait_for


def test_nothing_is_sent() -> None:
    """The server sees a connection that is reset, and not a byte."""
    assert TCP.request is None
    with listening() as listener:
        connection = Connection(Target("tcp", HOST, listener.getsockname()[1], 1.0, b""), monotonic())
        try:
            outcome = wait_for(lambda: connection.advance(monotonic()))
        finally:
            connection.close()
        assert outcome.seconds is not None
        accepted, _ = listener.accept()
        with accepted, pytest.raises(ConnectionResetError):
            accepted.recv(100)
