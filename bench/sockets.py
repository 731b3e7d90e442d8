"""The sockets of the measuring programs: receive rings, and three ways out of them.

Independent of fastlb's own: what a yardstick is made of must not be what it measures. Nothing here is done per packet.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION, PACKET_RESERVE, PACKET_TX_RING = 5, 6, 10, 12, 13
PACKET_LOSS, PACKET_VNET_HDR, PACKET_FANOUT, PACKET_QDISC_BYPASS, PACKET_IGNORE_OUTGOING = 14, 15, 18, 20, 23
TPACKET_V2, TPACKET_V3 = 1, 2
SO_DETACH_FILTER, SO_SNDBUFFORCE, SO_ATTACH_BPF = 27, 32, 50

AF_XDP, SOL_XDP = 44, 283
XDP_MMAP_OFFSETS, XDP_TX_RING, XDP_UMEM_REG, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING = 1, 3, 4, 5, 6
XDP_COPY, XDP_USE_NEED_WAKEUP = 1 << 1, 1 << 3
XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING = 0x80000000, 0x180000000
UNALIGNED_CHUNKS = 1

BLOCK_SIZE, TIMEOUT_MS, RESERVE = 256 << 10, 1, 66  # fastlb's defaults
CHUNK = 4096
DESCRIPTORS = 2048  # of an AF_XDP ring
SLOTS, SLOT_SIZE = 1024, 2048  # of a transmit ring
STAMP_BLOCK, STAMP_SLOT = 64 << 10, 256  # of a ring that is only looked at when all is over
SEND_BUFFER = 16 << 20
RELEASE_TIMEOUT = 2.0  # seconds that the kernel may take to free the queue of a closed AF_XDP socket

T = TypeVar("T")


class Mapped(NamedTuple):
    """A socket and the memory that it shares with the kernel. Closing both frees everything."""

    socket: socket.socket
    memory: mmap.mmap

    @property
    def address(self) -> int:
        return address_of(self.memory)

    def close(self) -> None:
        self.memory.close()
        self.socket.close()


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def packet_socket() -> socket.socket:
    """A raw packet socket that receives nothing until it is bound."""
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)


def open_ring(interface: str, filter_fd: int, blocks: int, timeout_ms: int = TIMEOUT_MS) -> Mapped:
    """A TPACKET_V3 receive ring as fastlb has it, behind a socket filter."""
    ring = packet_socket()
    ring.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    ring.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    ring.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    ring.setsockopt(SOL_PACKET, PACKET_RESERVE, RESERVE)
    ring.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
    request = struct.pack("7I", BLOCK_SIZE, blocks, BLOCK_SIZE, blocks, timeout_ms, 0, 0)
    ring.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
    memory = mmap.mmap(ring.fileno(), BLOCK_SIZE * blocks)
    ring.bind((interface, ETH_P_ALL))  # last: no frame enters before the filter is there
    return Mapped(ring, memory)


def open_sender(interface: str, bypass: bool = True, vnet_hdr: bool = False) -> socket.socket:
    """A packet socket that only sends; ``bypass``: past the queueing discipline and the taps."""
    sender = packet_socket()
    sender.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, bypass)
    sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, vnet_hdr)
    sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
    sender.bind((interface, 0))
    return sender


def mac_of(interface: str) -> bytes:
    """The hardware address, six bytes."""
    with packet_socket() as opened:
        opened.bind((interface, 0))
        mac: bytes = opened.getsockname()[4]
        return mac


def open_tx_ring(interface: str) -> Mapped:
    """A TPACKET_V2 transmit ring of SLOTS slots."""
    sender = open_sender(interface)
    sender.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
    sender.setsockopt(SOL_PACKET, PACKET_LOSS, 1)  # a frame that cannot be sent does not stop the ring
    size = SLOTS * SLOT_SIZE
    sender.setsockopt(SOL_PACKET, PACKET_TX_RING, struct.pack("4I", size >> 4, 16, SLOT_SIZE, SLOTS))
    return Mapped(sender, mmap.mmap(sender.fileno(), size))


def open_stamp_ring(interface: str, frames: int) -> Mapped:
    """A TPACKET_V2 receive ring with room for so many small frames: the kernel writes down when each arrived."""
    ring = packet_socket()
    ring.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    ring.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
    slots = STAMP_BLOCK // STAMP_SLOT
    blocks = -(-frames // slots)
    ring.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("4I", STAMP_BLOCK, blocks, STAMP_SLOT, blocks * slots))
    memory = mmap.mmap(ring.fileno(), STAMP_BLOCK * blocks)
    ring.bind((interface, ETH_P_ALL))
    return Mapped(ring, memory)


class XskRing(NamedTuple):
    """Where the parts of a ring that an AF_XDP socket shares with the kernel begin."""

    memory: mmap.mmap
    producer: int
    consumer: int
    flags: int
    entries: int


class Xsk(NamedTuple):
    """An AF_XDP socket that only sends, with its descriptor ring and its completion ring."""

    socket: socket.socket
    tx: XskRing
    completions: XskRing

    def close(self) -> None:
        self.tx.memory.close()
        self.completions.memory.close()
        self.socket.close()


def open_xsk(interface: str, queue: int, umem: mmap.mmap) -> Xsk:
    """Send from ``umem``, the memory of a receive ring, where it lies. Raises OSError."""
    xsk = socket.socket(AF_XDP, socket.SOCK_RAW, 0)
    xsk.setsockopt(SOL_XDP, XDP_UMEM_REG, struct.pack("QQIIII", address_of(umem), len(umem), CHUNK, 0, 1, 0))
    for ring in (XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_TX_RING):
        xsk.setsockopt(SOL_XDP, ring, DESCRIPTORS)
    xsk.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
    offsets = struct.unpack("16Q", xsk.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, 128))
    tx = map_xsk_ring(xsk, XDP_PGOFF_TX_RING, offsets[4:8], 16)
    completions = map_xsk_ring(xsk, XDP_UMEM_PGOFF_COMPLETION_RING, offsets[12:16], 8)
    patiently(lambda: bind_xsk(xsk, interface, queue))
    return Xsk(xsk, tx, completions)


def map_xsk_ring(xsk: socket.socket, page: int, offsets: tuple[int, ...], entry_size: int) -> XskRing:
    """``offsets``: struct xdp_ring_offset."""
    producer, consumer, entries, flags = offsets
    memory = mmap.mmap(xsk.fileno(), entries + DESCRIPTORS * entry_size, offset=page)
    at = address_of(memory)
    return XskRing(memory, at + producer, at + consumer, at + flags, at + entries)


def bind_xsk(xsk: socket.socket, interface: str, queue: int) -> None:
    """Python's own bind does not know this family. Copy mode, without an XDP program."""
    flags = XDP_COPY | XDP_USE_NEED_WAKEUP
    address = struct.pack("HHIII", AF_XDP, flags, socket.if_nametoindex(interface), queue, 0)
    if ctypes.CDLL(None, use_errno=True).bind(xsk.fileno(), address, len(address)):
        code = ctypes.get_errno()
        raise OSError(code, f"AF_XDP on {interface}, queue {queue}: {os.strerror(code)}")


def patiently(open_it: Callable[[], T]) -> T:
    """Try again while the kernel still cleans up after the socket that had the queue before."""
    deadline = time.monotonic() + RELEASE_TIMEOUT
    while True:
        try:
            return open_it()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
