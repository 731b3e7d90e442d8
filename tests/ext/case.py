"""What the tests over held.pyx share: a worker, its pipeline, and the socket that it kicks.

Every frame is numbered, so that the order and the number of those that left can be told.
"""

from __future__ import annotations

import errno
import os
import socket
from types import ModuleType
from typing import Any

from fastlb._core import Routes
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, service
from tests.frames import BALANCER_MAC, frame, mac_bytes, mac_of, take_apart

BLOCKS, BLOCK_SIZE = 4, 1 << 18
IFINDEX = 7
PLAIN = bytes(10)
NEAR_THE_END = 2**32 - 5  # of a counter's 32 bits
KICK = b""


class OneLink(Balancer):
    """A pipeline whose every next hop is on the interface that has the AF_XDP socket."""

    def routes(self) -> Routes:
        mac = mac_bytes(BALANCER_MAC)
        hops = [(mac_bytes(mac_of(host)), mac, IFINDEX, 9000, None) for host in BACKENDS[4]]
        return Routes(hops, [], {}, {member.id: at for at, member in enumerate(self.plans[0].members)})


class Kicks:
    """The socket that a kick goes to: each is an empty datagram."""

    def __init__(self) -> None:
        self.theirs, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)

    def count(self) -> int:
        """Those since the last call."""
        count = 0
        try:
            while self.ours.recv(1) == KICK:
                count += 1
        except BlockingIOError:
            return count
        raise AssertionError("a kick has no content")

    def close(self) -> None:
        self.theirs.close()
        self.ours.close()


class Case:
    """A worker, its pipeline and its socket."""

    def __init__(
        self,
        held: ModuleType,
        rings: int = 1,
        counts: int = 0,
        fd: int | None = None,
        open_blocks: bool = False,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.kicks = Kicks()
        self.pipeline = OneLink(config(service("dsr", protocol="udp"))).pipeline
        self.fd = os.dup(self.kicks.theirs.fileno()) if fd is None else fd  # the worker's, if it ends the socket
        self.worker: Any = held.Worker(
            self.pipeline, rings, BLOCKS, block_size, IFINDEX, self.fd, counts, open_blocks
        )

    def close(self) -> None:
        self.kicks.close()
        if not is_closed(self.fd):
            os.close(self.fd)

    def drops(self) -> dict[str, int]:
        names = ("tx_link_down", "tx_error", "over_mtu", "no_route", "ring_hole", "ring_clamped")
        counters = self.pipeline.counters()
        return {name: counters[name] for name in names if counters[name]}

    def read(self, block: int, count: int, now: int = 0) -> list[int]:
        """The kernel fills a block, the worker reads it; the addresses that were posted."""
        self.worker.fill(block, [(PLAIN, numbered(at)) for at in range(count)])
        assert self.worker.turn(now)
        return [address for address, _, _ in self.worker.posted()]


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def numbered(number: int, size: int = 64) -> bytes:
    """A frame to the VIP, of ``size`` bytes."""
    payload = number.to_bytes(4, "big") + bytes(size - 46)
    return frame(CLIENT[4], 1000 + number % 5000, VIP[4], 80, "udp", payload=payload)


def number_of(raw: bytes) -> int:
    """Of a frame that left; AssertionError when it is not whole or not for a backend."""
    seen = take_apart(raw)
    assert seen.eth_dst in {mac_of(host) for host in BACKENDS[4]}
    return int.from_bytes(seen.segment[8:12], "big")
