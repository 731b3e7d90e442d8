"""The data path against a slow model of it: any sequence of packets, replies, pauses, reloads and commands.

After every step the verdict, the backend, the rewritten addresses and the whole flow table must agree, and every count
with a walk over the table; before a packet, `fastlb trace` must have said what becomes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlb._core import FlowWalk
from fastlb.observe.explanation import Context, Explanation, FiveTuple
from fastlb.observe.trace import explain
from tests.balancers import BACKENDS, VIP, Balancer, config, flags
from tests.frames import frame, take_apart
from tests.property.model import AFFINITY, OVER, RING, SIZE, TIMEOUTS, Model, Name, Outcome, Sight, Tuple, named

CLIENTS = ("10.1.0.2", "10.1.0.3")
PORTS = (40000, 40001)
VIPS = (VIP[4], "203.0.113.20")
HOSTS = BACKENDS[4]
CHECKED = ("web", "dns", "one-way")  # services with a health check

# name, forward, VIP, port, protocol, the backends' port
SERVICES = (
    ("web", "nat", VIPS[0], 80, "tcp", 8080),
    ("api", "nat", VIPS[1], 80, "tcp", 8080),
    ("dns", "nat", VIPS[0], 80, "udp", 5300),
    ("one-way", "dsr", VIPS[0], 443, "tcp", None),
    ("any", "dsr", VIPS[1], "any", "udp", None),
)
SCHEDULERS = ("maglev", "maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c")
HASHES, BY_CHANCE = ("maglev", "ketama", "source-hash"), ("random", "p2c", "lrt")
ON_LEAVE, ON_DOWN = ("rehash", "keep", "reset"), ("auto", "auto", "keep", "rehash", "reset")


def drawn(seed: int) -> list[dict[str, Any]]:
    """Services by lot: as a single number they leave the search room for what happens.

    web and api may change their VIPs. Where a scheduler goes by chance, nat and affinity do not go together: the model
    could not tell whom an affinity remembers after a conflict.
    """
    lot = Random(seed)
    swapped, checked, grouped = lot.random() < 0.3, lot.random() < 0.7, lot.random() < 0.5
    made = []
    for name, forward, vip, port, protocol, backend_port in SERVICES:
        service: dict[str, Any] = {
            "name": name, "forward": forward, "port": port, "protocol": protocol,
            "vip": VIPS[1 - VIPS.index(vip)] if swapped and name in ("web", "api") else vip,
            "backends": list(drawn_backends(lot, backend_port)),
            "scheduler": lot.choice(SCHEDULERS), "on_leave": lot.choice(ON_LEAVE), "on_down": lot.choice(ON_DOWN),
        }  # fmt: skip
        if checked and name in CHECKED:
            service["check"] = {"type": "tcp", "rise": 1, "fall": 1}
        if lot.random() < 0.4:
            service["affinity"] = {"timeout": f"{AFFINITY}s"} | ({"group": "g"} if grouped else {})
        if service["scheduler"] in HASHES and lot.random() < 0.3:
            service["bounded_load"] = lot.choice([1.01, 1.25, 2])
        if (service["scheduler"] == "lrt" and (forward == "dsr" or protocol == "udp")) or (
            forward == "nat" and "affinity" in service and service["scheduler"] in BY_CHANCE
        ):
            service["scheduler"] = "wlc"
        made.append(service)
    return made


def drawn_backends(lot: Random, port: int | None) -> Iterator[dict[str, Any]]:
    for host in HOSTS:
        weight = lot.choices([None, 0, 1, 3], [1, 1, 5, 2])[0]
        if weight is not None:
            backend = {"address": host, "weight": weight} | ({"port": port} if port else {})
            yield backend | ({"max_flows": lot.randint(1, 3)} if lot.random() < 0.15 else {})


shapes = st.integers(0, 1 << 16)
packets = st.tuples(
    st.just("client"), st.sampled_from(CLIENTS), st.sampled_from(PORTS), st.sampled_from(VIPS),
    st.sampled_from([80, 80, 80, 80, 443]), st.sampled_from(["tcp", "tcp", "udp"]),
    st.sampled_from(["S", "S", "A", "A", "FA", "RA", "SA"]),
)  # fmt: skip
replies = st.tuples(
    st.just("backend"), st.sampled_from(HOSTS), st.sampled_from([("tcp", 8080), ("tcp", 8080), ("udp", 5300)]),
    st.sampled_from(CLIENTS), st.sampled_from(PORTS), st.sampled_from(["SA", "SA", "A", "A", "FA", "RA"]),
)  # fmt: skip
answers = st.tuples(st.just("answer"), st.sampled_from(["SA", "SA", "A", "FA", "RA"]))
pauses = st.tuples(st.just("pause"), st.sampled_from([1, 500, 500, 2000, 2001, 3000, 4001, 10_001]))
reloads = st.tuples(st.just("reload"), shapes)
places = st.integers(0, len(SERVICES) * len(HOSTS) - 1)
commands = st.one_of(
    st.tuples(st.just("drain"), places, st.sampled_from([None, 0, 500, 3000])),
    st.tuples(st.just("enable"), places),
    st.tuples(st.just("weigh"), places, st.sampled_from([0, 1, 2, 7])),
    st.tuples(st.just("check"), places, st.booleans()),
)
operations = st.lists(
    st.one_of(packets, packets, packets, answers, answers, replies, pauses, commands, commands, reloads),
    min_size=30, max_size=60,
)  # fmt: skip


class Both:
    """The data path and the model, fed with the same."""

    def __init__(self, seed: int) -> None:
        services = drawn(seed)
        self.model = Model(services)
        self.real = Balancer(configured(services), hosts=[*CLIENTS, *HOSTS])
        self.now = 1000
        self.last: bytes | None = None

    # --- packets ---------------------------------------------------------------------------------------------------

    def client(self, host: str, port: int, vip: str, vport: int, protocol: str, letters: str) -> None:
        flow = (protocol, host, port, vip, vport)
        told, rows = self.trace(flow), self.real.flows()
        reason, sent, backend = self.real.send(
            frame(host, port, vip, vport, protocol, flags=flags(letters)), self.now / 1000
        )
        expected = self.model.from_client(flow, letters, self.now, self.sight(flow, rows, backend))
        self.compare(reason, sent, backend, expected, "dst")
        if is_foretold(told, protocol, letters):
            self.check_trace(told, reason, backend)
        self.last = sent or self.last

    def backend(self, host: str, source: tuple[str, int], client: str, port: int, letters: str) -> None:
        protocol, sport = source
        told = self.trace((protocol, host, sport, client, port))
        raw = frame(host, sport, client, port, protocol, flags=flags(letters))
        reason, sent, backend = self.real.send(raw, self.now / 1000)
        expected = self.model.from_backend(f"{host}:{sport}", protocol, client, port, letters, self.now)
        self.compare(reason, sent, backend, expected, "src")
        if expected.reasons == (reason,):
            self.check_trace(told, reason, backend)

    def answer(self, letters: str) -> None:
        """The backend's reply to the packet that was forwarded last."""
        if self.last is None:
            return
        seen = take_apart(self.last)
        if seen.dst in HOSTS:
            protocol = "tcp" if seen.protocol == 6 else "udp"
            self.backend(seen.dst, (protocol, seen.dport), seen.src, seen.sport, letters)

    def sight(self, flow: Tuple, rows: list[tuple[Any, ...]], backend: str | None) -> Sight:
        """``rows``: the entries before the packet. The flow's own, if it did not decide, had gone by then."""
        counted = Counter(row[5] for row in rows if row[6] not in OVER and entry_of(row) != flow)
        members = {(plan.name, member.key): member for plan in self.real.plans for member in plan.members}

        def response(name: Name) -> float:
            seen = self.real.pipeline.response_time(members[name].id) or members[name].response
            return max(seen, self.model.silence(name, self.now))

        return Sight(backend, lambda name: counted[members[name].id], response)

    def compare(self, reason: str, sent: bytes | None, backend: str | None, expected: Outcome, side: str) -> None:
        assert reason in expected.reasons
        if sent is not None and reason != "reset":
            assert backend == expected.backend
            seen = take_apart(sent)
            assert expected.to == ((seen.dst, seen.dport) if side == "dst" else (seen.src, seen.sport))

    def trace(self, flow: Tuple) -> Explanation:
        protocol, src, sport, dst, dport = flow
        packet = FiveTuple(ip_address(src), sport, ip_address(dst), dport, protocol)
        context = Context(
            self.real.plans, self.real.settings.services, self.real.standings, now=self.now / 1000
        )
        return explain(self.real.pipeline, packet, context, self.now)

    def check_trace(self, told: Explanation, reason: str, backend: str | None) -> None:
        assert (told.reason, told.backend) == (reason, backend if reason != "no_service" else None)

    # --- time, the configuration, commands ---------------------------------------------------------------------------

    def pause(self, milliseconds: int) -> None:
        before, self.now = self.now, self.now + milliseconds
        if self.real.standings.drains_ended(before / 1000, self.now / 1000):
            self.plan()

    def reload(self, seed: int) -> None:
        services = drawn(seed)
        self.model.reload(services)
        self.real.reload(configured(services), self.now / 1000)

    def plan(self) -> None:
        self.real.plan(self.now / 1000)

    def named(self, place: int) -> Name | None:
        """One of the backends that there are."""
        there = named(self.model.services)
        return there[place % len(there)] if there else None

    def drain(self, place: int, deadline: int | None) -> None:
        if name := self.named(place):
            at = None if deadline is None else self.now + deadline
            self.real.standings.drain(name, None if at is None else at / 1000)
            self.model.standings[name].draining, self.model.standings[name].deadline = True, at
            self.plan()

    def enable(self, place: int) -> None:
        if name := self.named(place):
            self.real.standings.enable(name, self.now / 1000)
            standing = self.model.standings[name]
            standing.draining, standing.deadline, standing.weight = False, None, None
            self.plan()

    def weigh(self, place: int, weight: int) -> None:
        if name := self.named(place):
            self.real.standings.set_weight(name, weight, self.now / 1000)
            self.model.standings[name].weight = weight
            self.plan()

    def check(self, place: int, passed: bool) -> None:
        name = self.named(place)
        service = next((each for each in self.real.settings.services if name and each.name == name[0]), None)
        if name and service and service.check is not None:
            self.real.standings.checked(service, name[1], 0.001 if passed else None, "", self.now / 1000)
            self.model.standings[name].health = "up" if passed else "down"
            self.plan()

    # --- what must hold after each -----------------------------------------------------------------------------------

    def hold(self) -> None:
        """The tables agree, but for entries that expired and were not yet swept; and every count with its walk."""
        self.model.sweep(map(entry_of, self.real.flows()), self.now)
        assert self.walk() == self.model.table(self.now)
        assert self.real.counts_agree()

    def walk(self) -> list[tuple[Any, ...]]:
        rows, after = FlowWalk(self.real.pipeline).rows(0, 1 << 40, 1 << 30, self.now)
        assert after is None
        return sorted((*entry_of(row), self.real.keys[row[5]], row[6], self.now - row[8]) for row in rows)


