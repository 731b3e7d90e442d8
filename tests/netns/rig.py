"""fastlb between two cables, for tests that send and see single frames.

    client                      host (fastlb)                  servers
      c0  (mtu 9000) ─────────── l0 10.9.0.2   fd09::2
                                 l1 10.8.0.2   fd08::2 ──────── s0 10.8.0.11  fd08::11 (mtu 9000)

Raw frames come from 10.9.0.99 and fd09::99, which no kernel holds. The servers' kernel is asked for its MAC, and has no
route by which it could answer anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import ip_address
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

from fastlb.kernel import guard
from tests.frames import ACK, BALANCER_MAC, ROUTER_MAC, TCP, frame
from tests.netns.balancer import Balancer, until, within
from tests.netns.namespaces import Namespace, veth
from tests.netns.wire import PLAIN, Arrival, Wire

HERE = Path(__file__).resolve().parent
CORES = frozenset(os.sched_getaffinity(0))  # before any test has its frames sent by one of them
CLIENT = {4: "10.9.0.99", 6: "fd09::99"}
BACKEND = {4: "10.8.0.11", 6: "fd08::11"}
HAIRPIN = "10.9.0.50"  # a backend on the client's link
VIP = {
    ("nat", 4): "203.0.113.10", ("nat", 6): "2001:db8:cafe::10",
    ("dsr", 4): "203.0.113.20", ("dsr", 6): "2001:db8:cafe::20",
    ("hairpin", 4): "203.0.113.30",
}  # fmt: skip
PORT, PROBE_PORT = 80, 1
WORKERS = 2  # where there are several
SHARDS = 64
WAYS = [(kind, version, protocol) for kind in ("nat", "dsr") for version in (4, 6) for protocol in ("tcp", "udp")]
RING = {"block_size": "128KiB", "blocks": 64}
AF_XDP, SOL_XDP, UMEM_REG, FILL_RING, COMPLETION_RING, TX_RING, COPY = 44, 283, 4, 5, 6, 3, 2

_ports = iter(range(2000, 60000))


def next_port() -> int:
    """A port of the client's that no flow has had."""
    return next(_ports)


def service(kind: str, version: int, protocol: str) -> dict[str, Any]:
    address = HAIRPIN if kind == "hairpin" else BACKEND[version]
    return {
        "name": f"{kind}-{version}-{protocol}", "vip": VIP[kind, version], "port": PORT, "protocol": protocol,
        "forward": "nat" if kind == "nat" else "dsr", "backends": [{"address": address}],
    }  # fmt: skip


def config(**changes: Any) -> dict[str, Any]:
    """fastlb's configuration for the rig; ``changes`` replace top-level keys."""
    return {
        "interfaces": ["l0", "l1"], "workers": 1, "flows": 10_000, "maglev_size": 251,
        "ring": RING,
        "services": [service(*at, protocol) for at in VIP for protocol in ("tcp", "udp")],
    } | changes  # fmt: skip


