"""What lies in the tables of the data path: flows, also those that have expired, and the points of a ring."""

from __future__ import annotations

import sys
from fcntl import LOCK_EX, flock
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import ModuleType

from fastlb._core import KetamaRing, Pipeline

ROOT = Path(__file__).resolve().parents[1]
Address = IPv4Address | IPv6Address
Flow = tuple[int, Address, int, Address, int, int, str, int]


@cache
def extension() -> ModuleType:
    """Compile tests/ext/tables.pyx, if it or the data path has changed; one process at a time, where tests run in many.
    """
    sys.path.insert(0, str(ROOT / "bench"))
    from extension import build

    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/tables.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        return build("tables", "tests/ext", "quick")


def flows(pipeline: Pipeline) -> list[Flow]:
    """Return (protocol, client, port, vip, port, backend id, state, last seen in ms) of every entry."""
    return list(extension().flows(pipeline))


def ring_points(ring: KetamaRing) -> list[tuple[int, int]]:
    """Return (hash, position) of every point, ascending."""
    return list(extension().ring_points(ring))


def position_on_ring(ring: KetamaRing, hashed: int) -> int:
    """Return the position of the backend to which the data path sends a flow with this hash."""
    return int(extension().position_on_ring(ring, hashed))
