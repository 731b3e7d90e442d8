"""JSON of values that are large, in steps: one call of json.dumps for all of it would hold up every other thread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastlb.model.steps import Steps

ITEMS = 50  # of a long list that are encoded between two places where the work may be interrupted


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
