"""Names and numbers on which two rooms must agree."""

from __future__ import annotations

from collections.abc import Iterable

BackendName = tuple[str, str]
"""What a backend is called: the name of its service, and its key there, ``ADDR:PORT``."""

DEFAULT_CONTROL = "/run/fastlb/fastlb.sock"
"""Where the control socket lies unless the configuration's `control` says otherwise."""

GUARD_NAME = "fastlb_guard"
"""The name of the ingress guard's program, by which a later process finds it again."""

SHARDS = 64
"""Parts of the flow table, each with one owner among the workers; held against flowhash.pxd by a test."""

MAX_WORKERS = SHARDS
"""Threads that forward packets: each owns at least one shard."""

OFFLOAD_TYPE = 0x88B5
"""EtherType between the core and the program of tunnel offload: for local experiments (IEEE 802, section 9.2.4)."""

OFFLOAD_LINKS = 16
"""Interfaces at most behind which tunnels are cut by the kernel; both numbers are held against the core by a test."""


MAX_BACKEND_ID = (1 << 20) - 1
"""The highest number of a backend in a flow entry, and so the most backends of all services together."""

MAX_SERVICE_SLOT = (1 << 16) - 1
"""The highest number of a service in the counters, and so the most services."""


def owner_of_shard(shard: int, workers: int) -> int:
    """Return the worker that owns a shard. Neighbouring shards have one owner, so that their counters lie together."""
    return shard * workers // SHARDS


def listed(words: Iterable[str]) -> str:
    """Return words as a sentence lists them: "a", "a and b", "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
