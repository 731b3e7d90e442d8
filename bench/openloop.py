"""Clients that come when they come: HTTP requests at random times, whether earlier ones have been answered or not.

    openloop.py HOST RATE SECONDS SOURCE PORT [PORT...]

RATE is that of each port, in requests a second; SOURCE is the first of SOURCES addresses of this host. Each request is
a connection of its own, from one of the addresses in turn. A response time begins when the client was due to come, so
that nothing which delays the clients hides (Poisson arrivals, the same ones at every call). Prints a JSON object: by
port the answers, [backend, milliseconds] each, and how many requests failed.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from ipaddress import ip_address

SOURCES = 64
PATIENCE = 30.0  # seconds for one answer
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"

Answer = tuple[str, float]


async def ask(host: str, port: int, source: str, due: float) -> Answer:
    """The backend's name, and milliseconds since ``due``."""
    reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0))
    try:
        writer.write(REQUEST)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"unexpected answer {head[:40]!r}")
    return body.decode(), (time.monotonic() - due) * 1000


async def come(host: str, port: int, rate: float, seconds: float, sources: list[str]) -> list[Answer | BaseException]:
    """All clients of one port."""
    times = random.Random(port)
    start = time.monotonic()
    due = start
    tasks: list[asyncio.Task[Answer]] = []
    while (due := due + times.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        source = sources[len(tasks) % len(sources)]
        tasks.append(asyncio.create_task(asyncio.wait_for(ask(host, port, source, due), PATIENCE)))
    return await asyncio.gather(*tasks, return_exceptions=True)


async def main(host: str, rate: float, seconds: float, first: str, ports: list[int]) -> None:
    sources = [str(ip_address(first) + number) for number in range(SOURCES)]
    outcomes = await asyncio.gather(*(come(host, port, rate, seconds, sources) for port in ports))
    answered = [[each for each in of_port if not isinstance(each, BaseException)] for of_port in outcomes]
    failed = sum(isinstance(each, BaseException) for of_port in outcomes for each in of_port)
    print(json.dumps({"answers": dict(zip(map(str, ports), answered, strict=True)), "failed": failed}))


if __name__ == "__main__":
    _, host, rate, seconds, source, *ports = sys.argv
    asyncio.run(main(host, float(rate), float(seconds), source, list(map(int, ports))))
