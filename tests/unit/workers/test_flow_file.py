"""flow_file.py and takeover.pxd: what one process leaves, another one takes over, or sets aside with a reason.

A `Life` is what a process has of it, without rings: the file, pipelines over it, frames. Files are in /dev/shm.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import structlog

from fastlb._core import FlowMemory, Pipeline, Routes, flow_layout
from fastlb.config import Config
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.saved import restored_states, saved_states
from fastlb.plan.tables import services_table
from fastlb.workers import flow_file, flow_places
from fastlb.workers.flow_file import FlowFileError, FlowFileUsedError, open_file
from fastlb.workers.flow_records import HEAD_BYTES, Head, pack_head, parse_head
from fastlb.workers.workers import open_pipelines
from tests import tables
from tests.balancers import BACKENDS, CLIENT, VIP, config, flags, reply_to, service
from tests.frames import frame, take_apart

PAGE, LARGE_PAGE = 4096, 2 << 20
ENTRY, TUPLE, BUCKET = 16, 48, 64
SNAT = ["10.3.0.5", "fd00:3::5"]
MODES = ("nat", "fullnat", "dsr", "ipip")
SERVICES = [service(mode, vip=f"203.0.113.{10 + at}") for at, mode in enumerate(MODES)]
SERVICES += [service("fullnat", 6, "udp"), service("dsr", 6)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastlb-test-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_places, "LOCK_PATIENCE", 0.0)


def settings(folder: Path, *services: dict[str, Any], **changes: Any) -> Config:
    plain = {"snat": SNAT, "flow_file": str(folder / "flows"), "maglev_size": 251}
    return config(*(services or SERVICES), **{**plain, **changes})


class Life:
    """One process: from the opening of its file on."""

    def __init__(self, settings: Config, workers: int = 1) -> None:
        with structlog.testing.capture_logs() as self.logs:
            self._open(settings, workers)

    def _open(self, settings: Config, workers: int) -> None:
        self.ids, self.standings, memory = BackendIds(), BackendStates(), None
        self.follow(settings)
        file = open_file(settings, self.saved())
        assert file is not None
        self.file = file
        if file.found is not None:
            self.ids = BackendIds.restored(file.found["ids"], 0.0)
            self.standings = restored_states(file.found, 0.0)
            self.follow(settings)
            memory = file.take_over(settings, self.services, self.ids.highest)
            file.save(self.saved())
        self.pipelines = open_pipelines(settings, workers, memory or file.memory(settings))
        for pipeline in self.pipelines:
            pipeline.publish(self.services, routes_for(self.plans))

    def follow(self, settings: Config) -> None:
        self.standings.apply_config(settings, 0.0)
        self.plans = plan_services(settings, self.ids, 0.0, self.standings)
        self.services = services_table(settings, self.plans)
        self.keys = {member.id: (plan.name, member.key) for plan in self.plans for member in plan.members}

    def saved(self) -> dict[str, Any]:
        return {"ids": self.ids.saved(), **saved_states(self.standings)}

    def send(self, raw: bytes) -> tuple[str, list[bytes], tuple[str, str] | None]:
        """(reason, what would be sent, service and backend), by whichever worker has the packet's shard."""
        for pipeline in self.pipelines:
            _, reason, sent, backend, _ = pipeline.process([raw], clock())[0]
            if reason != "wrong_worker":
                return reason, sent, self.keys.get(backend)
        raise AssertionError("no worker has this shard")

    def flows(self) -> set[tuple[Any, ...]]:
        """Without the time of the last packet."""
        return {flow[:7] for flow in tables.flows(self.pipelines[0])}

    def ports(self) -> dict[tuple[int, int], int]:
        """Source ports that are taken, by IP version and protocol."""
        found = self.pipelines[0].source_ports()
        return {(version, protocol): taken for version, protocol, taken, _ in found}

    def counts_agree(self) -> bool:
        """Do the counts of entries, and of each backend's flows that are not over, equal what a walk finds?"""
        walked = Counter(flow[5] for flow in self.flows() if flow[6] not in ("closing", "reset"))
        counted = Counter({
            number: sum(pipeline.backend_stats(number)["active_flows"] for pipeline in self.pipelines)
            for number in range(self.ids.highest + 1)
        })  # fmt: skip
        return +counted == walked and self.pipelines[0].flow_count() == len(self.flows())

    def said(self) -> str:
        """The reason why a file was set aside, or "taken over", or "" for a new one."""
        for line in self.logs:
            if "set aside" in line["event"]:
                return str(line["reason"])
        return "taken over" if any(line["event"] == "flows taken over" for line in self.logs) else ""

    def end(self, keep: bool = True) -> None:
        """As a kill does: nothing more is written."""
        self.pipelines = []
        self.file.close(keep)


