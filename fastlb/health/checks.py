"""One health check of one backend: seconds, or CheckFailedError. Asynchronous; nothing outlives the timeout."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time

from fastlb.config.schema import Check
from fastlb.errors import FastlbError
from fastlb.model.net import Address, endpoint_text

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: |\r|$)")
_LONGEST_LINE = 4096  # bytes


class CheckFailedError(FastlbError):
    """Why a backend counts as failed."""


async def run_check(check: Check, address: Address, port: int) -> float:
    """Seconds until the backend had answered as ``check`` asks: connected (tcp), or sent a good status (http)."""
    began = time.monotonic()
    try:
        probe = _http if check.type == "http" else _tcp
        await asyncio.wait_for(probe(check, address, check.port or port), check.timeout)
    except asyncio.TimeoutError:  # another than TimeoutError until Python 3.11
        raise CheckFailedError(f"no answer within {check.timeout:g} s") from None
    except OSError as error:
        raise CheckFailedError(os.strerror(error.errno) if error.errno else str(error)) from None
    return time.monotonic() - began


async def _tcp(check: Check, address: Address, port: int) -> None:
    _, writer = await asyncio.open_connection(str(address), port)
    writer.transport.abort()  # RST: no TIME-WAIT is left here, none of a check's ports is used up


async def _http(check: Check, address: Address, port: int) -> None:
    reader, writer = await asyncio.open_connection(str(address), port, limit=_LONGEST_LINE)
    try:
        request = f"GET {check.path} HTTP/1.1\r\nHost: {check.host or endpoint_text(address, port)}\r\n"
        writer.write(f"{request}User-Agent: fastlb\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        with contextlib.suppress(ValueError):  # a line without an end
            line = await reader.readline()
            match = _STATUS_LINE.match(line)
            if not line:
                raise CheckFailedError("the connection was closed without an answer")
            if match is None:
                raise CheckFailedError("the answer is not HTTP")
            status = int(match[1])
            if not 200 <= status < 400:
                raise CheckFailedError(f"status {status}")
            return
        raise CheckFailedError("the answer is not HTTP")
    finally:
        writer.transport.abort()
