"""transmit.pxd, sendmmsg.pxd, xsk.pxd and paths.py: frames leave by AF_XDP or by sendmmsg, once, whole and in order.

    client                      host (fastlb)                  servers
      c0  (mtu 9000) ─────────── l0 10.9.0.2   fd09::2
                                 l1 10.8.0.2   fd08::2 ──────── s0 10.8.0.11  fd08::11 (mtu 9000)

Raw frames come from 10.9.0.99 and fd09::99, which no kernel holds. fastlb receives on l0, and sends on both.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from tests.frames import ACK, BALANCER_MAC, ROUTER_MAC, frame, take_apart
from tests.netns.balancer import Balancer, drops, fastlb, until
from tests.netns.namespaces import Namespace, veth
from tests.netns.wire import PLAIN, Offload, Wire, leave_to_device, payload

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "netns-lab"))

from topology import BACKENDS, VIPS, Lab  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

MODES = ("xdp", "sendmmsg", "auto")
LONGEST = 4072  # bytes: a chunk of 4096 less the metadata in front
CLIENT = {4: "10.9.0.99", 6: "fd09::99"}
BACKEND = {4: "10.8.0.11", 6: "fd08::11"}
HAIRPIN = "10.9.0.50"  # a backend on the client's link
VIP = {
    ("nat", 4): "203.0.113.10", ("nat", 6): "2001:db8:cafe::10",
    ("dsr", 4): "203.0.113.20", ("dsr", 6): "2001:db8:cafe::20",
    ("hairpin", 4): "203.0.113.30",
}  # fmt: skip
PORT = 80
AF_XDP, SOL_XDP, UMEM_REG, FILL_RING, COMPLETION_RING, TX_RING, COPY = 44, 283, 4, 5, 6, 3, 2
BUSY = "its queue is in use by another AF_XDP socket"


def service(kind: str, version: int, protocol: str) -> dict[str, Any]:
    address = HAIRPIN if kind == "hairpin" else BACKEND[version]
    return {
        "name": f"{kind}-{version}-{protocol}", "vip": VIP[kind, version], "port": PORT, "protocol": protocol,
        "forward": "nat" if kind == "nat" else "dsr", "backends": [{"address": address}],
    }  # fmt: skip


def config(mode: str) -> dict[str, Any]:
    return {
        "interfaces": ["l0"], "workers": 1, "flows": 10_000, "maglev_size": 251, "transmit": mode,
        "ring": {"block_size": "128KiB", "blocks": 64},
        "services": [service(*at, protocol) for at in VIP for protocol in ("tcp", "udp")],
    }  # fmt: skip


# ---- real traffic


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("fastlb-tx-") as lab:
        yield lab


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_traffic(lab: Lab, tmp_path: Path, mode: str) -> None:
    path = "sendmmsg" if mode == "sendmmsg" else "xdp"
    with Balancer(lab.namespace("lb"), lab.config(workers=1, transmit=mode), tmp_path) as balancer:
        assert balancer.status()["transmit"] == {"eth0": path, "eth1": path}
        assert f"eth0 {path}, eth1 {path}" in fastlb("status", "--socket", balancer.socket_path).stdout
        for vip in VIPS.values():
            for answer in (lab.client("fetch", vip, "--count", 60), lab.client("echo", vip, "--port", 5000)):
                assert answer["answered"] == answer["ports"], answer["errors"]
            for transfer in ("download", "upload"):
                assert lab.client(transfer, vip, "--bytes", 20_000_000)["verified"]
        counters = settled(balancer)
        assert counters["transmitted"] == counters["forwarded"] > 1000
        assert (counters["transmitted_xdp"] > 500) == (path == "xdp")
        assert counters["transmitted_xdp"] == 0 or path == "xdp"
        assert drops(balancer.status()) == {}
        assert [each["event"] for each in balancer.logs()] == ["running"]


@pytest.mark.parametrize("mode", MODES)
def test_without_offloads_everything_leaves_one_way(lab: Lab, tmp_path: Path, mode: str) -> None:
    lab.set_offloads(False)
    try:
        with Balancer(lab.namespace("lb"), lab.config(workers=1, transmit=mode), tmp_path) as balancer:
            for way in VIPS:
                assert lab.client("download", VIPS[way], "--bytes", 5_000_000)["verified"]
                assert sorted(lab.client("fetch", VIPS[way], "--count", 60)["backends"]) == list(BACKENDS)
            counters = settled(balancer)
    finally:
        lab.set_offloads(True)
    by_xdp = 0 if mode == "sendmmsg" else counters["transmitted"]
    assert (counters["transmitted_xdp"], counters["transmitted"]) == (by_xdp, counters["forwarded"])


def settled(balancer: Balancer) -> dict[str, Any]:
    """The counters when nothing is counted any more."""
    found: list[dict[str, Any]] = [{}]

    def same() -> bool:
        time.sleep(0.05)
        found.append(balancer.status()["counters"])
        return found[-2] == found[-1]

    assert until(same)
    return found[-1]


# ---- single frames


class Rig:
    """The namespaces, and both ends of the wire."""

    def __init__(self, undo: ExitStack) -> None:
        undo.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        self.client_side, self.host, self.server_side = (
            undo.enter_context(Namespace(label)) for label in ("client", "host", "servers")
        )
        veth(self.client_side, "c0", self.host, "l0")
        self.client_side.set_link("c0", address=ROUTER_MAC, mtu=9000)
        self.host.set_link("l0", address=BALANCER_MAC, mtu=9000)
        self.host.add_address("l0", "10.9.0.2/24")
        self.host.add_address("l0", "fd09::2/64")
        for address in (CLIENT[4], CLIENT[6], HAIRPIN):
            place = {"dst": address, "lladdr": ROUTER_MAC, "ifindex": self.host.index("l0"), "state": "permanent"}
            self.host.rtnl(methodcaller("neigh", "replace", **place))
        self.client = Wire(self.client_side, "c0", undo)
        self._undo = undo
        self.connect_servers()
        self._here = {min(os.sched_getaffinity(0))}

    def connect_servers(self) -> None:
        """Make the cable to the servers, for the first time or again."""
        veth(self.host, "l1", self.server_side, "s0")
        for namespace, name, number in ((self.host, "l1", "2"), (self.server_side, "s0", "11")):
            namespace.set_link(name, mtu=9000)
            namespace.add_address(name, f"10.8.0.{number}/24")
            namespace.add_address(name, f"fd08::{number}/64")
        self.host.set_link("l1", address=BALANCER_MAC)
        self.servers = Wire(self.server_side, "s0", self._undo)

    def cut_servers(self) -> None:
        """The interface is gone, and with it its addresses and routes."""
        index = self.host.index("l1")
        self.host.rtnl(methodcaller("link", "del", index=index))

    def balancer(self, mode: str, directory: Path) -> Balancer:
        return Balancer(self.host.name, config(mode), directory)

    def send_in_order(self) -> None:
        """What one processor sends arrives in order; call it when the balancer runs, which shall have them all."""
        os.sched_setaffinity(0, self._here)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        yield Rig(undo)


_ports = iter(range(2000, 60000))


class Single:
    """A running balancer, and what a single frame does there."""

    def __init__(self, rig: Rig, balancer: Balancer, mode: str) -> None:
        self.rig, self.balancer, self.mode = rig, balancer, mode

    def by_xdp(self) -> int:
        return int(self.balancer.status()["counters"]["transmitted_xdp"])

    def send(self, raw: bytes, offload: Offload, wire: Wire | None = None) -> list[Any]:
        """Everything that arrives because of this frame: up to a marker that follows it on the same way."""
        wire = wire or self.rig.servers
        kind = "dsr" if wire is self.rig.servers else "hairpin"
        marker = next(_ports)
        self.rig.client.send(raw, offload)
        self.rig.client.send(frame(CLIENT[4], marker, VIP[kind, 4], PORT, "udp", payload=b"marker"))
        found = []
        while (arrival := wire.receive()).seen.sport != marker:
            found.append(arrival)
        return found


@pytest.fixture(scope="module", params=["xdp", "sendmmsg"])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Single]:
    with ExitStack() as undo:
        rig = Rig(undo)
        balancer = undo.enter_context(rig.balancer(request.param, tmp_path_factory.mktemp("transmit")))
        reach_backend(rig, balancer)
        yield Single(rig, balancer, request.param)
        assert drops(balancer.status()).keys() <= {"no_neighbour", "no_route"}
        balancer.show_log()


def reach_backend(rig: Rig, balancer: Balancer) -> None:
    """Wait until the kernel has resolved the backends, so that fastlb can send to them."""
    for version in (4, 6):
        probe = frame(CLIENT[version], 1, VIP["dsr", version], PORT, "udp", payload=b"probe")

        def answered(probe: bytes = probe) -> bool:
            before = balancer.status()["counters"]["transmitted"]
            rig.client.send(probe)
            time.sleep(0.02)
            return bool(balancer.status()["counters"]["transmitted"] > before)

        assert until(answered), balancer.status()
    rig.send_in_order()
    rig.servers.arrived()


def sized(kind: str, version: int, protocol: str, size: int) -> bytes:
    """A frame of exactly this many bytes."""
    headers = 14 + (20 if version == 4 else 40) + (20 if protocol == "tcp" else 8)
    return frame(
        CLIENT[version], next(_ports), VIP[kind, version], PORT, protocol, flags=ACK, payload=payload(size - headers)
    )


@pytest.mark.parametrize("size", [80, LONGEST - 1, LONGEST, LONGEST + 1, LONGEST + 2, 4096, 4097, 9014])
@pytest.mark.parametrize("offload", ["plain", "partial"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("kind", "version"), [("nat", 4), ("nat", 6), ("dsr", 4), ("dsr", 6)])
def test_frames_at_the_boundary(
    single: Single, kind: str, version: int, protocol: str, offload: str, size: int
) -> None:
    whole = sized(kind, version, protocol, size)
    left, raw = leave_to_device(whole, offload)
    before = single.by_xdp()
    [got] = single.send(raw, left)
    sent = take_apart(whole)
    assert (len(got.raw), got.seen.sport, got.seen.segment[20:]) == (size, sent.sport, sent.segment[20:])
    assert got.seen.dst == (BACKEND[version] if kind == "nat" else sent.dst)
    marker = 1
    assert single.by_xdp() - before == (0 if single.mode == "sendmmsg" else marker + (size <= LONGEST))


TAGS = [
    ((0x8100, 5),),
    ((0x8100, 0x6FFE),),
    ((0x88A8, 7),),
    ((0x88A8, 7), (0x8100, 5)),
]


@pytest.mark.parametrize("tags", TAGS, ids=["802.1q", "priority", "802.1ad", "qinq"])
@pytest.mark.parametrize(
    ("offload", "size"),
    [*itertools.product(("plain", "partial"), (999, LONGEST, LONGEST + 1)), ("gso", 20_000)],
)
@pytest.mark.parametrize("kind", ["hairpin", "dsr", "nat"])
def test_vlan_tags(
    single: Single, kind: str, offload: str, size: int, tags: tuple[tuple[int, int], ...]
) -> None:
    """A tag stays on its link, so it is part of the frame that leaves there, and of that frame's length."""
    body = payload(size - 14 - 40 - 4 * len(tags))
    whole = frame(CLIENT[4], next(_ports), VIP[kind, 4], PORT, flags=ACK, payload=body, tags=tags)
    left, raw = leave_to_device(whole, offload)
    before = single.by_xdp()
    [got] = single.send(raw, left, single.rig.client if kind == "hairpin" else None)
    sent = take_apart(whole)
    kept = tags if kind == "hairpin" else ()
    length = len(whole) - 4 * (len(tags) - len(kept))
    assert (got.seen.tags, got.seen.segment[20:], got.seen.sport) == (kept, sent.segment[20:], sent.sport)
    assert (got.offload.gso_type, got.offload.gso_size) == (left.gso_type, left.gso_size)
    assert single.by_xdp() - before == (0 if single.mode == "sendmmsg" else 1 + (length <= LONGEST))


