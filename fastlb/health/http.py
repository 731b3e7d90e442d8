"""The check ``type: http``: a backend works if it answers GET with a status from 200 to 399 (RFC 9112)."""

from __future__ import annotations

import re

from fastlb.config import Check
from fastlb.health.protocol import MAX_ANSWER, Conversation
from fastlb.model.net import endpoint_text

GOOD = range(200, 400)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: |\r|$)")


def request(check: Check, address: str, port: int) -> bytes:
    """Return the request for a path; the Host is the check's own, or the address and the port."""
    host = check.host or endpoint_text(address, port)
    lines = (f"GET {check.path} HTTP/1.1", f"Host: {host}", "User-Agent: fastlb", "Connection: close")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def judge(received: bytes, ended: bool) -> str | None:
    """Judge an answer by its first line, which must end within MAX_ANSWER bytes."""
    line, end, _ = received.partition(b"\n")
    if not end and not ended and len(received) < MAX_ANSWER:
        return None
    if not received:
        return "the connection was closed without an answer"
    matched = _STATUS_LINE.match(line + end) if end or ended else None
    if matched is None:
        return "the answer is not HTTP"
    status = int(matched[1])
    return "" if status in GOOD else f"status {status}"


HTTP = Conversation(request, judge)