def is_foretold(told: Explanation, protocol: str, letters: str) -> bool:
    """A trace tells of a packet that follows a flow, where there is one; else of one that begins it."""
    flow: Mapping[str, Any] = next((step.facts for step in told.steps if step.stage == "flow"), {})
    syn = protocol == "tcp" and letters == "S"
    if flow.get("entry") and not flow["void"]:
        return not (syn and flow["state"] == "picked-up")
    return syn or protocol == "udp"


def entry_of(row: tuple[Any, ...]) -> Tuple:
    protocol, client, port, vip, vport = row[:5]
    return "tcp" if protocol == 6 else "udp", str(client), port, str(vip), vport


def configured(services: list[dict[str, Any]]) -> Any:
    return config(*services, timeouts=TIMEOUTS, maglev_size=SIZE, ring_points=RING, flows=1024)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes, operations)
def test_the_data_path_does_as_the_model(seed: int, steps: list[tuple[Any, ...]]) -> None:
    """Short, and cut down to what matters when it fails."""
    both = Both(seed)
    for name, *arguments in steps:
        getattr(both, name)(*arguments)
        both.hold()


# --- long walks -------------------------------------------------------------------------------------------------------

SEEDS, STEPS = 40, 200
TURNS = {
    "onward": 8, "client": 4, "answer": 5, "backend": 1, "pause": 2, "drain": 2, "enable": 1, "weigh": 1, "check": 3,
    "reload": 2,
}  # fmt: skip


