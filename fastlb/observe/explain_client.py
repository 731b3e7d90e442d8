"""The explanation of a packet to a VIP: its service, who may begin a flow, the flow's entry, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any, NamedTuple

from fastlb.model.net import PortRange, endpoint_text
from fastlb.observe.explain_backend import FAULTS, explain_all_backends, explain_backend, explain_forward
from fastlb.observe.explain_scheduler import explain_scheduler
from fastlb.observe.explanation import ClientPacket, Explanation, FiveTuple, Step
from fastlb.plan.plan import Plan

TURNED_AWAY = ("denied", "source_limit", "new_flow_rate")  # before a backend is chosen, or in spite of it

VOID = {
    None: "",
    "expired": ": expired, so a new flow",
    "left": ": its backend has left, or is down, and keeps no flows, so a new flow",
    "to reset": ": its backend has left, or is down: answered with RST; a SYN begins a new flow",
    "down": ": its backend is down, so a SYN begins a new flow; what else comes still goes there",
    "of another service": ": of a service that had this VIP before, so a new flow",
    "of another mode": ": without a source port, from before the service went over to fullnat, so a new flow",
    "over": ": over, so a SYN begins a new flow; what else comes still goes there",
}
"""Why an entry does not decide, by its name in the data path."""

REFUSALS = {"tcp": "a RST", "udp": "ICMP port unreachable"}


class Verdict(NamedTuple):
    """What becomes of the packet: FORWARD or DROP, the counter's name, and what there is to add."""

    name: str
    reason: str
    why: str


def explain_client(seen: ClientPacket) -> Explanation:
    """Return the steps of a packet to a VIP, in the order in which it meets the stages."""
    verdict = decide(seen)
    steps = [_service(seen.packet, seen.plan, seen.context.plans), *_access(seen)]
    if not seen.found["admission"]["denied"]:
        steps += _way(seen)
    facts = {"verdict": verdict.name, "reason": verdict.reason}
    steps.append(Step("verdict", f"{verdict.name} {verdict.reason}{verdict.why}", facts))
    backend = seen.backend.key if seen.backend is not None and verdict.reason not in TURNED_AWAY else None
    hashed, slot = seen.found["hash"], seen.found["placement"]["slot"]
    return Explanation(
        seen.packet, seen.plan.name, backend, verdict.name, verdict.reason, tuple(steps), hashed, slot
    )


def _way(seen: ClientPacket) -> Iterator[Step]:
    """Yield what comes between access and verdict."""
    yield _worker(seen)
    yield _flow(seen)
    if not seen.known:
        yield explain_scheduler(seen)
    if seen.backend is not None:
        yield explain_backend(seen, seen.backend)
        yield explain_forward(seen, seen.backend)
    elif _no_backend(seen).reason != "nat_conflict":
        yield explain_all_backends(seen)


# --- the service, and who may begin a flow ---------------------------------------------------------------------------


def _service(packet: FiveTuple, plan: Plan, plans: Sequence[Plan]) -> Step:
    vip = "the address itself" if plan.network.num_addresses == 1 else f"prefix {plan.vip}"
    port = f"port {plan.ports}" if isinstance(plan.ports, int) else f"ports {plan.ports}"
    others = [other.name for other in plans if other is not plan and _fits(other, packet)]
    before = f"; more specific than {', '.join(others)}" if others else ""
    facts = {"service": plan.name, "vip": str(plan.vip), "port": str(plan.ports), "less_specific": others}
    return Step("service", f"{plan.name}: {vip}, {port}/{plan.protocol}{before}", facts)


def _fits(plan: Plan, packet: FiveTuple) -> bool:
    if packet.dst not in plan.network or plan.protocol != packet.protocol:
        return False
    if isinstance(plan.ports, PortRange):
        return plan.ports.first <= packet.dport <= plan.ports.last
    return plan.ports in ("any", packet.dport)


def _access(seen: ClientPacket) -> Iterator[Step]:
    """Yield nothing where the service lets everybody in."""
    denied, limit = seen.found["admission"]["denied"], seen.found["admission"]["limit"]
    said = []
    if seen.plan.allow or seen.plan.deny:
        said.append(_lists(seen, denied))
    if limit is not None and not denied:
        said.append(_source_limit(seen, *limit))
    if said:
        yield Step("access", "; ".join(said), {"denied": denied, "limit": limit})


def _lists(seen: ClientPacket, denied: bool) -> str:
    here = [(net.prefixlen, net) for net in (*seen.plan.allow, *seen.plan.deny) if seen.packet.src in net]
    if here:
        return f"{'denied' if denied else 'allowed'} as of {max(here)[1]}, the longest prefix of its lists"
    return "denied: it is in no prefix of allow" if denied else "in no list, so allowed"