def routes_for(plans: list[Plan]) -> Routes:
    """One gateway to everywhere."""
    everywhere = [(ip_network("0.0.0.0/0"), 1, 0), (ip_network("::/0"), 1, 0)]
    members = [member.id for plan in plans for member in plan.members]
    sources = dict.fromkeys(members, ip_network("10.3.0.2"))
    gateway = (b"\2\0\0\0\1\0", b"\2\0\0\0\0\1", 1, 1500, None)
    return Routes([gateway], everywhere, {}, dict.fromkeys(members, 0), sources)


def clock() -> int:
    return time.monotonic_ns() // 1_000_000 % (1 << 32)


def opening(at: int, client: int, letters: str = "S", vip: str = "") -> bytes:
    """A packet of a client of the service at this position of SERVICES, or to another ``vip``."""
    spec = SERVICES[at]
    vip = vip or spec["vip"]
    host = f"fd00:1::{client:x}" if ":" in vip else f"10.1.{client >> 8}.{client & 255}"
    return frame(host, 1024 + client, vip, 80, spec["protocol"], flags=flags(letters))


def fill(life: Life, clients: int = 40) -> dict[tuple[int, int], tuple[str, str] | None]:
    """Open flows of every service; which backend has which."""
    placed = {}
    for at in range(len(SERVICES)):
        for client in range(clients):
            reason, sent, placed[at, client] = life.send(opening(at, client))
            assert reason == "scheduled"
            if SERVICES[at]["forward"] in ("nat", "fullnat"):
                assert life.send(reply_to(sent[0]))[0] == "conntrack"
    return placed


# --- taking over ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (3, 2), (2, 64)])
def test_every_flow_goes_on(folder: Path, before: int, after: int) -> None:
    """With the same number of workers or another: the same backends, source ports, states and counts."""
    here = settings(folder)
    first = Life(here, before)
    placed = fill(first)
    sources = {(at, client): source_of(first, at, client) for at, client in placed if is_full(at)}
    flows, ports = first.flows(), first.ports()
    first.end()

    second = Life(here, after)
    assert second.said() == "taken over"
    assert (second.flows(), second.ports()) == (flows, ports)
    assert second.counts_agree()
    for (at, client), owner in placed.items():
        assert second.send(opening(at, client, "A"))[::2] == ("conntrack", owner)
    assert {key: source_of(second, *key) for key in sources} == sources
    assert second.counts_agree()
    second.end(keep=False)
    assert list(folder.iterdir()) == []


def is_full(at: int) -> bool:
    return bool(SERVICES[at]["forward"] == "fullnat")


def source_of(life: Life, at: int, client: int) -> tuple[str, int]:
    """The source address and port of a flow of fullnat, and the check that answers to it come through."""
    reason, sent, _ = life.send(opening(at, client, "A"))
    seen = take_apart(sent[0])
    back, answer, _ = life.send(reply_to(sent[0], "A"))
    assert (reason, back) == ("conntrack", "conntrack")
    to_client = take_apart(answer[0])
    assert (to_client.src, to_client.dport) == (SERVICES[at]["vip"], 1024 + client)
    return seen.src, seen.sport


def test_a_taken_port_is_given_to_nobody_else(folder: Path) -> None:
    """Until all 64 ports of a shard are in use, and from then on when they are free again."""
    here = settings(folder, SERVICES[1], snat=SNAT[:1], snat_ports="2048-6143")
    first = Life(here)
    used = [full_source(first, client) for client in range(300)]
    for client in range(0, 300, 3):
        first.send(opening(1, client, "R"))
    first.end()

    second = Life(here)
    used += [full_source(second, client) for client in range(300, 900)]
    assert len(set(used)) == len(used), "a port that was free last longest is taken next"
    assert second.ports()[4, 6] == 900
    assert second.counts_agree()
    second.end(keep=False)


def full_source(life: Life, client: int) -> tuple[str, int]:
    reason, sent, _ = life.send(opening(1, client))
    assert reason == "scheduled"
    seen = take_apart(sent[0])
    return seen.src, seen.sport


