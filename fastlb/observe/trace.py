"""Which backend does a client's packet get, and why? `fastlb trace`, and `Datapath.trace`. Pure.

The data path says what it finds at each stage (`explain_tuple`); here it is put into words, in the order in which a
packet meets the stages, up to its verdict. Asking changes nothing: no turn is taken, no flow is begun.

    service     the most specific VIP and port that fit                     explain_client.py
    access      the service's lists of sources, and how many flows this
                one may begin
    worker      who owns the shard of the flow
    flow        its entry in the flow table, and whether that decides
    scheduler   where a new flow would go, and by what                      explain_scheduler.py
    backend     the backend's state                                         explain_backend.py
    forward     mode, next hop, what fits
    verdict     what becomes of the packet, under the name of its counter   explain_client.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlb._core import FlowMemory, Pipeline, Routes, explain_tuple, shard_of_client
from fastlb.config import Config
from fastlb.errors import FastlbError
from fastlb.model.names import owner_of_shard
from fastlb.model.net import PROTOCOL_NUMBERS, endpoint_text
from fastlb.observe.explain_client import explain_client
from fastlb.observe.explanation import ClientPacket, Context, Explanation, FiveTuple, Step, parse_tuple
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Member, Plan, plan_services
from fastlb.plan.tables import services_table


def explain(pipeline: Pipeline, packet: FiveTuple, context: Context, now_ms: int) -> Explanation:
    """Ask the data path about a packet, and return what it found.

    ``pipeline``: that of the worker that owns the packet's shard; ``now_ms``: its clock. Raises ValueError for what is
    no tuple.
    """
    found: Mapping[str, Any] = explain_tuple(
        pipeline, packet.src, packet.sport, packet.dst, packet.dport, PROTOCOL_NUMBERS[packet.protocol], now_ms
    )
    if found["leg"] == "client":
        return explain_client(ClientPacket(packet, context, found))
    if found["leg"] == "reply":
        return _explain_reply(packet, context.plans, found["reply"])
    steps = (_no_service(packet, context.plans), Step("verdict", "PASS no_service: left to the host"))
    return Explanation(packet, None, None, "PASS", "no_service", steps)


def explain_offline(config: Config, packet: FiveTuple) -> Explanation:
    """Return what the configuration alone decides: as in a balancer that has just started, before the first check."""
    states, ids = BackendStates(), BackendIds()
    states.apply_config(config, 0.0)
    plans = plan_services(config, ids, 0.0, states)
    pipeline = Pipeline(FlowMemory(1, sources=config.snat, ports=config.snat_ports))
    anywhere = (bytes(6), bytes(6), 0, 0, None)
    hops = dict.fromkeys((member.id for plan in plans for member in plan.members), 0)
    pipeline.publish(services_table(config, plans), Routes([anywhere], [], {}, hops))
    return explain(pipeline, packet, Context(plans, config.services, states, hops_known=False), 0)


def requested_tuple(request: Mapping[str, Any]) -> FiveTuple:
    """Return what a request on the control socket asks for; raises FastlbError."""
    try:
        return parse_tuple(str(request.get("source")), str(request.get("destination")))
    except ValueError as error:
        raise FastlbError(str(error)) from None


def owner_of(packet: FiveTuple, workers: int) -> int:
    """Return which of the workers has the packet's flow, and with it the pipeline to ask."""
    return owner_of_shard(shard_of_client(packet.src, packet.sport), workers)


# --- packets that are not a client's to a VIP ------------------------------------------------------------------------


def _no_service(packet: FiveTuple, plans: Sequence[Plan]) -> Step:
    here = [plan for plan in plans if packet.dst in plan.network]
    near = ", ".join(f"{plan.name} has {plan.vip} port {plan.ports}/{plan.protocol}" for plan in here)
    hint = near if near else f"{packet.dst} is no VIP"
    return Step("service", f"none has this address, port and protocol: {hint}", {"service": None})


def _explain_reply(packet: FiveTuple, plans: Sequence[Plan], reply: Mapping[str, Any]) -> Explanation:
    """Return which flow a packet answers that comes from a backend of the NAT modes."""
    sender = endpoint_text(packet.src, packet.sport)
    service = Step("service", f"{sender} is a backend of nat or fullnat: what it sends counts as an answer to a client")
    placed = _find_member(plans, reply["backend"])
    if placed is None:
        flow = Step("flow", "no flow has this backend and client, and no hash explains one", {"entry": False})
        steps = (service, flow, Step("verdict", "DROP reply_unknown"))
        return Explanation(packet, None, None, "DROP", "reply_unknown", steps)
    plan, member = placed
    flow, reason = _answered(plan, member, reply)
    verdict = f"FORWARD {reason}: to the client, from the VIP, unless the way to the client is missing"
    steps = (service, flow, Step("verdict", verdict))
    return Explanation(packet, plan.name, member.key, "FORWARD", reason, steps)


def _answered(plan: Plan, member: Member, reply: Mapping[str, Any]) -> tuple[Step, str]:
    """Return the step of the flow that is answered, and the path of the answer."""
    flow = f"{endpoint_text(reply['client'], reply['client_port'])} -> {endpoint_text(reply['vip'], reply['vip_port'])}"
    facts = {"entry": reply["state"] is not None, "state": reply["state"], "flow": flow}
    if reply["state"] is not None:
        return Step("flow", f"{flow} of {plan.name}, {reply['state']}, at {member.key}", facts), "conntrack"
    says = f"no entry; by the hash of {plan.name}, {flow} would be at {member.key}"
    return Step("flow", says, facts), "maglev" if reply["remembered"] else "overload"


def _find_member(plans: Sequence[Plan], number: int) -> tuple[Plan, Member] | None:
    return next(((plan, member) for plan in plans for member in plan.members if member.id == number), None)
