"""Which backend does a client's packet get, and why? `fastlb trace`, and `Datapath.trace`. Pure.

The data path says what it finds at each stage (`explain_tuple`); here it is put into words, in the order in which a
packet meets the stages, up to its verdict. Asking changes nothing: no turn is taken, no flow is begun.

    service     the most specific VIP and port that fit
    access      the service's lists of sources, and how many flows this one may begin
    worker      who owns the shard of the flow
    flow        its entry in the flow table, and whether that decides
    scheduler   where a new flow would go, and by what
    backend     how the backend stands
    forward     mode, next hop, what fits
    verdict     what becomes of the packet, under the name of its counter
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from textwrap import wrap
from typing import Any, NamedTuple

from fastlb._core import FlowMemory, Pipeline, Routes, explain_tuple, shard_of_client
from fastlb.config import Config, Service
from fastlb.errors import FastlbError
from fastlb.model.modes import TUNNELS
from fastlb.model.names import owner_of_shard
from fastlb.model.net import PROTOCOL_NUMBERS, Address, PortRange, endpoint_text, parse_endpoint
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Member, Plan, plan_services
from fastlb.plan.tables import services_table

EVENLY = ("rr", "lc")  # weights do not count
TURNED_AWAY = ("denied", "source_limit", "new_flow_rate")  # before a backend is chosen, or in spite of it
WIDTH = 118  # of the lines that are printed
MOST_CANDIDATES = 8  # that are listed in a line; programs get them all


class Tuple(NamedTuple):
    """Of a packet: where it comes from and where it goes to."""

    src: Address
    sport: int
    dst: Address
    dport: int
    protocol: str

    def __str__(self) -> str:
        return f"{endpoint_text(self.src, self.sport)} -> {endpoint_text(self.dst, self.dport)}/{self.protocol}"


@dataclass(frozen=True)
class Step:
    """One stage: ``says`` it in words, ``facts`` are the same for programs."""

    stage: str
    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """What is known beside the data path itself."""

    plans: Sequence[Plan]
    services: Sequence[Service]
    standings: BackendStates
    worker_of: Callable[[int], str] = lambda shard: ""  # a shard's
    next_hop: Callable[[Address], tuple[str, Address] | None] = lambda address: None  # (interface, address)
    hops_known: bool = True  # not without a running balancer
    now: float = 0.0  # seconds, on the clock of the standings


@dataclass(frozen=True)
class Explanation:
    """``verdict``: FORWARD, PASS or DROP; ``reason``: the counter's name."""

    packet: Tuple
    service: str | None
    backend: str | None
    verdict: str
    reason: str
    steps: tuple[Step, ...]
    flow_hash: int | None = None  # what the service's scheduler takes, and a fleet agrees on
    slot: int | None = None  # of the service's Maglev table

    def as_json(self) -> dict[str, Any]:
        return {
            "packet": str(self.packet),
            "service": self.service,
            "backend": self.backend,
            "verdict": self.verdict,
            "reason": self.reason,
            "flow_hash": self.flow_hash,
            "slot": self.slot,
            "steps": [{"stage": step.stage, "says": step.says, **step.facts} for step in self.steps],
        }


def parse_tuple(source: str, destination: str) -> Tuple:
    """From "198.51.100.7:40000" and "203.0.113.10:443/tcp"; raises ValueError, which says what would be right."""
    destination, _, protocol = destination.partition("/")
    if protocol not in PROTOCOL_NUMBERS:
        raise ValueError(f"a destination ends in /tcp or /udp, as in 203.0.113.10:443/tcp, not in {protocol!r}")
    packet = Tuple(*parse_endpoint(source), *parse_endpoint(destination), protocol)
    if packet.src.version != packet.dst.version:
        raise ValueError(f"{packet.src} and {packet.dst} are of different IP versions")
    return packet


def owner_of(packet: Tuple, workers: int) -> int:
    """Return which of the workers has the packet's flow, and with it the pipeline to ask."""
    return owner_of_shard(shard_of_client(packet.src, packet.sport), workers)