def test_every_port_is_taken_in_the_end(folder: Path) -> None:
    """None is lost, none is there twice: as many flows as ports, half of them from the life before."""
    here = settings(folder, SERVICES[1], snat=SNAT[:1], snat_ports="2048-2175")
    sources: list[tuple[str, int]] = []
    clients = iter(range(3000))
    for most in (50, 100, 128):
        life = Life(here, 2)
        while len(sources) < most:
            client = next(clients)
            reason, sent, _ = life.send(opening(1, client))
            if reason == "scheduled":
                sources.append((take_apart(sent[0]).src, take_apart(sent[0]).sport))
            else:
                assert reason == "no_source_port"
        assert life.counts_agree()
        life.end()
    assert len(sources) == 128
    assert len(set(sources)) == 128


def test_three_lives(folder: Path) -> None:
    """What was taken over is left again, with what came meanwhile."""
    here = settings(folder)
    life = Life(here)
    placed = fill(life, 10)
    for letters in ("S", "S"):
        life.end()
        life = Life(here, 2)
        client = 100 + len(placed)
        _, _, placed[0, client] = life.send(opening(0, client, letters))
    assert {key: life.send(opening(*key, "A"))[2] for key in placed} == placed
    life.end(keep=False)


# --- another configuration --------------------------------------------------------------------------------------------


def without(spec: dict[str, Any], host: str) -> dict[str, Any]:
    return {**spec, "backends": [each for each in spec["backends"] if each["address"] != host]}


def test_backends_keep_their_ids(folder: Path) -> None:
    """In another order, with another one in front, without one: a flow's backend is found by its name."""
    first = Life(settings(folder))
    placed = fill(first)
    first.end()
    gone = BACKENDS[4][0]
    changed = [without(spec, gone) | {"on_leave": "rehash"} for spec in reversed(SERVICES)]
    changed[-1]["backends"] = [{"address": "10.3.0.9", "port": 8080}, *changed[-1]["backends"]]
    second = Life(settings(folder, *changed), 2)
    stay = {key: owner for key, owner in placed.items() if owner is not None and gone not in owner[1]}
    assert {key: second.send(opening(*key, "A"))[2] for key in stay} == stay
    assert second.counts_agree()
    line = what_was_taken_over(second)
    assert (line["flows"], line["of_no_backend"], line["damaged"]) == (len(stay), len(placed) - len(stay), 0)
    second.end(keep=False)


@pytest.mark.parametrize(("policy", "reason"), [("keep", "conntrack"), ("rehash", "maglev"), ("reset", "reset")])
def test_a_backend_that_left_meanwhile(folder: Path, policy: str, reason: str) -> None:
    """As after a reload: its service's on_leave decides of its flows, and does so in the life after, too."""
    spec = service("nat", on_leave=policy)
    gone = BACKENDS[4][0]
    life = Life(settings(folder, spec))
    placed = {client: life.send(opening(0, client, vip=VIP[4]))[2] for client in range(60)}
    leaving = [client for client, owner in placed.items() if owner is not None and owner[1].startswith(gone)]
    for at in range(2):
        life.end()
        life = Life(settings(folder, without(spec, gone)), 2)
        for client in leaving[at::2]:
            found, _, owner = life.send(opening(0, client, "A", vip=VIP[4]))
            assert (found, owner == placed[client]) == (reason, policy == "keep")
        assert len(leaving) > 10
        assert life.counts_agree()
    life.end(keep=False)


def test_an_id_of_before_is_not_given_away_at_once(folder: Path) -> None:
    """Flows of a backend that left must not find another one under its number."""
    only = [service("dsr", on_leave="rehash", backends=[{"address": host}]) for host in BACKENDS[4][:2]]
    first = Life(settings(folder, only[0]))
    first.send(frame(CLIENT[4], 40000, VIP[4], 80))
    number = first.ids.by_name["dsr4tcp", f"{BACKENDS[4][0]}:80"]
    first.end()
    second = Life(settings(folder, only[1]))
    assert second.ids.by_name == {("dsr4tcp", f"{BACKENDS[4][1]}:80"): number + 1}
    assert [each for _, each in second.ids.resting] == [number]
    assert second.flows() == set()
    second.end(keep=False)


@pytest.mark.parametrize(
    "change", [{"vip": "203.0.113.99"}, {"port": 81}, {"protocol": "udp"}, {"forward": "nat"}, {"forward": "fullnat"}]
)
def test_a_service_that_is_another_one_has_no_flows(folder: Path, change: dict[str, Any]) -> None:
    """They would never be found again."""
    spec = service("dsr")
    first = Life(settings(folder, spec))
    for client in range(100):
        first.send(frame(CLIENT[4], 40000 + client, VIP[4], 80))
    first.end()
    second = Life(settings(folder, {**spec, **change}))
    assert (second.said(), second.flows(), second.counts_agree()) == ("taken over", set(), True)
    second.end(keep=False)


