"""The file in which the flow table outlives its process, and what must be true of it before it is used.

    0        head: magic, version; which list holds; where the two lists are; SHA-256 of all this
    4 KiB    identity: what a process must agree on to use the rest, and the table's key
    2 MiB    the hot part, then the cold part of the table, as dataplane/conntrack.pxd has them
    behind   two lists of backend ids and names, written in turn

Identity and lists are records (flow_records.py). A list is written whole before the head says that it holds; the head
is within one page, which is written whole or not at all; and the file has no name before it is complete. So a process
may be killed anywhere, and whatever does not check was damaged otherwise: such a file is set aside, never half-read.

A file belongs to one process at a time, which holds its lock (flock(2)). Where files are, says flow_places.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from fastlb._core import FlowMemory, Services, flow_layout
from fastlb.config import Config
from fastlb.errors import FlowFileError, FlowFileUsedError
from fastlb.model.clock import flow_clock
from fastlb.model.files import set_aside
from fastlb.version import __version__
from fastlb.workers.flow_places import (
    IDENTITY_AT,
    IDENTITY_ROOM,
    bring_here,
    check_path,
    lock,
    network_namespace,
    places,
)
from fastlb.workers.flow_records import HEAD_BYTES, Place, difference, lists_fit, pack_head, parse_head, seal, unseal

MIN_LIST = 1 << 16  # bytes that a list has room for
KEY_BYTES = 32

_PAGE = 4096
_TABLE_AT = IDENTITY_AT + IDENTITY_ROOM  # a large page's boundary

log = structlog.get_logger()


class FlowFile:
    """An open and locked file. ``found``: the list of backends that another process has left; None: it is new."""

    def __init__(self, path: Path, wanted: Mapping[str, Any], backends: Mapping[str, Any]) -> None:
        """Raises FlowFileError; nothing is left open then."""
        self.path, self._wanted = path, wanted
        self._hot = _TABLE_AT
        self._cold = self._hot + wanted["layout"]["buckets"]
        self._end = self._cold + wanted["layout"]["tuples"]
        self.found: dict[str, Any] | None = None
        self._saved: Mapping[str, Any] | None = None
        self._lists: list[Place] = [(0, 0), (0, 0)]
        self._fd = -1
        try:
            self._open(backends)
        except OSError as error:
            self._release()
            raise FlowFileError(f"{path}: {error.strerror}") from None
        except FlowFileError:
            self._release()
            raise

    def _open(self, backends: Mapping[str, Any]) -> None:
        while True:
            try:
                fault = self._open_existing() or self._read()
            except FileNotFoundError:
                break
            if fault is None:
                return
            self._set_aside(fault)
        self._create(backends)

    def _open_existing(self) -> str | None:
        """Open and lock what has the name; returns what is wrong with it as a file. Raises FileNotFoundError."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
            return f"it is no plain file that fastlb could have made ({error.strerror})"
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return "it is not a file that its owner alone, who runs fastlb, can open"
        lock(self._fd, self.path)
        now = os.stat(self.path, follow_symlinks=False)
        if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):  # its process removed it meanwhile
            self._release()
            return self._open_existing()
        return None

    def _create(self, backends: Mapping[str, Any]) -> None:
        """Make a new file, which gets its name when it is complete and locked."""
        self._fd = os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._reserve(0, self._end)
        self._key = os.urandom(KEY_BYTES)
        who = {"key": self._key.hex(), "fastlb": __version__, "namespace": network_namespace()}
        os.pwrite(self._fd, seal(0, {**self._wanted, **who}), IDENTITY_AT)
        self._sequence, self._lists, self._saved = 0, [(0, 0), (0, 0)], None
        self.save(backends)
        # linkat(2) follows to the file itself; without a descriptor Python calls link(2), which does not
        os.link(f"/proc/self/fd/{self._fd}", self.path, src_dir_fd=self._fd)

    def _reserve(self, start: int, size: int) -> None:
        """Take the memory now: else a packet would end the process when there is none left."""
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room = os.statvfs(self.path.parent)
            raise FlowFileError(
                f"{self.path}: no room for {size >> 20} MiB, {room.f_bavail * room.f_frsize >> 20} MiB are free there; "
                "choose another flow_file, or fewer flows"
            ) from None

    # --- what is in it -----------------------------------------------------------------------------------------------

    def _read(self) -> str | None:
        """Take in what the file says; returns why it cannot be used, None when it can."""
        head = parse_head(os.pread(self._fd, HEAD_BYTES, 0))
        if isinstance(head, str):
            return head
        self._sequence, self._lists = head.sequence, list(head.lists)
        return self._read_identity() or self._read_list()

    def _read_identity(self) -> str | None:
        """Take in the table's key, if the file is one that this process can use; else say why not."""
        identified = unseal(self._fd, IDENTITY_AT, IDENTITY_ROOM)
        if identified is None or len(key := bytes.fromhex(identified[1].get("key", ""))) != KEY_BYTES:
            return "its identity is damaged"
        self._key = key
        return difference(identified[1], self._wanted)

    def _read_list(self) -> str | None:
        """Take in the list of backends that holds; else say why not."""
        size = os.fstat(self._fd).st_size
        if size < self._end:
            return "it is cut short"
        if not lists_fit(self._lists, self._end, size):
            return "its lists of backends are not where they can be"
        held = unseal(self._fd, *self._lists[self._sequence % 2])
        if held is None or held[0] != self._sequence:
            return "its list of backends is damaged"
        self.found = self._saved = held[1]
        return None

    def save(self, backends: Mapping[str, Any]) -> None:
        """Replace the list of backends; before the data path hears of it. Raises FlowFileError, and the old one holds.

        A list that holds already is not written again.
        """
        if backends == self._saved:
            return
        sequence = self._sequence + 1
        record = seal(sequence, backends)
        try:
            if len(record) > self._lists[sequence % 2][1]:
                self._make_room(sequence % 2, len(record))
            os.pwrite(self._fd, record, self._lists[sequence % 2][0])
            self._write_head(sequence)
        except OSError as error:
            raise FlowFileError(f"{self.path}: cannot write the list of backends: {error.strerror}") from None
        self._sequence, self._saved = sequence, backends

    def _make_room(self, which: int, size: int) -> None:
        """Give the list that does not hold a new place, behind all else and with as much to spare.

        What it had is lost, at most as much again as it gets. The head will say where it is, with its sequence.
        """
        start = (max(os.fstat(self._fd).st_size, self._end) + _PAGE - 1) // _PAGE * _PAGE
        room = max(2 * size, MIN_LIST)
        self._reserve(start, room)
        self._lists[which] = (start, room)

    def _write_head(self, sequence: int) -> None:
        os.pwrite(self._fd, pack_head(sequence, self._lists), 0)

    # --- its table ---------------------------------------------------------------------------------------------------

    def memory(self, config: Config) -> FlowMemory:
        """Return the flow table in the file."""
        return FlowMemory(
            config.flows, self._key, config.snat, config.snat_ports, (self._fd, self._hot, self._cold)
        )

    def take_over(self, config: Config, services: Services, highest: int) -> FlowMemory | None:
        """Return the table that another process has left, each entry verified; no `Pipeline` has seen it yet.

        ``highest``: of all backend ids in ``found``. None: so much is damaged that the file was set aside, and is new.
        """
        memory = self.memory(config)
        try:
            clock = flow_clock()
            kept, unwanted, damaged = memory.take_over(services, highest, clock, config.flow_log is not None)
        except ValueError as error:
            backends = self.found or {}
            self._set_aside(str(error))
            self._create(backends)
            return None
        log.info("flows taken over", file=str(self.path), flows=kept, of_no_backend=unwanted, damaged=damaged)
        return memory

    # --- its end -----------------------------------------------------------------------------------------------------

    def _set_aside(self, fault: str) -> None:
        """Give the file another name, for whoever wants to find out what is wrong with it, and close it."""
        rejected = set_aside(self.path)
        os.replace(self.path, rejected)
        self._release()
        self.found = None
        log.warning("a flow file is set aside, and its flows are not taken over", reason=fault, file=str(rejected))

    def close(self, keep: bool) -> None:
        """Leave the file to the next process, or remove it. The table stays mapped while its memory is in use."""
        if self._fd < 0:
            return
        if not keep:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self._release()

    def _release(self) -> None:
        """Give the lock back, and close the descriptor."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping would hold it
            os.close(self._fd)
            self._fd = -1


def open_file(config: Config, backends: Mapping[str, Any]) -> FlowFile | None:
    """Open the configuration's flow file, and lock it: one that another process has left, else a new one.

    ``backends``: the list that a new one begins with. None: the table has to be in this process's own memory, because
    that is configured, or because ``auto`` finds no place, which is logged. Raises FlowFileError.
    """
    bring_here(config)
    problems = []
    for path in sorted(places(config), key=lambda place: not os.path.lexists(place)):
        try:
            check_path(path)
            return FlowFile(path, identity(config), backends)
        except FlowFileUsedError:
            raise
        except FlowFileError as error:
            if config.flow_file != "auto":
                raise FlowFileError(f"flow_file: {error}") from None
            problems.append(str(error))
    if problems:
        log.warning("a crash will lose the flow table: there is no place for its file", problems=problems)
    return None


def identity(config: Config) -> dict[str, Any]:
    """Return what two processes must have in common to use one file: all that its entries' meaning depends on."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # times are of the monotonic clock
        "flows": config.flows,
        "snat": list(map(str, config.snat)),
        "snat_ports": str(config.snat_ports),
        "interfaces": list(config.interfaces),  # nothing depends on them; the file is found by them
        "layout": flow_layout(config.flows),
    }


__all__ = ["FlowFile", "FlowFileError", "FlowFileUsedError", "identity", "open_file"]
