"""A bounded packet generator: pre-built small UDP frames, sent as fast as one core can.

Frames go out through AF_PACKET by sendmmsg(2), past the queueing discipline, a batch a system call. One
frame a flow is built beforehand: flow i has source port FIRST_PORT + i. The frames are whole and valid,
checksums included. What arrives is told by the kernel's interface counters: ``interface_counters``.

    generator.py INTERFACE NEXT_HOP_MAC SOURCE TARGET [--port 9] [--flows 1024] [--size 64] [--seconds 5]
                 [--frames N]
prints {"frames": sent, "seconds": s, "refused": calls the kernel refused for lack of buffers}.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import ipaddress
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

FIRST_PORT = 1024
MOST_FLOWS = 65536 - FIRST_PORT
BATCH = 256  # frames a system call; more gains nothing, and the clock is read once a batch
MOST_SECONDS = 60.0
MOST_FRAMES = 1_000_000_000
UDP = 17
PACKET_QDISC_BYPASS = 20
SOL_PACKET = 263


class Counters(NamedTuple):
    """One interface's counters since it was made: packets, bytes and drops in both directions."""

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int


def interface_counters() -> dict[str, Counters]:
    """The counters of every interface in the calling thread's namespace."""
    with open("/proc/thread-self/net/dev") as file:
        lines = file.readlines()[2:]
    table = {}
    for line in lines:
        name, _, rest = line.partition(":")
        column = [int(word) for word in rest.split()]
        table[name.strip()] = Counters(column[1], column[0], column[3], column[9], column[8], column[11])
    return table


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Mmsghdr(ctypes.Structure):
    _fields_ = (("header", Msghdr), ("length", ctypes.c_uint32))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp_datagram(source: bytes, target: bytes, source_port: int, port: int, size: int) -> bytes:
    """A UDP datagram of ``size`` bytes, header included (RFC 768; RFC 8200 section 8.1 for IPv6)."""
    header = struct.pack("!HHHH", source_port, port, size, 0)
    payload = bytes(size - len(header))
    pseudo = source + target + struct.pack("!HH", UDP, size)
    padding = b"\0" * (size % 2)
    value = checksum(pseudo + header + payload + padding) or 0xFFFF
    return header[:6] + struct.pack("!H", value) + payload


def ip_packet(source: str, target: str, source_port: int, port: int, size: int) -> bytes:
    """An IPv4 or IPv6 packet of ``size`` bytes with a UDP datagram in it."""
    src, dst = ipaddress.ip_address(source).packed, ipaddress.ip_address(target).packed
    if len(src) == 4:
        first = struct.pack("!BBHHHBB", 0x45, 0, size, 0, 0x4000, 64, UDP)
        header = first + struct.pack("!H", checksum(first + b"\0\0" + src + dst)) + src + dst
    else:
        header = struct.pack("!IHBB", 6 << 28, size - 40, UDP, 64) + src + dst
    return header + udp_datagram(src, dst, source_port, port, size - len(header))


def build_frames(arguments: argparse.Namespace, source_mac: bytes) -> list[bytes]:
    """One Ethernet frame a flow, each ``size`` bytes long without the frame check sequence."""
    ethertype = {4: 0x0800, 6: 0x86DD}[ipaddress.ip_address(arguments.target).version]
    link = bytes.fromhex(arguments.next_hop_mac.replace(":", "")) + source_mac + struct.pack("!H", ethertype)
    return [
        link + ip_packet(arguments.source, arguments.target, port, arguments.port, arguments.size - len(link))
        for port in range(FIRST_PORT, FIRST_PORT + arguments.flows)
    ]


def open_sender(interface: str) -> socket.socket:
    """A packet socket that only sends: protocol 0 receives nothing."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    sock.bind((interface, 0))
    return sock


def send(sock: socket.socket, frames: Sequence[bytes], seconds: float, most: int) -> dict[str, float]:
    """Send the frames round and round until time or number is reached, whichever is first."""
    buffers = [ctypes.create_string_buffer(frame, len(frame)) for frame in frames]
    iovecs = [Iovec(ctypes.addressof(buffer), len(buffer)) for buffer in buffers]
    messages = (Mmsghdr * len(frames))()
    for message, iovec in zip(messages, iovecs, strict=True):
        message.header.iov = ctypes.pointer(iovec)
        message.header.iovlen = 1
    sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
    stride, sent, refused, at = ctypes.sizeof(Mmsghdr), 0, 0, 0
    start = time.monotonic()
    while sent < most and time.monotonic() - start < seconds:
        count = min(BATCH, len(frames) - at, most - sent)
        done = sendmmsg(sock.fileno(), ctypes.byref(messages, at * stride), count, 0)
        if done < 0:
            code = ctypes.get_errno()
            if code not in (errno.ENOBUFS, errno.EAGAIN, errno.EINTR):
                raise OSError(code, os.strerror(code))
            refused += 1
            continue
        sent += done
        at = (at + done) % len(frames)
    return {"frames": sent, "seconds": time.monotonic() - start, "refused": refused}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Send small UDP frames at full speed, for a bounded time.")
    parser.add_argument("interface")
    parser.add_argument("next_hop_mac", metavar="NEXT_HOP_MAC")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--port", type=int, default=9)
    parser.add_argument("--flows", type=int, default=1024, help=f"source ports, at most {MOST_FLOWS}")
    parser.add_argument("--size", type=int, default=64, help="bytes a frame, without its check sequence")
    parser.add_argument("--seconds", type=float, default=5.0, help=f"at most {MOST_SECONDS:g}")
    parser.add_argument("--frames", type=int, default=MOST_FRAMES, help=f"at most {MOST_FRAMES}")
    arguments = parser.parse_args()
    if not 1 <= arguments.flows <= MOST_FLOWS:
        parser.error(f"--flows must be 1 to {MOST_FLOWS}")
    if not 62 <= arguments.size <= 1514:
        parser.error("--size must be 62 (Ethernet, IPv6 and UDP headers) to 1514")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with open_sender(arguments.interface) as sock:
        frames = build_frames(arguments, source_mac=sock.getsockname()[4])
        seconds, most = min(arguments.seconds, MOST_SECONDS), min(arguments.frames, MOST_FRAMES)
        print(json.dumps(send(sock, frames, seconds, most)))


if __name__ == "__main__":
    main()