# --- what does not fit ---------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def in_version(path: Path) -> None:
    flip(path, 9)


def in_magic(path: Path) -> None:
    flip(path, 3)


def which_list_holds(path: Path) -> None:
    flip(path, 16)


def in_key(path: Path) -> None:
    flip(path, path.read_bytes()[: 2 * PAGE].index(b'"key"') + 10)


def length_of_identity(path: Path) -> None:
    flip(path, PAGE + 14)


def in_list(path: Path) -> None:
    flip(path, path.read_bytes().rindex(b'"named"') + 3)


def place_of_list(path: Path) -> None:
    flip(path, 24 + 16 + 5)


def flip(path: Path, at: int, bit: int = 1) -> None:
    change(path, at, lambda byte: byte ^ bit)


def change(path: Path, at: int, how: Callable[[int], int]) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([how(byte)]))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (emptied, "it is no flow file"),
    (in_magic, "it is no flow file"),
    (in_version, r"it has version \d+ of the format, not 3"),
    (cut_short, "it is cut short"),
    (in_key, "its identity is damaged"),
    (length_of_identity, "its identity is damaged"),
    (in_list, "its list of backends is damaged"),
    (place_of_list, "its head is damaged"),
    (which_list_holds, "its head is damaged"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_file_is_set_aside(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    here = settings(folder)
    first = Life(here)
    fill(first, 5)
    first.end()
    damage(folder / "flows")
    left = (folder / "flows").read_bytes()
    second = Life(here)
    assert re.fullmatch(reason, second.said())
    assert (folder / "flows.rejected").read_bytes() == left
    assert (second.flows(), second.counts_agree()) == (set(), True)
    fill(second, 5)
    second.end(keep=False)
    assert [path.name for path in folder.iterdir()] == ["flows.rejected"]


def test_each_bit_of_the_head(folder: Path) -> None:
    """One flipped bit, anywhere, ends in rejection; set right again, the file is what it was. Both lists have a place,
    or a wrong one of the list that does not hold would have nothing to be wrong about."""
    here = settings(folder)
    first = Life(here)
    placed, flows = fill(first, 5), first.flows()
    first.file.save(first.saved() | {"note": 1})
    first.end()
    path, rejected = folder / "flows", folder / "flows.rejected"
    for bit in range(8 * HEAD_BYTES):
        flip(path, bit // 8, 1 << bit % 8)
        with structlog.testing.capture_logs() as logs:
            file = open_file(here, {})
        assert file is not None
        assert (file.found, [line["file"] for line in logs]) == (None, [str(rejected)]), f"bit {bit}"
        file.close(keep=False)
        rejected.rename(path)
        flip(path, bit // 8, 1 << bit % 8)
    second = Life(here)
    assert (second.said(), second.flows()) == ("taken over", flows)
    second.file.save(second.saved())
    assert {key: second.send(opening(*key, "A"))[2] for key in placed} == placed
    second.end(keep=False)


def test_a_head_that_puts_a_list_into_the_table(folder: Path) -> None:
    """Its digest is right, and it is not believed."""
    here = settings(folder)
    first = Life(here)
    fill(first, 5)
    first.end()
    with (folder / "flows").open("r+b") as file:
        head = parse_head(file.read(HEAD_BYTES))
        assert isinstance(head, Head)
        lists = list(head.lists)
        lists[(head.sequence + 1) % 2] = (LARGE_PAGE, 1 << 16)
        file.seek(0)
        file.write(pack_head(head.sequence, lists))
    second = Life(here)
    assert second.said() == "its lists of backends are not where they can be"
    second.end(keep=False)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"flows": 8192}, "it is of another configuration: flows: 4096 -> 8192"),
    ({"snat": SNAT[::-1]}, "it is of another configuration: snat: 10.3.0.5, fd00:3::5 -> fd00:3::5, 10.3.0.5"),
    ({"snat": [*SNAT, "10.3.0.6"]}, "it is of another configuration: snat: .* -> .*10.3.0.6"),
    ({"snat_ports": "1024-32000"}, "it is of another configuration: snat_ports: 1024-32767 -> 1024-32000"),
]


@pytest.mark.parametrize(("change", "reason"), OTHERS)
def test_another_configuration(folder: Path, change: dict[str, Any], reason: str) -> None:
    first = Life(settings(folder))
    fill(first, 5)
    first.end()
    second = Life(settings(folder, **change))
    assert re.fullmatch(reason, second.said())
    assert second.flows() == set()
    second.end(keep=False)


def test_another_boot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Life(settings(folder)).end()
    of_this = flow_file.identity
    monkeypatch.setattr(flow_file, "identity", lambda config: of_this(config) | {"boot": "another"})
    second = Life(settings(folder))
    assert second.said() == "it is of another boot"
    second.end(keep=False)


def test_another_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade that changed what an entry is."""
    Life(settings(folder)).end()
    monkeypatch.setattr(flow_file, "flow_layout", lambda flows: flow_layout(flows) | {"states": ["none", "some"]})
    second = Life(settings(folder))
    assert "has laid its flow table out otherwise" in second.said()
    second.end(keep=False)


def test_an_older_file_that_was_set_aside_is_replaced(folder: Path) -> None:
    for flows in (4096, 8192, 4096, 8192):
        life = Life(settings(folder, flows=flows))
        life.end()
    assert sorted(path.name for path in folder.iterdir()) == ["flows", "flows.rejected"]


# --- damaged entries -----------------------------------------------------------------------------------------------


class Table:
    """The entries of a file, to damage them."""

    def __init__(self, path: Path) -> None:
        layout = flow_layout(4096)
        self.path, self.hot, self.cold = path, LARGE_PAGE, LARGE_PAGE + layout["buckets"]
        content = path.read_bytes()
        count = layout["shards"] * layout["buckets_per_shard"] * 4
        self.used = [at for at in range(count) if any(content[self.hot + 16 * at : self.hot + 16 * at + 8])]
        self.empty = sorted(set(range(count)) - set(self.used))

    def flip(self, offset: int, entry: int, bit: int = 1) -> None:
        """``offset``: from the beginning of an entry, or 16 and more: of its tuple."""
        self.change(offset, entry, lambda byte: byte ^ bit)

    def change(self, offset: int, entry: int, how: Callable[[int], int]) -> None:
        at = self.used[entry]
        start = self.hot + ENTRY * at if offset < ENTRY else self.cold + TUPLE * at - ENTRY
        change(self.path, start + offset, how)

    def copy(self, source: int, target: int) -> None:
        """One entry with its tuple over another."""
        with self.path.open("r+b") as file:
            for start, size in ((self.hot, ENTRY), (self.cold, TUPLE)):
                file.seek(start + size * source)
                data = file.read(size)
                file.seek(start + size * target)
                file.write(data)


CHANGES = range(92, 128)  # bits of an entry that its packets change: the state, and when the last one came
BITS = 8 * (ENTRY + TUPLE)


@pytest.mark.parametrize("first_bit", range(0, BITS, 48))
def test_each_bit_of_an_entry(folder: Path, first_bit: int) -> None:
    """One flipped bit, and the entry is dropped, wherever nothing but its first packet writes; all others stay."""
    here = settings(folder)
    first = Life(here)
    placed = fill(first, 15)
    flows = first.flows()
    first.end()
    table = Table(folder / "flows")
    bits = range(first_bit, min(first_bit + 48, BITS))
    for entry, bit in enumerate(bits):
        table.flip(bit // 8, entry, 1 << bit % 8)
    second = Life(here, 2)
    line = what_was_taken_over(second)
    changes = len(set(bits) & set(CHANGES))
    assert len(bits) - changes <= line["damaged"] <= len(bits)
    assert line["flows"] + line["damaged"] + line["of_no_backend"] == len(placed)
    if changes == 0:
        assert second.flows() < flows
    assert second.counts_agree()
    second.end(keep=False)


def what_was_taken_over(life: Life) -> Any:
    assert life.said() == "taken over"
    (line,) = (line for line in life.logs if line["event"] == "flows taken over")
    return line


STATES = [
    # service (position in SERVICES), and the states that its flows can have
    (0, "syn syn-ack picked-up established fin-client fin-backend closing reset"),  # nat, TCP
    (1, "syn syn-ack picked-up established fin-client fin-backend closing reset"),  # fullnat, TCP
    (2, "syn picked-up established closing reset"),  # dsr, TCP
    (4, "udp-new udp"),  # fullnat, UDP
]


@pytest.mark.parametrize(("at", "possible"), STATES)
def test_a_state_is_one_that_the_flow_can_have(folder: Path, at: int, possible: str) -> None:
    here = settings(folder, SERVICES[at])
    first = Life(here)
    for client in range(16):
        first.send(opening(at, client))
    first.end()
    table = Table(folder / "flows")
    for entry in range(16):
        table.change(11, entry, lambda byte, state=entry: byte & 15 | state << 4)
    second = Life(here)
    assert Counter(flow[6] for flow in second.flows()) == Counter(possible.split())
    assert second.counts_agree()
    second.end(keep=False)


@pytest.mark.parametrize("offset", [0, 16 + 43], ids=["fingerprint", "source port"])
def test_more_damage_than_is_bearable(folder: Path, offset: int) -> None:
    """The file as a whole is not what it was."""
    here = settings(folder, SERVICES[1])
    first = Life(here)
    for client in range(200):
        first.send(opening(1, client))
    first.end()
    table = Table(folder / "flows")
    for entry in range(65):
        table.flip(offset, entry, 0x80)
    second = Life(here)
    assert second.said() == "more than 64 entries are damaged"
    assert (second.flows(), second.ports()[4, 6], second.counts_agree()) == (set(), 0, True)
    assert (folder / "flows.rejected").exists()
    for client in range(200):
        assert second.send(opening(1, client))[0] == "scheduled"
    second.end()
    third = Life(here)
    assert (third.said(), len(third.flows())) == ("taken over", 200)
    third.end(keep=False)


def damaged_later(folder: Path, monkeypatch: pytest.MonkeyPatch, offset: int, bit: int) -> Life:
    """A life whose table is damaged in one entry when all have been verified already."""
    table, verify = Table(folder / "flows"), flow_file.FlowFile.take_over

    def verify_and_damage(*given: Any) -> FlowMemory | None:
        memory = verify(*given)
        table.flip(offset, 0, bit)
        return memory

    monkeypatch.setattr(flow_file.FlowFile, "take_over", verify_and_damage)
    return Life(settings(folder, SERVICES[1]))


@pytest.mark.parametrize(("offset", "bit", "left"), [(10, 0x08, 1), (16 + 43, 0x80, 0)])
def test_what_is_damaged_later_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, offset: int, bit: int, left: int
) -> None:
    """A backend that there is not, which has a counter all the same; a source port that the flow never had, which is
    not given back."""
    first = Life(settings(folder, SERVICES[1]))
    fill_full(first, 10)
    first.end()
    second = damaged_later(folder, monkeypatch, offset, bit)
    assert (len(second.flows()), second.ports()[4, 6]) == (10, 10)
    second.pipelines[0].renew(range(1, second.ids.highest + 1))
    assert (len(second.flows()), second.ports()[4, 6]) == (left, 1)
    second.end(keep=False)


def fill_full(life: Life, clients: int) -> None:
    for client in range(clients):
        assert life.send(opening(1, client))[0] == "scheduled"


def test_killed_in_the_middle_of_a_move(folder: Path) -> None:
    """The entry is in both of its buckets, whichever comes first; one of the two goes."""
    here = settings(folder, SERVICES[1])
    first = Life(here)
    for client in range(200):
        first.send(opening(1, client))
    flows = first.flows()
    first.end()
    table = Table(folder / "flows")
    twins = 0
    for at in table.used:
        for place in twin_places(table, at):
            table.copy(at, place)
            twins += 1
            break
    assert twins > 100
    second = Life(here)
    line = what_was_taken_over(second)
    assert (line["flows"], line["damaged"], line["of_no_backend"]) == (200, 0, 0)
    assert (second.flows(), second.counts_agree(), second.ports()[4, 6]) == (flows, True, 200)
    second.end(keep=False)


def twin_places(table: Table, at: int) -> Iterator[int]:
    """Free entries of the flow's two buckets, by the rule of conntrack.pxd."""
    layout = flow_layout(4096)
    with table.path.open("rb") as file:
        file.seek(table.hot + ENTRY * at)
        half = int.from_bytes(file.read(8), "little") >> 32
    shard = at // 4 // layout["buckets_per_shard"]
    for hashed in (half, (half * 0x85EBCA6B & 0xFFFFFFFF) ^ 0x5BD1E995):
        bucket = shard * layout["buckets_per_shard"] + (hashed * layout["buckets_per_shard"] >> 32)
        yield from (bucket * 4 + i for i in range(4) if bucket * 4 + i in table.empty)


def test_an_entry_in_a_wrong_bucket(folder: Path) -> None:
    here = settings(folder, SERVICES[0])
    first = Life(here)
    for client in range(50):
        first.send(opening(0, client))
    first.end()
    table = Table(folder / "flows")
    own = set(twin_places(table, table.used[0]))
    table.copy(table.used[0], next(at for at in table.empty if at not in own))
    second = Life(here)
    line = what_was_taken_over(second)
    assert (line["flows"], line["damaged"]) == (50, 1)
    second.end(keep=False)


TIMES = [
    # when the last packet came, in ms after now, and whether the entry is kept; the flow began 5,000 ms before now
    (-(1 << 30), False), (-6000, False), (-5000, True), (-100, True), (60_000, False), (1 << 30, False),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "kept"), TIMES)
