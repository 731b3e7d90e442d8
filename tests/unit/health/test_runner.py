"""Checks that run again and again, within a real event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest

from fastlb.health.connection import Outcome
from fastlb.health.probe import Probe
from fastlb.health.runner import LATE, MAX_AGAIN, START_RATE, Runner
from fastlb.health.target import Target
from tests.unit.health.loopback import HOST, answering, full_queue, listening, nobody, serving


class Bench:
    """A runner within the running loop, and what it told."""

    def __init__(self, max_running: int = 100) -> None:
        self.loop = asyncio.get_running_loop()
        self.ends: list[tuple[Probe, Outcome]] = []
        self.when: list[float] = []
        self.troubles: list[Exception] = []
        self.fault: Exception | None = None  # of whoever is told of an end
        self.runner = Runner(self.loop, self._end, lambda error, now: self.troubles.append(error), max_running)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def _end(self, probe: Probe, outcome: Outcome) -> None:
        self.ends.append((probe, outcome))
        self.when.append(self.loop.time())
        if self.fault is not None:
            raise self.fault

    def check(self, kind: str, port: int, interval: float = 0.05, timeout: float = 1.0) -> Probe:
        request = b"GET / HTTP/1.1\r\n\r\n" if kind == "http" else b""
        probe = Probe(Target(kind, HOST, port, timeout, request))
        probe.interval = interval
        self.runner.add(probe)
        return probe

    async def until(self, wanted: Callable[[], object]) -> None:
        end = self.loop.time() + 10
        while not wanted():
            assert self.loop.time() < end, "it did not happen"
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_again_and_again(kind: str) -> None:
    async def run(port: int) -> None:
        with Bench() as bench:
            bench.check(kind, port)
            await bench.until(lambda: len(bench.ends) >= 4)
            assert all(outcome.seconds is not None for _, outcome in bench.ends)
            assert min(later - earlier for earlier, later in pairwise(bench.when[1:])) > 0.045

    with serving(answering(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
        asyncio.run(run(port))


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_refused(kind: str) -> None:
    async def run(port: int) -> None:
        with Bench() as bench:
            probe = bench.check(kind, port)
            await bench.until(lambda: len(bench.ends) >= 2)
            assert set(bench.ends) == {(probe, Outcome(None, "Connection refused"))}
            assert not bench.troubles

    with nobody() as port:
        asyncio.run(run(port))


def test_no_answer_in_time() -> None:
    """The interval counts from the deadline, however late the process was to see it."""

    async def run(port: int) -> None:
        with Bench() as bench:
            probe = bench.check("tcp", port, interval=0.05, timeout=0.1)
            began = bench.loop.time()
            await bench.until(lambda: len(bench.ends) >= 3)
            assert set(bench.ends) == {(probe, Outcome(None, "no answer within 0.1 s"))}
            assert bench.when[0] - began >= 0.1
            assert bench.when[2] - began >= 0.1 + 0.025 + 0.1 + 0.05 + 0.1 - 0.01

    with full_queue() as port:
        asyncio.run(run(port))


def hold_up(seconds: float) -> None:
    """Keep the event loop from everything else."""
    time.sleep(seconds)


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_a_loop_that_stands_still_fails_nobody(kind: str) -> None:
    """Each look comes long after the deadline; the answer was there in time."""

    async def run(port: int) -> None:
        with Bench() as bench:
            bench.check(kind, port, interval=0.05, timeout=0.1)
            while len(bench.ends) < 4:
                hold_up(LATE + 0.15)
                await asyncio.sleep(0.02)
            assert all(outcome.seconds is not None and outcome.seconds <= 0.1 for _, outcome in bench.ends)

    with serving(answering(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
        asyncio.run(run(port))


def test_a_deadline_that_was_met_much_too_late_counts_for_nothing() -> None:
    """It is asked again at once, and not for ever: the kernel has no answer either."""

    async def run(port: int) -> None:
        with Bench() as bench:
            probe = bench.check("tcp", port, interval=0.05, timeout=0.1)
            await bench.until(lambda: probe.connection is not None)
            for again in range(1, MAX_AGAIN + 1):
                asked = probe.connection
                hold_up(0.1 + LATE + 0.05)
                await bench.until(lambda asked=asked: probe.connection not in (None, asked))  # type: ignore[misc]
                assert (probe.again, bench.ends) == (again, [])
            hold_up(0.1 + LATE + 0.05)
            await bench.until(lambda: bench.ends)
            assert bench.ends == [(probe, Outcome(None, "no answer within 0.1 s"))]
            assert probe.again == 0

    with full_queue() as port:
        asyncio.run(run(port))


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """The process may open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_this_host_lacks_is_no_verdict() -> None:
    async def run(port: int) -> None:
        with Bench() as bench:
            with no_descriptors_left():
                bench.check("tcp", port)
                await bench.until(lambda: bench.troubles)
            assert [getattr(error, "errno", None) for error in bench.troubles] == [errno.EMFILE]
            assert not bench.ends
            await bench.until(lambda: bench.ends)
            assert bench.ends[0][1].seconds is not None

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.EPERM])
def test_errors_of_connecting(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says at once that it cannot connect, for a reason of its own."""
    monkeypatch.setattr(socket.socket, "connect_ex", lambda sock, address: number)

    async def run() -> None:
        with Bench() as bench:
            bench.check("tcp", 80)
            await bench.until(lambda: bench.troubles)
            assert not bench.ends
            assert bench.troubles[0].errno == number  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_check_outlives_any_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of our own in one check: it is told, others go on, and it is tried again itself."""
    faults = [ZeroDivisionError("a fault")]
    plain = socket.socket.getsockopt

    def faulty(*arguments: object) -> object:
        if faults:
            raise faults.pop()
        return plain(*arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(socket.socket, "getsockopt", faulty)

    async def run(port: int) -> None:
        with Bench() as bench:
            probes = {bench.check("tcp", port), bench.check("tcp", port)}
            await bench.until(lambda: {probe for probe, _ in bench.ends} == probes)
            assert list(map(str, bench.troubles)) == ["a fault"]

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), BrokenPipeError(32, "no reader")])
def test_a_check_outlives_whoever_is_told_of_it(error: Exception) -> None:
    """Such as a log that cannot be written, whose error must not be taken for one of the backend either."""

    async def run(port: int) -> None:
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))

        with Bench() as bench:
            bench.fault = error
            probes = {bench.check("tcp", port), bench.check("tcp", port)}
            await bench.until(lambda: len(bench.ends) >= 6)
            assert {probe for probe, _ in bench.ends} == probes
            assert all(outcome.seconds is not None for _, outcome in bench.ends)
            assert set(told) == {error}
            assert bench.troubles == []

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))


