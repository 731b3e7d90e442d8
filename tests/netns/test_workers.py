"""workers.py, cores.py, engine.py: several workers share the traffic; what becomes of them, their links and queues.

Real traffic in the lab; single frames over the cables of rig.py, whose interfaces have as many queues as a test says.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastlb import guard
from tests.frames import ACK, SYN, TCP, frame
from tests.netns.balancer import Balancer, drops, fastlb, until, within
from tests.netns.rig import (
    BACKEND,
    CLIENT,
    PORT,
    VIP,
    Flood,
    Preload,
    Rig,
    build_preload,
    is_free,
    next_port,
    open_sockets,
    service,
    settled,
)
from tests.netns.wire import Wire, leave_to_device

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processor cores"),
]

CORES = frozenset(os.sched_getaffinity(0))
WORKERS = 2
SHARDS = 64
WAYS = [(kind, version, protocol) for kind in ("nat", "dsr") for version in (4, 6) for protocol in ("tcp", "udp")]


@pytest.fixture(autouse=True)
def on_all_cores() -> Iterator[None]:
    """A rig's frames come from one core; the next balancer shall have them all."""
    yield
    os.sched_setaffinity(0, CORES)


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Preload:
    return build_preload(tmp_path_factory.mktemp("preload"))


def make_rig(queues: int) -> Iterator[Rig]:
    with ExitStack() as undo:
        yield Rig(undo, queues)


@pytest.fixture(scope="module")
def wide() -> Iterator[Rig]:
    """With a queue for each worker."""
    yield from make_rig(WORKERS)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Rig]:
    """With fewer queues than workers."""
    yield from make_rig(1)


@pytest.fixture
def fresh() -> Iterator[Rig]:
    """A wide one, for a test that does not leave it as it was."""
    yield from make_rig(WORKERS)


# ---- flows and their workers


def owner(client: str, port: int) -> int:
    """The worker that has this client's shard: the words of the address, and the port, as they lie in the frame."""
    mixed = int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)
    for word in struct.unpack("=4I", ip_address(client).packed.rjust(16, b"\0")):
        mixed ^= word
    return ((mixed * 0x9E3779B1 & 0xFFFFFFFF) >> 26) * WORKERS // SHARDS


def port_of(worker: int, version: int = 4) -> int:
    """A fresh port of the client's, whose flows are this worker's."""
    return next(port for port in iter(next_port, 0) if owner(CLIENT[version], port) == worker)


class Flow(NamedTuple):
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


def arrivals(wire: Wire, count: int) -> Counter[tuple[object, ...]]:
    seen = [wire.receive().seen for _ in range(count)]
    return Counter((s.src, s.sport, s.dst, s.dport, "tcp" if s.protocol == TCP else "udp") for s in seen)


def packets(status: dict[str, Any]) -> list[int]:
    """By worker."""
    return [worker["packets"] for worker in status["workers"]]


def ways_out(status: dict[str, Any]) -> list[dict[str, str]]:
    """By worker."""
    return [worker["transmit"] for worker in status["workers"]]


def events(balancer: Balancer) -> list[str]:
    return [each["event"] for each in balancer.logs()]


# ---- real traffic


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("fastlb-workers-") as lab:
        yield lab


@pytest.mark.parametrize("mode", ["auto", "sendmmsg"])
def test_both_legs_of_every_flow_meet_one_worker(lab: Lab, tmp_path: Path, mode: str) -> None:
    """A worker refuses what belongs to another (wrong_worker), and knows no flow of another's."""
    path = "sendmmsg" if mode == "sendmmsg" else "xdp"
    with Balancer(lab.namespace("lb"), lab.config(workers=WORKERS, transmit=mode), tmp_path) as balancer:
        for vip in VIPS.values():
            got = lab.client("fetch", vip, "--count", 300)
            assert (got["answered"], got["ports"], sorted(got["backends"])) == (300, 300, list(BACKENDS)), got
            got = lab.client("echo", vip, "--port", 5000, "--count", 300)
            assert (got["answered"], got["torn"], got["errors"]) == (300, 0, {}), got
        shares = packets(settled(balancer))
        assert len(shares) == WORKERS
        assert min(shares) > 0.35 * sum(shares)
        for vip in VIPS.values():
            for transfer in ("download", "upload"):
                assert lab.client(transfer, vip, "--bytes", 10_000_000)["verified"]
        status = settled(balancer)
        workers, counters = status["workers"], status["counters"]
        assert (drops(status), counters["ring_drops"]) == ({}, 0)
        assert (counters["paths"]["scheduled"], counters["paths"]["maglev"]) == (len(VIPS) * 602, 0)
        assert counters["transmitted"] == counters["forwarded"] == counters["packets"] == sum(packets(status))
        assert ways_out(status) == [{"eth0": path, "eth1": path}] * WORKERS
        assert status["transmit"] == {"eth0": path, "eth1": path}
        for worker in workers:
            assert (worker["transmitted_xdp"] > 0.2 * worker["transmitted"]) == (path == "xdp")
        assert events(balancer) == ["running"]