def explain(pipeline: Pipeline, packet: Tuple, scene: Scene, now_ms: int) -> Explanation:
    """Look a packet's tuple up, and say what was found. ``pipeline``: the one that owns its shard; ``now_ms``: its
    clock. Raises ValueError for what is no tuple."""
    found: Mapping[str, Any] = explain_tuple(
        pipeline, packet.src, packet.sport, packet.dst, packet.dport, PROTOCOL_NUMBERS[packet.protocol], now_ms
    )
    if found["leg"] == "client":
        return _Client(packet, scene, found).explanation()
    if found["leg"] == "reply":
        return _reply(packet, scene, found)
    steps = (_no_service(packet, scene.plans), Step("verdict", "PASS no_service: left to the host"))
    return Explanation(packet, None, None, "PASS", "no_service", steps)


# --- whose packet it is ----------------------------------------------------------------------------------------------


def _no_service(packet: Tuple, plans: Sequence[Plan]) -> Step:
    here = [plan for plan in plans if packet.dst in plan.network]
    near = ", ".join(f"{plan.name} has {plan.vip} port {plan.ports}/{plan.protocol}" for plan in here)
    hint = near if near else f"{packet.dst} is no VIP"
    return Step("service", f"none has this address, port and protocol: {hint}", {"service": None})


def _service(packet: Tuple, plan: Plan, plans: Sequence[Plan]) -> Step:
    vip = "the address itself" if plan.network.num_addresses == 1 else f"prefix {plan.vip}"
    port = f"port {plan.ports}" if isinstance(plan.ports, int) else f"ports {plan.ports}"
    others = [other.name for other in plans if other is not plan and _fits(other, packet)]
    before = f"; more specific than {', '.join(others)}" if others else ""
    facts = {"service": plan.name, "vip": str(plan.vip), "port": str(plan.ports), "less_specific": others}
    return Step("service", f"{plan.name}: {vip}, {port}/{plan.protocol}{before}", facts)


def _fits(plan: Plan, packet: Tuple) -> bool:
    if packet.dst not in plan.network or plan.protocol != packet.protocol:
        return False
    if isinstance(plan.ports, PortRange):
        return plan.ports.first <= packet.dport <= plan.ports.last
    return plan.ports in ("any", packet.dport)


def _reply(packet: Tuple, scene: Scene, found: Mapping[str, Any]) -> Explanation:
    """Of a backend of the NAT modes, to its client."""
    reply = found["reply"]
    placed = _members(scene.plans).get(reply["backend"])
    whose = endpoint_text(packet.src, packet.sport)
    steps = [Step("service", f"{whose} is a backend of nat or fullnat: what it sends counts as an answer to a client")]
    if placed is None:
        steps += [Step("flow", "no flow has this backend and client, and no hash explains one", {"entry": False}),
                  Step("verdict", "DROP reply_unknown")]  # fmt: skip
        return Explanation(packet, None, None, "DROP", "reply_unknown", tuple(steps))
    plan, member = placed
    flow = f"{endpoint_text(reply['client'], reply['client_port'])} -> {endpoint_text(reply['vip'], reply['vip_port'])}"
    if reply["state"] is None:
        says = f"no entry; by the hash of {plan.name}, {flow} would be at {member.key}"
        reason = "maglev" if reply["remembered"] else "overload"
    else:
        says, reason = f"{flow} of {plan.name}, {reply['state']}, at {member.key}", "conntrack"
    steps += [
        Step("flow", says, {"entry": reply["state"] is not None, "state": reply["state"], "flow": flow}),
        Step("verdict", f"FORWARD {reason}: to the client, from the VIP, unless the way to the client is missing"),
    ]
    return Explanation(packet, plan.name, member.key, "FORWARD", reason, tuple(steps))


def _members(plans: Sequence[Plan]) -> dict[int, tuple[Plan, Member]]:
    return {member.id: (plan, member) for plan in plans for member in plan.members}


# --- a client's packet -----------------------------------------------------------------------------------------------


