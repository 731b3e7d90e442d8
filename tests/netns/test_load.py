"""worker.pxd, ring.pxd and daemon under load, while the configuration changes, and with nothing to do at all."""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from fastlb.control.client import call
from tests.frames import BALANCER_MAC, SYN, UDP, frame, mac_bytes
from tests.netns.balancer import Balancer, drops, fastlb, until
from tests.netns.rig import (
    CLIENT,
    CORES,
    PORT,
    RING,
    VIP,
    WORKERS,
    Preload,
    Rig,
    config,
    exchange,
    leftovers,
    make_rig,
    new_flows,
    next_port,
    port_of,
    receive,
    service,
    settled,
)
from tests.netns.wire import SO_RCVBUFFORCE

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from generator import Iovec, Mmsghdr, open_sender  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs two processor cores"),
]

LOADED = [f"10.8.0.{number}" for number in (11, 12, 13)]  # backends
by_workers = pytest.mark.parametrize("workers", [1, WORKERS])


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    for made in make_rig(WORKERS):
        lladdr, index = made.server_side.mac("s0").hex(":"), made.host.index("l1")
        for address in LOADED:
            place = {"dst": address, "lladdr": lladdr, "ifindex": index, "state": "permanent"}
            made.host.rtnl(methodcaller("neigh", "replace", **place))
        yield made


# ---- reloads under load

RELOADS = 20
FLOWS = 128  # half of them nat, half dsr
BURST, PAUSE = 2 * FLOWS, 0.005  # frames, seconds: 50,000 frames a second
MOST = 400_000  # frames
ENOUGH = 2000  # between two reloads
SIZE = 64  # bytes of a frame
NUMBER = 42  # its place in a frame: IPv4 without options, UDP
ARRIVED = struct.Struct("!6x6sH9xB6x4sH6xI18x")  # source MAC, EtherType, protocol, destination, source port, number
BATCH = 1024  # frames of a system call


def messages(buffer: ctypes.Array[ctypes.c_char]) -> ctypes.Array[Mmsghdr]:
    """For sendmmsg or recvmmsg: one frame after the other."""
    count, start = len(buffer) // SIZE, ctypes.addressof(buffer)
    made = (Mmsghdr * count)()
    for number, message in enumerate(made):
        message.header.iov = ctypes.pointer(Iovec(start + number * SIZE, SIZE))
        message.header.iovlen = 1
    return made


