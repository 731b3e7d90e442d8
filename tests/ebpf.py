"""What tests ask the kernel about eBPF, beyond what fastlb asks: its programs, its maps, and the keys of one.

Other programs of the machine load such objects too, another fastlb under the same names: a test that looks for what
was left asks for those of a process (`held`), or of a namespace (`of_namespace`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from pyroute2 import netns

from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.frame import ACT_SHOT

_MAP_NEXT_KEY, _PROG_NEXT_ID, _MAP_NEXT_ID, _PROG_FD_BY_ID, _MAP_FD_BY_ID, _INFO_BY_FD = 4, 11, 12, 13, 14, 15
_NAME_AT = {_PROG_FD_BY_ID: 64, _MAP_FD_BY_ID: 24}  # in struct bpf_prog_info and struct bpf_map_info


def programs() -> dict[int, str]:
    """Every eBPF program of this kernel, whoever loaded it: id to name."""
    return _objects(_PROG_NEXT_ID, _PROG_FD_BY_ID)


def maps() -> dict[int, str]:
    """Every eBPF map of this kernel, whoever made it: id to name."""
    return _objects(_MAP_NEXT_ID, _MAP_FD_BY_ID)


Objects = set[tuple[str, int]]  # ("prog_id" or "map_id", id)


def held(process: int) -> Objects:
    """Return the eBPF objects that a process has descriptors of; none when it has ended."""
    found = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for fd in list(Path(f"/proc/{process}/fdinfo").iterdir()):
            with suppress(FileNotFoundError):  # the descriptor that listed the directory
                fields = [line.split(":") for line in fd.read_text().splitlines()]
                found |= {(each[0], int(each[1])) for each in fields if each[0] in ("prog_id", "map_id")}
    return found


def names(objects: Objects) -> list[str]:
    """Return the names of those of the objects that the kernel still has."""
    alive = {"prog_id": programs(), "map_id": maps()}
    return sorted(alive[kind][identity] for kind, identity in objects if identity in alive[kind])


def processes_in(namespace: str) -> list[int]:
    """Return the processes that live in a network namespace."""
    inode = os.stat(Path(netns.NETNS_RUN_DIR, namespace)).st_ino
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (process / "ns/net").stat().st_ino == inode:
                found.append(int(process.name))
    return found


def of_namespace(namespace: str, attached: Iterable[int]) -> Objects:
    """Return what the processes of a namespace hold, the programs ``attached`` there, and the maps of all of them."""
    found = set().union(*map(held, processes_in(namespace)), {("prog_id", program) for program in attached})
    return found | {("map_id", each) for kind, identity in found if kind == "prog_id" for each in maps_of(identity)}


def maps_of(program: int) -> list[int]:
    """Return the ids of the maps that a program uses: none when it has gone."""
    identities, info = (ctypes.c_uint32 * 64)(), ctypes.create_string_buffer(64)
    struct.pack_into("=IQ", info, 52, len(identities), ctypes.addressof(identities))
    with suppress(FileNotFoundError):
        fd = syscall.bpf(_PROG_FD_BY_ID, struct.pack("=III", program, 0, 0))
        try:
            syscall.bpf(_INFO_BY_FD, bytearray(struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))))
        finally:
            os.close(fd)
        return list(identities[: struct.unpack_from("=I", info, 52)[0]])
    return []


def keys(of: syscall.Map, size: int) -> Iterator[bytes]:
    """Every key of a map, ``size`` bytes each, in no order."""
    following = ctypes.create_string_buffer(size)
    current = 0  # a null pointer asks for the first key
    while True:
        try:
            syscall.bpf(_MAP_NEXT_KEY, struct.pack("=IxxxxQQQ", of.fd, current, ctypes.addressof(following), 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        yield following.raw
        current = ctypes.addressof(following)


class Word(syscall.Value):
    """A map of one 32-bit number, 0 at first."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 4)

    def set(self, number: int) -> None:
        """Store it; a program sees the old number or the new one."""
        self.write(struct.pack("=I", number))


def is_taken(classifier: Classifier, frame: bytes) -> bool:
    """Whether the guard would take this Ethernet frame.

    KernelError for one of 14 bytes or fewer, or without a whole IP header where its type promises one.
    The kernel runs it as if received by the loopback device: a destination MAC of zeros is PACKET_HOST,
    every other one is not. A tag in the frame is an inline one (the outer has already been taken out).
    """
    result, _duration = syscall.run_program(classifier.guard_fd, frame)
    return result == ACT_SHOT


def _objects(next_id: int, fd_by_id: int) -> dict[int, str]:
    found: dict[int, str] = {}
    attr = bytearray(12)
    while True:
        try:
            syscall.bpf(next_id, attr)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        (identity,) = struct.unpack_from("=I", attr, 4)
        with suppress(FileNotFoundError):  # gone since its id was read
            found[identity] = _object_name(fd_by_id, identity)
        struct.pack_into("=I", attr, 0, identity)


def _object_name(fd_by_id: int, identity: int) -> str:
    at = _NAME_AT[fd_by_id]
    info = ctypes.create_string_buffer(at + syscall.NAME_SIZE)
    fd = syscall.bpf(fd_by_id, struct.pack("=III", identity, 0, 0))
    try:
        syscall.bpf(_INFO_BY_FD, bytearray(struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))))
    finally:
        os.close(fd)
    return info.raw[at:].split(b"\0", 1)[0].decode()
