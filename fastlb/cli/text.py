"""Answers as text for people: tables, counts, lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

FATES = {  # of one flow, and of several
    "stay": ("stays until it ends", "stay until they end"),
    "move": ("moves to another backend", "move to other backends"),
    "end": ("ends", "end"),
}
"""What becomes of the flows of a backend that leaves, by the word for it."""


def table(heads: Iterable[object], rows: Iterable[Sequence[object]]) -> str:
    """Return columns as wide as their widest cell, under their heads."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def count_of(number: int, what: str) -> str:
    """Return "1 flow", or "2 flows"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def flows_with_fate(flows: int, fate: str) -> str:
    """Return "1 flow stays until it ends", or "2 flows stay until they end"."""
    return f"{count_of(flows, 'flow')} {FATES[fate][flows != 1]}"


def nonzero(counts: Mapping[str, int]) -> str:
    """Return the counts that are not 0, by name; "none" without any."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def print_json(value: object) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=2))