class Rig:
    """The namespaces, and both ends of the wire; ``queues`` of each interface."""

    def __init__(self, undo: ExitStack, queues: int = 1) -> None:
        undo.callback(os.sched_setaffinity, 0, CORES)
        self._undo, self._queues = undo, queues
        self.client_side, self.host, self.server_side = (
            undo.enter_context(Namespace(label)) for label in ("client", "host", "servers")
        )
        self.connect_client()
        self.connect_servers()

    def connect_client(self) -> None:
        """Make the cable to the client, for the first time or again."""
        veth(self.client_side, "c0", self.host, "l0", self._queues)
        self.client_side.set_link("c0", address=ROUTER_MAC, mtu=9000)
        self.host.set_link("l0", address=BALANCER_MAC, mtu=9000)
        self.host.add_address("l0", "10.9.0.2/24")
        self.host.add_address("l0", "fd09::2/64")
        self.place_clients()
        self.client = Wire(self.client_side, "c0", self._undo)

    def place_clients(self) -> None:
        """The host knows the clients' MAC: until l0 is set down."""
        for address in (CLIENT[4], CLIENT[6], HAIRPIN):
            place = {"dst": address, "lladdr": ROUTER_MAC, "ifindex": self.host.index("l0"), "state": "permanent"}
            self.host.rtnl(methodcaller("neigh", "replace", **place))

    def connect_servers(self) -> None:
        """Make the cable to the servers, for the first time or again."""
        veth(self.host, "l1", self.server_side, "s0", self._queues)
        for namespace, name, number in ((self.host, "l1", "2"), (self.server_side, "s0", "11")):
            namespace.set_link(name, mtu=9000)
            namespace.add_address(name, f"10.8.0.{number}/24")
            namespace.add_address(name, f"fd08::{number}/64")
        self.host.set_link("l1", address=BALANCER_MAC)
        self.servers = Wire(self.server_side, "s0", self._undo)

    def cut(self, interface: str) -> None:
        """The host's interface is gone, and with it its addresses and routes."""
        index = self.host.index(interface)
        self.host.rtnl(methodcaller("link", "del", index=index))

    def balancer(self, directory: Path, environment: Mapping[str, str] | None = None, **changes: Any) -> Balancer:
        """Not started yet; with these changes to ``config``, and in this environment when one is given."""
        os.sched_setaffinity(0, CORES)  # which it inherits
        balancer = Balancer(self.host.name, config(**changes), directory)
        if environment is not None:
            balancer.start = partial(balancer.start, env=environment)  # type: ignore[method-assign]
        return balancer

    def send_in_order(self) -> None:
        """What one processor sends arrives in order; call it when the balancer runs, which shall have them all."""
        os.sched_setaffinity(0, {min(CORES)})

    def reach(self, balancer: Balancer, *services: tuple[str, int]) -> None:
        """Wait until the kernel has resolved the backends of these (kind, version), and fastlb can send to them.

        Those of dsr when none is named. What has arrived by then is forgotten.
        """
        for kind, version in services or (("dsr", 4), ("dsr", 6)):
            probe = frame(CLIENT[version], PROBE_PORT, VIP[kind, version], PORT, "udp", payload=b"probe")

            def answered(probe: bytes = probe) -> bool:
                before = balancer.status()["counters"]["transmitted"]
                self.client.send(probe)
                time.sleep(0.02)
                return bool(balancer.status()["counters"]["transmitted"] > before)

            assert until(answered), balancer.status()
        self.send_in_order()
        for wire in (self.client, self.servers):
            wire.arrived()


def make_rig(queues: int) -> Iterator[Rig]:
    """For a fixture to yield from."""
    with ExitStack() as undo:
        yield Rig(undo, queues)


def settled(balancer: Balancer) -> dict[str, Any]:
    """The status when nothing is counted any more, but sleeps."""
    found: list[dict[str, Any]] = [{"counters": {}}]

    def same() -> bool:
        time.sleep(0.05)
        found.append(balancer.status())
        before, after = (each["counters"] for each in found[-2:])
        return bool(before == after | {"sleeps": before.get("sleeps")})

    assert until(same)
    return found[-1]


def owner(client: str, port: int) -> int:
    """The worker, of two, that has this client's shard: by the words of its address and the port, as in the frame."""
    mixed = int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)
    for word in struct.unpack("=4I", ip_address(client).packed.rjust(16, b"\0")):
        mixed ^= word
    return ((mixed * 0x9E3779B1 & 0xFFFFFFFF) >> 26) * WORKERS // SHARDS


def port_of(worker: int, version: int = 4) -> int:
    """A fresh port of the client's, whose flows are this worker's."""
    return next(port for port in iter(next_port, 0) if owner(CLIENT[version], port) == worker)


class Flow(NamedTuple):
    """A flow of the client's."""

    kind: str
    version: int
    protocol: str
    port: int

    def request(self, flags: int) -> bytes:
        where = VIP[self.kind, self.version]
        return frame(CLIENT[self.version], self.port, where, PORT, self.protocol, flags=flags, payload=b"question")

    def reply(self, flags: int) -> bytes:
        return frame(
            BACKEND[self.version], PORT, CLIENT[self.version], self.port, self.protocol, flags=flags, payload=b"answer"
        )

    def at_backend(self) -> tuple[object, ...]:
        where = (BACKEND if self.kind == "nat" else {self.version: VIP["dsr", self.version]})[self.version]
        return (CLIENT[self.version], self.port, where, PORT, self.protocol)

    def at_client(self) -> tuple[object, ...]:
        return (VIP["nat", self.version], PORT, CLIENT[self.version], self.port, self.protocol)


def new_flows(each: int) -> list[Flow]:
    """So many of each worker, in each way."""
    return [Flow(*way, port_of(at, way[1])) for way in WAYS for at in range(WORKERS) for _ in range(each)]


def exchange(rig: Rig, flows: Sequence[Flow], flags: int = ACK) -> None:
    """A packet of each flow arrives, once, and so does the answer of a nat backend."""
    for flow in flows:
        rig.client.send(flow.request(flags))
    assert arrivals(rig.servers, len(flows)) == Counter(flow.at_backend() for flow in flows)
    two_way = [flow for flow in flows if flow.kind == "nat"]
    for flow in two_way:
        rig.servers.send(flow.reply(flags | ACK))
    assert arrivals(rig.client, len(two_way)) == Counter(flow.at_client() for flow in two_way)


