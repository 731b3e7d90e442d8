"""Reads how much memory this process may still take before the kernel kills it: the limits of its control groups.

Its own group counts, and each one above it that can be seen, in both versions of cgroups (cgroups(7)): version 2 has
one hierarchy, version 1 one of its own for memory. Some containers, and `ip netns exec`, hide /sys/fs/cgroup: then the
kernel is asked for the hierarchy itself, which takes CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # the same on every architecture that Linux calls new enough
FSCONFIG_SET_FLAG, FSCONFIG_CMD_CREATE = 0, 6
NO_LIMIT = 1 << 60  # bytes; version 1 writes the largest number of pages for "none"


@dataclass(frozen=True)
class Version:
    """What one version of cgroups calls its files."""

    file_system: str
    controller: str  # in /proc/self/cgroup
    limit: str
    used: str
    cached: tuple[str, ...]  # lines of memory.stat: what the kernel takes back before it kills anybody


VERSIONS = (
    Version("cgroup2", "", "memory.max", "memory.current", ("inactive_file", "active_file")),
    Version("cgroup", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file")),
)  # fmt: skip


@dataclass(frozen=True)
class MemoryLimit:
    """One limit, in bytes, and how much of it is taken by what cannot be given back."""

    file: str  # where it is written
    limit: int
    used: int

    @property
    def free(self) -> int:
        """How much may still be taken."""
        return max(0, self.limit - self.used)


def memory_limits(
    proc: Path = Path("/proc/self"), unmounted: Callable[[Version], int] | None = None
) -> list[MemoryLimit]:
    """Return every limit that holds for this process, its own group's first; what cannot be read is left out.

    ``unmounted`` opens the top of a hierarchy that is mounted nowhere: `open_unmounted`.
    """
    found: list[MemoryLimit] = []
    for version in VERSIONS:
        with suppress(OSError, ValueError):
            group = _group(version, proc)
            if group is not None:
                found += _limits(version, group, proc, unmounted or open_unmounted)
    return found


def _group(version: Version, proc: Path) -> str | None:
    """Return the path of this process's group in the hierarchy; None where there is no such hierarchy."""
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if version.controller in controllers.split(","):
            return path
    return None


def _limits(
    version: Version, group: str, proc: Path, unmounted: Callable[[Version], int]
) -> Iterator[MemoryLimit]:
    place = _mounted(version, proc)
    if place is None:
        top, root, shown = unmounted(version), "/", f"{version.controller or 'cgroup2'}:"
    else:
        root, shown = place
        top = os.open(shown, os.O_RDONLY | os.O_DIRECTORY)
    try:
        relative = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
        if ".." in relative.parts:  # of another cgroup namespace: all that can be seen of it is the top
            relative = Path()
        for folder in (relative, *relative.parents):
            if (limit := _read(version, top, folder, shown)) is not None:
                yield limit
    finally:
        os.close(top)


def _mounted(version: Version, proc: Path) -> tuple[str, str] | None:
    """Return which group of the hierarchy is mounted, and where; None if none is."""
    for line in (proc / "mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        if kind == version.file_system and (not version.controller or version.controller in options.split(",")):
            root, where = mount.split(" ")[3:5]
            return root, where.replace("\\040", " ")
    return None


def open_unmounted(version: Version) -> int:
    """Return a descriptor of the hierarchy's top, which is mounted nowhere (fsopen(2)); raises OSError."""
    context = _system_call(SYS_FSOPEN, version.file_system.encode(), 1)
    try:
        if version.controller:
            _system_call(SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, version.controller.encode(), None, 0)
        _system_call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _system_call(SYS_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
    finally:
        os.close(mount)


def _system_call(number: int, *arguments: bytes | int | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    done = int(libc.syscall(number, *arguments))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def _read(version: Version, top: int, folder: Path, shown: str) -> MemoryLimit | None:
    """Return the limit of one group; None if it has none, or if it does not tell."""
    try:
        limit = _text(top, folder / version.limit).strip()
        if limit == "max" or int(limit) >= NO_LIMIT:
            return None
        stat = dict(line.split() for line in _text(top, folder / "memory.stat").splitlines())
        used = int(_text(top, folder / version.used)) - sum(int(stat.get(name, 0)) for name in version.cached)
    except OSError:
        return None
    return MemoryLimit(f"{shown.rstrip('/')}/{folder / version.limit}", int(limit), max(0, used))


def _text(top: int, path: Path) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=top)) as file:
        return file.read()