# ---- queues

ONE_QUEUE = "it has no queue 1: each worker sends by a queue of its own"
REFUSED = "AF_XDP refused; sending by sendmmsg"


def said(balancer: Balancer) -> list[tuple[int, str, str]]:
    """What workers were refused: their number, the interface, the reason."""
    refusals = (each for each in balancer.logs() if each["event"] == REFUSED)
    return [(each["worker"], each["interface"], each["reason"]) for each in refusals]


def test_each_worker_sends_by_a_queue_of_its_own(wide: Rig, tmp_path: Path) -> None:
    places = list(itertools.product(("l0", "l1"), range(WORKERS)))
    with wide.balancer(tmp_path, workers=WORKERS, transmit="xdp") as balancer:
        wide.reach(balancer)
        assert ways_out(balancer.status()) == [{"l0": "xdp", "l1": "xdp"}] * WORKERS
        assert [is_free(wide.host, *place) for place in places] == [False] * len(places)
        before = settled(balancer)
        flows = new_flows(10)
        exchange(wide, flows, SYN)
        exchange(wide, flows)
        after = settled(balancer)
        each = 2 * (len(flows) + len(flows) // 2) // WORKERS  # the replies of nat
        for worker, earlier in zip(after["workers"], before["workers"], strict=True):
            gained = {name: worker[name] - earlier[name] for name in ("packets", "transmitted", "transmitted_xdp")}
            assert gained == {"packets": each, "transmitted": each, "transmitted_xdp": each}
        assert drops(after) == {}
        assert after["counters"]["paths"]["maglev"] == 0
        assert balancer.terminate() == 0
    for place in places:
        assert until(is_free, wide.host, *place)


def test_more_workers_than_queues(narrow: Rig, tmp_path: Path) -> None:
    with narrow.balancer(tmp_path, workers=WORKERS) as balancer:
        narrow.reach(balancer)
        status = balancer.status()
        assert status["transmit"] == {"l0": "xdp+sendmmsg", "l1": "xdp+sendmmsg"}
        assert ways_out(status) == [{"l0": "xdp", "l1": "xdp"}, {"l0": "sendmmsg", "l1": "sendmmsg"}]
        assert "l0 xdp+sendmmsg, l1 xdp+sendmmsg" in fastlb("status", "--socket", balancer.socket_path).stdout
        flows = new_flows(25)
        exchange(narrow, flows, SYN)
        exchange(narrow, flows)
        status = settled(balancer)
        assert [worker["transmitted_xdp"] for worker in status["workers"]] == [status["workers"][0]["transmitted"], 0]
        assert min(packets(status)) >= 2 * 25 * 12
        assert (drops(status), status["counters"]["paths"]["maglev"]) == ({}, 0)
        assert said(balancer) == [(1, "l0", ONE_QUEUE), (1, "l1", ONE_QUEUE)]


def test_more_workers_than_queues_is_an_error_when_xdp_is_forced(narrow: Rig, tmp_path: Path) -> None:
    balancer = narrow.balancer(tmp_path, workers=WORKERS, transmit="xdp")
    done = fastlb("run", "-c", balancer.config_path, namespace=narrow.host.name)
    assert (done.returncode, done.stderr) == (1, f"fastlb: transmit: xdp cannot be had on l0: {ONE_QUEUE}\n")
    assert leftovers(narrow, balancer) == []


def leftovers(rig: Rig, balancer: Balancer) -> list[str]:
    """What a fastlb that has ended may not leave behind."""
    left = [f"guard on {found.interface}" for found in within(rig.host.name, guard.show)]
    sockets = within(rig.host.name, Path("/proc/thread-self/net/packet").read_text)
    left += [f"packet socket: {line}" for line in sockets.splitlines()[1:]]
    return left + [str(balancer.socket_path)] * balancer.socket_path.exists()


FALLBACK = {  # what is refused: the path, what is said by each worker of each interface
    "socket": ("sendmmsg", "this kernel has no AF_XDP (Address family not supported by protocol)"),
    "metadata": ("xdp", None),
}


@pytest.mark.parametrize("part", FALLBACK)
def test_a_kernel_without_a_part_of_af_xdp(wide: Rig, tmp_path: Path, preload: Preload, part: str) -> None:
    path, reason = FALLBACK[part]
    with wide.balancer(tmp_path, preload(REFUSE=part), workers=WORKERS) as balancer:
        wide.reach(balancer)
        assert ways_out(balancer.status()) == [{"l0": path, "l1": path}] * WORKERS
        flows, before = new_flows(10), settled(balancer)
        exchange(wide, flows, SYN)
        exchange(wide, flows)
        for flow in flows:
            wide.client.send(*reversed(leave_to_device(flow.request(ACK), "partial")))
        assert arrivals(wide.servers, len(flows)) == Counter(flow.at_backend() for flow in flows)
        after = settled(balancer)
        by_xdp = 3 * len(flows) if path == "xdp" else 0  # two exchanges and their replies; no open checksum
        assert after["counters"]["transmitted_xdp"] - before["counters"]["transmitted_xdp"] == by_xdp
        assert after["counters"]["transmitted"] - before["counters"]["transmitted"] == 4 * len(flows)
        assert (drops(after), after["counters"]["paths"]["maglev"]) == ({}, 0)
        assert said(balancer) == [(at, name, reason) for at in range(WORKERS) for name in ("l0", "l1") if reason]
        assert events(balancer) == [REFUSED] * len(said(balancer)) + ["running"]


# ---- cores


class Task(NamedTuple):
    """A thread, as the kernel shows it."""

    name: str
    cores: frozenset[int]
    nice: int


def tasks(balancer: Balancer) -> list[Task]:
    numbers = [int(task.name) for task in Path(f"/proc/{balancer.pid}/task").iterdir()]
    found = [
        Task(
            Path(f"/proc/{balancer.pid}/task/{number}/comm").read_text().strip(),
            frozenset(os.sched_getaffinity(number)),
            os.getpriority(os.PRIO_PROCESS, number),
        )
        for number in numbers
    ]
    return sorted(found, key=lambda task: task.name)


@pytest.mark.parametrize("workers", [1, len(CORES)], ids=["one", "all cores"])
def test_no_other_thread_on_a_workers_core(wide: Rig, tmp_path: Path, workers: int) -> None:
    """Unless there are no others: then every other thread has the lowest priority."""
    with wide.balancer(tmp_path, workers=workers) as balancer:
        kept = sorted(CORES)[-workers:]
        place = (CORES - set(kept), 0) if workers < len(CORES) else (CORES, 19)
        for _ in range(2):
            found = tasks(balancer)
            own = [task for task in found if task.name.startswith("worker-")]
            assert own == [Task(f"worker-{at}", frozenset({core}), 0) for at, core in enumerate(kept)]
            assert len(found) > len(own)
            assert {task[1:] for task in found if task not in own} == {place}
            assert [worker["core"] for worker in balancer.status()["workers"]] == kept
            assert balancer.reload().returncode == 0


# ---- workers that die, or do not come back


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """See refuse.c."""
    directory = tmp_path / "faults"
    directory.mkdir()
    return directory


def happens(faults: Path, name: str) -> float:
    """Have it happen; returns when it did."""
    (faults / name).touch()
    assert until(lambda: not (faults / name).exists())
    return time.monotonic()


DIED, AGAIN = "a worker has died; starting the workers again", "a worker has died 4 times within 60 s; stopping"


def test_a_worker_that_dies_is_replaced(wide: Rig, tmp_path: Path, preload: Preload, faults: Path) -> None:
    """And with it the other, as they are a group. Flows are known, and nothing of them reaches the host meanwhile."""
    with wide.balancer(tmp_path, preload(FAULTS=str(faults)), workers=WORKERS) as balancer:
        wide.reach(balancer)
        flows = new_flows(25)
        exchange(wide, flows, SYN)
        before, guards, sockets, threads = settled(balancer), guards_of(wide), open_sockets(balancer), tasks(balancer)
        for number in range(WORKERS):
            died = happens(faults, f"die-{number}")
            assert until(lambda: events(balancer).count(DIED) == number + 1)  # noqa: B023
            assert time.monotonic() - died < 1.0
            assert until(lambda: ways_out(balancer.status()) == [{"l0": "xdp", "l1": "xdp"}] * WORKERS)
            exchange(wide, flows)
            after = settled(balancer)
            counters = after["counters"]
            assert (drops(after), counters["paths"]["scheduled"]) == ({}, before["counters"]["paths"]["scheduled"])
            assert counters["transmitted"] == counters["forwarded"]
            assert min(packets(after)) > min(packets(before))
        assert [each["workers"] for each in balancer.logs() if each["event"] == DIED] == [[0], [1]]
        assert guards_of(wide) == guards
        assert until(lambda: open_sockets(balancer) <= sockets and set(tasks(balancer)) <= set(threads))
        assert [each for each in tasks(balancer) if "worker" in each.name] == [
            each for each in threads if "worker" in each.name
        ]
        assert balancer.terminate() == 0
    assert leftovers(wide, balancer) == []


def guards_of(rig: Rig) -> list[guard.GuardInfo]:
    return within(rig.host.name, guard.show)


def test_a_worker_that_dies_again_and_again(wide: Rig, tmp_path: Path, preload: Preload, faults: Path) -> None:
    with wide.balancer(tmp_path, preload(FAULTS=str(faults)), workers=WORKERS) as balancer:

        def has_ended() -> bool:
            (faults / "die-1").touch()
            return not balancer.running

        assert until(has_ended)
        assert balancer.wait() == 1
        assert events(balancer) == ["running", DIED, DIED, DIED, f"fastlb: {AGAIN}"]
        assert leftovers(wide, balancer) == []


STUCK, LEFT = "a worker is stuck; stopping", "workers do not stop; leaving without them"


@pytest.mark.parametrize("dies", [False, True], ids=["stuck", "stuck while the other dies"])
def test_a_worker_that_hangs(wide: Rig, tmp_path: Path, preload: Preload, faults: Path, dies: bool) -> None:
    """The other one works on until fastlb ends, which has to be without the threads that hang."""
    changes = {"workers": WORKERS, "vip_address": "interface"}
    with wide.balancer(tmp_path, preload(FAULTS=str(faults)), **changes) as balancer:
        wide.reach(balancer)
        happens(faults, "hang-0")
        flows = [flow for flow in new_flows(5) if owner(CLIENT[flow.version], flow.port) == 1]
        exchange(wide, flows, SYN)
        if dies:
            happens(faults, "die-1")
        assert until(lambda: not balancer.running)
        assert balancer.wait() == 1
        assert events(balancer) == ["running", DIED if dies else STUCK, LEFT]
        assert balancer.logs()[-1]["workers"] == [0]
        assert leftovers(wide, balancer) == []
        assert held_vips(wide) == []


def held_vips(rig: Rig) -> list[str]:
    found = rig.host.rtnl(lambda ipr: [each.get_attr("IFA_ADDRESS") for each in ipr.get_addr()])
    return [address for address in found if address in VIP.values()]


# ---- links

GONE, NEW = "interface is gone; waiting for it", "an interface is new; opening the rings again"


class Floods:
    """A flow of each worker, under way until the end of the block."""

    def __init__(self, rig: Rig, undo: ExitStack) -> None:
        self._rig = rig
        self.all = [undo.enter_context(Flood(rig, port_of(worker))) for worker in range(WORKERS)]

    def go_on(self) -> bool:
        """Whether more frames of both arrive, of those that are sent from now on."""
        first = [flood.sent for flood in self.all]
        return until(lambda: self._collect() and all(map(_passed, self.all, first)))

    def _collect(self) -> bool:
        frames = self._rig.servers.arrived()
        for flood in self.all:
            flood.arrived += flood.numbers(frames)
        return all(flood.arrived for flood in self.all)

    def in_order(self) -> bool:
        """And none twice."""
        return all(flood.arrived == sorted(set(flood.arrived)) for flood in self.all)


def _passed(flood: Flood, number: int) -> bool:
    return flood.arrived[-1] > number + 100


def all_xdp(balancer: Balancer) -> bool:
    return ways_out(balancer.status()) == [{"l0": "xdp", "l1": "xdp"}] * WORKERS


def intact(rig: Rig, balancer: Balancer, floods: Floods) -> None:
    """All flows are on their way again, on both links and by both workers; those of the floods were never new."""
    assert floods.in_order()
    status = settled(balancer)
    assert status["counters"]["paths"]["scheduled"] == len(floods.all) + 2  # and what reached the backends first
    assert status["counters"]["transmitted"] == status["counters"]["forwarded"] - late_drops(status)
    rig.place_clients()
    rig.reach(balancer, ("hairpin", 4), ("dsr", 4))
    flows = [flow for flow in new_flows(10) if flow.version == 4]  # a link that goes down loses its IPv6 addresses
    before = packets(status)
    exchange(rig, flows, SYN)
    exchange(rig, flows)
    after = settled(balancer)
    grown = [now - then for now, then in zip(packets(after), before, strict=True)]
    assert min(grown) == 3 * len(flows) // WORKERS


def late_drops(status: dict[str, Any]) -> int:
    """Of frames that were to be forwarded."""
    return sum(count for name, count in drops(status).items() if name.startswith("tx_"))


@pytest.mark.parametrize("name", ["l0", "c0", "l1", "s0"])
def test_a_link_that_goes_down_and_up(fresh: Rig, tmp_path: Path, name: str) -> None:
    """Either end of either cable, under traffic. The kernel takes the group apart, and puts it together again."""
    side = {"l0": fresh.host, "c0": fresh.client_side, "l1": fresh.host, "s0": fresh.server_side}[name]
    with fresh.balancer(tmp_path, workers=WORKERS) as balancer, ExitStack() as undo:
        fresh.reach(balancer)
        floods = Floods(fresh, undo)
        for _ in range(3):
            assert floods.go_on()
            before = balancer.status()
            side.set_link(name, state="down")
            if name in ("l0", "c0"):
                settled(balancer)
            else:
                enough = before["counters"]["drops"]["no_route"] + 100
                assert until(lambda: balancer.status()["counters"]["drops"]["no_route"] > enough)  # noqa: B023
            side.set_link(name, state="up")
            assert until(all_xdp, balancer)
            before = balancer.status()
            assert floods.go_on()
            after = balancer.status()
            for worker, earlier in zip(after["workers"], before["workers"], strict=True):
                assert worker["packets"] > earlier["packets"]
                assert worker["transmitted_xdp"] > earlier["transmitted_xdp"]
        undo.close()
        intact(fresh, balancer, floods)
        assert drops(balancer.status()).keys() <= {"no_route", "no_neighbour", "tx_link_down"}
        assert not {DIED, GONE, NEW} & set(events(balancer))
        assert balancer.terminate() == 0


@pytest.mark.parametrize("name", ["l0", "l1"])
def test_an_interface_that_is_made_again(fresh: Rig, tmp_path: Path, name: str) -> None:
    connect = {"l0": fresh.connect_client, "l1": fresh.connect_servers}[name]
    with fresh.balancer(tmp_path, workers=WORKERS) as balancer, ExitStack() as undo:
        fresh.reach(balancer)
        floods = Floods(fresh, undo)
        for number in range(1, 4):
            assert floods.go_on()
            fresh.cut(name)
            assert until(lambda: events(balancer).count(GONE) == number)  # noqa: B023
            connect()
            assert until(lambda: events(balancer).count(NEW) == number)  # noqa: B023
            assert until(all_xdp, balancer)
            assert floods.go_on()
        undo.close()
        intact(fresh, balancer, floods)
        assert drops(balancer.status()).keys() <= {"no_route", "no_neighbour", "tx_link_down", "tx_error"}
        assert sorted(found.interface for found in guards_of(fresh)) == ["l0", "l1"]
        assert balancer.terminate() == 0
    assert leftovers(fresh, balancer) == []


@pytest.mark.parametrize("names", [["l1"], ["l0"], ["l0", "l1"]], ids="+".join)
def test_an_interface_that_is_down_at_the_start(fresh: Rig, tmp_path: Path, names: list[str]) -> None:
    """A group needs an interface that is up: the rings on this one wait for that."""
    services = [service("nat", 4, protocol) for protocol in ("tcp", "udp")]  # dsr backends must be on-link
    for name in names:
        fresh.host.set_link(name, state="down")
    with fresh.balancer(tmp_path, workers=WORKERS, services=services) as balancer:
        down = [each["interface"] for each in balancer.logs() if each["event"] == "interface is down"]
        assert down == names
        assert fastlb("status", "--socket", balancer.socket_path).returncode == 0
        for name in names:
            fresh.host.set_link(name, state="up")
        assert until(all_xdp, balancer)
        fresh.place_clients()
        fresh.reach(balancer, ("nat", 4))
        flows = [flow for flow in new_flows(10) if (flow.kind, flow.version) == ("nat", 4)]
        exchange(fresh, flows, SYN)
        exchange(fresh, flows)
        status = settled(balancer)
        assert drops(status).keys() <= {"no_route", "no_neighbour"}
        assert (status["counters"]["paths"]["maglev"], NEW in events(balancer)) == (0, True)
