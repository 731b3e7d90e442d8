"""The file in which the flow table outlives its process: where it is, and what must be true of it before it is used.

    0        head: magic, version; which list holds; where the two lists are; SHA-256 of all this
    4 KiB    identity: what a process must agree on to use the rest, and the table's key
    2 MiB    the hot part, then the cold part of the table, as dataplane/conntrack.pxd has them
    behind   two lists of backend ids and names, written in turn

Identity and lists are records: | sequence 64 | length 64 | SHA-256 of both and the JSON | JSON |. A list is written
whole before the head says that it holds; the head is within one page, which is written whole or not at all; and the
file has no name before it is complete. So a process may be killed anywhere, and whatever does not check was damaged
otherwise: such a file is set aside, never half-read.

A file belongs to one process at a time, which holds its lock (flock(2)).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from fastlb._core import FlowMemory, Services, flow_layout
from fastlb.config import Config
from fastlb.errors import FastlbError
from fastlb.model.clock import flow_clock
from fastlb.version import __version__

MAGIC, VERSION = b"fastlb\0\n", 3
SHARED_MEMORY = Path("/dev/shm")
REJECTED = ".rejected"
MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # statfs(2), f_type
LOCK_PATIENCE = 2.0  # seconds: a process that was killed lets go only when the kernel has taken it down
LEAST_LIST = 1 << 16  # bytes that a list has room for
KEY_BYTES = 32

_PAGE, _LARGE_PAGE = 4096, 2 << 20
_HEAD = struct.Struct("<8sII Q QQQQ")  # magic, version, 0, the sequence that holds; offset and room of each list
HEAD_BYTES = _HEAD.size + hashlib.sha256().digest_size
_RECORD = struct.Struct("<QQ32s")
_STATFS_BYTES = 256  # more than any struct statfs has

log = structlog.get_logger()


class FlowFileError(FastlbError):
    """A flow file cannot be had here."""


class FlowFileUsedError(FlowFileError):
    """Another process holds it."""


# --- where it is -----------------------------------------------------------------------------------------------------


def places(config: Config) -> list[Path]:
    """Where a file of this configuration may be, the best place first; none with ``flow_file: none``."""
    if config.flow_file == "none":
        return []
    if config.flow_file != "auto":
        return [Path(config.flow_file)]
    control = Path(config.control)
    digest = hashlib.sha256(os.fsencode(control)).hexdigest()[:12]
    return [control.with_name(control.name + ".flows"), SHARED_MEMORY / f"fastlb-{control.stem}-{digest}.flows"]


def is_in_memory(folder: Path) -> bool:
    """Whether files in there live in memory alone. Raises FlowFileError when there is no such directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(folder), found) != 0:
        raise FlowFileError(f"{folder}: {os.strerror(ctypes.get_errno())}")
    (kind,) = struct.unpack_from("@l", found)  # f_type
    return kind & 0xFFFFFFFF in MEMORY_FILE_SYSTEMS


def check_place(path: Path) -> None:
    """Raises FlowFileError where no flow file may be."""
    if not is_in_memory(path.parent):
        raise FlowFileError(f"{path.parent} is not on tmpfs or ramfs; a flow file must be in memory")


def held_bytes(config: Config) -> int:
    """Memory that files of this configuration take already."""
    return sum(size for path in places(config) if (size := _blocks(path)) is not None)


def _blocks(path: Path) -> int | None:
    with suppress(OSError):
        return path.lstat().st_blocks * 512
    return None


