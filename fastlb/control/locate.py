"""Finds the control socket of a process by what the kernel knows of it, whatever a configuration file says by now."""

from __future__ import annotations

import os
from pathlib import Path

from fastlb.errors import ControlError

ACCEPTS = 1 << 16  # __SO_ACCEPTCON, among the flags in /proc/net/unix: somebody listens there


def socket_of_process(pid: int, proc: Path = Path("/proc")) -> str:
    """Return the path of the Unix socket on which a process listens; raises ControlError when it has none."""
    process = proc / str(pid)
    try:
        held = {_target(link) for link in (process / "fd").iterdir()}
        lines = (process / "net" / "unix").read_text().splitlines()[1:]
    except OSError as error:
        raise ControlError(f"cannot look into process {pid}: {error.strerror}") from error
    for line in lines:
        _, _, _, flags, _, _, inode, *path = line.split(maxsplit=7)
        if path and path[0].startswith("/") and int(flags, 16) & ACCEPTS and f"socket:[{inode}]" in held:
            return path[0]
    raise ControlError(f"process {pid} has no control socket; is it a fastlb that runs?")


def _target(link: Path) -> str:
    """Return where the link points; nowhere if it has gone meanwhile."""
    try:
        return os.readlink(link)
    except OSError:
        return ""
