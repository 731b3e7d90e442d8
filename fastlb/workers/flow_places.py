"""Where flow files are: the places that a configuration allows, their locks, and what a crash has left there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from fastlb.config import Config
from fastlb.errors import FlowFileError, FlowFileUsedError
from fastlb.model.files import REJECTED, SHARED_MEMORY, flow_file_places, set_aside
from fastlb.model.names import DEFAULT_CONTROL
from fastlb.workers.flow_records import unseal

MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # statfs(2), f_type
LOCK_PATIENCE = 2.0  # seconds: the kernel gives a killed process's lock back only when it has taken that down
IDENTITY_AT, IDENTITY_ROOM = 4096, (2 << 20) - 4096  # where a file says what it is, and in how many bytes at most

_STATFS_BYTES = 256  # more than any struct statfs has

log = structlog.get_logger()


@dataclass(frozen=True)
class LeftFile:
    """A flow file that is there."""

    path: str
    bytes: int
    state: str  # "in use", "left over" or "set aside"


# --- places ----------------------------------------------------------------------------------------------------------


def places(config: Config) -> list[Path]:
    """Return where a file of this configuration may be, the best place first; none with ``flow_file: none``."""
    return flow_file_places(config.flow_file, config.control, SHARED_MEMORY)


def is_in_memory(folder: Path) -> bool:
    """Return True if files in there live in memory alone. Raises FlowFileError when there is no such directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(folder), found) != 0:
        raise FlowFileError(f"{folder}: {os.strerror(ctypes.get_errno())}")
    (kind,) = struct.unpack_from("@l", found)  # f_type
    return kind & 0xFFFFFFFF in MEMORY_FILE_SYSTEMS


def check_path(path: Path) -> None:
    """Raise FlowFileError where no flow file may be."""
    if not is_in_memory(path.parent):
        raise FlowFileError(f"{path.parent} is not on tmpfs or ramfs; a flow file must be in memory")


def held_bytes(config: Config) -> int:
    """Return how much memory files of this configuration take already, wherever they were left."""
    left = left_elsewhere(config)
    return sum(size for path in (*places(config), *([left] if left else [])) if (size := _blocks(path)) is not None)


def _blocks(path: Path) -> int | None:
    with suppress(OSError):
        return path.lstat().st_blocks * 512
    return None


# --- locks -----------------------------------------------------------------------------------------------------------


def lock(fd: int, path: Path) -> None:
    """Take a file for this process. Raises FlowFileUsedError while another one keeps it for LOCK_PATIENCE seconds."""
    until = time.monotonic() + LOCK_PATIENCE
    while not try_lock(fd, fcntl.LOCK_EX):
        if time.monotonic() > until:
            raise FlowFileUsedError(f"another fastlb uses {path}")
        time.sleep(0.01)


def try_lock(fd: int, kind: int) -> bool:
    """Take a lock (LOCK_EX or LOCK_SH) if nobody has one against it; returns whether it could be had."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def network_namespace() -> int:
    """Return the number of the calling thread's network namespace: whose interfaces the guards are on."""
    return os.stat("/proc/thread-self/ns/net").st_ino


# --- what another process has left somewhere else --------------------------------------------------------------------


def bring_here(config: Config) -> None:
    """Move a file that `left_elsewhere` finds to where this configuration looks, if that is on the same file system."""
    left = left_elsewhere(config)
    if left is None:
        return
    for place in places(config):
        with suppress(OSError):
            if place.parent.stat().st_dev == left.stat().st_dev:
                os.rename(left, place)
                log.info("a flow file has followed its balancer", file=str(place), was=str(left))
                return
    log.warning("flows are not taken over: their file is on another file system", file=str(left))


def left_elsewhere(config: Config) -> Path | None:
    """Return the file that a balancer on the same interfaces has left where this configuration does not look.

    `control` or `flow_file` was edited before a restart, say. There is no second balancer on these interfaces, and the
    guard there is taken over as well. None while there is a file in one of the configuration's own places.
    """
    own = places(config)
    if not own or any(map(os.path.lexists, own)):
        return None
    folders = {SHARED_MEMORY, Path(DEFAULT_CONTROL).parent, *(place.parent for place in own)}
    found = [path for folder in folders for path in _files_of(folder) if _is_left_on(path, config.interfaces)]
    return max(found, key=os.path.getmtime, default=None)


def _files_of(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if not path.name.endswith(REJECTED)]
    return []


def _is_left_on(path: Path, interfaces: Iterable[str]) -> bool:
    """Return whether this is a flow file of this network namespace, of one of these interfaces, that nobody uses."""
    with _opened(path) as fd:
        identified = None if fd is None else unseal(fd, IDENTITY_AT, IDENTITY_ROOM)
        if fd is None or identified is None or identified[1].get("namespace") != network_namespace():
            return False
        return not set(interfaces).isdisjoint(identified[1].get("interfaces", ())) and try_lock(fd, fcntl.LOCK_SH)


# --- what a crash leaves ---------------------------------------------------------------------------------------------


def left_files(config: Config | None = None) -> list[LeftFile]:
    """Return the files of a configuration that are there, and others in /dev/shm of this network namespace.

    ``config`` None: that of a configuration that says nothing.
    """
    own = places(config or Config())
    others = [path for path in SHARED_MEMORY.glob("fastlb-*.flows*") if _is_of_this_namespace(path)]
    named = {path for place in own for path in (place, set_aside(place))}
    return [found for path in sorted({*named, *others}) if (found := _inspect(path)) is not None]


def remove_files(files: Iterable[LeftFile]) -> None:
    """Remove those that are not in use."""
    for each in files:
        if each.state != "in use":
            with suppress(FileNotFoundError):
                os.unlink(each.path)


def _inspect(path: Path) -> LeftFile | None:
    with _opened(path) as fd:
        if fd is None:
            return None
        if path.name.endswith(REJECTED):
            state = "set aside"
        else:
            state = "left over" if try_lock(fd, fcntl.LOCK_SH) else "in use"
        return LeftFile(str(path), os.fstat(fd).st_blocks * 512, state)


def _is_of_this_namespace(path: Path) -> bool:
    with _opened(path) as fd:
        identified = None if fd is None else unseal(fd, IDENTITY_AT, IDENTITY_ROOM)
        return identified is not None and identified[1].get("namespace") == network_namespace()


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """Open a plain file of ours, for reading; None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        found = os.fstat(fd)
        yield fd if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() else None
    finally:
        os.close(fd)
