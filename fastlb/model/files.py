"""Where a running fastlb keeps files, by what its configuration says."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
REJECTED = ".rejected"  # behind the name of a flow file that was set aside


def flow_file_places(flow_file: str, control: str, shared_memory: Path = SHARED_MEMORY) -> list[Path]:
    """Return where the flow table's file may be, the best place first; none with ``flow_file`` "none"."""
    if flow_file == "none":
        return []
    if flow_file != "auto":
        return [Path(flow_file)]
    socket = Path(control)
    digest = hashlib.sha256(os.fsencode(socket)).hexdigest()[:12]
    return [socket.with_name(socket.name + ".flows"), shared_memory / f"fastlb-{socket.stem}-{digest}.flows"]


def set_aside(path: Path) -> Path:
    """Return the name that a flow file gets which cannot be used."""
    return path.with_name(path.name + REJECTED)
