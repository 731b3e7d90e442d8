"""Flow tables in a file on tmpfs, as `fastlb run` has them; without a name, since nobody takes them over."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastlb._core import FlowMemory, flow_layout

SHARED_MEMORY = "/dev/shm"
PR_SET_THP_DISABLE = 41


def memory_in_file(flows: int, large_pages: bool) -> FlowMemory:
    """For so many flows, in large pages or in small ones. Raises RuntimeError when the pages are not such."""
    layout = flow_layout(flows)
    fd = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, layout["buckets"] + layout["tuples"])
        with small_pages(not large_pages):
            memory = FlowMemory(flows, file=(fd, 0, layout["buckets"]))
    finally:
        os.close(fd)
    if memory.large_pages != large_pages:
        raise RuntimeError(f"a file in {SHARED_MEMORY} has {'small' if large_pages else 'large'} pages here")
    return memory


@contextmanager
def small_pages(wanted: bool) -> Iterator[None]:
    """The kernel gives this process no large pages meanwhile."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_THP_DISABLE, int(wanted), 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)
