"""A test of whether open blocks can be read on this kernel: at every start, as no document promises it (ring.pxd).

A ring on the loopback device of a network namespace of its own, which no traffic but the test's ever reaches, and a
sender that races its reader: frames of many lengths, through every block of the ring several times.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import random
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from fastlb._core import Ring, RingMemory
from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.classification import constant_program
from fastlb.kernel.ebpf.frame import WHOLE_FRAME

ROUNDS = 16
FRAMES = 120  # a round: less than the ring holds, so that none may be lost
BLOCK_SIZE, BLOCKS = 128 << 10, 2
TIMEOUT_MS = 200  # so that a block is open until it is full
PATIENCE = 1.0  # seconds without a frame
MAX_FRAME = 1600  # bytes of a frame
HEADER = bytes(12) + b"\x88\xb5"  # to lo's own address of zeros; EtherType for local experiments (IEEE 802, 9.2.4)
PROGRAM_NAME = "fastlb_selftest"

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

_libc = ctypes.CDLL(None, use_errno=True)


def open_blocks_fault() -> str | None:
    """Return why open blocks must not be read on this machine; None: they may be. Takes some ten milliseconds."""
    if platform.machine() != "x86_64":
        return f"it needs a processor that keeps the order of stores (x86-64), not {platform.machine()}"
    frames = make_frames(ROUNDS * FRAMES)
    try:
        with ThreadPoolExecutor(1) as thread:  # its namespace goes with it
            return verify(frames, thread.submit(read_frames, frames).result())
    except (OSError, KernelError) as error:
        return f"it cannot be tried here: {error}"


def make_frames(count: int) -> list[bytes]:
    """Return Ethernet frames that tell their place, of lengths and contents that repeat from run to run."""
    drawn = random.Random(count)
    return [
        HEADER + struct.pack("!I", number) + drawn.randbytes(drawn.randrange(42, MAX_FRAME - len(HEADER) - 4))
        for number in range(count)
    ]


def verify(sent: Sequence[bytes], taken: Sequence[tuple[bytes, bool]]) -> str | None:
    """Return what is wrong with what was read: (frame, whether its block was still open), in the order of reading."""
    for number, (frame, (found, _)) in enumerate(zip(sent, taken, strict=False)):
        if found != frame:
            return f"frame {number} of {len(sent)} was read wrong"
    if len(taken) != len(sent):
        return f"{len(taken)} frames of {len(sent)} were read"
    if not any(early for _, early in taken):
        return "no frame could be read before its block was closed"
    return None


def read_frames(frames: Sequence[bytes]) -> list[tuple[bytes, bool]]:
    """Read the frames in a network namespace of the calling thread's own, which is of no use afterwards.

    Raises OSError, KernelError.
    """
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        hint = " (a network namespace needs CAP_SYS_ADMIN)" if code == errno.EPERM else ""
        raise OSError(code, os.strerror(code) + hint)
    _set_up("lo")
    everything = syscall.load_program(syscall.SOCKET_FILTER, constant_program(WHOLE_FRAME), PROGRAM_NAME)
    memory = RingMemory(1, BLOCK_SIZE, BLOCKS)
    try:
        ring = Ring("lo", everything, memory, TIMEOUT_MS, open_blocks=True)
        try:
            return _race(ring, frames)
        finally:
            ring.close()
    finally:
        memory.close()
        os.close(everything)


def _race(ring: Ring, frames: Sequence[bytes]) -> list[tuple[bytes, bool]]:
    """Send the frames in one thread, and read them in this one, as they come."""
    taken: list[tuple[bytes, bool]] = []
    left = iter(frames)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender, ThreadPoolExecutor(1) as thread:
        sender.bind(("lo", 0))
        while some := list(islice(left, FRAMES)):
            sending = thread.submit(_send, sender, some)
            taken += ring.take(len(some), sum(map(len, some)), PATIENCE)
            sending.result()
    return taken


def _send(sender: socket.socket, frames: Sequence[bytes]) -> None:
    for frame in frames:
        sender.send(frame)


def _set_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", interface.encode(), 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags | _IFF_UP))
