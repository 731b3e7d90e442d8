"""The data path against a slow model of it: any sequence of packets, replies, pauses and reloads.

The model keeps flows in a dict and knows nothing of fingerprints, buckets or sweeps: what a table that is never full
must do. After every step the verdict, the backend, the rewritten addresses and the whole flow table must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any

import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.balancers import BACKENDS, VIP, Balancer, config, flags
from tests.frames import frame, take_apart
from tests.unit.test_maglev import slow_table

CLIENTS = ("10.1.0.2", "10.1.0.3")
PORTS = (40000, 40001)
VIPS = (VIP[4], "203.0.113.20")
HOSTS = BACKENDS[4]
SIZE = 251
TIMEOUTS = {"tcp_syn": 2, "tcp_established": 10, "tcp_half_closed": 6, "tcp_closing": 3, "udp": 4}
TIMEOUT_OF = {
    **dict.fromkeys(("syn", "syn-ack", "picked-up"), 2000),
    **dict.fromkeys(("established",), 10_000),
    **dict.fromkeys(("fin-client", "fin-backend"), 6000),
    **dict.fromkeys(("closing", "reset"), 3000),
    **dict.fromkeys(("udp-new", "udp"), 4000),
}
OVER = ("closing", "reset")

# name, forward, VIP, port, protocol, the backends' port
SERVICES = (
    ("web", "nat", VIPS[0], 80, "tcp", 8080),
    ("api", "nat", VIPS[1], 80, "tcp", 8080),
    ("dns", "nat", VIPS[0], 80, "udp", 5300),
    ("one-way", "dsr", VIPS[0], 443, "tcp", None),
    ("any", "dsr", VIPS[1], "any", "udp", None),
)

Tuple = tuple[str, str, int, str, int]  # protocol, client, port, VIP, port


def shape(weights: tuple[tuple[int | None, ...], ...], swapped: bool) -> list[dict[str, Any]]:
    """The services with these weights; None leaves a backend out. ``swapped``: web and api change their VIPs."""
    made = []
    for (name, forward, vip, port, protocol, backend_port), chosen in zip(SERVICES, weights, strict=True):
        if swapped and name in ("web", "api"):
            vip = VIPS[1 - VIPS.index(vip)]
        backends = [
            {"address": host, "weight": weight} | ({"port": backend_port} if backend_port else {})
            for host, weight in zip(HOSTS, chosen, strict=True)
            if weight is not None
        ]
        made.append(
            {"name": name, "forward": forward, "vip": vip, "port": port, "protocol": protocol, "backends": backends}
        )
    return made


@cache
def table(keys: tuple[str, ...], weights: tuple[int, ...]) -> list[int] | None:
    return slow_table(list(keys), list(weights), SIZE) if any(weights) else None


@dataclass
class Flow:
    number: int
    state: str
    seen: int


@dataclass(frozen=True)
class Outcome:
    reasons: tuple[str, ...]  # more than one where either is right
    backend: str | None = None
    to: tuple[str, int] | None = None  # the destination on the client's leg, the source on the reply's


class Model:
    def __init__(self, services: list[dict[str, Any]]) -> None:
        self.flows: dict[Tuple, Flow] = {}
        self.numbers: dict[tuple[str, str], int] = {}
        self.count = 0
        self.reload(services)

    def reload(self, services: list[dict[str, Any]]) -> None:
        self.services = services
        wanted = [(service["name"], key) for service in services for key in keys_of(service)]
        self.numbers = {backend: number for backend, number in self.numbers.items() if backend in wanted}
        for backend in wanted:
            if backend not in self.numbers:
                self.count += 1
                self.numbers[backend] = self.count
        self.backends = {number: backend for backend, number in self.numbers.items()}

    def service_of(self, flow: Flow) -> dict[str, Any]:
        return next(service for service in self.services if service["name"] == self.backends[flow.number][0])

    def alive(self, flow: Flow, now: int) -> bool:
        return flow.number in self.backends and now - flow.seen <= TIMEOUT_OF[flow.state]

    def find(self, vip: str, port: int, protocol: str) -> dict[str, Any] | None:
        here = [s for s in self.services if (s["vip"], s["protocol"]) == (vip, protocol)]
        return next((s for wanted in (port, "any") for s in here if s["port"] == wanted), None)

    def preferences(self, service: dict[str, Any], flow: Tuple) -> Iterator[int]:
        """Backend numbers in the order of Maglev's slots, from the flow's own on."""
        protocol, client, port, vip, vport = flow
        slots = table(tuple(keys_of(service)), tuple(b["weight"] for b in service["backends"]))
        if slots is None:
            return
        data = ip_address(client).packed + ip_address(vip).packed + port.to_bytes(2, "big") + vport.to_bytes(2, "big")
        hashed = xxhash.xxh3_64_intdigest(data + bytes([6 if protocol == "tcp" else 17]))
        for offset in range(16 if service["forward"] == "nat" else 1):
            yield self.numbers[service["name"], keys_of(service)[slots[(hashed + offset) % SIZE]]]

    def conflict(self, flow: Tuple, number: int, now: int) -> bool:
        """Does the backend already see this client port, through another VIP? One that is over gives way."""
        for other, entry in list(self.flows.items()):
            if other[:3] != flow[:3] or other == flow or entry.number not in self.backends:
                continue
            if self.service_of(entry)["forward"] != "nat" or self.backends[entry.number][1] != self.backends[number][1]:
                continue
            if entry.state not in OVER and self.alive(entry, now):
                return True
            del self.flows[other]
        return False

    def from_client(self, flow: Tuple, letters: str, now: int) -> Outcome:
        protocol, _, _, vip, vport = flow
        service = self.find(vip, vport, protocol)
        if service is None:
            return Outcome(("no_service",))
        syn = protocol == "tcp" and "S" in letters and "A" not in letters
        entry = self.flows.get(flow)
        lives = entry is not None and self.alive(entry, now) and self.service_of(entry) is service
        if entry and lives and not (syn and entry.state in (*OVER, "picked-up")):
            entry.state = step(entry.state, protocol, letters, True, service["forward"] == "nat")
            entry.seen = now
            return self.forwarded("conntrack", entry.number, service, vip, vport)
        self.flows.pop(flow, None)
        choices = list(self.preferences(service, flow))
        if not choices:
            return Outcome(("no_backend",))
        free = (n for n in choices if service["forward"] == "dsr" or not self.conflict(flow, n, now))
        number = next(free, None)
        if number is None:
            return Outcome(("nat_conflict",))
        if not (protocol == "tcp" and "R" in letters):
            self.flows[flow] = Flow(number, "udp-new" if protocol == "udp" else "syn" if syn else "picked-up", now)
        return self.forwarded("scheduled" if syn or protocol == "udp" else "maglev", number, service, vip, vport)

    def forwarded(self, reason: str, number: int, service: dict[str, Any], vip: str, vport: int) -> Outcome:
        key = self.backends[number][1]
        host, _, port = key.rpartition(":")
        return Outcome((reason,), key, (host, int(port)) if service["forward"] == "nat" else (vip, vport))

    def from_backend(self, key: str, protocol: str, client: str, port: int, letters: str, now: int) -> Outcome:
        senders = [
            s for s in self.services
            if s["forward"] == "nat" and s["protocol"] == protocol and key in keys_of(s)
        ]  # fmt: skip
        if not senders:
            return Outcome(("no_service",))
        for flow, entry in self.flows.items():
            if flow[:3] == (protocol, client, port) and self.alive(entry, now):
                service = self.service_of(entry)
                leads_here = service["forward"] == "nat" and (service["vip"], service["port"]) == flow[3:]
                if leads_here and self.backends[entry.number][1] == key:
                    entry.state, entry.seen = step(entry.state, protocol, letters, False, True), now
                    return Outcome(("conntrack",), key, flow[3:])
        for service in reversed(senders):
            flow = (protocol, client, port, service["vip"], service["port"])
            number = self.numbers[service["name"], key]
            if next(self.preferences(service, flow), None) != number:
                continue
            entry = self.flows.get(flow)
            if entry and self.alive(entry, now) and self.service_of(entry) is service:
                # The flow lives at another backend: whatever becomes of this reply, the flow stays there.
                return Outcome(("maglev", "reply_unknown"), key, flow[3:])
            self.flows.pop(flow, None)
            if protocol == "tcp" and "R" not in letters:
                self.flows[flow] = Flow(number, "picked-up", now)
            return Outcome(("maglev",), key, flow[3:])
        return Outcome(("reply_unknown",))

    def table(self, now: int) -> list[tuple[Any, ...]]:
        return sorted(
            (*flow, self.backends[entry.number][1], entry.state, entry.seen)
            for flow, entry in self.flows.items()
            if self.alive(entry, now)
        )


def keys_of(service: dict[str, Any]) -> list[str]:
    default = 0 if service["port"] == "any" else service["port"]
    return [f"{backend['address']}:{backend.get('port', default)}" for backend in service["backends"]]


def step(state: str, protocol: str, letters: str, from_client: bool, two_way: bool) -> str:
    """A flow's next state; "closing" is left by a RST only, "reset" by a client that does not keep to it."""
    if protocol == "udp":
        return "udp" if not two_way or not from_client else state
    if "R" in letters:
        return "reset"
    if state == "reset" and from_client and letters.strip("A") == "":
        return "picked-up"
    if state in OVER:
        return state
    if "F" in letters and two_way and from_client and state in ("syn", "picked-up"):
        return "closing"
    mine, theirs = ("fin-client", "fin-backend") if from_client else ("fin-backend", "fin-client")
    if "F" in letters:
        return "closing" if not two_way or state == theirs else mine
    if "S" in letters:
        return "syn-ack" if state == "syn" and not from_client else state
    if not two_way and state in ("syn", "picked-up"):
        return "established"
    answers = {("syn", False), ("syn-ack", True), ("picked-up", False)}
    return "established" if (state, from_client) in answers else state


