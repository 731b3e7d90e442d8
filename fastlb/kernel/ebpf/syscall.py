"""The calls of bpf(2): maps, programs, their place at a link's egress, and what the kernel says when it refuses one.

Nothing in here knows about fastlb.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import resource
import struct
import time

from fastlb.errors import KernelError

SOCKET_FILTER, SCHED_CLS = 1, 3  # BPF_PROG_TYPE_*
LICENCE = b"Apache-2.0"  # of every program; no helper that they call is for GPL programs only
NAME_SIZE = 16  # bytes that the kernel keeps of a name, with the terminating zero

# What bpf(2) is asked to do, and the number of the call itself, which libc does not wrap.
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE = 0, 1, 2, 3
_PROG_LOAD, _PROG_TEST_RUN, _INFO_BY_FD, _PROG_QUERY, _LINK_CREATE = 5, 10, 15, 16, 28
_SYSCALL = {"x86_64": 321, "aarch64": 280}

_MAP_TYPE_HASH, _MAP_TYPE_ARRAY, _MAP_TYPE_LRU_HASH = 1, 2, 9
_F_NO_PREALLOC, F_MMAPABLE = 1, 1 << 10
_TCX_EGRESS, _F_BEFORE = 47, 1 << 3
_MAX_QUERIED = 64  # the kernel allows no more on one hook
_LOG_SIZE = 1 << 20
_UPDATE_PAUSES = (0.001, 0.01, 0.1, 1.0)  # seconds: Linux 6.1 and later refill their store for map entries later on
_LOAD_TRIES = 5  # the verifier gives up with EAGAIN when a signal is pending

_HINTS = {
    errno.EPERM: "this needs root, or CAP_BPF and CAP_NET_ADMIN",
    errno.ENOSYS: "the kernel was built without CONFIG_BPF_SYSCALL",
    errno.ENOMEM: "free some memory, or raise RLIMIT_MEMLOCK (kernels before 5.11 count maps against it)",
}

_FOR_ROOT = "prohibited for !root"  # the verifier's words where CAP_PERFMON is missing

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Map:
    """A map in the kernel, which frees it with the last file descriptor and the last program that use it.

    Not safe to be written by two threads at once.
    """

    def __init__(self, name: str, kind: int, key_size: int, value_size: int, max_entries: int, flags: int):
        self.name, self.max_entries = name, max_entries
        attr = struct.pack("=7I16s", kind, key_size, value_size, max_entries, flags, *(0, 0), _name(name))
        try:
            self.fd = bpf(_MAP_CREATE, attr)
        except OSError as error:
            raise _failed(f"cannot create the map {name}", error) from error
        self._key = ctypes.create_string_buffer(key_size)
        self._value = ctypes.create_string_buffer(value_size)
        self._entry = struct.pack(
            "=IxxxxQQQ", self.fd, ctypes.addressof(self._key), ctypes.addressof(self._value), 0
        )

    def put(self, key: bytes, value: bytes) -> None:
        """Add or overwrite one entry; KernelError that names the limit when the map is full."""
        self._fill(self._key, key)
        self._fill(self._value, value)
        for patience in (*_UPDATE_PAUSES, None):
            try:
                bpf(_MAP_UPDATE, self._entry)
                return
            except OSError as error:
                if error.errno == errno.E2BIG:
                    raise KernelError(f"the map {self.name} is full: its limit is {self.max_entries}") from error
                if error.errno != errno.ENOMEM or patience is None:
                    raise _failed(f"cannot write to the map {self.name}", error) from error
                time.sleep(patience)

    def delete(self, key: bytes) -> None:
        """Remove one entry; one that is not there is fine."""
        self._fill(self._key, key)
        try:
            bpf(_MAP_DELETE, self._entry[:16])  # the kernel refuses fields that a command does not use
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise _failed(f"cannot delete from the map {self.name}", error) from error

    def close(self) -> None:
        """Give up this file descriptor; programs that use the map keep it alive."""
        os.close(self.fd)

    @staticmethod
    def _fill(buffer: ctypes.Array[ctypes.c_char], content: bytes) -> None:
        if len(content) != len(buffer):  # a shorter one would leave a tail of the entry before
            raise ValueError(f"{len(content)} bytes for a field of {len(buffer)}")
        buffer.raw = content


class HashMap(Map):
    """Entries of any key; they take memory only while they exist."""

    def __init__(self, name: str, key_size: int, value_size: int, max_entries: int):
        """Sizes in bytes; ``name`` has at most 15 characters. Raises KernelError."""
        super().__init__(name, _MAP_TYPE_HASH, key_size, value_size, max_entries, _F_NO_PREALLOC)


class RecentMap(Map):
    """Entries of any key, their memory taken at once; a full one gives up those that were not used for the longest."""

    def __init__(self, name: str, key_size: int, value_size: int, max_entries: int):
        """Make the map, with the meanings that ``HashMap`` gives to its arguments. Raises KernelError."""
        super().__init__(name, _MAP_TYPE_LRU_HASH, key_size, value_size, max_entries, 0)


class Value(Map):
    """One value, zeros at first, which a program reads at the price of a memory access (``Assembler.map_value``)."""

    def __init__(self, name: str, size: int, flags: int = 0):
        """``size`` in bytes. Raises KernelError."""
        super().__init__(name, _MAP_TYPE_ARRAY, 4, size, 1, flags)

    def write(self, value: bytes) -> None:
        """Overwrite all of it; a program sees every aligned 64-bit word of it old or new. Raises KernelError."""
        self.put(bytes(4), value)

    def read(self) -> bytes:
        """All of it, each aligned 64-bit word as it was at some moment. Raises KernelError."""
        self._fill(self._key, bytes(4))
        try:
            bpf(_MAP_LOOKUP, self._entry)
        except OSError as error:
            raise _failed(f"cannot read the map {self.name}", error) from error
        return self._value.raw


class SharedValue(Value):
    """One value that also lies in this process's memory: both sides read and write it without a system call.

    It begins at a page. Linux 5.5 and later have it; earlier ones refuse the map.
    """

    def __init__(self, name: str, size: int):
        """``size`` in bytes. Raises KernelError."""
        super().__init__(name, size, F_MMAPABLE)
        try:
            self._memory = memoryview(mmap.mmap(self.fd, size))
        except OSError as error:
            os.close(self.fd)
            raise _failed(f"cannot map the memory of {name}", error) from error

    def view(self, offset: int, size: int) -> memoryview:
        """These bytes of the value, writable. The memory stays for as long as a view of it is in use."""
        return self._memory[offset : offset + size]

    def close(self) -> None:
        """Give up the file descriptor; the memory, and the map with it, go with the last view."""
        self._memory.release()
        super().close()


def load_program(kind: int, code: bytes, name: str) -> int:
    """Load ``code`` as a program of a BPF_PROG_TYPE, and return its file descriptor.

    KernelError carries the verifier's last words, which say what it objects to.
    """
    try:
        return _load(kind, code, name, None)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG_SIZE)
        with contextlib.suppress(OSError):
            os.close(_load(kind, code, name, log))
        lines = [line for line in log.value.decode(errors="replace").splitlines() if line]
        # The log ends in statistics ("processed 9 insns ..."): the line before them is the objection.
        objections = [line for line in lines if not line.startswith(("processed ", "verification time "))]
        verdict = f"; the verifier says: {objections[-1]}" if objections else ""
        if _FOR_ROOT in verdict:
            verdict = f" (this needs root, or CAP_PERFMON){verdict}"
        raise _failed(f"cannot load the program {name}", error, verdict) from error


def hold_program(undo: contextlib.ExitStack, kind: int, code: bytes, name: str) -> int:
    """Load a program, as `load_program` does, whose descriptor the stack closes."""
    fd = load_program(kind, code, name)
    undo.callback(os.close, fd)
    return fd


def _load(kind: int, code: bytes, name: str, log: ctypes.Array[ctypes.c_char] | None) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    terms = ctypes.create_string_buffer(LICENCE)
    attr = struct.pack(
        "=IIQQIIQII16s",
        *(kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(terms)),
        *((1, len(log), ctypes.addressof(log)) if log is not None else (0, 0, 0)),
        *(0, 0, _name(name)),
    )
    for _ in range(_LOAD_TRIES - 1):
        try:
            return bpf(_PROG_LOAD, attr)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return bpf(_PROG_LOAD, attr)


def link_to_egress(program_fd: int, interface: int) -> int:
    """Let a program of type SCHED_CLS see what leaves an interface, before all others that do (tcx, Linux 6.6).

    The descriptor that this returns is the link, which ends when that is closed, with the process at the latest. It
    outlives the interface, without effect. Raises OSError: EINVAL from kernels before 6.6.
    """
    return bpf(_LINK_CREATE, struct.pack("=6IQ", program_fd, interface, _TCX_EGRESS, _F_BEFORE, 0, 0, 0))


def first_at_egress(interface: int) -> int:
    """The id of the program that sees what leaves an interface before all others of tcx; 0: there is none.

    Raises OSError.
    """
    ids = (ctypes.c_uint32 * _MAX_QUERIED)()
    attr = struct.pack("=4IQI36x", interface, _TCX_EGRESS, 0, 0, ctypes.addressof(ids), len(ids))
    bpf(_PROG_QUERY, bytearray(attr))
    return ids[0]


def program_id(program_fd: int) -> int:
    """Return the number by which the kernel lists a program. Raises OSError."""
    info = ctypes.create_string_buffer(8)  # type and id, at the beginning of struct bpf_prog_info
    bpf(_INFO_BY_FD, bytearray(struct.pack("=IIQ", program_fd, len(info), ctypes.addressof(info))))
    identity: int = struct.unpack_from("=I", info.raw, 4)[0]
    return identity


def run_program(program_fd: int, data: bytes, repeat: int = 1) -> tuple[int, int]:
    """Run a program over one frame inside the kernel: (its 32-bit result, mean ns a run).

    The kernel wants at least an Ethernet header (14 bytes), and more than that for some program types.
    """
    frame = ctypes.create_string_buffer(data, len(data))
    attr = bytearray(
        struct.pack("=4I2QII24x", program_fd, 0, len(data), 0, ctypes.addressof(frame), 0, repeat, 0)
    )
    try:
        bpf(_PROG_TEST_RUN, attr)
    except OSError as error:
        raise _failed(f"cannot test the program on a frame of {len(data)} bytes", error) from error
    result, duration = struct.unpack_from("=I", attr, 4)[0], struct.unpack_from("=I", attr, 36)[0]
    return result, duration


def raise_memlock_limit() -> None:
    """Kernels before 5.11 count maps against RLIMIT_MEMLOCK (64 KiB by default); later ones do not care."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _name(name: str) -> bytes:
    encoded = name.encode()
    if len(encoded) >= NAME_SIZE:
        raise ValueError(f"the kernel keeps {NAME_SIZE - 1} bytes of a name; {name!r} is longer")
    return encoded


def bpf(command: int, attr: bytes | bytearray) -> int:
    """bpf(2). A bytearray receives what the kernel writes back. Raises OSError."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no eBPF on {platform.machine()}; supported are {', '.join(_SYSCALL)}")
    argument = (ctypes.c_char * len(attr)).from_buffer(attr) if isinstance(attr, bytearray) else attr
    result: int = _libc.syscall(ctypes.c_long(number), command, argument, ctypes.c_uint(len(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _failed(what: str, error: OSError, detail: str = "") -> KernelError:
    hint = f" ({_HINTS[error.errno]})" if error.errno in _HINTS else ""
    return KernelError(f"{what}: {error.strerror}{hint}{detail}")
