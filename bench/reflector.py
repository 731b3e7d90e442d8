"""The yardstick of lab.py as a process: reflects frames between two interfaces until SIGTERM.

    reflector.py INTERFACE NEXT_HOP_MAC INTERFACE NEXT_HOP_MAC ADDRESS:PORT/PROTOCOL...

What enters one interface leaves by the other towards its NEXT_HOP_MAC. Only frames from or to one of the given
endpoints are taken, by fastlb's own filter and guard, so that the kernel does the same work for both forwarders.
Prints "ready" when it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from struct import pack
from typing import Any, NamedTuple

from extension import build

from fastlb import guard
from fastlb.classifier import Classifier, Key

SOL_PACKET = 263
PACKET_RX_RING, PACKET_VERSION, PACKET_RESERVE, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 5, 10, 12, 15, 23
SO_ATTACH_BPF, SO_SNDBUFFORCE = 50, 32
ETH_P_ALL = 3
TPACKET_V3 = 2
BLOCK_SIZE, BLOCKS, TIMEOUT_MS, RESERVE = 256 << 10, 64, 1, 66  # fastlb's defaults


class Port(NamedTuple):
    """One interface: its ring, the sockets to receive from and to send by, and its own MAC address."""

    memory: mmap.mmap
    way_in: socket.socket
    way_out: socket.socket
    mac: bytes


def open_port(interface: str, filter_fd: int) -> Port:
    """A ring behind a filter, and a sender, on one interface."""
    way_in = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    ring = pack("7I", BLOCK_SIZE, BLOCKS, BLOCK_SIZE, BLOCKS, TIMEOUT_MS, 0, 0)
    way_in.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    way_in.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    way_in.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    way_in.setsockopt(SOL_PACKET, PACKET_RESERVE, RESERVE)
    way_in.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
    way_in.setsockopt(SOL_PACKET, PACKET_RX_RING, ring)
    memory = mmap.mmap(way_in.fileno(), BLOCK_SIZE * BLOCKS)
    way_in.bind((interface, ETH_P_ALL))
    way_out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    way_out.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    way_out.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
    way_out.bind((interface, 0))
    return Port(memory, way_in, way_out, way_out.getsockname()[4])


def side(entry: Port, leave: Port, next_hop: str) -> tuple[int, int, int, bytes]:
    """What the reflector needs to know of one direction."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(entry.memory))
    macs = bytes.fromhex(next_hop.replace(":", "")) + leave.mac
    return address, entry.way_in.fileno(), leave.way_out.fileno(), macs


def key_of(endpoint: str) -> Key:
    """From "10.3.0.11:8080/tcp"."""
    address, _, rest = endpoint.rpartition(":")
    port, _, protocol = rest.partition("/")
    return Key(ip_address(address), int(port), {"tcp": 6, "udp": 17}[protocol])


def run_until_sigterm(reflector: Any) -> None:
    """The loop runs in a thread of its own, without the GIL; this one waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    worker = threading.Thread(target=reflector.run)
    worker.start()
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})
    reflector.stop()
    worker.join()


def main(words: Sequence[str]) -> None:
    first, first_hop, second, second_hop, *endpoints = words
    keys = [key_of(endpoint) for endpoint in endpoints]
    with ExitStack() as stack:
        classifier = stack.enter_context(Classifier())
        classifier.replace(keys, keys, ())
        for interface in (first, second):
            stack.callback(guard.detach, interface)
            guard.attach(interface, classifier.guard_fd)
        near, far = (open_port(interface, classifier.filter_fd) for interface in (first, second))
        sides = [side(near, far, second_hop), side(far, near, first_hop)]
        run_until_sigterm(build("_reflect").Reflector(sides, BLOCK_SIZE, BLOCKS))


if __name__ == "__main__":
    main(sys.argv[1:])