weights = st.sampled_from([None, 0, 1, 1, 1, 3])
shapes = st.builds(shape, st.tuples(*[st.tuples(*[weights] * len(HOSTS))] * len(SERVICES)), st.booleans())
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
operations = st.lists(st.one_of(packets, packets, packets, answers, answers, replies, pauses, reloads), max_size=60)


class Both:
    """The data path and the model, fed with the same."""

    def __init__(self, services: list[dict[str, Any]]) -> None:
        self.model = Model(services)
        self.real = Balancer(configured(services), hosts=[*CLIENTS, *HOSTS])
        self.now = 1000
        self.last: bytes | None = None

    def client(self, host: str, port: int, vip: str, vport: int, protocol: str, letters: str) -> None:
        raw = frame(host, port, vip, vport, protocol, flags=flags(letters))
        sent = self.compare(raw, self.model.from_client((protocol, host, port, vip, vport), letters, self.now), "dst")
        self.last = sent or self.last

    def backend(self, host: str, source: tuple[str, int], client: str, port: int, letters: str) -> None:
        protocol, sport = source
        raw = frame(host, sport, client, port, protocol, flags=flags(letters))
        self.compare(raw, self.model.from_backend(f"{host}:{sport}", protocol, client, port, letters, self.now), "src")

    def answer(self, letters: str) -> None:
        """The backend's reply to the packet that was forwarded last."""
        if self.last is None:
            return
        seen = take_apart(self.last)
        if seen.dst in HOSTS:
            protocol = "tcp" if seen.protocol == 6 else "udp"
            self.backend(seen.dst, (protocol, seen.dport), seen.src, seen.sport, letters)

    def pause(self, milliseconds: int) -> None:
        self.now += milliseconds

    def reload(self, services: list[dict[str, Any]]) -> None:
        self.model.reload(services)
        self.real.reload(configured(services), self.now / 1000)

    def compare(self, raw: bytes, expected: Outcome, side: str) -> bytes | None:
        reason, sent, backend = self.real.send(raw, self.now / 1000)
        assert reason in expected.reasons
        if sent is None:
            return None
        assert backend == expected.backend
        seen = take_apart(sent)
        assert expected.to == ((seen.dst, seen.dport) if side == "dst" else (seen.src, seen.sport))
        return sent

    def check(self) -> None:
        """The tables agree, but for entries that expired and were not yet swept; and every count with its walk."""
        assert self.walk() == self.model.table(self.now)
        assert self.real.counts_agree()

    def walk(self) -> list[tuple[Any, ...]]:
        rows = []
        for protocol, client, port, vip, vport, number, state, seen in self.real.flows():
            if number in self.real.keys and self.now - seen <= TIMEOUT_OF[state]:
                name = "tcp" if protocol == 6 else "udp"
                rows.append((name, str(client), port, str(vip), vport, self.real.keys[number], state, seen))
        return sorted(rows)


def configured(services: list[dict[str, Any]]) -> Any:
    return config(*services, timeouts=TIMEOUTS, maglev_size=SIZE, flows=1024)


@settings(max_examples=2000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes, operations)
def test_the_data_path_does_as_the_model(services: list[dict[str, Any]], steps: list[tuple[Any, ...]]) -> None:
    both = Both(services)
    for name, *arguments in steps:
        getattr(both, name)(*arguments)
        both.check()
