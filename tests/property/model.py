"""A slow model of the data path: what a flow table that is never full must do, and where new flows may go.

Flows are kept in a dict, and nothing is known here of fingerprints, buckets, sweeps, snapshots or tables in C. Where
chance decides, the model says which backends are right, and goes on with the one that the data path has taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from ipaddress import ip_address
from typing import Any

import xxhash

from tests.unit.plan.test_maglev import slow_table

SIZE = 251
RING = 16
TIMEOUTS = {"tcp_syn": 2, "tcp_established": 10, "tcp_half_closed": 6, "tcp_closing": 3, "udp": 4}
TIMEOUT_OF = {
    **dict.fromkeys(("syn", "syn-ack", "picked-up"), 2000),
    "established": 10_000,
    **dict.fromkeys(("fin-client", "fin-backend"), 6000),
    **dict.fromkeys(("closing", "reset"), 3000),
    **dict.fromkeys(("udp-new", "udp"), 4000),
}
OVER = ("closing", "reset")
LOOKS = 16  # at other backends, where one has no room or is in conflict
AFFINITY = 4  # seconds
TICK_BITS = 8  # of milliseconds: affinity is as exact as that
TRIAL_TICKS = 12
LEAST_RESPONSE = 64e-6  # seconds: faster answers do not count

Tuple = tuple[str, str, int, str, int]  # protocol, client, port, VIP, port
Name = tuple[str, str]  # service, backend key


# --- tables -----------------------------------------------------------------------------------------------------------


@cache
def maglev(keys: tuple[str, ...], weights: tuple[int, ...]) -> list[int] | None:
    return slow_table(list(keys), list(weights), SIZE) if any(weights) else None


@cache
def ring(keys: tuple[str, ...], weights: tuple[int, ...]) -> list[tuple[int, int]]:
    """(hash, position), ascending: RING points for the heaviest, for the others by weight, rounded up."""
    return sorted(
        (xxhash.xxh64_intdigest(f"{key}_{number}".encode()), position)
        for position, (key, weight) in enumerate(zip(keys, weights, strict=True))
        for number in range(math.ceil(Fraction(RING * weight, max(weights))))
    )


@cache
def rotation(weights: tuple[int, ...]) -> list[int]:
    """The k-th of w turns is due at (k + 1/2) / w of the round."""
    common = math.gcd(*weights) or 1
    due = (
        (Fraction(2 * turn + 1, 2 * (weight // common)), position)
        for position, weight in enumerate(weights)
        for turn in range(weight // common)
    )
    return [position for _, position in sorted(due)]


def xxh3(client: str, port: int, vip: str, vport: int, protocol: int) -> int:
    data = ip_address(client).packed + ip_address(vip).packed + port.to_bytes(2, "big") + vport.to_bytes(2, "big")
    return xxhash.xxh3_64_intdigest(data + bytes([protocol]))


def keys_of(service: dict[str, Any]) -> list[str]:
    default = 0 if service["port"] == "any" else service["port"]
    return [f"{backend['address']}:{backend.get('port', default)}" for backend in service["backends"]]


def group_of(service: dict[str, Any]) -> str:
    """Services of one group share their clients."""
    group = service.get("affinity", {}).get("group")
    return f"group {group}" if group else service["name"]


# --- the model --------------------------------------------------------------------------------------------------------


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


@dataclass
class BackendState:
    """What is known of a backend beside its configuration."""

    health: str = "unchecked"
    draining: bool = False
    deadline: int | None = None
    weight: int | None = None
    removed: bool = False  # and known on for the sake of its flows


@dataclass(frozen=True)
class Choice:
    """What a scheduler may say, and its place in the rotation after that; None: that is not known."""

    allowed: list[int]
    cursor: int | None
    cursors: dict[int, int] = field(default_factory=dict)  # by what it says, where that makes a difference


@dataclass
class Silence:
    """What a backend has not answered, or not as it should, since its last SYN-ACK; milliseconds."""

    asked: int | None = None
    tried: int = 0
    refused: int = 0

    def counts(self, now: int) -> float:
        """Seconds."""
        waits = [] if self.asked is None else [min(1024.0, max(0, now - self.asked - 1) / 1000)]
        waits += [2.0 ** (min(self.refused, 11) - 1)] if self.refused else []
        return max(waits, default=0.0) * math.exp(-max(0, now - self.tried - 1000) / 10_000)


@dataclass(frozen=True)
class Sight:
    """What the model is told of the data path: the backend that it chose, and what schedulers by load go by."""

    backend: str | None
    flows: Callable[[Name], int]  # those that are not over
    response: Callable[[Name], float]  # seconds


class Model:
    def __init__(self, services: list[dict[str, Any]]) -> None:
        self.flows: dict[Tuple, Flow] = {}
        self.numbers: dict[Name, int] = {}
        self.standings: dict[Name, BackendState] = {}
        self.cursors: dict[int, int | None] = {}  # by the service's place; None: it is not known
        self.slots: dict[tuple[str, str], tuple[str, int]] = {}  # by group and client: address, the tick when it ends
        self.silences: dict[int, Silence] = {}  # by number
        self.count = 0
        self.services: list[dict[str, Any]] = []
        self.reload(services)

    # --- backends that come and go -----------------------------------------------------------------------------------

    def reload(self, services: list[dict[str, Any]]) -> None:
        before, earlier = self.standings, {service["name"]: service for service in self.services}
        self.services, self.standings = services, {}
        for service in services:
            for key in keys_of(service):
                known = before.get((service["name"], key))
                standing = BackendState() if known is None or known.removed else known
                if "check" not in service:
                    standing.health = "unchecked"
                elif standing.health == "unchecked":
                    standing.health = "unknown"
                self.standings[service["name"], key] = standing
            same_vip = service["vip"] == earlier.get(service["name"], {}).get("vip")
            for name, standing in before.items() if same_vip and service["on_leave"] != "rehash" else ():
                if name[0] == service["name"] and name not in self.standings:
                    self.standings[name] = standing
                    standing.removed, standing.draining, standing.deadline = True, False, None
        self.numbers = {name: number for name, number in self.numbers.items() if name in self.standings}
        for name in self.standings:
            if name not in self.numbers:
                self.count += 1
                self.numbers[name] = self.count
        self.backends = {number: name for name, number in self.numbers.items()}

    def keeping(self, number: int, now: int) -> str:
        """What becomes of a backend's flows: stay, syn moves, move, reset (docs/backends.md)."""
        service, standing = self.service_called(self.backends[number][0]), self.standings[self.backends[number]]
        drained = standing.draining and standing.deadline is not None and standing.deadline <= now
        down = standing.health == "down"
        policies = []
        if standing.removed or drained:
            policies.append("rehash" if drained and service["on_leave"] == "keep" else service["on_leave"])
        if down:
            automatic = "keep" if service["protocol"] == "tcp" else "rehash"
            policies.append(automatic if service["on_down"] == "auto" else service["on_down"])
        if drained and policies[0] == "rehash" and service["on_leave"] == "keep" and "reset" in policies:
            policies = ["reset"]  # that one is not kept is said by the other
        policy = next((each for each in policies if each != "keep"), "keep")
        if policy == "reset":
            return "reset" if service["protocol"] == "tcp" else "move"
        return "move" if policy == "rehash" else "syn moves" if down and service["protocol"] == "tcp" else "stay"

    def service_called(self, name: str) -> dict[str, Any]:
        return next(service for service in self.services if service["name"] == name)

    def service_of(self, flow: Flow) -> dict[str, Any]:
        return self.service_called(self.backends[flow.number][0])

    def is_known(self, flow: Flow, now: int) -> bool:
        return flow.number in self.backends and now - flow.seen <= TIMEOUT_OF[flow.state]

    def alive(self, flow: Flow, now: int) -> bool:
        """Known, and not to leave its backend."""
        return self.is_known(flow, now) and self.keeping(flow.number, now) != "move"

    def sweep(self, entries: Iterable[Tuple], now: int) -> None:
        """Flows that decide no more go when the sweep meets them, and may come back to life before; ``entries``: what
        it has left."""
        left = set(entries)
        self.flows = {flow: entry for flow, entry in self.flows.items() if flow in left or self.alive(entry, now)}

    def find(self, vip: str, port: int, protocol: str) -> dict[str, Any] | None:
        here = [s for s in self.services if (s["vip"], s["protocol"]) == (vip, protocol)]
        return next((s for wanted in (port, "any") for s in here if s["port"] == wanted), None)

    # --- where new flows go ------------------------------------------------------------------------------------------

    def weights(self, service: dict[str, Any]) -> list[int]:
        """As health and the operator leave them, in the configuration's order."""
        by_state: dict[str, list[int]] = {}
        for backend, key in zip(service["backends"], keys_of(service), strict=True):
            standing = self.standings[service["name"], key]
            weight = backend["weight"] if standing.weight is None else standing.weight
            for health in ("unchecked", "up", "unknown", "down"):
                taken = weight if standing.health == health and not standing.draining else 0
                by_state.setdefault(health, []).append(taken)
        working = [a + b for a, b in zip(by_state.get("unchecked", []), by_state.get("up", []), strict=True)]
        return working if any(working) else by_state.get("unknown", [])

    def sorted(self, service: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Keys and weights, by key."""
        pairs = sorted(zip(keys_of(service), self.weights(service), strict=True))
        return tuple(key for key, _ in pairs), tuple(weight for _, weight in pairs)

    def number(self, service: dict[str, Any], key: str) -> int:
        return self.numbers[service["name"], key]

    def hashed(self, service: dict[str, Any], flow: Tuple, count: int) -> list[int]:
        """Backend numbers in the order of the hash, from the flow's own on."""
        protocol, client, port, vip, vport = flow
        keys, weights = self.sorted(service)
        if not any(weights):
            return []
        hashed = xxh3(client, port, vip, vport, 6 if protocol == "tcp" else 17)
        if service["scheduler"] == "source-hash":
            hashed = xxh3(client, 0, client, 0, 0)
        order = maglev(keys, weights)
        first = hashed % SIZE
        if service["scheduler"] == "ketama":
            points = ring(keys, weights)
            order = [position for _, position in points]
            first = next((place for place, (at, _) in enumerate(points) if at >= hashed), 0)
        assert order is not None
        return [self.number(service, keys[order[(first + offset) % len(order)]]) for offset in range(count)]

    def takers(self, service: dict[str, Any]) -> dict[int, int]:
        """The weights of those that take new flows, by key."""
        keys, weights = self.sorted(service)
        return {self.number(service, key): weight for key, weight in zip(keys, weights, strict=True) if weight}

    def cap(self, service: dict[str, Any], number: int) -> float:
        there = zip(service["backends"], keys_of(service), strict=True)
        return next((b.get("max_flows", math.inf) for b, key in there if key == self.backends[number][1]), math.inf)

    def silence(self, name: Name, now: int) -> float:
        """What it counts as with lrt and p2c, in seconds."""
        return self.silences.get(self.numbers[name], Silence()).counts(now)

    def ask(self, service: dict[str, Any], number: int, now: int) -> None:
        """It gets the SYN of a new flow."""
        if service["forward"] == "nat" and service["scheduler"] in ("lrt", "p2c"):
            silence = self.silences.setdefault(number, Silence())
            silence.asked = now if silence.asked is None else silence.asked
            silence.tried = now

    def hear(self, number: int, letters: str) -> None:
        """It has answered a SYN: with SYN-ACK, with RST, or with something else, which says nothing."""
        if "R" in letters:
            silence = self.silences.setdefault(number, Silence())
            silence.asked, silence.refused = None, silence.refused + 1
        elif "S" in letters:
            self.silences.pop(number, None)

    def has_room(self, service: dict[str, Any], number: int, seen: Sight) -> bool:
        flows = seen.flows(self.backends[number])
        if flows >= self.cap(service, number):
            return False
        if service.get("bounded_load") is None:
            return True
        takers = self.takers(service)
        every = sum(seen.flows(self.backends[each]) for each in takers) + 1
        bound = Fraction(str(service["bounded_load"])) * every * takers[number] / sum(takers.values())
        return flows < math.ceil(bound)

    def least_loaded(self, service: dict[str, Any], seen: Sight, cursor: int | None) -> Choice:
        takers = self.takers(service)
        open_ones = [number for number in takers if self.has_room(service, number, seen)]
        loads = {
            number: (seen.flows(self.backends[number]) + 1)
            / (1 if service["scheduler"] == "lc" else takers[number])
            * (max(seen.response(self.backends[number]), LEAST_RESPONSE) if service["scheduler"] == "lrt" else 1)
            for number in open_ones
        }
        if not loads:
            return Choice([], cursor)
        least = [number for number in open_ones if loads[number] <= min(loads.values()) * 1.000001]
        order = list(takers)
        if cursor is None or service["scheduler"] == "lrt":
            return Choice(least, None, {number: order.index(number) + 1 for number in least})
        best = min(least, key=lambda number: (order.index(number) - cursor) % len(order))
        return Choice([best], order.index(best) + 1)

    def scheduled(self, service: dict[str, Any], flow: Tuple, seen: Sight) -> Choice:
        """What the scheduler may say of a new flow."""
        scheduler, cursor = service["scheduler"], self.cursors.get(self.place(service), 0)
        takers = self.takers(service)
        if not takers:
            return Choice([], cursor)
        if scheduler in ("maglev", "ketama", "source-hash"):
            for number in self.hashed(service, flow, LOOKS):
                if self.has_room(service, number, seen):
                    return Choice([number], cursor)
        elif scheduler in ("random", "p2c") or (scheduler in ("rr", "wrr") and cursor is None):
            return Choice([number for number in takers if self.has_room(service, number, seen)], None)
        elif scheduler in ("rr", "wrr"):
            keys, weights = self.sorted(service)
            turns = rotation(tuple(map(bool, weights)) if scheduler == "rr" else weights)
            for _ in range(LOOKS):
                cursor = 0 if cursor >= len(turns) else cursor
                number = self.number(service, keys[turns[cursor]])
                cursor += 1
                if self.has_room(service, number, seen):
                    return Choice([number], cursor)
        return self.least_loaded(service, seen, cursor)

    def place(self, service: dict[str, Any]) -> int:
        return self.services.index(service)

    # --- where clients stick ------------------------------------------------------------------------------------------

    def stuck(self, service: dict[str, Any], client: str, now: int) -> int | None:
        """The backend that a client's last flow has gone to, in a service of the group, if it takes its clients."""
        address, end = self.slots.get((group_of(service), client), ("", 0))
        if "affinity" not in service or now >> TICK_BITS >= end:
            return None
        there = zip(service["backends"], keys_of(service), strict=True)
        key = next((key for backend, key in there if backend["address"] == address), None)
        return self.number(service, key) if key is not None and self.keeps_clients(service, key) else None

    def keeps_clients(self, service: dict[str, Any], key: str) -> bool:
        standing = self.standings[service["name"], key]
        others = any(
            self.standings[service["name"], each].health in ("unchecked", "up") and weight
            for each, weight in zip(keys_of(service), self.weights(service), strict=True)
        )
        works = standing.health in ("unchecked", "up") or (standing.health == "unknown" and not others)
        return works and not standing.draining

    def remember(self, service: dict[str, Any], client: str, number: int, now: int, proven: bool) -> None:
        """A flow that nothing has shown to work yet has its client remembered for a short time."""
        if "affinity" in service:
            address = self.backends[number][1].rpartition(":")[0]
            ticks = (AFFINITY * 1000 >> TICK_BITS) + 2
            end = (now >> TICK_BITS) + (ticks if proven else min(ticks, TRIAL_TICKS))
            self.slots[group_of(service), client] = address, end

    def learn(self, service: dict[str, Any], client: str, number: int, now: int) -> None:
        """A client's connection is established now."""
        if self.stuck(service, client, now) in (None, number) and not self.standings[self.backends[number]].removed:
            self.remember(service, client, number, now, True)

    def midflow(self, service: dict[str, Any], flow: Tuple, now: int) -> int | None:
        """Where a packet goes whose flow is not known, and that begins none."""
        stuck = self.stuck(service, flow[1], now)
        return stuck if stuck is not None else next(iter(self.hashed(service, flow, 1)), None)

    def new_flow(self, service: dict[str, Any], flow: Tuple, now: int, seen: Sight) -> list[int]:
        """Where a new flow may go; the scheduler's turn is taken, and where it may only be one, remembered."""
        stuck = self.stuck(service, flow[1], now)
        proven = flow[0] == "udp"
        if stuck is not None and seen.flows(self.backends[stuck]) < self.cap(service, stuck):
            if proven:
                self.remember(service, flow[1], stuck, now, True)
            return [stuck]
        choice = self.scheduled(service, flow, seen)
        got = self.numbers.get((service["name"], seen.backend or ""))
        said = got if got in choice.allowed else choice.allowed[0] if len(choice.allowed) == 1 else None
        self.cursors[self.place(service)] = choice.cursors.get(said or 0, choice.cursor)
        if said is not None:
            self.remember(service, flow[1], said, now, proven)
        return choice.allowed

    def place_flow(
        self, service: dict[str, Any], flow: Tuple, fresh: bool, now: int, seen: Sight
    ) -> tuple[int | None, str]:
        """The backend of a flow without an entry, or why there is none.

        In nat, one that already sees this client port through another VIP is passed over, and the hash says for which.
        """
        midflow = self.midflow(service, flow, now)
        allowed = self.new_flow(service, flow, now, seen) if fresh else [midflow] if midflow is not None else []
        if not allowed:
            return None, "backends_full" if self.takers(service) else "no_backend"
        got = self.numbers.get((service["name"], seen.backend or ""))
        choice = got if got in allowed else allowed[0]
        if service["forward"] != "nat" or not self.conflict(flow, choice, now):
            return choice, ""
        for number in self.hashed(service, flow, LOOKS):
            if (not fresh or self.has_room(service, number, seen)) and not self.conflict(flow, number, now):
                return number, ""
        return None, "nat_conflict"

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

    # --- packets -----------------------------------------------------------------------------------------------------

    def from_client(self, flow: Tuple, letters: str, now: int, seen: Sight) -> Outcome:
        protocol, _, _, vip, vport = flow
        service = self.find(vip, vport, protocol)
        if service is None:
            return Outcome(("no_service",))
        syn = protocol == "tcp" and "S" in letters and "A" not in letters
        entry = self.flows.get(flow)
        if entry and self.alive(entry, now) and self.service_of(entry) is service:
            keeping = self.keeping(entry.number, now)
            if keeping == "reset" and not syn and "R" not in letters:
                del self.flows[flow]
                return Outcome(("reset",))
            stays = keeping == "stay" or not syn
        else:
            stays = False
        if entry and stays and not (syn and entry.state in (*OVER, "picked-up")):
            before, entry.seen = entry.state, now
            entry.state = step(before, protocol, letters, True, service["forward"] == "nat")
            if before in ("syn", "syn-ack") and entry.state == "established":
                self.learn(service, flow[1], entry.number, now)
            return self.forwarded("conntrack", entry.number, service, vip, vport)
        self.flows.pop(flow, None)
        fresh = syn or protocol == "udp"
        number, why = self.place_flow(service, flow, fresh, now, seen)
        if number is None:
            return Outcome((why,))
        if not (protocol == "tcp" and "R" in letters):
            self.flows[flow] = Flow(number, "udp-new" if protocol == "udp" else "syn" if syn else "picked-up", now)
            if syn:
                self.ask(service, number, now)
        return self.forwarded("scheduled" if fresh else "maglev", number, service, vip, vport)

    def forwarded(self, reason: str, number: int, service: dict[str, Any], vip: str, vport: int) -> Outcome:
        key = self.backends[number][1]
        host, _, port = key.rpartition(":")
        return Outcome((reason,), key, (host, int(port)) if service["forward"] == "nat" else (vip, vport))

    def from_backend(self, key: str, protocol: str, client: str, port: int, letters: str, now: int) -> Outcome:
        senders = [
            s for s in self.services
            if s["forward"] == "nat" and s["protocol"] == protocol and (s["name"], key) in self.standings
        ]  # fmt: skip
        if not senders:
            return Outcome(("no_service",))
        for flow, entry in self.flows.items():
            if flow[:3] == (protocol, client, port) and self.is_known(entry, now):
                service = self.service_of(entry)
                leads_here = service["forward"] == "nat" and (service["vip"], service["port"]) == flow[3:]
                if leads_here and self.backends[entry.number][1] == key:
                    if entry.state == "syn" and protocol == "tcp":
                        self.hear(entry.number, letters)
                    entry.state, entry.seen = step(entry.state, protocol, letters, False, True), now
                    return Outcome(("conntrack",), key, flow[3:])
        for service in reversed(senders):
            flow = (protocol, client, port, service["vip"], service["port"])
            number = self.number(service, key)
            if self.midflow(service, flow, now) != number:
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
        reopened = "A" in letters and state in ("fin-client", "fin-backend")
        return "syn-ack" if not from_client and (state == "syn" or reopened) else state
    if not two_way and state in ("syn", "picked-up"):
        return "established"
    answers = {("syn", False), ("syn-ack", True), ("picked-up", False)}
    return "established" if (state, from_client) in answers else state


def named(services: Iterable[dict[str, Any]]) -> list[Name]:
    return [(service["name"], key) for service in services for key in keys_of(service)]