class Load:
    """Numbered frames of many flows in turn, at an even rate until the end of the block, and what of them arrives."""

    def __init__(self, rig: Rig) -> None:
        self.ports = [next_port() for _ in range(FLOWS)]
        kinds = itertools.cycle(("nat", "dsr"))
        burst = b"".join(map(self._template, kinds, self.ports)) * (BURST // FLOWS)
        self._burst = ctypes.create_string_buffer(burst, len(burst))
        self._sender = rig.client_side.run(open_sender, "c0")
        self._receiver = rig.server_side.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
        self._receiver.bind(("s0", 0x0003))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        self.sent = 0
        self._arrived: list[bytes] = []

    @staticmethod
    def _template(kind: str, port: int) -> bytes:
        body = bytes(SIZE - NUMBER)
        return frame(CLIENT[4], port, VIP[kind, 4], PORT, "udp", payload=body, with_checksum=False)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def _send(self) -> None:
        due, burst = time.monotonic(), messages(self._burst)
        while self.sent < MOST and not self._stop.is_set():
            for place in range(BURST):
                struct.pack_into("!I", self._burst, place * SIZE + NUMBER, self.sent + place)
            done = self._libc.sendmmsg(self._sender.fileno(), burst, BURST, 0)
            assert done == BURST, os.strerror(ctypes.get_errno())
            self.sent += done
            due += PAUSE
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        """Until nothing more has come for half a second after the last was sent."""
        buffer = ctypes.create_string_buffer(BATCH * SIZE)
        batch = messages(buffer)
        while select.select([self._receiver], [], [], 0.5)[0] or not self._stop.is_set():
            count = self._libc.recvmmsg(self._receiver.fileno(), batch, BATCH, socket.MSG_DONTWAIT, None)
            self._arrived.append(buffer.raw[: max(count, 0) * SIZE])

    def arrived(self) -> dict[int, list[tuple[bytes, int]]]:
        """By port of the client's: (destination address, number of the frame) in the order of arrival."""
        found: dict[int, list[tuple[bytes, int]]] = {}
        for mac, kind, protocol, target, port, number in ARRIVED.iter_unpack(b"".join(self._arrived)):
            if (mac, kind, protocol) == (mac_bytes(BALANCER_MAC), 0x0800, UDP):
                found.setdefault(port, []).append((target, number))
        return found


def changed(workers: int, step: int) -> dict[str, Any]:
    """The configuration at each step: what all flows use changes its weights, others come, go and change."""
    used = [
        service(kind, 4, "udp")
        | {"backends": [{"address": address, "weight": 1 + (step + at) % 3} for at, address in enumerate(LOADED)]}
        for kind in ("nat", "dsr")
    ]
    other = service("nat", 6, "tcp") | {"backends": [{"address": f"fd08::{at}"} for at in range(20, 20 + step % 4)]}
    more = [service("dsr", 6, protocol) for protocol in ("tcp", "udp")][: step % 3]
    services = [*used[:: 1 if step % 2 else -1], other, *more]
    return config(workers=workers, services=services, ring=RING | {"blocks": 256})


@by_workers
def test_reloads_under_load_lose_nothing(rig: Rig, tmp_path: Path, workers: int) -> None:
    with Balancer(rig.host.name, changed(workers, 0), tmp_path) as balancer:
        rig.reach(balancer, ("nat", 4))
        before = settled(balancer)["counters"]
        with Load(rig) as load:
            for step in range(1, RELOADS + 1):
                goal = load.sent + ENOUGH
                assert until(lambda: load.sent >= goal)  # noqa: B023
                balancer.configure(changed(workers, step))
                call(str(balancer.socket_path), "reload")
            assert until(lambda: load.sent >= goal + ENOUGH)
        status = settled(balancer)
        counters = status["counters"]
        arrived = load.arrived()
        for place, port in enumerate(load.ports):
            numbers = [number for _, number in arrived[port]]
            assert numbers == list(range(place, load.sent, FLOWS)), f"flow {place}"
            assert len({target for target, _ in arrived[port]}) == 1
        assert counters["packets"] - before["packets"] == counters["transmitted"] - before["transmitted"] == load.sent
        assert (drops(status), counters["ring_drops"]) == ({}, 0)
        paths = {name: count - before["paths"][name] for name, count in counters["paths"].items()}
        taken = {name: count for name, count in paths.items() if count}
        assert taken == {"scheduled": FLOWS, "conntrack": load.sent - FLOWS}
        assert [each["event"] for each in balancer.logs()].count("reloaded") == RELOADS
        last = balancer.config["services"]
        assert [each["name"] for each in status["services"]] == [each["name"] for each in last]


# ---- nothing to do

IDLE = 2.0  # seconds of looking on


def processor_time(balancer: Balancer) -> dict[str, float]:
    """Seconds on a processor, by the names of the threads."""
    spent: dict[str, float] = {}
    for task in Path(f"/proc/{balancer.pid}/task").iterdir():
        name = task.joinpath("comm").read_text().strip()
        on_processor, _waiting, _slices = task.joinpath("schedstat").read_text().split()
        spent[name] = spent.get(name, 0.0) + int(on_processor) / 1e9
    return spent


@by_workers
def test_an_idle_worker_costs_next_to_nothing(rig: Rig, tmp_path: Path, workers: int) -> None:
    with rig.balancer(tmp_path, workers=workers) as balancer:
        rig.reach(balancer)
        asleep = settled(balancer)["counters"]["sleeps"]
        start, before = time.monotonic(), processor_time(balancer)
        time.sleep(IDLE)
        seconds, after = time.monotonic() - start, processor_time(balancer)
        share = {name: (after[name] - before[name]) / seconds for name in after}
        print(f"idle, share of a core: {', '.join(f'{name} {each:.2%}' for name, each in sorted(share.items()))}")
        own = {name: each for name, each in share.items() if name.startswith("worker-")}
        assert len(own) == workers
        assert max(own.values()) < 0.01
        assert sum(share.values()) < 0.1
        assert balancer.status()["counters"]["sleeps"] - asleep > 5 * IDLE * workers


def lone_packets(rig: Rig, balancer: Balancer, count: int) -> list[float]:
    """Seconds until each has arrived, which comes when its worker sleeps; by both workers in turn."""
    found, slept = [], 0
    for number in range(count):
        assert until(lambda: balancer.status()["counters"]["sleeps"] > slept)  # noqa: B023
        slept = balancer.status()["counters"]["sleeps"]
        sent = time.monotonic()
        port = port_of(number % WORKERS)
        rig.client.send(frame(CLIENT[4], port, VIP["dsr", 4], PORT, "udp", payload=b"alone"))
        assert receive(rig.servers).seen.sport == port
        found.append(time.monotonic() - sent)
    return found


@by_workers
def test_a_lone_packet_rings_and_is_read_at_once(rig: Rig, tmp_path: Path, workers: int) -> None:
    """A worker that sleeps looks ten times a second by itself; and without reading of open blocks, once a second."""
    changes: dict[str, Any] = {"workers": workers, "ring": RING | {"timeout": "1s", "open_blocks": True}}
    with rig.balancer(tmp_path, **changes) as balancer:
        rig.reach(balancer)
        before = balancer.status()
        took = lone_packets(rig, balancer, 20)
        after = balancer.status()
        print(f"lone packets, microseconds: {', '.join(f'{each * 1e6:.0f}' for each in sorted(took))}")
        assert max(took) < 0.5
        assert statistics.median(took) < 0.01
        assert (after["open_blocks"], drops(after)) == (True, {})
        assert after["counters"]["read_early"] - before["counters"]["read_early"] == 20
        assert [worker["read_early"] > 0 for worker in after["workers"]] == [True] * workers


def test_without_open_blocks_a_lone_packet_waits_for_its_block(rig: Rig, tmp_path: Path) -> None:
    """The timer of a block starts when the one before is closed, with the packet that has just arrived."""
    timeout = 0.3
    changes: dict[str, Any] = {"workers": WORKERS, "ring": RING | {"timeout": timeout, "open_blocks": False}}
    with rig.balancer(tmp_path, **changes) as balancer:
        rig.reach(balancer, ("dsr", 4))
        port = next_port()
        took = []
        for _ in range(3):
            sent = time.monotonic()
            rig.client.send(frame(CLIENT[4], port, VIP["dsr", 4], PORT, "udp", payload=b"alone"))
            assert receive(rig.servers).seen.sport == port
            took.append(time.monotonic() - sent)
        assert min(took[1:]) > timeout / 2
        status = balancer.status()
        assert (status["open_blocks"], status["counters"]["read_early"], drops(status)) == (False, 0, {})
        assert "open blocks not read" in fastlb("status", "--socket", balancer.socket_path).stdout
        assert [each["event"] for each in balancer.logs()] == ["running"]


# ---- what the kernel refuses

FAULT = "it cannot be tried here: [Errno 1] Operation not permitted (a network namespace needs CAP_SYS_ADMIN)"


@by_workers
def test_a_self_test_that_fails(rig: Rig, tmp_path: Path, preload: Preload, workers: int) -> None:
    with rig.balancer(tmp_path, preload(REFUSE="unshare"), workers=workers) as balancer:
        rig.reach(balancer)
        flows = new_flows(5)
        exchange(rig, flows, SYN)
        exchange(rig, flows)
        status = settled(balancer)
        assert (status["open_blocks"], status["counters"]["read_early"], drops(status)) == (False, 0, {})
        said = [(each["level"], each["event"], each.get("reason")) for each in balancer.logs()]
        assert said == [
            ("warning", "open blocks are not read; a lone packet waits for its block", FAULT),
            ("info", "running", None),
        ]


def test_a_self_test_that_fails_is_an_error_when_open_blocks_are_forced(
    rig: Rig, tmp_path: Path, preload: Preload
) -> None:
    balancer = rig.balancer(tmp_path, workers=WORKERS, ring=RING | {"open_blocks": True})
    environment = preload(REFUSE="unshare")
    done = fastlb("run", "-c", balancer.config_path, namespace=rig.host.name, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fastlb: ring.open_blocks: true, but {FAULT}\n"
    assert leftovers(rig, balancer) == []


def test_no_memory_for_the_rings(rig: Rig, tmp_path: Path, preload: Preload) -> None:
    balancer = rig.balancer(tmp_path, workers=WORKERS, ring=RING | {"open_blocks": False})  # without the self-test's
    done = fastlb("run", "-c", balancer.config_path, namespace=rig.host.name, env=preload(REFUSE="ring"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "fastlb: cannot open a receive ring on l0: Cannot allocate memory; it takes 8 MiB, try fewer ring.blocks\n"
    )
    assert leftovers(rig, balancer) == []