def test_the_last_packet_came_between_the_beginning_and_now(folder: Path, seen: int, kept: bool) -> None:
    """The clock of entries comes round after 49 days."""
    here = settings(folder, SERVICES[0])
    first = Life(here)
    first.pipelines[0].process([opening(0, 1)], (now := clock()) - 5000)
    first.end()
    table = Table(folder / "flows")
    for at, byte in enumerate((now + seen & 0xFFFFFFFF).to_bytes(4, "little")):
        table.change(12 + at, 0, lambda _, byte=byte: byte)
    second = Life(here)
    assert len(second.flows()) == kept
    second.end(keep=False)


# --- the file as a file ----------------------------------------------------------------------------------------------


def test_only_its_owner_may_read_it(folder: Path) -> None:
    """It has the key that keeps others from aiming at buckets."""
    life = Life(settings(folder))
    found = (folder / "flows").stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_nlink) == (0o600, os.geteuid(), 1)
    life.end(keep=False)


def test_two_cannot_share_one(folder: Path) -> None:
    first = Life(settings(folder))
    with pytest.raises(FlowFileUsedError, match=f"another fastlb uses {folder}/flows"):
        Life(settings(folder))
    first.end()
    second = Life(settings(folder))
    assert second.said() == "taken over"
    second.end(keep=False)