def test_one_flow_stays_in_order_over_both_ways(single: Single) -> None:
    """Small frames, long ones, open checksums and super-frames, in turns of all lengths."""
    shapes = [("plain", 100), ("partial", 1400), ("gso", 20_000), ("plain", 8000), ("plain", 100), ("gso", 5000)]
    total, small, before, got = 3000, 0, single.by_xdp(), []
    port = next(_ports)
    for start in range(0, total, 50):
        for number in range(start, start + 50):
            offload, size = shapes[(number * number // 7) % len(shapes)]
            body = number.to_bytes(4, "big") + payload(size)
            whole = frame(CLIENT[4], port, VIP["dsr", 4], PORT, flags=ACK, seq=number, payload=body)
            small += offload != "gso" and len(whole) <= LONGEST
            single.rig.client.send(*reversed(leave_to_device(whole, offload)))
        got += [single.rig.servers.receive().seen.tcp.seq for _ in range(50)]
    assert got == list(range(total))
    assert 500 < small < total - 500
    assert single.by_xdp() - before == (small if single.mode == "xdp" else 0)


# ---- links that come and go


class Flood:
    """Numbered frames of one flow from the client, until it is stopped."""

    def __init__(self, rig: Rig) -> None:
        self.sent = 0
        self.arrived: list[int] = []
        self._wire, self._port = rig.client, next(_ports)
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
            for _ in range(20):
                self._wire.send(self._template[:42] + self.sent.to_bytes(4, "big") + self._template[46:], PLAIN)
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


def events(balancer: Balancer) -> list[str]:
    """What was said about l1's way out."""
    return [each["event"] for each in balancer.logs() if each.get("interface") == "l1"]


def accounted(balancer: Balancer, sent: int, before: dict[str, Any]) -> dict[str, int]:
    """The new drops; every frame was read, and ended as sent or dropped."""
    after = settled(balancer)
    assert after["ring_drops"] == 0
    assert after["packets"] - before["packets"] == sent
    new = {name: count - before["drops"][name] for name, count in after["drops"].items()}
    assert sent == after["transmitted"] - before["transmitted"] + sum(new.values())
    return {name: count for name, count in new.items() if count}


DOWN = {  # of l1: what is said about its socket
    "the link": (["AF_XDP socket lost; sending by sendmmsg", "AF_XDP socket open"], "host", "l1"),
    "its peer": ([], "server_side", "s0"),
}


@pytest.mark.parametrize("mode", ["xdp", "sendmmsg"])
@pytest.mark.parametrize("what", DOWN)
def test_a_link_that_goes_down_and_up(rig: Rig, tmp_path: Path, what: str, mode: str) -> None:
    """Without its peer the link keeps its socket: each frame is refused, and counted, until the route is gone."""
    said, side, name = DOWN[what]
    namespace: Namespace = getattr(rig, side)
    with rig.balancer(mode, tmp_path) as balancer:
        reach_backend(rig, balancer)
        before = settled(balancer)
        with Flood(rig) as flood:
            for _ in range(3):
                assert flood.more(rig.servers)
                enough = balancer.status()["counters"]["drops"]["no_route"] + 100  # each time fastlb must see it
                namespace.set_link(name, state="down")
                assert until(lambda: balancer.status()["counters"]["drops"]["no_route"] > enough)  # noqa: B023
                namespace.set_link(name, state="up")
                assert until(lambda: balancer.status()["transmit"].get("l1") == mode)
                by_xdp = balancer.status()["counters"]["transmitted_xdp"]
                assert flood.more(rig.servers)
                assert (balancer.status()["counters"]["transmitted_xdp"] > by_xdp) == (mode == "xdp")
        assert flood.last(rig.servers)
        assert flood.arrived == sorted(set(flood.arrived)), "none twice, none out of order"
        dropped = accounted(balancer, flood.sent, before)
        assert dropped.keys() <= {"no_route", "no_neighbour", "tx_link_down", "tx_full"}
        sent = flood.sent - sum(dropped.values())
        if (what, mode) != ("its peer", "sendmmsg"):  # a link without a carrier takes those, and says nothing
            assert 0 <= sent - len(flood.arrived) < 100
        assert events(balancer) == (said * 3 if mode == "xdp" else [])
        assert balancer.terminate() == 0


@pytest.mark.parametrize("mode", ["xdp", "sendmmsg"])
def test_an_interface_that_vanishes_and_returns(rig: Rig, tmp_path: Path, mode: str) -> None:
    with rig.balancer(mode, tmp_path) as balancer:
        reach_backend(rig, balancer)
        before = settled(balancer)
        with Flood(rig) as flood:
            for _ in range(2):
                assert flood.more(rig.servers)
                rig.cut_servers()
                assert until(lambda: "l1" not in balancer.status()["transmit"])
                rig.connect_servers()
                assert until(lambda: balancer.status()["transmit"].get("l1") == mode)
            by_xdp = balancer.status()["counters"]["transmitted_xdp"]
            assert flood.more(rig.servers)
            assert (balancer.status()["counters"]["transmitted_xdp"] > by_xdp) == (mode == "xdp")
        assert flood.last(rig.servers)
        assert flood.arrived == sorted(set(flood.arrived))
        assert accounted(balancer, flood.sent, before).keys() <= {
            "no_route", "no_neighbour", "tx_link_down", "tx_error", "tx_full"
        }  # fmt: skip
        assert balancer.terminate() == 0


def test_interfaces_that_vanish_leave_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    """More often than a worker has sockets, and without traffic, which would tell it."""
    with rig.balancer("auto", tmp_path) as balancer:
        sockets = open_sockets(balancer)
        for _ in range(20):
            rig.cut_servers()
            assert until(lambda: "l1" not in balancer.status()["transmit"])
            rig.connect_servers()
            assert until(lambda: balancer.status()["transmit"].get("l1") == "xdp")
        assert until(lambda: open_sockets(balancer) == sockets)
        reach_backend(rig, balancer)
        assert events(balancer) == []


def open_sockets(balancer: Balancer) -> int:
    links = map(os.readlink, Path(f"/proc/{balancer.pid}/fd").iterdir())
    return sum(link.startswith("socket:") for link in links)


# ---- refusals


class OtherXsk:
    """Another program's AF_XDP socket on queue 0 of an interface; OSError when the queue is taken."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)
        self.socket = namespace.run(socket.socket, AF_XDP, socket.SOCK_RAW, 0)
        try:
            self._bind(namespace.index(interface))
        except BaseException:
            self.socket.close()
            raise

    def _bind(self, index: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.socket.setsockopt(SOL_XDP, UMEM_REG, struct.pack("=QQIIII", address, 1 << 16, 4096, 0, 0, 0))
        for ring in (FILL_RING, COMPLETION_RING, TX_RING):
            self.socket.setsockopt(SOL_XDP, ring, struct.pack("I", 64))
        where = struct.pack("=HHIII", AF_XDP, COPY, index, 0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.bind(self.socket.fileno(), where, len(where)):
            raise OSError(ctypes.get_errno(), "bind")

    def __enter__(self) -> OtherXsk:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def is_free(namespace: Namespace, interface: str) -> bool:
    try:
        OtherXsk(namespace, interface).socket.close()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def test_a_clean_stop_frees_the_queues(rig: Rig, tmp_path: Path) -> None:
    with rig.balancer("xdp", tmp_path) as balancer:
        assert [is_free(rig.host, name) for name in ("l0", "l1")] == [False, False]
        assert balancer.terminate() == 0
    for name in ("l0", "l1"):
        assert until(is_free, rig.host, name)


def test_a_restart_has_its_queues_at_once(rig: Rig, tmp_path: Path) -> None:
    with rig.balancer("xdp", tmp_path) as balancer:
        for end in (balancer.terminate, balancer.kill, balancer.terminate):
            end()
            balancer.start()
            assert balancer.status()["transmit"] == {"l0": "xdp", "l1": "xdp"}
        assert {each["event"] for each in balancer.logs()} - {"replies will not be seen"} == {"running", "stopped"}


def test_a_queue_in_use_is_waited_for(rig: Rig, tmp_path: Path) -> None:
    with ExitStack() as undo:
        other = undo.enter_context(OtherXsk(rig.host, "l1"))
        balancer = undo.enter_context(rig.balancer("auto", tmp_path))
        assert balancer.status()["transmit"] == {"l0": "xdp", "l1": "sendmmsg"}
        reach_backend(rig, balancer)
        assert settled(balancer)["transmitted_xdp"] == 0
        other.socket.close()
        assert until(lambda: balancer.status()["transmit"]["l1"] == "xdp")
        reach_backend(rig, balancer)
        assert settled(balancer)["transmitted_xdp"] > 0
        assert events(balancer) == ["AF_XDP refused; sending by sendmmsg", "AF_XDP socket open"]
        [refused] = (each for each in balancer.logs() if each["event"].startswith("AF_XDP refused"))
        assert refused["reason"] == BUSY


def test_a_queue_in_use_is_an_error_when_forced(rig: Rig, tmp_path: Path) -> None:
    with OtherXsk(rig.host, "l1"):
        refused(rig, tmp_path, f"l1: {BUSY}")
    assert until(is_free, rig.host, "l0"), "what was open is closed again"


def refused(rig: Rig, directory: Path, said: str, **options: Any) -> None:
    """With transmit: xdp, fastlb says this and ends."""
    balancer = rig.balancer("xdp", directory)
    done = fastlb("run", "-c", balancer.config_path, namespace=rig.host.name, **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fastlb: transmit: xdp cannot be had on {said}\n"
    assert not balancer.socket_path.exists()


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The environment of a program that is refused a part of AF_XDP."""
    library = tmp_path_factory.mktemp("refuse") / "refuse.so"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, HERE / "refuse.c"], check=True)
    return lambda part: {**os.environ, "LD_PRELOAD": str(library), "REFUSE": part}