def _source_limit(seen: ClientPacket, flows: int, seconds: float) -> str:
    """Return how many flows the source may begin, or in how many seconds the next one."""
    assert seen.plan.source_limit is not None
    source = ip_network(f"{seen.packet.src}/{seen.plan.source_limit.prefix}", strict=False)
    if flows:
        return f"{source} may begin {flows} more flows at this moment"
    return f"{source} has begun as many flows as it may, the next one in {seconds:.1f} s"


# --- the worker and the flow -----------------------------------------------------------------------------------------


def _worker(seen: ClientPacket) -> Step:
    shard = seen.found["shard"]
    return Step("worker", f"{seen.context.worker_of(shard)}shard {shard} of the flow table", {"shard": shard})


def _flow(seen: ClientPacket) -> Step:
    entry = seen.found["entry"]
    if entry is None:
        return Step("flow", "no entry: a new flow" + _remembered(seen), {"entry": False})
    backend = seen.key(entry["backend"])
    source = endpoint_text(entry["source"], entry["source_port"]) if entry["source"] else None
    says = f"{entry['state']}{f' at {backend}' if backend else ''}"
    says += f", {entry['age'] / 1000:.1f} s old, idle for {entry['idle'] / 1000:.1f} s"
    says += f", source {source}" if source else ""
    facts = {
        "entry": True, "state": entry["state"], "backend": backend, "age": entry["age"] / 1000,
        "idle": entry["idle"] / 1000, "source": source, "void": entry["void"],
    }  # fmt: skip
    return Step("flow", says + VOID[entry["void"]] + ("" if seen.known else _remembered(seen)), facts)


def _remembered(seen: ClientPacket) -> str:
    """Return why a new flow gets no entry, or may have none; nothing where flows get their entries."""
    admission = seen.found["admission"]
    if not admission["remembered"]:
        return "; it gets none, for there are more new flows than new_flow_rate"
    if not admission["scheduled"]:
        return "; it may be of one that got none lately, when there were more than new_flow_rate"
    return ""


# --- the verdict -----------------------------------------------------------------------------------------------------


def decide(seen: ClientPacket) -> Verdict:
    """Return what becomes of the packet: the first of all reasons that holds, as in the data path."""
    if seen.found["admission"]["denied"]:
        return Verdict("DROP", "denied", ": the service's lists do not let this source in")
    limit = seen.found["admission"]["limit"]
    if not seen.known and limit is not None and not limit[0]:
        return Verdict("DROP", "source_limit", ": too many new flows from this source")
    if seen.backend is None:
        return _no_backend(seen)
    refusal = None if seen.known else _refuse_new_flow(seen.found)
    if refusal is not None:
        return refusal
    fault = seen.found["hop"]["fault"]
    if fault and seen.context.hops_known:
        return Verdict("DROP", fault, f": {FAULTS[fault]}")
    unless = "" if seen.context.hops_known else ", if the next hop can be reached"
    return Verdict("FORWARD", _path(seen), unless)


def _refuse_new_flow(found: Mapping[str, Any]) -> Verdict | None:
    """Return why there is no entry or no source port for a new flow that needs one."""
    admission, ports = found["admission"], found["source_ports"]
    if admission["crowded"] and admission["needs_entry"]:
        return Verdict("DROP", "flow_table_full", ": its flows may not fill the table any further, and need an entry")
    if not admission["remembered"] and admission["needs_entry"]:
        return Verdict(
            "DROP", "new_flow_rate", ": too many new flows, and without an entry nobody would know its answers"
        )
    if ports is not None and ports[0] >= ports[1]:
        return Verdict("DROP", "no_source_port", f": all {ports[1]} of the flow's shard are taken")
    return None


def _path(seen: ClientPacket) -> str:
    """Return by which path the packet is forwarded."""
    admission = seen.found["admission"]
    if seen.known:
        return "conntrack"
    if not admission["remembered"]:
        return "overload"
    return "scheduled" if admission["scheduled"] else "maglev"


def _no_backend(seen: ClientPacket) -> Verdict:
    """Return what becomes of a flow that no backend takes."""
    if seen.found["scheduled" if seen.found["admission"]["scheduled"] else "hashed"]:
        return Verdict("DROP", "nat_conflict", ": the client's port already talks to every backend through another VIP")
    if seen.plan.no_backend == "reset":
        return Verdict("FORWARD", "rejected", f": answered with {REFUSALS[seen.packet.protocol]}")
    if seen.found["full"]:
        return Verdict("DROP", "backends_full", ": each backend has the flows that it may have")
    return Verdict("DROP", "no_backend", ": no backend takes new flows")