class _Client:
    """The steps of a packet to a VIP."""

    def __init__(self, packet: Tuple, scene: Scene, found: Mapping[str, Any]) -> None:
        self.packet, self.scene, self.found = packet, scene, found
        self.plan = scene.plans[found["service"]]
        self.members = {member.id: member for member in self.plan.members}
        self.entry: Mapping[str, Any] | None = found["entry"]
        self.known = self.entry is not None and self.entry["void"] is None
        self.backend = self.members.get(found["backend"])

    def explanation(self) -> Explanation:
        verdict, reason, why = self._verdict()
        steps = [_service(self.packet, self.plan, self.scene.plans), *self._access()]
        if not self.found["admission"]["denied"]:
            steps += self._way()
        steps.append(Step("verdict", f"{verdict} {reason}{why}", {"verdict": verdict, "reason": reason}))
        key = self.backend.key if self.backend is not None and reason not in TURNED_AWAY else None
        hashed, slot = self.found["hash"], self.found["placement"]["slot"]
        return Explanation(self.packet, self.plan.name, key, verdict, reason, tuple(steps), hashed, slot)

    def _way(self) -> Iterator[Step]:
        yield self._worker()
        yield self._flow()
        if not self.known:
            yield self._scheduler()
        if self.backend is not None:
            yield self._standing(self.backend)
            yield self._forward(self.backend)
        elif self._nowhere()[1] != "nat_conflict":
            yield self._all_standing()

    # --- who may begin a flow -----------------------------------------------------------------------------------------

    def _access(self) -> Iterator[Step]:
        """Nothing where the service lets everybody in."""
        denied, limit = self.found["admission"]["denied"], self.found["admission"]["limit"]
        said = []
        if self.plan.allow or self.plan.deny:
            said.append(self._listed(denied))
        if limit is not None and not denied:
            said.append(self._limit(*limit))
        if said:
            yield Step("access", "; ".join(said), {"denied": denied, "limit": limit})

    def _listed(self, denied: bool) -> str:
        here = [(net.prefixlen, net) for net in (*self.plan.allow, *self.plan.deny) if self.packet.src in net]
        if here:
            return f"{'denied' if denied else 'allowed'} as of {max(here)[1]}, the longest prefix of its lists"
        return "denied: it is in no prefix of allow" if denied else "in no list, so allowed"

    def _limit(self, flows: int, seconds: float) -> str:
        assert self.plan.source_limit is not None
        source = ip_network(f"{self.packet.src}/{self.plan.source_limit.prefix}", strict=False)
        if flows:
            return f"{source} may begin {flows} more flows at this moment"
        return f"{source} has begun as many flows as it may, the next one in {seconds:.1f} s"

    def _worker(self) -> Step:
        shard = self.found["shard"]
        return Step("worker", f"{self.scene.worker_of(shard)}shard {shard} of the flow table", {"shard": shard})

    # --- the flow ----------------------------------------------------------------------------------------------------

    def _flow(self) -> Step:
        entry = self.entry
        if entry is None:
            return Step("flow", "no entry: a new flow" + self._remembered(), {"entry": False})
        member = self.members.get(entry["backend"])
        at = f" at {member.key}" if member else ""
        source = endpoint_text(entry["source"], entry["source_port"]) if entry["source"] else None
        says = f"{entry['state']}{at}, {_seconds(entry['age'])} old, idle for {_seconds(entry['idle'])}"
        if source:
            says += f", source {source}"
        facts = {
            "entry": True, "state": entry["state"], "backend": member.key if member else None,
            "age": entry["age"] / 1000, "idle": entry["idle"] / 1000, "source": source, "void": entry["void"],
        }  # fmt: skip
        return Step("flow", says + _VOID[entry["void"]] + ("" if self.known else self._remembered()), facts)

    def _remembered(self) -> str:
        """Nothing where flows get their entries."""
        admission = self.found["admission"]
        if not admission["remembered"]:
            return "; it gets none, for there are more new flows than new_flow_rate"
        if not admission["scheduled"]:
            return "; it may be of one that got none lately, when there were more than new_flow_rate"
        return ""

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def _scheduler(self) -> Step:
        scheduled = self.members.get(self.found["scheduled"])
        affine = self._affine()
        facts = {
            "scheduler": self.plan.scheduler,
            "affinity": affine is not None and affine == scheduled,
            "scheduled": scheduled.key if scheduled else None,
            "without_a_syn": self._key(self.found["hashed"]),
            **{name: value for name, value in self.found["placement"].items() if name != "candidates" and value},
            "candidates": [self._candidate(each) for each in self.found["placement"]["candidates"]],
        }
        if not self.found["admission"]["scheduled"]:
            by = "its client's affinity" if self._affine() else "the flow's hash"
            return Step("scheduler", f"not asked: by {by} -> {self.backend.key if self.backend else 'none'}", facts)
        if scheduled is None:
            none = "each backend has the flows that it may have" if self.found["full"] else "no backend takes new flows"
            return Step("scheduler", f"{self.plan.scheduler}: {none}", facts)
        if affine is not None:
            left = self.found["affine"]["left"]
            says = f"affinity: the client's last flow went to {affine.key}; remembered for {left:.0f} s more"
        else:
            says = f"{self._affinity()}{self.plan.scheduler}: {self._grounds()}{self._limits()} -> {scheduled.key}"
        if self.backend is not scheduled:
            says += f"; it already talks to this client port through another VIP, so {self._next_by_hash()}"
        if self.packet.protocol == "tcp" and self.found["hashed"] != self.found["scheduled"]:
            sticks = self.found["affine"] is not None and self.found["affine"]["backend"] == self.found["hashed"]
            how = "after its client" if sticks else "by hash"
            says += f"; a packet that is no SYN goes {how}, to {self._key(self.found['hashed'])}"
        return Step("scheduler", says, facts)

    def _affine(self) -> Member | None:
        """Whom the client sticks to, as long as that one takes its flow."""
        affine = self.found["affine"]
        return self.members.get(affine["backend"]) if affine and not affine["full"] else None

    def _affinity(self) -> str:
        """Why what is remembered of the client does not decide."""
        affine = self.found["affine"]
        if affine is None:
            return ""
        former = self._key(affine["backend"])
        why = f"{former} has the flows that it may have" if former else "the client's former backend takes none"
        return f"affinity: {why}, so "

    def _limits(self) -> str:
        """Why another one may be meant than the scheduler's first."""
        bound = f"at most {self.plan.bounded_load} of its share" if self.plan.bounded_load else ""
        caps = ", ".join(
            f"{member.key} at most {member.max_flows}"
            for member in self._first([member for member in self.plan.members if member.max_flows])
        )
        limits = "; ".join(each for each in (bound, caps) if each)
        return f", of those with room ({limits})" if limits else ""

    def _key(self, number: int) -> str | None:
        return self.members[number].key if number in self.members else None

    def _next_by_hash(self) -> str:
        return f"the next by the hash, {self.backend.key}" if self.backend else "there is none for it"

    def _candidate(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        return {**candidate, "backend": self._key(candidate["backend"])}

    def _grounds(self) -> str:
        placement, scheduler = self.found["placement"], self.plan.scheduler
        if scheduler in ("maglev", "source-hash"):
            of = "the flow's hash" if scheduler == "maglev" else f"the hash of {self.packet.src}"
            return f"{of} {self.found['hash']:#018x}, slot {placement['slot']} of {placement['slots']}"
        if scheduler == "ketama":
            point = f"point {placement['point']:#018x}, one of {placement['points']}"
            return f"the flow's hash {self.found['hash']:#018x}, {point}"
        if scheduler in ("rr", "wrr"):
            return f"turn {placement['turn'] + 1} of {placement['turns']} of this worker, if no other flow comes first"
        if scheduler == "random":
            return f"by lot, the next one of this worker, {self._chance()}"
        if scheduler == "p2c":
            return f"the better of two drawn by lot, if no other flow comes first; {self._loads()}"
        return f"the least load at this moment, of equals the next in turn; {self._loads()}"

    def _chance(self) -> str:
        whole = sum(member.weight for member in self.plan.members)
        return "by weight " + ", ".join(
            f"{member.key} {member.weight / whole:.1%}" for member in self._first(self.plan.members) if member.weight
        )

    def _loads(self) -> str:
        candidates = self.found["placement"]["candidates"]
        listed = [self._load(each) for each in self._first(candidates)]
        more = len(candidates) - len(listed)
        return "; ".join(listed) + (f"; and {more} more" if more else "")

    @staticmethod
    def _first(listed: Sequence[Any]) -> Sequence[Any]:
        return listed[:MOST_CANDIDATES]

    def _load(self, candidate: Mapping[str, Any]) -> str:
        response = candidate["response"]
        by = f" x {response * 1000:.2f} ms" if response is not None else ""
        return f"{self._key(candidate['backend'])} ({candidate['flows']} + 1) / {candidate['weight']}{by}"

    # --- the backend and the way to it -------------------------------------------------------------------------------

    def _standing(self, member: Member) -> Step:
        share = self._part(member) / max(1, sum(map(self._part, self.plan.members)))
        facts = self._stands(member) | {"share": share}
        says = f", {share:.1%} of the weight for new flows" if share else ", no new flows"
        return Step("backend", self._says(member) + says, facts)

    def _all_standing(self) -> Step:
        """Of those that take no new flows."""
        members = self.plan.members
        says = [self._says(member) for member in self._first(members)]
        if len(members) > len(says):
            says.append(f"and {len(members) - len(says)} more")
        facts = {"backends": [self._stands(member) for member in members]}
        return Step("backend", "; ".join(says) or "the service has none", facts)

    def _says(self, member: Member) -> str:
        """With the last check's fault."""
        facts, reason = self._stands(member), self.scene.standings.of(self.plan.name, member.key).reason
        weight, configured = facts["weight"], facts["configured"]
        says = f"{member.key} is {facts['state']}" + (f" ({reason})" if reason else "") + f", weight {weight}"
        return says + (f" by command (configured: {configured})" if weight != configured else "")

    def _stands(self, member: Member) -> dict[str, Any]:
        standing, configured = self.scene.standings.of(self.plan.name, member.key), self._configured(member)
        state, weight = standing.shown(self.scene.now), standing.chosen_weight(configured)
        return {"backend": member.key, "state": state, "weight": weight, "configured": configured}

    def _part(self, member: Member) -> int:
        return member.unweighted if self.plan.scheduler in EVENLY else member.weight

    def _configured(self, member: Member) -> int:
        """0 of one that is removed."""
        service = next(service for service in self.scene.services if service.name == self.plan.name)
        return next((each.weight for each in service.backends if service.key(each) == member.key), 0)

    def _forward(self, member: Member) -> Step:
        hop = self.found["hop"]
        facts: dict[str, Any] = {"forward": self.plan.forward}
        if not self.scene.hops_known:
            return Step("forward", f"{self.plan.forward}; the next hop is a running balancer's to know", facts)
        towards = self.scene.next_hop(member.address)
        link, gateway = towards or (None, member.address)
        mac = hop["mac"].hex(":") if hop["mac"] else None
        facts |= {"interface": link, "next_hop": str(gateway), "mac": mac, "mtu": hop["mtu"], "fault": hop["fault"]}
        target = endpoint_text(member.address, member.port or self.packet.dport)
        if self.plan.forward in TUNNELS or self.plan.forward == "dsr":
            target = str(member.address)
        says = f"{self.plan.forward} to {target}"
        if hop["fault"] != "no_route":
            says += ", on-link" if gateway == member.address else f", by {gateway}"
        says += f", interface {link}" if link else ""
        says += f", MAC {mac}" if mac else ""
        if hop["fault"]:
            return Step("forward", f"{says}: {_FAULTS[hop['fault']]}", facts)
        inside = f" inside the tunnel's {hop['outer']} bytes of headers" if hop["outer"] else ""
        return Step("forward", f"{says}, packets of up to {hop['mtu']} bytes{inside}", facts)

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _verdict(self) -> tuple[str, str, str]:
        """Verdict, reason, and what there is to add."""
        admission = self.found["admission"]
        if admission["denied"]:
            return "DROP", "denied", ": the service's lists do not let this source in"
        if not self.known and admission["limit"] is not None and not admission["limit"][0]:
            return "DROP", "source_limit", ": too many new flows from this source"
        if self.backend is None:
            return self._nowhere()
        if not self.known and admission["crowded"] and admission["needs_entry"]:
            return "DROP", "flow_table_full", ": its flows may not fill the table any further, and need an entry"
        if not self.known and not admission["remembered"] and admission["needs_entry"]:
            return "DROP", "new_flow_rate", ": too many new flows, and without an entry nobody would know its answers"
        ports = self.found["source_ports"]
        if not self.known and ports is not None and ports[0] >= ports[1]:
            return "DROP", "no_source_port", f": all {ports[1]} of the flow's shard are taken"
        fault = self.found["hop"]["fault"]
        if fault and self.scene.hops_known:
            return "DROP", fault, f": {_FAULTS[fault]}"
        unless = "" if self.scene.hops_known else ", if the next hop can be reached"
        return "FORWARD", self._path(), unless

    def _path(self) -> str:
        admission = self.found["admission"]
        if self.known:
            return "conntrack"
        if not admission["remembered"]:
            return "overload"
        return "scheduled" if admission["scheduled"] else "maglev"

    def _nowhere(self) -> tuple[str, str, str]:
        if self.found["scheduled" if self.found["admission"]["scheduled"] else "hashed"]:
            return "DROP", "nat_conflict", ": the client's port already talks to every backend through another VIP"
        reason, why = "no_backend", ": no backend takes new flows"
        if self.found["full"]:
            reason, why = "backends_full", ": each backend has the flows that it may have"
        if self.plan.no_backend == "reset":
            return "FORWARD", "rejected", f": answered with {_REFUSALS[self.packet.protocol]}"
        return "DROP", reason, why


_VOID = {
    None: "",
    "expired": ": expired, so a new flow",
    "left": ": its backend has left, or is down, and keeps no flows, so a new flow",
    "to reset": ": its backend has left, or is down: answered with RST; a SYN begins a new flow",
    "down": ": its backend is down, so a SYN begins a new flow; what else comes still goes there",
    "of another service": ": of a service that had this VIP before, so a new flow",
    "of another mode": ": without a source port, from before the service went over to fullnat, so a new flow",
    "over": ": over, so a SYN begins a new flow; what else comes still goes there",
}
_FAULTS = {
    "no_route": "no route leads there, or its link is down",
    "no_neighbour": "the next hop's MAC is not known",
    "not_on_link": "behind a gateway, where dsr cannot send",
    "no_tunnel_source": "this host has no address of the backend's IP version to send from",
}
_REFUSALS = {"tcp": "a RST", "udp": "ICMP port unreachable"}


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s"


# --- without a running balancer --------------------------------------------------------------------------------------


def from_configuration(config: Config, packet: Tuple) -> Explanation:
    """What the configuration alone decides: as in a balancer that has just begun, before the first health check."""
    standings, ids = BackendStates(), BackendIds()
    standings.apply_config(config, 0.0)
    plans = plan_services(config, ids, 0.0, standings)
    pipeline = Pipeline(FlowMemory(1, sources=config.snat, ports=config.snat_ports))
    anywhere = (bytes(6), bytes(6), 0, 0, None)
    hops = dict.fromkeys((member.id for plan in plans for member in plan.members), 0)
    pipeline.publish(services_table(config, plans), Routes([anywhere], [], {}, hops))
    return explain(pipeline, packet, Scene(plans, config.services, standings, hops_known=False), 0)


# --- for the command -------------------------------------------------------------------------------------------------


def requested(request: Mapping[str, Any]) -> Tuple:
    """What a request on the control socket asks for; raises FastlbError."""
    try:
        return parse_tuple(str(request.get("source")), str(request.get("destination")))
    except ValueError as error:
        raise FastlbError(str(error)) from None


def described(explained: Mapping[str, Any]) -> Iterator[str]:
    """The lines of an explanation that came as JSON."""
    yield str(explained["packet"])
    for step in explained["steps"]:
        yield from wrap(step["says"], WIDTH, initial_indent=f"  {step['stage']:<10} ", subsequent_indent=" " * 13)
