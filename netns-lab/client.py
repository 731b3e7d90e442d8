"""The lab's clients; each command prints one JSON object and leaves the judgement to its caller.

client.py fetch HOST [--port 80] [--count 200]       GET / over COUNT connections that are open at once
client.py echo HOST [--port 5000] [--count 200] [--rounds 3]   UDP echo from COUNT ports at once
client.py download HOST [--port 80] [--bytes N]      GET /bytes/N, SHA-256 verified
client.py upload HOST [--port 80] [--bytes N]        POST N bytes, SHA-256 verified
client.py trickle HOST [--port 80] [--count 200] [--bytes N] [--seconds 6]
                                                     COUNT such downloads at once, none of which ends before SECONDS
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

PATIENCE = 20.0  # seconds for one connection or one answer
UDP_PATIENCE = 1.0  # seconds until a datagram is sent again
UDP_ATTEMPTS = 3
CHUNK = 1 << 20
DEFAULT_BYTES = 200_000_000


async def open_all(host: str, port: int, count: int) -> list[Any]:
    """Open every connection before the first request, so that each has a source port of its own."""
    opening = [asyncio.wait_for(asyncio.open_connection(host, port), PATIENCE) for _ in range(count)]
    return await asyncio.gather(*opening, return_exceptions=True)


async def get_root(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, str]:
    """GET / on an open connection; returns the backend's name and our address as the backend saw it."""
    writer.write(b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(f"unexpected answer {head[:40]!r}")
    backend, client = body.decode().split()
    return backend, client


async def fetch(host: str, port: int, count: int) -> dict[str, Any]:
    """Fetch / over ``count`` simultaneous connections."""
    start = time.monotonic()
    opened = await open_all(host, port, count)
    failed = [error for error in opened if isinstance(error, BaseException)]
    streams = [pair for pair in opened if not isinstance(pair, BaseException)]
    ports = {writer.get_extra_info("sockname")[1] for _, writer in streams}
    answers, errors = await settle(asyncio.wait_for(get_root(*pair), PATIENCE) for pair in streams)
    return {
        "asked": count,
        "answered": len(answers),
        "ports": len(ports),
        "backends": Counter(backend for backend, _ in answers),
        "clients": Counter(client for _, client in answers),
        "errors": Counter(map(describe, failed + errors)),
        "seconds": time.monotonic() - start,
    }


class Echo(asyncio.DatagramProtocol):
    """One UDP port: the answers in the order in which they arrive."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[bytes | Exception] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.answers.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        self.answers.put_nowait(exc)


async def echo_once(transport: asyncio.DatagramTransport, echo: Echo, text: bytes) -> str:
    """Send one datagram, again after UDP_PATIENCE, and return the name of the backend that echoed it."""
    for _ in range(UDP_ATTEMPTS):
        transport.sendto(text)
        try:
            answer = await asyncio.wait_for(echo.answers.get(), UDP_PATIENCE)
        except asyncio.TimeoutError:
            continue
        if isinstance(answer, Exception):
            raise answer
        backend, _, echoed = answer.partition(b" ")
        if echoed == text:
            return backend.decode()
    raise TimeoutError("no echo")


async def echo_from_one_port(host: str, port: int, rounds: int) -> tuple[int, set[str]]:
    """Exchange ``rounds`` datagrams from one port; returns the port and the backends that answered."""
    loop = asyncio.get_running_loop()
    # A connected socket takes answers only from the address and port that were asked.
    transport, echo = await loop.create_datagram_endpoint(Echo, remote_addr=(host, port))
    try:
        own_port = transport.get_extra_info("sockname")[1]
        return own_port, {await echo_once(transport, echo, b"%d/%d" % (own_port, i)) for i in range(rounds)}
    finally:
        transport.close()


async def echo(host: str, port: int, count: int, rounds: int) -> dict[str, Any]:
    """Exchange datagrams from ``count`` ports at once; ``torn`` counts ports that two backends answered."""
    start = time.monotonic()
    answers, errors = await settle(echo_from_one_port(host, port, rounds) for _ in range(count))
    return {
        "asked": count,
        "answered": len(answers),
        "ports": len({own_port for own_port, _ in answers}),
        "backends": Counter(next(iter(backends)) for _, backends in answers),
        "torn": sum(len(backends) > 1 for _, backends in answers),
        "errors": Counter(map(describe, errors)),
        "seconds": time.monotonic() - start,
    }


async def settle(tasks: Iterable[Awaitable[Any]]) -> tuple[list[Any], list[BaseException]]:
    """Wait for all; returns the results and the exceptions apart."""
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)], failed


def describe(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


def download(host: str, port: int, size: int) -> dict[str, Any]:
    """GET /bytes/N; ``verified`` tells whether exactly N bytes came and hash to what the server announced."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    connection.request("GET", f"/bytes/{size}")
    answer = connection.getresponse()
    digest, got, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    start = time.monotonic()  # the server has hashed its side by now
    while count := answer.readinto(buffer):
        digest.update(buffer[:count])
        got += count
    seconds = time.monotonic() - start
    verified = got == size and digest.hexdigest() == answer.getheader("X-SHA256")
    return {"bytes": got, "seconds": seconds, "verified": verified, "backend": answer.getheader("X-Backend")}


def upload(host: str, port: int, size: int) -> dict[str, Any]:
    """POST N bytes; ``verified`` tells whether the server hashed the same bytes."""
    digest, block = hashlib.sha256(), random.randbytes(CHUNK)

    def body() -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            chunk = block[: min(CHUNK, size - start)]
            digest.update(chunk)
            yield chunk

    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    start = time.monotonic()
    connection.request("POST", "/upload", body(), {"Content-Length": str(size)})
    answer = connection.getresponse()
    theirs = answer.read().decode().strip()
    seconds, backend = time.monotonic() - start, answer.getheader("X-Backend")
    return {"bytes": size, "seconds": seconds, "verified": theirs == digest.hexdigest(), "backend": backend}


TRICKLE_CHUNK = 4096
TRICKLED_BYTES = 200_000
TRICKLE_BUFFER = 16 << 10  # bytes; little, so that a server waits for its client and the transfer stays in progress


async def trickle(host: str, port: int, count: int, size: int, seconds: float) -> dict[str, Any]:
    """Downloads at once, each read evenly over at least ``seconds``; ``verified``: how many came whole and unchanged.

    ``ends``: when each ended, by time.monotonic.
    """
    start = time.monotonic()
    ended, errors = await settle(
        asyncio.wait_for(trickle_one(host, port, size, seconds), seconds + 3 * PATIENCE)
        for _ in range(count)
    )
    return {
        "asked": count,
        "verified": len(ended),
        "ends": sorted(ended),
        "errors": Counter(map(describe, errors)),
        "seconds": time.monotonic() - start,
    }


async def trickle_one(host: str, port: int, size: int, seconds: float) -> float:
    """One download; when it ended. Raises ConnectionError when anything but the whole came."""
    sock = await connect_narrow(host, port)
    reader, writer = await asyncio.open_connection(sock=sock, limit=TRICKLE_CHUNK)
    writer.write(b"GET /bytes/%d HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n" % size)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    announced = head.partition("X-SHA256: ")[2].split("\r\n")[0]
    digest, got, began = hashlib.sha256(), 0, time.monotonic()
    while chunk := await reader.read(TRICKLE_CHUNK):
        digest.update(chunk)
        got += len(chunk)
        await asyncio.sleep(max(0.0, began + seconds * got / size - time.monotonic()))
    writer.close()
    if (got, digest.hexdigest()) != (size, announced):
        raise ConnectionError(f"{got} of {size} bytes, or other ones")
    return time.monotonic()


async def connect_narrow(host: str, port: int) -> socket.socket:
    """With a small receive buffer, which is told before the handshake."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TRICKLE_BUFFER)
    sock.setblocking(False)
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (host, port)), PATIENCE)
    return sock


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Clients of the lab; each prints one JSON object.")
    commands = parser.add_subparsers(dest="command", required=True)
    for function, port in ((fetch, 80), (echo, 5000), (download, 80), (upload, 80), (trickle, 80)):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("host")
        command.add_argument("--port", type=int, default=port)
        if function in (fetch, echo, trickle):
            command.add_argument("--count", type=int, default=200)
        if function in (download, upload, trickle):
            size = TRICKLED_BYTES if function is trickle else DEFAULT_BYTES
            command.add_argument("--bytes", dest="size", type=int, default=size)
        if function is trickle:
            command.add_argument("--seconds", type=float, default=6.0)
        if function is echo:
            command.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = vars(parse_arguments())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    del options["command"]
    answer = options.pop("function")(**options)
    print(json.dumps(asyncio.run(answer) if asyncio.iscoroutine(answer) else answer))


if __name__ == "__main__":
    main()