def test_no_more_run_at_once_than_may() -> None:
    async def run(silent: int, port: int) -> None:
        with Bench(max_running=2) as bench:
            slow = [bench.check("tcp", silent, timeout=0.2) for _ in range(4)]
            quick = bench.check("tcp", port)
            most = 0

            def all_have_ended() -> bool:
                nonlocal most
                most = max(most, sum(probe.connection is not None for probe in (*slow, quick)))
                return {probe for probe, _ in bench.ends} == {*slow, quick}

            await bench.until(all_have_ended)
            assert most == 2

    with full_queue() as silent, listening() as listener:
        asyncio.run(run(silent, listener.getsockname()[1]))


def test_many_begin_one_after_the_other() -> None:
    """And a few at once."""

    async def run(port: int) -> None:
        with Bench(max_running=10_000) as bench:
            count = int(START_RATE / 4)
            began = bench.loop.time()
            for _ in range(count):
                bench.check("tcp", port, interval=60)
            await bench.until(lambda: bench.ends)
            assert bench.loop.time() - began < 0.2
            await bench.until(lambda: len(bench.ends) == count)
            assert bench.when[-1] - began >= 0.24

    with listening(4096) as listener:
        asyncio.run(run(listener.getsockname()[1]))


def test_what_is_removed_ends() -> None:
    async def run(silent: int, port: int) -> None:
        with Bench() as bench:
            waiting, running = bench.check("tcp", port, interval=60), bench.check("tcp", silent, timeout=60)
            await bench.until(lambda: bench.ends and running.connection is not None)
            for probe in (waiting, running):
                bench.runner.remove(probe)
                bench.runner.remove(probe)
            assert running.connection is None
            assert len(bench.ends) == 1

    with full_queue() as silent, listening() as listener:
        asyncio.run(run(silent, listener.getsockname()[1]))


def test_a_shorter_interval_rules_at_once() -> None:
    async def run(port: int) -> None:
        with Bench() as bench:
            probe = bench.check("tcp", port, interval=3600)
            await bench.until(lambda: bench.ends)
            probe.interval = 0.05
            bench.runner.hasten(probe)
            await bench.until(lambda: len(bench.ends) >= 3)

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))
