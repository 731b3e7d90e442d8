"""decap.py: in which order the receiver opens and closes what it is made of, and when it ends."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import Any

import pytest
import structlog

from fastlb.daemon import decap
from fastlb.daemon.decap import Options, Receiver
from fastlb.errors import KernelError

ADDRESS = ip_address("192.0.2.1")
OPTIONS = Options("eth0", modes=("ipip",), addresses=(ADDRESS,))
SIGNALS = {signal.SIGTERM, signal.SIGUSR1}


class Stage:
    """Stands for the kernel and the core; ``done``: what was opened and closed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.index = 2
        self.stopped = threading.Event()
        self.dies = False
        self.ring_refused = 0
        monkeypatch.setattr(decap, "claim", lambda interface: self.opened("claim"))
        monkeypatch.setattr(decap, "open_tun", lambda name: self.opened("tun"))
        monkeypatch.setattr(decap, "interface_index", lambda interface: self.index)
        monkeypatch.setattr(decap, "Decapsulator", lambda *_, **__: self)
        monkeypatch.setattr(decap, "RingMemory", lambda *_: Closing(self.done, "memory"))
        monkeypatch.setattr(decap, "Ring", self.ring)
        monkeypatch.setattr(decap, "load_programs", self.load)
        monkeypatch.setattr(decap.guard, "attach", lambda interface, fd: self.done.append("attach guard"))
        monkeypatch.setattr(decap.guard, "detach", lambda interface: self.done.append("detach guard"))

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        self.done.append(f"open {name}")
        yield 9
        self.done.append(f"close {name}")

    def load(self, modes: object, port: int, addresses: object, stack: ExitStack) -> tuple[int, int]:
        assert addresses == (ADDRESS,)
        self.done.append("load")
        return 3, 4

    def ring(self, *_: object) -> Closing:
        if self.ring_refused:
            raise OSError(self.ring_refused, os.strerror(self.ring_refused))
        self.done.append("open ring")
        return Closing(self.done, "ring")

    def run(self, ring: object) -> None:
        if not self.dies:
            self.stopped.wait()

    def stop(self) -> None:
        self.done.append("stop")
        self.stopped.set()

    def counters(self) -> dict[str, Any]:
        return {"decapsulated": 5, "drops": {"fragment": 0, "checksum": 2}}


class Closing:
    """Something that is closed, and counts."""

    def __init__(self, done: list[str], name: str) -> None:
        self._done, self._name = done, name
        self.is_open = True

    def close(self) -> None:
        self.is_open = False
        self._done.append(f"close {self._name}")

    def statistics(self) -> dict[str, int]:
        if not self.is_open:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return {"ring_packets": 7, "ring_drops": 1}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_the_guard_is_there_first_and_last(stage: Stage) -> None:
    """So that the host never answers a tunnel's packet."""
    with ExitStack() as stack:
        receiver = Receiver(OPTIONS, stack)
        assert stage.done == ["open claim", "open tun", "load", "attach guard", "open ring"]
        stage.done.clear()
    assert stage.done == ["stop", "close ring", "close memory", "detach guard", "close tun", "close claim"]
    assert receiver.counters() == {"decapsulated": 5, "drops": {"checksum": 2}, "ring_packets": 7, "ring_drops": 1}


def test_what_cannot_be_opened_leaves_nothing_behind(stage: Stage) -> None:
    stage.ring_refused = errno.ENOMEM
    with ExitStack() as stack, pytest.raises(KernelError, match="cannot open a ring on eth0: Cannot allocate memory"):
        Receiver(OPTIONS, stack)
    assert stage.done[-4:] == ["close memory", "detach guard", "close tun", "close claim"]


def test_signals(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 logs the counters, SIGTERM ends."""
    came = iter([None, signal.SIGUSR1, None, signal.SIGTERM])

    class Info:
        def __init__(self, number: int) -> None:
            self.si_signo = number

    def wait(signals: object, seconds: float) -> Info | None:
        number = next(came)
        return None if number is None else Info(number)

    monkeypatch.setattr(decap.signal, "sigtimedwait", wait)
    with ExitStack() as stack, structlog.testing.capture_logs() as logs:
        Receiver(OPTIONS, stack).wait_for(SIGNALS)
    assert [(line["event"], line["decapsulated"]) for line in logs] == [("counters", 5)]


def test_an_interface_that_was_replaced_ends_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decap.signal, "sigtimedwait", lambda *_: None)
    with ExitStack() as stack:
        receiver = Receiver(OPTIONS, stack)
        stage.index = 3
        with pytest.raises(KernelError, match="interface eth0 has been replaced by another of that name"):
            receiver.wait_for(SIGNALS)


def test_a_thread_that_has_died_ends_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decap.signal, "sigtimedwait", lambda *_: None)
    stage.dies = True
    with ExitStack() as stack, pytest.raises(KernelError, match="the receiving thread has died"):
        Receiver(OPTIONS, stack).wait_for(SIGNALS)


def test_an_interface_that_is_not_there(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(interface: str) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(decap, "interface_index", gone)
    with ExitStack() as stack, pytest.raises(KernelError, match="there is no interface eth0 here"):
        Receiver(OPTIONS, stack)
    assert stage.done == ["open claim", "close claim"]


def test_a_guard_that_cannot_be_taken_away_is_worth_a_line(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(interface: str) -> bool:
        raise KernelError("it is not there")

    monkeypatch.setattr(decap.guard, "detach", refuse)
    with structlog.testing.capture_logs() as logs:
        decap.detach_guard("eth0")
    assert [(line["event"], line["error"]) for line in logs] == [("guard not detached", "it is not there")]
