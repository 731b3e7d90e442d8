"""JSON of values that are large, in steps: one call for all of it would hold up every other thread.

pydantic's encoder, which is there anyway, takes a part of the time of Python's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from fastlb.model.steps import Steps

ITEMS = 100  # of a long list that are encoded between two places where the work may be interrupted: half a millisecond


def encode(value: object) -> Steps[bytes]:
    """Return the JSON text of a value, without spaces, in steps for a value that is large."""
    pieces = []
    for piece in _pieces(value):
        pieces.append(piece)
        yield
    return b"".join(pieces)


def _text(value: object) -> bytes:
    """Return the JSON text of a value at once; a byte of a file's name that is not UTF-8 is escaped."""
    try:
        return to_json(value)
    except PydanticSerializationError:
        return json.dumps(value, separators=(",", ":")).encode()


def _pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield from _pieces_of_dict(value)
    elif isinstance(value, list) and len(value) > 0:
        yield from _pieces_of_list(value)
    else:
        yield _text(value)


def _pieces_of_dict(value: dict[str, Any]) -> Iterator[bytes]:
    before = b"{"
    for key, each in value.items():
        yield before + _text(key) + b":"
        yield from _pieces(each)
        before = b","
    yield b"}" if value else b"{}"


def _pieces_of_list(value: list[Any]) -> Iterator[bytes]:
    """Encode ITEMS of a list at once, or each item in pieces of its own where items have long lists in them."""
    before = b"["
    at_once = 1 if any(map(_is_long, value[:ITEMS])) else ITEMS
    for start in range(0, len(value), at_once):
        yield before
        if at_once == 1:
            yield from _pieces(value[start])
        else:
            yield _text(value[start : start + at_once])[1:-1]
        before = b","
    yield b"]"


def _is_long(item: object) -> bool:
    return isinstance(item, dict) and any(isinstance(each, list) and len(each) > 1 for each in item.values())