REFUSALS = {
    "socket": "this kernel has no AF_XDP (Address family not supported by protocol)",
    "bind": "AF_XDP: cannot bind to queue 0 (Operation not supported)",
}


@pytest.mark.parametrize("part", REFUSALS)
def test_a_refusal_for_good(
    rig: Rig, tmp_path: Path, refusing: Callable[[str], dict[str, str]], part: str
) -> None:
    refused(rig, tmp_path, f"l0: {REFUSALS[part]}", env=refusing(part))
    balancer = rig.balancer("auto", tmp_path)
    start = balancer.start
    balancer.start = partial(start, env=refusing(part))  # type: ignore[method-assign]
    with balancer:
        reach_backend(rig, balancer)
        assert balancer.status()["transmit"] == {"l0": "sendmmsg", "l1": "sendmmsg"}
        time.sleep(1.0)
        said = [(each["event"], each.get("reason")) for each in balancer.logs()]
        said = [each for each in said if each[0] != "replies will not be seen"]  # l1 has no ring here
        assert said == [("AF_XDP refused; sending by sendmmsg", REFUSALS[part])] * 2 + [("running", None)]
        assert settled(balancer)["transmitted_xdp"] == 0


def test_a_kernel_without_transmit_metadata(
    rig: Rig, tmp_path: Path, refusing: Callable[[str], dict[str, str]]
) -> None:
    """AF_XDP it is, and only open checksums go by sendmmsg."""
    balancer = rig.balancer("xdp", tmp_path)
    start = balancer.start
    balancer.start = partial(start, env=refusing("metadata"))  # type: ignore[method-assign]
    with balancer:
        reach_backend(rig, balancer)
        single = Single(rig, balancer, "xdp")
        for offload, size, by_xdp in (("plain", 999, 2), ("partial", 999, 1), ("plain", LONGEST, 2)):
            whole = sized("nat", 4, "tcp", size)
            left, raw = leave_to_device(whole, offload)
            before = single.by_xdp()
            [got] = single.send(raw, left)
            assert got.seen == replace(
                take_apart(whole), eth_dst=got.seen.eth_dst, eth_src=BALANCER_MAC, dst=BACKEND[4], ttl=63,
                segment=got.seen.segment,
            )  # fmt: skip
            assert got.seen.segment[20:] == take_apart(whole).segment[20:]
            assert single.by_xdp() - before == by_xdp
