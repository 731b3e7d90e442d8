"""workers.py, cpus.py, packet_path.py: several workers share the traffic; what becomes of them, their links and queues.

Real traffic in the lab; single frames over the cables of rig.py, whose interfaces have as many queues as a test says.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastlb.control.client import call
from tests.frames import ACK, SYN, frame
from tests.netns.balancer import Balancer, drops, fastlb, until
from tests.netns.rig import (
    BACKEND,
    CLIENT,
    CORES,
    PORT,
    RING,
    VIP,
    WORKERS,
    Flood,
    Preload,
    Rig,
    arrivals,
    exchange,
    guards_of,
    is_free,
    leftovers,
    make_rig,
    new_flows,
    open_sockets,
    owner,
    port_of,
    receive,
    service,
    settled,
)
from tests.netns.wire import OFFLOADS, SEGMENT, Wire, leave_to_device, payload

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, own_prefix  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs two processor cores"),
]


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


# ---- what the status says of each worker


def packets(status: dict[str, Any]) -> list[int]:
    """By worker."""
    return [worker["packets"] for worker in status["workers"]]


def ways_out(status: dict[str, Any]) -> list[dict[str, str]]:
    """By worker."""
    return [worker["transmit"] for worker in status["workers"]]


# Of backends that hold no VIP, and answer nothing here.
OF_THE_WIRING = ("replies may be lost", "no client gets past its SYN", "no replies from a backend")


def events(balancer: Balancer) -> list[str]:
    return [each["event"] for each in balancer.logs()]


# ---- real traffic


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "workers-") as lab:
        yield lab


@pytest.mark.parametrize("mode", ["auto", "sendmmsg"])
def test_both_legs_of_every_flow_meet_one_worker(lab: Lab, tmp_path: Path, mode: str) -> None:
    """A worker refuses what belongs to another (wrong_worker), and knows no flow of another's."""
    path = "sendmmsg" if mode == "sendmmsg" else "xdp"
    with Balancer(lab.namespace("lb"), lab.config(workers=WORKERS, transmit=mode), tmp_path) as balancer:
        for vip in VIPS.values():
            got = lab.client("fetch", vip, "--count", 200)
            assert (got["answered"], got["ports"], sorted(got["backends"])) == (200, 200, list(BACKENDS)), got
            got = lab.client("echo", vip, "--port", 5000, "--count", 200)
            assert (got["answered"], got["torn"], got["errors"]) == (200, 0, {}), got
        shares = packets(settled(balancer))
        assert len(shares) == WORKERS
        assert min(shares) > 0.35 * sum(shares)
        for vip in VIPS.values():
            assert lab.client("download", vip, "--bytes", 10_000_000)["verified"]
        status = settled(balancer)
        workers, counters = status["workers"], status["counters"]
        assert (drops(status), counters["ring_drops"]) == ({}, 0)
        assert (counters["paths"]["scheduled"], counters["paths"]["maglev"]) == (len(VIPS) * 401, 0)
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
            left, raw = leave_to_device(flow.request(ACK), "partial")
            wide.client.send(raw, left)
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
    found = []
    for task in Path(f"/proc/{balancer.pid}/task").iterdir():
        number = int(task.name)
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            name, allowed = (task / "comm").read_text().strip(), frozenset(os.sched_getaffinity(number))
            found.append(Task(name, allowed, os.getpriority(os.PRIO_PROCESS, number)))
    return sorted(found, key=lambda task: task.name)


@pytest.mark.parametrize("workers", [1, len(CORES)], ids=["one", "all cores"])
def test_no_other_thread_on_a_workers_core(wide: Rig, tmp_path: Path, workers: int) -> None:
    """Unless there are no others: then every other thread has the lowest priority."""
    with wide.balancer(tmp_path, workers=workers) as balancer:
        kept = sorted(CORES)[-workers:]
        nice = os.getpriority(os.PRIO_PROCESS, 0)  # the balancer inherits it
        place = (CORES - set(kept), nice) if workers < len(CORES) else (CORES, 19)
        for _ in range(2):
            found = tasks(balancer)
            own = [task for task in found if task.name.startswith("worker-")]
            assert own == [Task(f"worker-{at}", frozenset({core}), nice) for at, core in enumerate(kept)]
            assert len(found) > len(own)
            assert {task[1:] for task in found if task not in own} == {place}
            assert [worker["core"] for worker in balancer.status()["workers"]] == kept
            call(str(balancer.socket_path), "reload")


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
        told = [event for event in events(balancer) if event not in OF_THE_WIRING]
        assert told == ["running", DIED if dies else STUCK, LEFT]
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

    def __init__(self, rig: Rig, balancer: Balancer, undo: ExitStack) -> None:
        self._rig = rig
        self.all = [undo.enter_context(Flood(rig, port_of(worker))) for worker in range(WORKERS)]
        assert self.go_on()
        self.scheduled = balancer.status()["counters"]["paths"]["scheduled"]

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
    assert status["counters"]["paths"]["scheduled"] == floods.scheduled
    assert status["counters"]["transmitted"] == status["counters"]["forwarded"] - late_drops(status)
    rig.place_clients()
    rig.reach(balancer, ("hairpin", 4), ("dsr", 4))
    flows = [flow for flow in new_flows(10) if flow.version == 4]  # a link that goes down loses its IPv6 addresses
    before = packets(status)
    exchange(rig, flows, SYN)
    exchange(rig, flows)
    new = [after - earlier for after, earlier in zip(packets(settled(balancer)), before, strict=True)]
    assert min(new) >= 3 * len(flows) // WORKERS  # the replies of nat; late frames of the floods