def onward(lot: Random, both: Both) -> tuple[Any, ...]:
    """Another packet of a flow that there is."""
    if not both.model.flows:
        return anything(lot, both, "client")
    protocol, host, port, vip, vport = lot.choice(sorted(both.model.flows))
    return "client", host, port, vip, vport, protocol, lot.choice(["S", "S", "A", "A", "A", "FA", "RA"])


def anything(lot: Random, both: Both, kind: str) -> tuple[Any, ...]:
    place = lot.randrange(len(SERVICES) * len(HOSTS))
    if kind == "onward":
        return onward(lot, both)
    if kind == "client":
        vport, protocol = lot.choice([(80, "tcp"), (80, "tcp"), (443, "tcp"), (80, "udp"), (443, "udp")])
        letters = lot.choice(["S", "S", "S", "A", "FA", "RA", "SA"])
        return kind, lot.choice(CLIENTS), lot.choice(PORTS), lot.choice(VIPS), vport, protocol, letters
    if kind == "answer":
        return kind, lot.choice(["SA", "SA", "A", "A", "FA", "RA"])
    if kind == "backend":
        source = lot.choice([("tcp", 8080), ("udp", 5300)])
        return kind, lot.choice(HOSTS), source, lot.choice(CLIENTS), lot.choice(PORTS), lot.choice(["SA", "A", "RA"])
    if kind == "pause":
        return kind, lot.choice([1, 500, 500, 1500, 2001, 3000, 10_001])
    if kind == "drain":
        return kind, place, lot.choice([None, 0, 500, 3000])
    if kind == "weigh":
        return kind, place, lot.choice([0, 1, 2, 7])
    if kind == "check":
        return kind, place, lot.random() < 0.5
    return (kind, place) if kind == "enable" else (kind, lot.randrange(1 << 16))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_walk(seed: int) -> None:
    """Packets follow flows that there are, so that these live through what is done to their backends."""
    lot, both = Random(seed), Both(seed)
    for kind in lot.choices(list(TURNS), list(TURNS.values()), k=STEPS):
        name, *arguments = anything(lot, both, kind)
        getattr(both, name)(*arguments)
        both.hold()
