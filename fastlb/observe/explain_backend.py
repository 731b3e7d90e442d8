"""The steps `backend` and `forward` of an explanation: the backend's state, and the way to it."""

from __future__ import annotations

from typing import Any

from fastlb.model.modes import MODES, SCHEDULERS
from fastlb.model.net import endpoint_text
from fastlb.observe.explanation import ClientPacket, Step
from fastlb.observe.status import problem_of
from fastlb.plan.plan import Member

MAX_NAMED = 8  # backends that are named in a line; programs get them all

FAULTS = {
    "no_route": "no route leads there, or its link is down",
    "no_neighbour": "the next hop's MAC is not known",
    "not_on_link": "behind a gateway, where dsr cannot send",
    "no_tunnel_source": "this host has no address of the backend's IP version to send from",
}


def explain_backend(seen: ClientPacket, member: Member) -> Step:
    """Return the state of the packet's backend, and its share of new flows."""
    share = _weight(seen, member) / max(1, sum(_weight(seen, each) for each in seen.plan.members))
    says = f", {share:.1%} of the weight for new flows" if share else ", no new flows"
    return Step("backend", _says(seen, member) + says, _facts(seen, member) | {"share": share})


def explain_all_backends(seen: ClientPacket) -> Step:
    """Return the states of a service's backends, none of which takes the flow."""
    members = seen.plan.members
    says = [_says(seen, member) for member in members[:MAX_NAMED]]
    if len(members) > len(says):
        says.append(f"and {len(members) - len(says)} more")
    facts = {"backends": [_facts(seen, member) for member in members]}
    return Step("backend", "; ".join(says) or "the service has none", facts)


def _says(seen: ClientPacket, member: Member) -> str:
    """Return a backend's state with the last check's fault."""
    facts, reason = _facts(seen, member), seen.context.states.of(seen.plan.name, member.key).reason
    weight, configured = facts["weight"], facts["configured"]
    problem = f", {facts['problem']}" if facts["problem"] else ""
    says = f"{member.key} is {facts['state']}" + (f" ({reason})" if reason else "") + f"{problem}, weight {weight}"
    return says + (f" by command (configured: {configured})" if weight != configured else "")


def _facts(seen: ClientPacket, member: Member) -> dict[str, Any]:
    state, configured = seen.context.states.of(seen.plan.name, member.key), _configured(seen, member)
    shown, weight = state.shown(seen.context.now), state.chosen_weight(configured)
    problem = problem_of(seen.plan, state)
    return {"backend": member.key, "state": shown, "problem": problem, "weight": weight, "configured": configured}


def _weight(seen: ClientPacket, member: Member) -> int:
    """Return the weight by which the service's scheduler goes."""
    return member.weight if SCHEDULERS[seen.plan.scheduler].weighted else member.unweighted


def _configured(seen: ClientPacket, member: Member) -> int:
    """Return the configuration's weight; 0 of a backend that it has no more."""
    service = next(service for service in seen.context.services if service.name == seen.plan.name)
    return next((each.weight for each in service.backends if service.key(each) == member.key), 0)


def explain_forward(seen: ClientPacket, member: Member) -> Step:
    """Return the way to the backend: mode, next hop, and how long a packet may be."""
    hop, plan = seen.found["hop"], seen.plan
    if not seen.context.hops_known:
        says = f"{plan.forward}; the next hop is a running balancer's to know"
        return Step("forward", says, {"forward": plan.forward})
    link, gateway = seen.context.next_hop(member.address) or (None, member.address)
    mac = hop["mac"].hex(":") if hop["mac"] else None
    facts = {
        "forward": plan.forward, "interface": link, "next_hop": str(gateway), "mac": mac, "mtu": hop["mtu"],
        "fault": hop["fault"], "past": _replies_go_past(seen, member),
    }  # fmt: skip
    says = f"{plan.forward} to {_target(seen, member)}"
    if hop["fault"] != "no_route":
        says += ", on-link" if gateway == member.address else f", by {gateway}"
    says += f", interface {link}" if link else ""
    says += f", MAC {mac}" if mac else ""
    if hop["fault"]:
        return Step("forward", f"{says}: {FAULTS[hop['fault']]}", facts)
    if facts["past"]:
        says += "; the client is on the backend's link, so that replies go to it directly, past this host"
    inside = f" inside the tunnel's {hop['outer']} bytes of headers" if hop["outer"] else ""
    return Step("forward", f"{says}, packets of up to {hop['mtu']} bytes{inside}", facts)


def _replies_go_past(seen: ClientPacket, member: Member) -> bool:
    """True if a mode needs replies to come by this host, and client and backend are neighbours of each other."""
    mode = MODES[seen.plan.forward]
    if not mode.sees_replies or mode.sends_from_snat:
        return False
    client, backend = seen.context.next_hop(seen.packet.src), seen.context.next_hop(member.address)
    on_link = client is not None and client[1] == seen.packet.src and backend is not None
    return on_link and client is not None and backend == (client[0], member.address)


def _target(seen: ClientPacket, member: Member) -> str:
    """Return the backend's address, with its port where the mode rewrites ports."""
    if not MODES[seen.plan.forward].sees_replies:
        return str(member.address)
    return endpoint_text(member.address, member.port or seen.packet.dport)
