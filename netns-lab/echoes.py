"""Many TCP connections that stay, each with a little traffic, and whether any of them was lost.

    echoes.py serve PORT                   answer every line on every connection with the same line, until ended
    echoes.py hold HOST PORT COUNT         open COUNT connections and say "ready"; on each a numbered line goes to and
                    [--interval 2]         fro every INTERVAL seconds, until a line comes by standard input

At the end `hold` waits for one more answer on each connection, and prints {"held": connections, "lost": those that
broke or never answered again, "echoes": lines that came back, "slowest": seconds, "median": seconds}. It never opens
another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from typing import Any

LINE = 32  # bytes
PATIENCE = 20.0  # seconds for a connection or a last answer; TCP sends again after 0.2, 0.4, 0.8 … seconds
AT_ONCE = 50  # connections that are being opened


class Held:
    """One connection, and how long its answers took."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._number = 0
        self.took: list[float] = []

    async def echo(self) -> None:
        """One line to and fro; ConnectionError when another one comes back, or none ever will."""
        self._number += 1
        line = f"{self._number:>{LINE - 1}}\n".encode()
        start = time.monotonic()
        self._writer.write(line)
        try:
            answer = await self._reader.readexactly(LINE)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("closed") from error
        if answer != line:
            raise ConnectionError(f"{answer!r} came back for {line!r}")
        self.took.append(time.monotonic() - start)

    async def keep_on(self, first: float, interval: float, end: asyncio.Event) -> bool:
        """Echo at this interval until the end, and once more; whether the connection was there all the time."""
        pause = first
        try:
            while not end.is_set():
                await self.echo()
                try:
                    await asyncio.wait_for(end.wait(), pause)
                except asyncio.TimeoutError:
                    pause = interval
            await asyncio.wait_for(self.echo(), PATIENCE)
        except (OSError, asyncio.TimeoutError):
            return False
        finally:
            self._writer.close()
        return True


async def open_all(host: str, port: int, count: int) -> list[Held]:
    """All of them, or OSError: what cannot be opened says nothing about what is lost."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def open_one() -> Held:
        async with gate:
            return Held(*await asyncio.wait_for(asyncio.open_connection(host, port), PATIENCE))

    return list(await asyncio.gather(*(open_one() for _ in range(count))))


async def hold(host: str, port: int, count: int, interval: float) -> dict[str, Any]:
    """Hold the connections until a line comes by standard input."""
    connections = await open_all(host, port, count)
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, end.set)
    kept = [
        asyncio.ensure_future(each.keep_on(interval * at / count, interval, end)) for at, each in enumerate(connections)
    ]
    print("ready", flush=True)
    await end.wait()
    loop.remove_reader(sys.stdin)
    held = await asyncio.gather(*kept)
    took = [seconds for each in connections for seconds in each.took]
    return {
        "held": count, "lost": held.count(False), "echoes": len(took),
        "slowest": max(took, default=0.0), "median": statistics.median(took) if took else 0.0,
    }  # fmt: skip


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of `serve`."""
    try:
        while line := await reader.read(1 << 16):
            writer.write(line)
    except OSError:
        pass  # the other side says what it thinks was lost
    finally:
        writer.close()


async def serve(port: int) -> None:
    server = await asyncio.start_server(answer, "0.0.0.0", port, backlog=4096)
    print("ready", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="TCP connections that stay.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("port", type=int)
    holding = commands.add_parser("hold")
    holding.add_argument("host")
    holding.add_argument("port", type=int)
    holding.add_argument("count", type=int)
    holding.add_argument("--interval", type=float, default=2.0)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.command == "serve":
        asyncio.run(serve(options.port))
    else:
        print(json.dumps(asyncio.run(hold(options.host, options.port, options.count, options.interval))))


if __name__ == "__main__":
    main()
