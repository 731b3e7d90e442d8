"""Long work in the event loop, a little at a time, so that checks, reloads and other connections need not wait."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from fastlb.model.steps import Steps

SLICE = 0.005  # seconds of work between turns of the event loop

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