def receive(wire: Wire) -> Arrival:
    """The next frame from fastlb that is no late probe of ``Rig.reach``."""
    while (arrival := wire.receive()).seen.sport == PROBE_PORT:
        pass
    return arrival


def arrivals(wire: Wire, count: int) -> Counter[tuple[object, ...]]:
    """The next frames from fastlb, as ``Flow`` describes them."""
    seen = [receive(wire).seen for _ in range(count)]
    return Counter((s.src, s.sport, s.dst, s.dport, "tcp" if s.protocol == TCP else "udp") for s in seen)


def guards_of(rig: Rig) -> list[guard.GuardInfo]:
    return within(rig.host.name, guard.show)


def leftovers(rig: Rig, balancer: Balancer) -> list[str]:
    """What a fastlb that has ended may not leave behind."""
    left = [f"guard on {found.interface}" for found in within(rig.host.name, guard.show)]
    sockets = within(rig.host.name, Path("/proc/thread-self/net/packet").read_text)
    left += [f"packet socket: {line}" for line in sockets.splitlines()[1:]]
    return left + [str(balancer.socket_path)] * balancer.socket_path.exists()


class Flood:
    """Numbered frames of one flow from the client, until it is stopped."""

    def __init__(self, rig: Rig, port: int | None = None) -> None:
        self.sent = 0
        self.arrived: list[int] = []
        self._rig, self._port = rig, port or next_port()
        self._template = frame(CLIENT[4], self._port, VIP["dsr", 4], PORT, "udp", payload=bytes(40))
        self._template = self._template[:40] + bytes(2) + self._template[42:]  # without a checksum, which UDP allows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(OSError):  # a link that is down takes none
                for _ in range(20):
                    numbered = self._template[:42] + self.sent.to_bytes(4, "big") + self._template[46:]
                    self._rig.client.send(numbered, PLAIN)
                    self.sent += 1
            time.sleep(0.001)

    def numbers(self, frames: list[bytes]) -> list[int]:
        """Of this flow's frames among others."""
        return [
            int.from_bytes(raw[42:46], "big")
            for raw in frames
            if raw[12:14] == b"\x08\x00" and raw[23] == 17 and raw[34:36] == self._port.to_bytes(2, "big")
        ]

    def more(self, wire: Wire) -> bool:
        """Whether a hundred more arrive from now on, of those that fastlb reads from now on."""
        self.arrived += self.numbers(wire.arrived())
        first = self.sent
        return until(lambda: self.collect(wire) and self.arrived[-1] > first + 100)

    def last(self, wire: Wire) -> bool:
        """Whether the last one that was sent arrives."""
        return until(lambda: self.collect(wire) and self.arrived[-1] == self.sent - 1)

    def collect(self, wire: Wire) -> bool:
        self.arrived += self.numbers(wire.arrived())
        return bool(self.arrived)


class OtherXsk:
    """Another program's AF_XDP socket on a queue of an interface; OSError when the queue is taken."""

    def __init__(self, namespace: Namespace, interface: str, queue: int = 0) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)
        self.socket = namespace.run(socket.socket, AF_XDP, socket.SOCK_RAW, 0)
        try:
            self._bind(namespace.index(interface), queue)
        except BaseException:
            self.socket.close()
            raise

    def _bind(self, index: int, queue: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.socket.setsockopt(SOL_XDP, UMEM_REG, struct.pack("=QQIIII", address, 1 << 16, 4096, 0, 0, 0))
        for ring in (FILL_RING, COMPLETION_RING, TX_RING):
            self.socket.setsockopt(SOL_XDP, ring, struct.pack("I", 64))
        where = struct.pack("=HHIII", AF_XDP, COPY, index, queue, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.bind(self.socket.fileno(), where, len(where)):
            raise OSError(ctypes.get_errno(), "bind")

    def __enter__(self) -> OtherXsk:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def is_free(namespace: Namespace, interface: str, queue: int = 0) -> bool:
    """Whether no AF_XDP socket uses the queue."""
    try:
        OtherXsk(namespace, interface, queue).socket.close()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def open_sockets(balancer: Balancer) -> int:
    """How many the process has; what it closes meanwhile does not count."""
    count = 0
    for descriptor in Path(f"/proc/{balancer.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(descriptor).startswith("socket:")
    return count


Preload = Callable[..., dict[str, str]]


def build_preload(directory: Path) -> Preload:
    """Build refuse.c there; what is returned makes an environment from what refuse.c reads: preload(REFUSE="bind")."""
    library = directory / "refuse.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", library, HERE / "refuse.c"], check=True)
    return lambda **variables: {**os.environ, "LD_PRELOAD": str(library), **variables}