def a_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def readable_by_all(path: Path) -> None:
    path.touch()
    path.chmod(0o644)


@pytest.mark.parametrize("planted", [a_link, a_link_to_nothing, a_pipe, a_folder, readable_by_all])
def test_what_others_plant_is_set_aside(folder: Path, planted: Callable[[Path], None]) -> None:
    planted(folder / "flows")
    life = Life(settings(folder))
    assert life.said().startswith("it is no")
    assert (folder / "flows").is_file()
    assert not (folder / "flows").is_symlink()
    assert not (folder / "nothing").exists()
    life.end(keep=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file away")
def test_a_file_of_somebody_else_is_set_aside(folder: Path) -> None:
    Life(settings(folder)).end()
    os.chown(folder / "flows", 12345, 12345)
    life = Life(settings(folder))
    assert life.said() == "it is not a file that its owner alone, who runs fastlb, can open"
    life.end(keep=False)


def test_not_in_memory(tmp_path: Path) -> None:
    if flow_places.is_in_memory(tmp_path):
        pytest.skip("temporary files are in memory here")
    with pytest.raises(FlowFileError, match=f"flow_file: {tmp_path} is not on tmpfs or ramfs"):
        Life(settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder(folder: Path) -> None:
    with pytest.raises(FlowFileError, match=r"flow_file: .*/none: No such file or directory"):
        Life(settings(folder / "none"))


def test_no_room(folder: Path) -> None:
    """Found out at the start: later a packet would find no memory behind its page."""
    room = os.statvfs(folder)
    flows = min(room.f_bavail * room.f_frsize // 20, 1 << 30)
    with pytest.raises(FlowFileError, match=r"flow_file: .*flows: no room for \d+ MiB, \d+ MiB are free there"):
        open_file(settings(folder, flows=flows), {})
    assert list(folder.iterdir()) == []


def test_none(folder: Path) -> None:
    assert open_file(settings(folder, flow_file="none"), {}) is None


def test_auto_prefers_the_control_socket_s_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = folder / "shm"
    shared.mkdir()
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", shared)
    for control, where in ((folder / "lb.sock", folder), (tmp_path / "lb.sock", shared)):
        if where is shared and flow_places.is_in_memory(tmp_path):
            continue
        file = open_file(settings(folder, flow_file="auto", control=str(control)), {})
        assert file is not None
        assert (file.path.parent, file.path.suffix) == (where, ".flows")
        file.close(keep=False)


def test_auto_finds_the_file_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the control socket there was no room when it was made."""
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", folder / "shm")
    (folder / "shm").mkdir()
    here = settings(folder, flow_file="auto", control=str(folder / "lb.sock"))
    _, second = flow_places.places(here)
    first = Life(settings(folder, flow_file=str(second)))
    placed = fill(first, 3)
    first.end()
    life = Life(here)
    assert (life.file.path, len(life.flows())) == (second, len(placed))
    life.end(keep=False)


def test_auto_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if flow_places.is_in_memory(tmp_path):
        pytest.skip("temporary files are in memory here")
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", tmp_path)
    with structlog.testing.capture_logs() as logs:
        assert open_file(settings(tmp_path, flow_file="auto", control=str(tmp_path / "lb.sock")), {}) is None
    assert [line["event"] for line in logs] == ["a crash will lose the flow table: there is no place for its file"]


# --- the list of backends ------------------------------------------------------------------------------------------


def test_lists_take_turns_and_grow(folder: Path) -> None:
    here = settings(folder)
    life = Life(here)
    for size in (10, 10_000, 20, 40_000, 39_999, 1):
        life.file.save(life.saved() | {"padding": list(range(size))})
        life.end()
        again = open_file(here, {})
        assert again is not None
        assert again.found is not None
        assert len(again.found["padding"]) == size
        life.file = again
    life.end(keep=False)


def test_killed_while_a_list_was_written(folder: Path) -> None:
    """The one before holds until the new one is whole."""
    here = settings(folder)
    life = Life(here)
    placed = fill(life, 5)
    life.file.save(life.saved() | {"note": 1})
    life.end()
    first_list = (folder / "flows").read_bytes().index(b'"ids"')
    flip(folder / "flows", first_list)  # the next one, which would be written there, is half-written
    second = Life(here)
    assert (second.said(), len(second.flows())) == ("taken over", len(placed))
    second.end(keep=False)


def test_saved_ids_are_the_same_ids() -> None:
    ids = BackendIds()
    ids.assign([("web", "10.0.0.1:80"), ("web", "10.0.0.2:80"), ("dns", "10.0.0.1:53")], 0.0)
    ids.assign([("web", "10.0.0.2:80"), ("dns", "10.0.0.1:53")], 5.0)
    restored = BackendIds.restored(ids.saved(), 100.0)
    assert (restored.by_name, restored.highest, restored.resting) == (ids.by_name, 3, [(100.0, 1)])


# --- what a crash leaves --------------------------------------------------------------------------------------------


def test_left_files_are_listed_and_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", folder)
    here = settings(folder)
    (folder / "flows.rejected").write_bytes(b"")
    (folder / "fastlb-of-somebody.flows").write_bytes(b"no flow file")
    life = Life(here)
    other = open_file(settings(folder, flow_file=str(folder / "fastlb-other.flows")), {})
    assert other is not None
    other.close(keep=True)

    def states() -> dict[str, str]:
        return {Path(each.path).name: each.state for each in flow_places.left_files(here)}

    assert states() == {"flows": "in use", "flows.rejected": "set aside", "fastlb-other.flows": "left over"}
    flow_places.remove_files(flow_places.left_files(here))
    assert states() == {"flows": "in use"}
    life.end()
    assert states() == {"flows": "left over"}
    assert flow_places.left_files()[0:0] == []
    flow_places.remove_files(flow_places.left_files(here))
    assert [path.name for path in folder.iterdir()] == ["fastlb-of-somebody.flows"]


# --- the table in the file -------------------------------------------------------------------------------------------


def test_pipelines_come_after_taking_over(folder: Path) -> None:
    here = settings(folder)
    memory = FlowMemory(here.flows)
    Pipeline(memory)
    services = services_table(here, plan_services(here, BackendIds(), 0.0))
    with pytest.raises(ValueError, match="pipelines use this memory"):
        memory.take_over(services, 100, 0)


def test_a_flow_log_goes_on(folder: Path) -> None:
    """The end of a flow is logged by whichever process sees it, with its beginning's time."""
    here = settings(folder, SERVICES[0], flow_log=str(folder / "log"))
    first = Life(here)
    first.send(opening(0, 1))
    began = first.pipelines[0].take_logged(10)
    first.end()
    second = Life(here)
    second.send(opening(0, 1, "R"))
    second.send(opening(0, 1))
    ended, again = second.pipelines[0].take_logged(10)
    assert (ended[0], ended[2:11], ended[11]) == (False, began[0][2:11], "reset")
    assert again[0] is True
    second.end()
    third = Life(settings(folder, SERVICES[0]))
    third.send(opening(0, 1, "A"))
    third.end()
    fourth = Life(settings(folder, SERVICES[0]))
    assert what_was_taken_over(fourth)["flows"] == 1
    fourth.send(opening(0, 1, "R"))
    fourth.send(opening(0, 1))
    assert fourth.pipelines[0].counters()["flow_log_lost"] == 0
    fourth.end(keep=False)