def open_file(config: Config, backends: Mapping[str, Any]) -> FlowFile | None:
    """The configuration's flow file, locked: one that another process has left, else a new one.

    ``backends``: the list that a new one begins with. None: the table has to be in this process's own memory, because
    that is configured, or because ``auto`` finds no place, which is logged. Raises FlowFileError.
    """
    problems = []
    for path in sorted(places(config), key=lambda place: not os.path.lexists(place)):
        try:
            check_place(path)
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
    """What two processes must have in common to use one file: all that the meaning of its entries depends on."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # times are of the monotonic clock
        "flows": config.flows,
        "snat": list(map(str, config.snat)),
        "snat_ports": str(config.snat_ports),
        "layout": flow_layout(config.flows),
    }


# --- a file ----------------------------------------------------------------------------------------------------------


class FlowFile:
    """An open and locked file. ``found``: the list of backends that another process has left; None: it is new."""

    def __init__(self, path: Path, wanted: Mapping[str, Any], backends: Mapping[str, Any]) -> None:
        """Raises FlowFileError; nothing is left open then."""
        self.path, self._wanted = path, wanted
        self._hot = _LARGE_PAGE
        self._cold = self._hot + wanted["layout"]["buckets"]
        self._end = self._cold + wanted["layout"]["tuples"]
        self.found: dict[str, Any] | None = None
        self._saved: Mapping[str, Any] | None = None
        self._fd = -1
        try:
            self._open(backends)
        except OSError as error:
            self._let_go()
            raise FlowFileError(f"{path}: {error.strerror}") from None
        except FlowFileError:
            self._let_go()
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
        """Open and lock what has the name; what is wrong with it as a file. Raises FileNotFoundError."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
            return f"it is no plain file that fastlb could have made ({error.strerror})"
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return "it is not a file that its owner alone, who runs fastlb, can open"
        _lock(self._fd, self.path)
        now = os.stat(self.path, follow_symlinks=False)
        if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):  # its process removed it meanwhile
            self._let_go()
            return self._open_existing()
        return None

    def _create(self, backends: Mapping[str, Any]) -> None:
        """Without a name until it is complete and locked."""
        self._fd = os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._reserve(0, self._end)
        self._key = os.urandom(KEY_BYTES)
        who = {"key": self._key.hex(), "fastlb": __version__, "namespace": _namespace()}
        os.pwrite(self._fd, _seal(0, {**self._wanted, **who}), _PAGE)
        self._sequence, self._lists, self._saved = 0, [(0, 0), (0, 0)], None
        self.save(backends)
        # linkat(2) follows to the file itself; without a descriptor Python calls link(2), which does not
        os.link(f"/proc/self/fd/{self._fd}", self.path, src_dir_fd=self._fd)

    def _reserve(self, start: int, size: int) -> None:
        """Have the memory now: else a packet would end the process when there is none left."""
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
        """Why the file cannot be used; None when it can."""
        head = os.pread(self._fd, HEAD_BYTES, 0)
        if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
            return "it is no flow file"
        _, version, _, self._sequence, *where = _HEAD.unpack_from(head)
        if version != VERSION:
            return f"it has version {version} of the format, not {VERSION}"
        if hashlib.sha256(head[: _HEAD.size]).digest() != head[_HEAD.size :]:
            return "its head is damaged"
        self._lists = [(where[0], where[1]), (where[2], where[3])]
        identified = _unseal(self._fd, _PAGE, _LARGE_PAGE - _PAGE)
        if identified is None or len(key := bytes.fromhex(identified[1].get("key", ""))) != KEY_BYTES:
            return "its identity is damaged"
        fault = difference(identified[1], self._wanted)
        if fault is not None:
            return fault
        self._key = key
        size = os.fstat(self._fd).st_size
        if size < self._end:
            return "it is cut short"
        if not lists_fit(self._lists, self._end, size):
            return "its lists of backends are not where they can be"
        held = _unseal(self._fd, *self._lists[self._sequence % 2])
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
        record = _seal(sequence, backends)
        try:
            if len(record) > self._lists[sequence % 2][1]:
                self._make_room(sequence % 2, len(record))
            os.pwrite(self._fd, record, self._lists[sequence % 2][0])
            self._write_head(sequence)
        except OSError as error:
            raise FlowFileError(f"{self.path}: cannot write the list of backends: {error.strerror}") from None
        self._sequence, self._saved = sequence, backends

    def _make_room(self, which: int, size: int) -> None:
        """For a list that does not hold, behind all else, with as much to spare: what it had is lost, at most as much
        again as it gets. Where it is, the head will say together with the list's sequence."""
        start = (max(os.fstat(self._fd).st_size, self._end) + _PAGE - 1) // _PAGE * _PAGE
        room = max(2 * size, LEAST_LIST)
        self._reserve(start, room)
        self._lists[which] = (start, room)

    def _write_head(self, sequence: int) -> None:
        head = _HEAD.pack(MAGIC, VERSION, 0, sequence, *self._lists[0], *self._lists[1])
        os.pwrite(self._fd, head + hashlib.sha256(head).digest(), 0)

    # --- its table ---------------------------------------------------------------------------------------------------

    def memory(self, config: Config) -> FlowMemory:
        """The flow table in the file."""
        return FlowMemory(
            config.flows, self._key, config.snat, config.snat_ports, (self._fd, self._hot, self._cold)
        )

    def take_over(self, config: Config, services: Services, highest: int) -> FlowMemory | None:
        """The table that another process has left, each entry verified; `Pipeline`s have not seen it yet.

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
        rejected = self.path.with_name(self.path.name + REJECTED)
        os.replace(self.path, rejected)
        log.warning("a flow file is set aside, and its flows are not taken over", reason=fault, file=str(rejected))
        self._let_go()
        self.found = None

    def close(self, keep: bool) -> None:
        """For the next process, or remove it. The table stays mapped as long as its memory is in use."""
        if self._fd < 0:
            return
        if not keep:
            with suppress(FileNotFoundError):
                self.path.unlink()
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping would hold it
            os.close(self._fd)
            self._fd = -1


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Why a file with this identity does not fit; None when it does."""
    if found.get("boot") != wanted["boot"]:
        return "it is of another boot"
    for key in ("flows", "snat", "snat_ports"):
        if found.get(key) != wanted[key]:
            return f"it is of another configuration: {key}: {_shown(found.get(key))} -> {_shown(wanted[key])}"
    if found.get("layout") != wanted["layout"]:
        return f"fastlb {found.get('fastlb')} has laid its flow table out otherwise"
    return None


