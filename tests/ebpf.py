"""What tests ask the kernel about eBPF, beyond what fastlb asks: its programs, its maps, and the keys of one."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress

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
