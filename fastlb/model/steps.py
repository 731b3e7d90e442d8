"""Long work in steps: a generator that yields wherever it may be interrupted, and returns its result.

Whoever has time runs it to its end with `finish`; an event loop runs a few milliseconds of it at a time.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def finish(steps: Steps[T]) -> T:
    """Run the steps to their end, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