def late_drops(status: dict[str, Any]) -> int:
    """Of frames that were to be forwarded."""
    return sum(count for name, count in drops(status).items() if name.startswith("tx_"))


@pytest.mark.parametrize("name", ["l0", "c0", "l1", "s0"])
def test_a_link_that_goes_down_and_up(fresh: Rig, tmp_path: Path, name: str) -> None:
    """Either end of either cable, under traffic. The kernel takes the group apart, and puts it together again."""
    side = {"l0": fresh.host, "c0": fresh.client_side, "l1": fresh.host, "s0": fresh.server_side}[name]
    with fresh.balancer(tmp_path, workers=WORKERS) as balancer, ExitStack() as undo:
        fresh.reach(balancer)
        floods = Floods(fresh, balancer, undo)
        for _ in range(2):
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
        floods = Floods(fresh, balancer, undo)
        for number in (1, 2):
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


def test_interfaces_that_vanish_while_the_rings_are_opened(fresh: Rig, tmp_path: Path) -> None:
    """Faster than fastlb looks, and at any moment of its work."""
    with fresh.balancer(tmp_path, workers=WORKERS) as balancer:
        fresh.reach(balancer)
        for _ in range(5):
            for name, connect in (("l0", fresh.connect_client), ("l1", fresh.connect_servers)):
                fresh.cut(name)
                connect()
        assert until(all_xdp, balancer)
        fresh.reach(balancer, ("hairpin", 4), ("dsr", 4), ("dsr", 6))
        flows = new_flows(10)
        exchange(fresh, flows, SYN)
        exchange(fresh, flows)
        assert drops(balancer.status()).keys() <= {"no_route", "no_neighbour"}
        assert balancer.terminate() == 0
    assert leftovers(fresh, balancer) == []


@pytest.mark.parametrize("names", [["l1"], ["l0", "l1"]], ids="+".join)
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


# ---- tags

TAGS = [((0x8100, 5),), ((0x88A8, 7),), ((0x88A8, 7), (0x8100, 0x6005))]
TAGGED = [("nat", 4), ("nat", 6), ("dsr", 4), ("dsr", 6), ("hairpin", 4)]
PATHS = [  # with one worker and open blocks: see test_transmit.py
    (mode, open_blocks, workers)
    for mode, open_blocks, workers in itertools.product(("xdp", "sendmmsg"), (True, False), (1, WORKERS))
    if workers > 1 or not open_blocks
]


class Crossing(NamedTuple):
    """A frame without tags, from one end to another; ``kept``: it stays on its link, and so does its tag."""

    sender: Wire
    receiver: Wire
    ends: tuple[str, int, str, int]  # source and destination
    after: tuple[str, int, str, int]
    kept: bool = False


def crossings(rig: Rig, kind: str, version: int, port: int) -> list[Crossing]:
    """What a client asks, and what a nat backend answers."""
    client, vip, backend = (CLIENT[version], port), (VIP[kind, version], PORT), (BACKEND[version], PORT)
    if kind == "hairpin":
        return [Crossing(rig.client, rig.client, client + vip, client + vip, kept=True)]
    if kind == "dsr":
        return [Crossing(rig.client, rig.servers, client + vip, client + vip)]
    return [
        Crossing(rig.client, rig.servers, client + vip, client + backend),
        Crossing(rig.servers, rig.client, backend + client, vip + client),
    ]


def cross(crossing: Crossing, tags: tuple[tuple[int, int], ...], offload: str) -> None:
    """Tagged, and with this much left to the device."""
    body = payload(5 * SEGMENT if offload == "gso" else 600)
    left, raw = leave_to_device(frame(*crossing.ends, flags=ACK, payload=body, tags=tags), offload)
    crossing.sender.send(raw, left)
    got = receive(crossing.receiver)
    seen = got.seen
    assert (seen.src, seen.sport, seen.dst, seen.dport) == crossing.after
    assert (seen.tags, seen.segment[20:]) == (tags if crossing.kept else (), body)
    assert (got.offload.gso_type, got.offload.gso_size) == (left.gso_type, left.gso_size)


@pytest.mark.parametrize(("mode", "open_blocks", "workers"), PATHS)
def test_vlan_tags(wide: Rig, tmp_path: Path, mode: str, open_blocks: bool, workers: int) -> None:
    """A tag stays on its link; which worker has a flow does not depend on it."""
    changes: dict[str, Any] = {"workers": workers, "transmit": mode, "ring": RING | {"open_blocks": open_blocks}}
    with wide.balancer(tmp_path, **changes) as balancer:
        wide.reach(balancer)
        before = settled(balancer)
        crossed: Counter[str] = Counter()
        for (kind, version), tags, offload, worker in itertools.product(TAGGED, TAGS, OFFLOADS, range(WORKERS)):
            for crossing in crossings(wide, kind, version, port_of(worker, version)):
                cross(crossing, tags, offload)
                crossed[offload] += 1
        after = settled(balancer)
        gained = {name: after["counters"][name] - before["counters"][name] for name in before["counters"]
                  if name.startswith("transmitted") or name == "read_early"}  # fmt: skip
        assert gained["transmitted"] == crossed.total() == len(TAGS) * len(OFFLOADS) * WORKERS * 7
        assert gained["transmitted_xdp"] == (crossed.total() - crossed["gso"] if mode == "xdp" else 0)
        assert (gained["read_early"] > 0, after["open_blocks"]) == (open_blocks, open_blocks)
        assert drops(after) == {}
        assert [count > crossed.total() // 3 for count in packets(after)] == [True] * workers
