"""Servers on the loopback for tests of checks, and how to wait for something without waiting longer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

HOST = "127.0.0.1"
PATIENCE = 10.0  # seconds until something that should have happened is called missing

T = TypeVar("T")


def wait_for(look: Callable[[], T | None]) -> T:
    """Return the first result of ``look`` that is not None; AssertionError when there is none in time."""
    end = time.monotonic() + PATIENCE
    while (found := look()) is None:
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)
    return found


@contextmanager
def listening(backlog: int = 128) -> Iterator[socket.socket]:
    """A listener that accepts what the test accepts."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(backlog)
        listener.settimeout(PATIENCE)
        yield listener


@contextmanager
def serving(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server in a thread of its own, so that it answers whatever the test's thread does; yields its port."""
    with listening() as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                    with client:
                        talk(client)
                except OSError as error:
                    if listener.fileno() < 0 or error.errno == 22:  # shut down
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def answering(answer: bytes, seen: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Return what reads a request, sends an answer, and hangs up."""

    def talk(client: socket.socket) -> None:
        request = client.recv(4096)
        if seen is not None:
            seen.append(request)
        client.sendall(answer)

    return talk


@contextmanager
def full_queue() -> Iterator[int]:
    """A port on which nobody answers: the queue of its listener is full, so that the kernel drops further SYNs."""
    with listening(0) as listener:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        try:
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


@contextmanager
def nobody() -> Iterator[int]:
    """A port that is taken and on which nobody listens, so that connections are refused."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        yield bound.getsockname()[1]
