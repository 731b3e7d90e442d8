"""One check of one backend, against real servers; the test says what time it is."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from time import monotonic

import pytest

from fastlb.health.connection import GRANULARITY, LOCAL_ERRORS, Connection, Outcome, no_answer, os_error
from fastlb.health.target import Target
from tests.unit.health.loopback import HOST, answering, full_queue, listening, nobody, serving, wait_for

GET = b"GET / HTTP/1.1\r\n\r\n"


def tcp(port: int, timeout: float = 1.0) -> Target:
    return Target("tcp", HOST, port, timeout, b"")


def http(port: int, timeout: float = 1.0, request: bytes = GET) -> Target:
    return Target("http", HOST, port, timeout, request)


def outcome_of(target: Target, look: Callable[[Connection], Outcome | None] | None = None) -> Outcome:
    """How a check ends that is looked at all the time."""
    connection = Connection(target, monotonic())
    try:
        return wait_for(lambda: connection.advance(monotonic()))
    finally:
        connection.close()


def test_tcp_passes_when_connected() -> None:
    with listening() as listener:
        seconds, reason = outcome_of(tcp(listener.getsockname()[1]))
    assert seconds is not None
    assert 0 < seconds < 1
    assert reason == ""


def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::1", 0))
        listener.listen()
        target = Target("tcp", "::1", listener.getsockname()[1], 1.0, b"")
        assert outcome_of(target).seconds is not None


def test_http_asks_and_is_answered() -> None:
    seen: list[bytes] = []
    with serving(answering(b"HTTP/1.1 200 OK\r\n\r\n", seen)) as port:
        seconds, reason = outcome_of(http(port))
    assert seconds is not None
    assert 0 < seconds < 1
    assert (seen, reason) == ([GET], "")


@pytest.mark.parametrize(("answer", "reason"), [
    (b"HTTP/1.1 503 No\r\n\r\n", "status 503"),
    (b"", "the connection was closed without an answer"),
    (b"x" * 100_000, "the answer is not HTTP"),
])  # fmt: skip
def test_http_is_answered_badly(answer: bytes, reason: str) -> None:
    with serving(answering(answer)) as port:
        assert outcome_of(http(port)) == Outcome(None, reason)


def test_an_answer_comes_in_pieces() -> None:
    with listening() as listener:
        connection = Connection(http(listener.getsockname()[1]), monotonic())
        assert not connection.reads
        client, _ = listener.accept()
        for piece in (b"HTTP/1", b".1 204", b" \r\n"):
            assert connection.advance(monotonic()) is None
            assert connection.reads
            client.sendall(piece)
        assert wait_for(lambda: connection.advance(monotonic())).seconds is not None
        client.close()
        connection.close()


def test_a_request_that_does_not_fit_at_once() -> None:
    long = b"GET /" + b"x" * 8_000_000 + b" HTTP/1.1\r\n\r\n"
    with listening() as listener:
        connection = Connection(http(listener.getsockname()[1], 60, long), monotonic())
        client, _ = listener.accept()
        received = 0
        while received < len(long):
            assert connection.advance(monotonic()) is None
            received += len(client.recv(1 << 20))
        assert connection.advance(monotonic()) is None
        assert connection.reads
        client.close()
        connection.close()


@pytest.mark.parametrize("target", [tcp, http])
def test_nobody_listens(target: Callable[[int], Target]) -> None:
    with nobody() as port, pytest.raises(ConnectionRefusedError):
        outcome_of(target(port))


def test_no_answer_yet() -> None:
    with full_queue() as port:
        connection = Connection(tcp(port), 100.0)
        assert connection.advance(100.5) is None
        assert connection.advance(200.0) is None
        assert connection.deadline == 101.0
        connection.close()


# --- who looks late finds the same ------------------------------------------------------------------------------


def test_a_late_look_finds_a_connection_in_its_own_time() -> None:
    """The answer came at once; nobody looked for an hour."""
    with listening() as listener:
        began = monotonic()
        connection = Connection(tcp(listener.getsockname()[1], timeout=0.05), began)
        select.select([], [connection.socket], [])
        outcome = connection.advance(began + 3600)
        connection.close()
    assert outcome is not None
    assert outcome.seconds is not None
    assert 0 < outcome.seconds <= 0.05


def test_the_way_to_the_request_is_not_the_servers_time() -> None:
    with listening() as listener:
        began = monotonic()
        connection = Connection(http(listener.getsockname()[1], timeout=0.5), began)
        client, _ = listener.accept()
        assert connection.advance(began + 10) is None
        assert connection.deadline == pytest.approx(began + 10.5, abs=0.1)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        select.select([connection.socket], [], [])
        outcome = connection.advance(began + 10.01)
        client.close()
        connection.close()
    assert outcome is not None
    assert outcome.seconds is not None
    assert outcome.seconds <= 0.01 + 0.5


def test_an_answer_that_came_late_is_none() -> None:
    """Its time is that of the arrival: two seconds after the request, though it is there when somebody looks."""
    with listening() as listener:
        began = monotonic()
        connection = Connection(http(listener.getsockname()[1], timeout=0.5), began)
        client, _ = listener.accept()
        assert connection.advance(began) is None
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        select.select([connection.socket], [], [])
        late = connection.advance(began + 2)
        client.close()
        connection.close()
    assert late == no_answer(http(0, timeout=0.5)) == Outcome(None, "no answer within 0.5 s")


def test_a_connection_that_the_server_resets_was_made() -> None:
    """Whether the reset comes before the look or after it does not matter."""
    with listening() as listener:
        connection = Connection(tcp(listener.getsockname()[1]), monotonic())
        client, _ = listener.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()
        poll = select.poll()
        poll.register(connection.socket, 0)
        assert poll.poll(1000)
        outcome = connection.advance(monotonic())
        connection.close()
    assert outcome is not None
    assert outcome.seconds is not None


def test_no_port_stays_taken() -> None:
    """A connection that is closed is reset: the other side has an error, and this one no TIME-WAIT."""
    with listening() as listener:
        connection = Connection(tcp(listener.getsockname()[1]), monotonic())
        own = connection.socket.getsockname()
        client, _ = listener.accept()
        wait_for(lambda: connection.advance(monotonic()))
        connection.close()
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
        with socket.socket() as again:
            again.bind(own)


def test_errors_of_this_host_are_known() -> None:
    named = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
    assert LOCAL_ERRORS.issuperset(named)
    assert LOCAL_ERRORS.isdisjoint((errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT))
    assert isinstance(os_error(errno.ECONNREFUSED), ConnectionRefusedError)


def test_ticks_of_the_kernel_are_forgiven() -> None:
    with listening() as listener:
        began = monotonic()
        connection = Connection(http(listener.getsockname()[1], timeout=0.5), began)
        client, _ = listener.accept()
        assert connection.advance(began) is None
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        select.select([connection.socket], [], [])
        outcome = connection.advance(began + 0.5)
        client.close()
        connection.close()
    assert outcome is not None
    assert outcome.seconds is not None
    assert outcome.seconds <= 0.5 < 0.5 + GRANULARITY