def lists_fit(lists: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Are they between these bytes, and apart? One that was never written, (0, 0), is nowhere."""
    before = start
    for offset, room in sorted(each for each in lists if each != (0, 0)):
        if offset < before or room < _RECORD.size:
            return False
        before = offset + room
    return before <= end


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _lock(fd: int, path: Path) -> None:
    """Raises FlowFileUsedError."""
    until = time.monotonic() + LOCK_PATIENCE
    while not _try_lock(fd, fcntl.LOCK_EX):
        if time.monotonic() > until:
            raise FlowFileUsedError(f"another fastlb uses {path}")
        time.sleep(0.01)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _seal(sequence: int, data: Mapping[str, Any]) -> bytes:
    body = json.dumps(data).encode()
    head = struct.pack("<QQ", sequence, len(body))
    return head + hashlib.sha256(head + body).digest() + body


def _unseal(fd: int, offset: int, room: int) -> tuple[int, dict[str, Any]] | None:
    """A record's sequence and data; None when it is not whole."""
    size = os.fstat(fd).st_size
    if offset >= size:
        return None
    head = os.pread(fd, _RECORD.size, offset)
    if len(head) < _RECORD.size:
        return None
    sequence, length, digest = _RECORD.unpack(head)
    if length > min(room, size):
        return None
    body = os.pread(fd, length, offset + _RECORD.size)
    if hashlib.sha256(head[:16] + body).digest() != digest:
        return None
    data = json.loads(body)
    return (sequence, data) if isinstance(data, dict) else None


def _namespace() -> int:
    """The network namespace of the calling thread: whose interfaces the guards are on."""
    return os.stat("/proc/thread-self/ns/net").st_ino


# --- what a crash leaves ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftFile:
    """A flow file that is there."""

    path: str
    bytes: int
    state: str  # "in use", "left over" or "set aside"


def left_files(config: Config | None = None) -> list[LeftFile]:
    """Those of a configuration (None: of one that says nothing), and others in /dev/shm of this network namespace."""
    own = places(config or Config())
    others = [path for path in SHARED_MEMORY.glob("fastlb-*.flows*") if _is_of_this_namespace(path)]
    named = {path for place in own for path in (place, place.with_name(place.name + REJECTED))}
    return [found for path in sorted({*named, *others}) if (found := _look_at(path)) is not None]


def remove_files(files: Iterable[LeftFile]) -> None:
    """Those in use stay."""
    for each in files:
        if each.state != "in use":
            with suppress(FileNotFoundError):
                os.unlink(each.path)


def _look_at(path: Path) -> LeftFile | None:
    with _opened(path) as fd:
        if fd is None:
            return None
        if path.name.endswith(REJECTED):
            state = "set aside"
        else:
            state = "left over" if _try_lock(fd, fcntl.LOCK_SH) else "in use"
        return LeftFile(str(path), os.fstat(fd).st_blocks * 512, state)


def _is_of_this_namespace(path: Path) -> bool:
    with _opened(path) as fd:
        identified = None if fd is None else _unseal(fd, _PAGE, _LARGE_PAGE - _PAGE)
        return identified is not None and identified[1].get("namespace") == _namespace()


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """The descriptor of a plain file of ours; None where there is none."""
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
