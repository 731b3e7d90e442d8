"""Long work in the event loop, a little at a time, so that checks, reloads and other connections need not wait."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from fastlb.model.steps import Steps

SLICE = 0.005  # seconds of work between turns of the event loop
ITEMS = 50  # of a long list that are encoded between two places where the work may be interrupted

T = TypeVar("T")


async def run_in_slices(steps: Steps[T]) -> T:
    """Run the steps to their end and return their result; after every SLICE of work the event loop has its turn."""
    until = time.monotonic() + SLICE
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + SLICE


def encode(value: object) -> Steps[bytes]:
    """Return the JSON text of a value, as `json.dumps` makes it, in steps for a value that is large."""
    pieces = []
    for piece in _pieces(value):
        pieces.append(piece)
        yield
    return "".join(pieces).encode()


def _pieces(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _pieces_of_dict(value)
    elif isinstance(value, list) and len(value) > 0:
        yield from _pieces_of_list(value)
    else:
        yield json.dumps(value)


def _pieces_of_dict(value: dict[str, Any]) -> Iterator[str]:
    before = "{"
    for key, each in value.items():
        yield f"{before}{json.dumps(key)}: "
        yield from _pieces(each)
        before = ", "
    yield "}" if value else "{}"


def _pieces_of_list(value: list[Any]) -> Iterator[str]:
    """Encode ITEMS of a list at once, or each item in pieces of its own where items have lists in them."""
    before = "["
    at_once = 1 if any(map(_is_long, value[:ITEMS])) else ITEMS
    for start in range(0, len(value), at_once):
        yield before
        if at_once == 1:
            yield from _pieces(value[start])
        else:
            yield json.dumps(value[start : start + at_once])[1:-1]
        before = ", "
    yield "]"


def _is_long(item: object) -> bool:
    return isinstance(item, dict) and any(isinstance(each, list) and len(each) > 1 for each in item.values())
