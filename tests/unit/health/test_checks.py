"""Health checks against real servers on the loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb import Config
from fastlb.config.schema import Check
from fastlb.health.checker import Checker
from fastlb.health.checks import CheckFailedError, run_check
from fastlb.model.names import BackendName
from tests.balancers import config, service

HOST = ip_address("127.0.0.1")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answering(answer: bytes, seen: list[bytes] | None = None, delay: float = 0.0) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(4096)
        if seen is not None:
            seen.append(request)
        await asyncio.sleep(delay)
        writer.write(answer)
        writer.close()

    return handle


def check(handler: Handler | None, **changes: Any) -> float:
    """The result of one check of a server; None: a port on which nobody listens."""

    async def run() -> float:
        server = await asyncio.start_server(handler or answering(b""), str(HOST), 0)
        port = server.sockets[0].getsockname()[1]
        if handler is None:
            server.close()
            await server.wait_closed()
        try:
            return await run_check(Check(**changes), HOST, port)
        finally:
            server.close()

    return asyncio.run(run())


@pytest.mark.parametrize("status", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 301 Moved\r\n\r\n", b"HTTP/1.1 204\r\n"])
def test_http_takes_a_good_status(status: bytes) -> None:
    seen: list[bytes] = []
    took = check(answering(status, seen), type="http", path="/healthz", host="web.example")
    assert 0 < took < 1
    assert seen[0].startswith(b"GET /healthz HTTP/1.1\r\nHost: web.example\r\n")
    assert seen[0].endswith(b"Connection: close\r\n\r\n")


@pytest.mark.parametrize(("answer", "reason"), [
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
    (b"HTTP/1.1 100 Continue\r\n\r\n", "status 100"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
    (b"HTTP/2 200\r\n", "the answer is not HTTP"),
    (b"HTTP/1.1 2000 OK\r\n", "the answer is not HTTP"),
    (b"", "the connection was closed without an answer"),
    (b"x" * 100_000, "the answer is not HTTP"),
])  # fmt: skip
def test_http_refuses_the_rest(answer: bytes, reason: str) -> None:
    with pytest.raises(CheckFailedError, match=f"^{reason}$"):
        check(answering(answer), type="http")


def test_http_waits_no_longer_than_the_timeout() -> None:
    with pytest.raises(CheckFailedError, match=r"^no answer within 0\.2 s$"):
        check(answering(b"HTTP/1.1 200 OK\r\n\r\n", delay=2), type="http", timeout=0.2)


def test_tcp_only_connects() -> None:
    assert check(answering(b""), type="tcp") < 1


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_nobody_listens(kind: str) -> None:
    with pytest.raises(CheckFailedError, match=r"^Connection refused$"):
        check(None, type=kind)


def test_tcp_times_out_where_the_queue_is_full() -> None:
    """A listener that accepts nothing: the kernel drops further SYNs."""
    with socket.socket() as listener:
        listener.bind((str(HOST), 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(CheckFailedError, match=r"^no answer within"):
            asyncio.run(run_check(Check(type="tcp", timeout=0.3), HOST, listener.getsockname()[1]))
        for filler in fillers:
            filler.close()


def checked(port: int) -> Config:
    """One backend on this host, checked at ``port`` every 50 ms."""
    backends = [{"address": "10.3.0.11"}]
    check = {"type": "tcp", "port": port, "interval": 0.05, "timeout": 0.3}
    conf = config(service("dsr", name="web", backends=backends, check=check))
    at_home = conf.services[0].backends[0].model_copy(update={"address": HOST})  # which no configuration may name
    return conf.model_copy(update={"services": (conf.services[0].model_copy(update={"backends": (at_home,)}),)})


def test_the_checker_follows_a_configuration() -> None:
    """Results come again and again, from the check that is configured now, and end with it."""
    results: list[tuple[BackendName, bool]] = []

    async def until(wanted: Callable[[], bool]) -> None:
        async def look() -> None:
            while not wanted():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(look(), 10)

    async def run() -> None:
        server = await asyncio.start_server(answering(b""), str(HOST), 0)
        checker = Checker(lambda name, took, _: results.append((name, took is not None)))
        conf = checked(server.sockets[0].getsockname()[1])
        checker.follow(conf)
        await until(lambda: len(results) >= 3)
        running = asyncio.all_tasks()
        checker.follow(conf)
        assert asyncio.all_tasks() == running  # the same again: nothing begins anew
        server.close()
        await server.wait_closed()
        await until(lambda: not results[-1][1])
        checker.follow(config(service("dsr")))
        ended = len(results)
        await asyncio.sleep(0.3)
        assert len(results) == ended

    asyncio.run(run())
    assert {name for name, _ in results} == {("web", "127.0.0.1:80")}
    assert results[0][1]


@pytest.mark.parametrize("ticks", range(12))
def test_a_check_ends_at_whatever_moment_it_is_taken_back(ticks: int) -> None:
    """Also when it has a result already and has not reported it: ``ticks`` rounds of the event loop after its start."""
    results: list[float | None] = []

    async def run() -> None:
        with socket.socket() as nobody:
            nobody.bind((str(HOST), 0))
            checker = Checker(lambda name, took, why: results.append(took))
            checker.follow(checked(nobody.getsockname()[1]))
            for _ in range(ticks):
                await asyncio.sleep(0)
            checker.follow(config(service("dsr")))
            reported = len(results)
            await asyncio.sleep(0.2)
            assert len(results) == reported

    asyncio.run(run())
