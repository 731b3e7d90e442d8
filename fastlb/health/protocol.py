"""What a type of check says to a backend, and how it judges the answer; decisions only, no sockets.

A type is a row of `types.CONVERSATIONS`. Every type begins with a TCP connection; one that judges nothing has passed
with that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastlb.config import Check

MAX_ANSWER = 4096  # bytes of an answer that are enough to judge it

Request = Callable[[Check, str, int], bytes]
"""Return what is sent, once connected, to an address and a port."""

Judge = Callable[[bytes, bool], "str | None"]
"""Given what has been received so far, and whether that is all: None while it cannot be told, "" for a good answer, or
what is wrong with it. With MAX_ANSWER bytes it must be told."""


class Conversation(NamedTuple):
    """How one type of check talks; without ``judge`` it passes when the connection is made."""

    request: Request | None = None
    judge: Judge | None = None
