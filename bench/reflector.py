"""The yardstick as a process: reflects frames out of another interface until SIGTERM.

    reflector.py WAY_OUT --reflect IN:OUT:NEXT_HOP_MAC... --take ADDRESS:PORT/PROTOCOL... [--core N] [--blocks N]

What enters IN leaves by OUT towards NEXT_HOP_MAC; WAY_OUT is sendmmsg, xdp or tx_ring. Only frames from or to one of
the given endpoints are taken, by fastlb's own filter and guard, so that the kernel does the same work for both
forwarders. Prints "ready" when it runs.
"""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import threading
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any, NamedTuple

from extension import build
from sockets import (
    BLOCK_SIZE,
    DESCRIPTORS,
    SLOT_SIZE,
    SLOTS,
    Mapped,
    mac_of,
    open_ring,
    open_sender,
    open_tx_ring,
    open_xsk,
)

from fastlb.kernel import guard
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.match import Key, Keys

WAYS_OUT = ("sendmmsg", "xdp", "tx_ring")
BLOCKS = 64  # fastlb's default


class Direction(NamedTuple):
    """Frames from one interface to a neighbour on another."""

    entry: str
    leave: str
    next_hop: bytes

    @classmethod
    def parse(cls, text: str) -> Direction:
        """From "eth0:eth1:02:00:00:00:00:01"."""
        entry, leave, mac = text.split(":", 2)
        return cls(entry, leave, bytes.fromhex(mac.replace(":", "")))


def open_side(ring: Mapped, leave: str, next_hop: bytes, way_out: str, queue: int, stack: ExitStack) -> Any:
    """What `Reflector` needs to know of a ring and of the way out of it; opens the latter."""
    way, mac = WAY_OPENERS[way_out](leave, ring.memory, queue, stack)
    blocks = len(ring.memory) // BLOCK_SIZE
    return ring.address, ring.socket.fileno(), BLOCK_SIZE, blocks, next_hop + mac, (way_out, *way)


def by_sendmmsg(interface: str, ring: mmap.mmap, queue: int, stack: ExitStack) -> tuple[tuple[int, ...], bytes]:
    """Whatever came in can leave, GSO packets included."""
    sender = stack.enter_context(open_sender(interface, vnet_hdr=True))
    return (sender.fileno(),), sender.getsockname()[4]


def by_xdp(interface: str, ring: mmap.mmap, queue: int, stack: ExitStack) -> tuple[tuple[int, ...], bytes]:
    """From the ring itself; frames of up to a chunk, with their checksums."""
    xsk = open_xsk(interface, queue, ring)
    stack.callback(xsk.close)
    tx, completions = xsk.tx, xsk.completions
    places = (tx.entries, DESCRIPTORS, tx.producer, tx.flags, completions.producer, completions.consumer)
    return (xsk.socket.fileno(), *places), mac_of(interface)


def by_tx_ring(interface: str, ring: mmap.mmap, queue: int, stack: ExitStack) -> tuple[tuple[int, ...], bytes]:
    """Frames that fit in a slot, with their checksums."""
    sender = open_tx_ring(interface)
    stack.callback(sender.close)
    return (sender.socket.fileno(), sender.address, SLOTS, SLOT_SIZE), mac_of(interface)


WAY_OPENERS = {"sendmmsg": by_sendmmsg, "xdp": by_xdp, "tx_ring": by_tx_ring}


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reflect frames out of another interface until SIGTERM.")
    parser.add_argument("--core", type=int, help="run on this core alone")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"of each ring, {BLOCK_SIZE >> 10} KiB each")
    parser.add_argument("way_out", choices=WAYS_OUT)
    parser.add_argument("--reflect", metavar="IN:OUT:MAC", type=Direction.parse, nargs="+", required=True)
    parser.add_argument("--take", metavar="ADDRESS:PORT/PROTOCOL", type=key_of, nargs="+", required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    with ExitStack() as stack:
        classifier = stack.enter_context(Classifier())
        classifier.replace(Keys(set(arguments.take), set(arguments.take)))
        sides = []
        for entry, leave, next_hop in arguments.reflect:
            stack.callback(guard.detach, entry)
            guard.attach(entry, classifier.guard_fd)
            ring = open_ring(entry, classifier.filter_fd, arguments.blocks)
            stack.callback(ring.close)
            sides.append(open_side(ring, leave, next_hop, arguments.way_out, 0, stack))
        run_until_sigterm(build("_reflect").Reflector(sides))


if __name__ == "__main__":
    main()
