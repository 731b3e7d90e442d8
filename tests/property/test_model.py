"""The data path against a slow model of it: any sequence of packets, replies, pauses, reloads and commands.

After every step the verdict, the backend, the rewritten addresses and the whole flow table must agree, and every count
with a walk over the table; before a packet, `fastlb trace` must have said what becomes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlb import trace
from fastlb._core import FlowWalk
from fastlb.standing import Standings
from tests.balancers import BACKENDS, VIP, Balancer, config, flags
from tests.frames import frame, take_apart
from tests.property.model import OVER, RING, SIZE, TIMEOUTS, Model, Name, Outcome, Sight, Tuple, named

CLIENTS = ("10.1.0.2", "10.1.0.3")
PORTS = (40000, 40001)
VIPS = (VIP[4], "203.0.113.20")
HOSTS = BACKENDS[4]
CHECKED = ("web", "one-way")  # services with a health check

# name, forward, VIP, port, protocol, the backends' port
SERVICES = (
    ("web", "nat", VIPS[0], 80, "tcp", 8080),
    ("api", "nat", VIPS[1], 80, "tcp", 8080),
    ("dns", "nat", VIPS[0], 80, "udp", 5300),
    ("one-way", "dsr", VIPS[0], 443, "tcp", None),
    ("any", "dsr", VIPS[1], "any", "udp", None),
)
SCHEDULERS = ("maglev", "maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c")


def shape(
    weights: tuple[tuple[int | None, ...], ...], schedulers: tuple[str, ...], swapped: bool, checked: bool
) -> list[dict[str, Any]]:
    """The services with these weights; None leaves a backend out. ``swapped``: web and api change their VIPs."""
    made = []
    for (name, forward, vip, port, protocol, backend_port), chosen, scheduler in zip(
        SERVICES, weights, schedulers, strict=True
    ):
        if scheduler == "lrt" and forward == "dsr":
            scheduler = "wlc"  # it would need a check
        if swapped and name in ("web", "api"):
            vip = VIPS[1 - VIPS.index(vip)]
        backends = [
            {"address": host, "weight": weight} | ({"port": backend_port} if backend_port else {})
            for host, weight in zip(HOSTS, chosen, strict=True)
            if weight is not None
        ]
        made.append(
            {"name": name, "forward": forward, "vip": vip, "port": port, "protocol": protocol, "backends": backends,
             "scheduler": scheduler}
            | ({"check": {"type": "tcp", "rise": 1, "fall": 1}} if checked and name in CHECKED else {})
        )  # fmt: skip
    return made


weights = st.sampled_from([None, 0, 1, 1, 1, 3])
shapes = st.builds(
    shape,
    st.tuples(*[st.tuples(*[weights] * len(HOSTS))] * len(SERVICES)),
    st.tuples(*[st.sampled_from(SCHEDULERS)] * len(SERVICES)),
    st.booleans(),
    st.booleans(),
)
packets = st.tuples(
    st.just("client"), st.sampled_from(CLIENTS), st.sampled_from(PORTS), st.sampled_from(VIPS),
    st.sampled_from([80, 80, 80, 443]), st.sampled_from(["tcp", "tcp", "udp"]),
    st.sampled_from(["S", "S", "A", "A", "FA", "RA", "SA"]),
)  # fmt: skip
replies = st.tuples(
    st.just("backend"), st.sampled_from(HOSTS), st.sampled_from([("tcp", 8080), ("tcp", 8080), ("udp", 5300)]),
    st.sampled_from(CLIENTS), st.sampled_from(PORTS), st.sampled_from(["SA", "SA", "A", "A", "FA", "RA"]),
)  # fmt: skip
answers = st.tuples(st.just("answer"), st.sampled_from(["SA", "SA", "A", "FA", "RA"]))
pauses = st.tuples(st.just("pause"), st.sampled_from([1, 500, 2000, 2001, 3000, 4001, 10_001]))
reloads = st.tuples(st.just("reload"), shapes)
places = st.integers(0, len(SERVICES) * len(HOSTS) - 1)
commands = st.one_of(
    st.tuples(st.just("drain"), places),
    st.tuples(st.just("enable"), places),
    st.tuples(st.just("weigh"), places, st.sampled_from([0, 1, 2, 65535])),
    st.tuples(st.just("check"), places, st.booleans()),
)
operations = st.lists(
    st.one_of(packets, packets, packets, answers, answers, replies, pauses, commands, reloads), max_size=60
)


class Both:
    """The data path and the model, fed with the same."""

    def __init__(self, services: list[dict[str, Any]]) -> None:
        self.model = Model(services)
        self.standings = Standings()
        self.real = Balancer(configured(services), hosts=[*CLIENTS, *HOSTS])
        self.now = 1000
        self.last: bytes | None = None
        self.reload(services)

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
        members = {member.id: member for plan in self.real.plans for member in plan.members}

        def response(number: int) -> float:
            return self.real.pipeline.response_time(number) or members[number].response

        return Sight(backend, lambda number: counted[number], response)

    def compare(self, reason: str, sent: bytes | None, backend: str | None, expected: Outcome, side: str) -> None:
        assert reason in expected.reasons
        if sent is not None:
            assert backend == expected.backend
            seen = take_apart(sent)
            assert expected.to == ((seen.dst, seen.dport) if side == "dst" else (seen.src, seen.sport))

    def trace(self, flow: Tuple) -> trace.Explanation:
        protocol, src, sport, dst, dport = flow
        packet = trace.Tuple(ip_address(src), sport, ip_address(dst), dport, protocol)
        scene = trace.Scene(self.real.plans, self.config.services, self.standings)
        return trace.explain(self.real.pipeline, packet, scene, self.now)

    def check_trace(self, told: trace.Explanation, reason: str, backend: str | None) -> None:
        assert (told.reason, told.backend) == (reason, backend if reason != "no_service" else None)

    # --- time, the configuration, commands ---------------------------------------------------------------------------

    def pause(self, milliseconds: int) -> None:
        self.now += milliseconds

    def reload(self, services: list[dict[str, Any]]) -> None:
        self.config = configured(services)
        self.model.reload(services)
        self.standings.follow(self.config, self.now / 1000)
        self.plan()

    def plan(self) -> None:
        self.real.reload(self.config, self.now / 1000, self.standings)

    def named(self, place: int) -> Name | None:
        """One of the backends that there are."""
        there = named(self.model.services)
        return there[place % len(there)] if there else None

    def drain(self, place: int) -> None:
        if name := self.named(place):
            self.standings.drain(name)
            self.model.standings[name].draining = True
            self.plan()

    def enable(self, place: int) -> None:
        if name := self.named(place):
            self.standings.enable(name, self.now / 1000)
            self.model.standings[name].draining, self.model.standings[name].weight = False, None
            self.plan()

    def weigh(self, place: int, weight: int) -> None:
        if name := self.named(place):
            self.standings.set_weight(name, weight, self.now / 1000)
            self.model.standings[name].weight = weight
            self.plan()

    def check(self, place: int, passed: bool) -> None:
        name = self.named(place)
        service = next((each for each in self.config.services if name and each.name == name[0]), None)
        if name and service and service.check is not None:
            self.standings.checked(service, name[1], 0.001 if passed else None, "", self.now / 1000)
            self.model.standings[name].health = "up" if passed else "down"
            self.plan()

    # --- what must hold after each -----------------------------------------------------------------------------------

    def hold(self) -> None:
        """The tables agree, but for entries that expired and were not yet swept; and every count with its walk."""
        assert self.walk() == self.model.table(self.now)
        assert self.real.counts_agree()

    def walk(self) -> list[tuple[Any, ...]]:
        rows, after = FlowWalk(self.real.pipeline).rows(0, 1 << 40, 1 << 30, self.now)
        assert after is None
        return sorted((*entry_of(row), self.real.keys[row[5]], row[6], self.now - row[8]) for row in rows)


def is_foretold(told: trace.Explanation, protocol: str, letters: str) -> bool:
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


@settings(max_examples=1000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes, operations)
def test_the_data_path_does_as_the_model(services: list[dict[str, Any]], steps: list[tuple[Any, ...]]) -> None:
    both = Both(services)
    for name, *arguments in steps:
        getattr(both, name)(*arguments)
        both.hold()
