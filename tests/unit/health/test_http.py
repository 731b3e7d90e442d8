"""What the check by HTTP asks, and how it judges what it is answered."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Check
from fastlb.health.http import judge, request
from fastlb.health.protocol import MAX_ANSWER


@pytest.mark.parametrize(("options", "address", "lines"), [
    ({}, "10.0.0.1", [b"GET / HTTP/1.1", b"Host: 10.0.0.1:8080"]),
    ({"path": "/healthz?deep=1"}, "10.0.0.1", [b"GET /healthz?deep=1 HTTP/1.1", b"Host: 10.0.0.1:8080"]),
    ({"host": "web.example"}, "10.0.0.1", [b"GET / HTTP/1.1", b"Host: web.example"]),
    ({}, "fd00::1", [b"GET / HTTP/1.1", b"Host: [fd00::1]:8080"]),
])  # fmt: skip
def test_the_request(options: dict[str, Any], address: str, lines: list[bytes]) -> None:
    asked = request(Check(type="http", **options), address, 8080)
    assert asked.split(b"\r\n") == [*lines, b"User-Agent: fastlb", b"Connection: close", b"", b""]


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 301 Moved\r\n\r\n", b"HTTP/1.1 204\r\n", b"HTTP/1.1 399 \n",
])  # fmt: skip
@pytest.mark.parametrize("ended", [True, False])
def test_a_good_status(answer: bytes, ended: bool) -> None:
    assert judge(answer, ended) == ""


@pytest.mark.parametrize(("answer", "reason"), [
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
    (b"HTTP/1.1 100 Continue\r\n\r\n", "status 100"),
    (b"HTTP/1.1 400\n", "status 400"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
    (b"HTTP/2 200\r\n", "the answer is not HTTP"),
    (b"HTTP/1.1 2000 OK\r\n", "the answer is not HTTP"),
    (b"\n", "the answer is not HTTP"),
    (b"x" * MAX_ANSWER, "the answer is not HTTP"),
    (b"HTTP/1.1 200 " + b"x" * MAX_ANSWER, "the answer is not HTTP"),
])  # fmt: skip
@pytest.mark.parametrize("ended", [True, False])
def test_what_is_wrong(answer: bytes, reason: str, ended: bool) -> None:
    if len(answer) < MAX_ANSWER or not ended:  # what has ended without a line's end is a line
        assert judge(answer, ended) == reason


@pytest.mark.parametrize(("received", "at_the_end"), [
    (b"", "the connection was closed without an answer"),
    (b"HTTP/1.1 2", "the answer is not HTTP"),
    (b"HTTP/1.1 200", ""),
    (b"HTTP/1.1 200 OK\r", ""),
    (b"HTTP/1.1 503", "status 503"),
])  # fmt: skip
def test_half_a_line_can_still_become_one(received: bytes, at_the_end: str) -> None:
    assert judge(received, False) is None
    assert judge(received, True) == at_the_end
