"""What the control socket answers: a running fastlb looked at, and told what to do.

Everything here runs within the balancer's event loop, as all that changes the data path does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import structlog

from fastlb.config import drain_time
from fastlb.config.refusal import show
from fastlb.control.balancer import Balancer
from fastlb.control.server import Command
from fastlb.control.slices import run_in_slices
from fastlb.errors import FastlbError
from fastlb.model.clock import flow_clock
from fastlb.model.counters import add_up
from fastlb.model.names import BackendName, owner_of_shard
from fastlb.model.net import Address
from fastlb.observe import flows, status, trace
from fastlb.observe.explanation import Context
from fastlb.observe.log import lost as lines_lost
from fastlb.plan.leaving import fate_after_drain, fate_of, totals
from fastlb.version import __version__

MAX_WEIGHT = 65535
MAX_LEFT = 1000  # backends that a reload took out, and its answer names
TOLD = ("interfaces", "transmit", "tunnel_offload", "open_blocks", "workers")  # of `Balancer.describe`, for status
HANDED_OVER = ("interfaces", "vips", "flow_file")  # of the same, for who stops it with a handover

log = structlog.get_logger()


class Commands:
    """The commands that one balancer answers. Each takes the request, and raises FastlbError to refuse it."""

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def by_name(self) -> Mapping[str, Command]:
        """Return the commands by name, for `ControlServer`."""
        return {
            "status": self._status, "conns": self._conns, "trace": self._trace,
            "drain": self._drain, "enable": self._enable, "weight": self._set_weight,
            "reload": self._reload, "stop": self._stop,
        }  # fmt: skip

    # --- looking -------------------------------------------------------------------------------------------

    async def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        pipelines, world = self._balancer.pipelines, self._balancer.world
        services = await run_in_slices(
            status.services_in_steps(pipelines, world.configuration.plans, world.states, time.monotonic())
        )
        told = self._balancer.describe()
        lost = told["lost_lines"] | {"log_lost": lines_lost()}
        counters = add_up((*(pipeline.counters() for pipeline in pipelines), told["passed"], lost)) | told["counters"]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._balancer.started, 1),
            **{name: told[name] for name in TOLD},
            "counters": status.split_counters(counters),
            "services": services,
            "flows": status.describe_flows(pipelines[0]) | {"file": told["flow_file"]},
            "affinity": status.describe_affinity(pipelines[0]),
            "event_loop": dict(told["event_loop"]),
        }

    def _conns(self, request: Mapping[str, Any]) -> dict[str, Any]:
        plans = self._balancer.world.configuration.plans
        return flows.answer(self._balancer.pipelines[0], plans, request, flow_clock())

    def _trace(self, request: Mapping[str, Any]) -> dict[str, Any]:
        world, packet = self._balancer.world, trace.requested_tuple(request)
        owner = trace.owner_of(packet, len(self._balancer.pipelines))
        context = Context(
            world.configuration.plans, world.configuration.config.services, world.states, self._worker_of,
            self._next_hop, now=time.monotonic(),
        )  # fmt: skip
        return trace.explain(self._balancer.pipelines[owner], packet, context, flow_clock()).as_json()

    def _worker_of(self, shard: int) -> str:
        count = len(self._balancer.pipelines)
        return f"{owner_of_shard(shard, count)} of {count}, "

    def _next_hop(self, address: Address) -> tuple[str, Address] | None:
        """Return the name of the interface towards an address, and the neighbour there; None without a route."""
        view = self._balancer.world.view
        next_hop = view.next_hop(address)
        if next_hop is None or next_hop[0] not in view.links:
            return None
        return view.links[next_hop[0]].name, next_hop[1]

    # --- the operator's word ---------------------------------------------------------------------------------

    async def _drain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name, after = self._named(request), request.get("deadline")
        seconds = None if after is None else drain_time(after)
        self._balancer.operator.drain(name, seconds)
        return await self._in_force("draining", name, **({} if seconds is None else {"seconds": seconds}))

    async def _enable(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name = self._named(request)
        self._balancer.operator.enable(name)
        return await self._in_force("enabled", name)

    async def _set_weight(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name, weight = self._named(request), request.get("weight")
        if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight <= MAX_WEIGHT:
            raise FastlbError(f"a weight is a whole number from 0 to {MAX_WEIGHT}, not {show(weight)}")
        self._balancer.operator.set_weight(name, weight)
        return await self._in_force("weight set", name, weight=weight)

    def _named(self, request: Mapping[str, Any]) -> BackendName:
        return self._balancer.world.states.find(str(request.get("service")), str(request.get("backend")))

    async def _in_force(self, event: str, name: BackendName, **more: object) -> dict[str, Any]:
        """Answer when the data path goes by it: with what becomes of the backend's flows, and who takes new ones."""
        await self._balancer.follow()
        found = self._flows_of(name)
        log.info(event, service=name[0], backend=name[1], **more, flows=found["flows"], fate=found["fate"])
        return {"service": name[0], "backend": name[1]} | found

    def _flows_of(self, name: BackendName) -> dict[str, Any]:
        """Return how many ``flows`` a backend has and their ``fate``: stay, move or end.

        ``after_deadline``: that of those that are left when its drain ends. ``takers``: how many backends of the
        service take new flows now.
        """
        world, now = self._balancer.world, time.monotonic()
        plan = next((plan for plan in world.configuration.plans if plan.name == name[0]), None)
        member = next((each for each in plan.members if each.key == name[1]), None) if plan else None
        if plan is None or member is None:  # a reload took it out meanwhile
            return {"flows": 0, "fate": "end", "after_deadline": None, "takers": plan.takers if plan else 0}
        state = world.states.of(*name)
        return {
            "flows": sum(pipeline.backend_stats(member.id)["active_flows"] for pipeline in self._balancer.pipelines),
            "fate": fate_of(state, plan.service, now),
            "after_deadline": fate_after_drain(state, plan.service, now),
            "takers": plan.takers,
        }

    # --- all of it -----------------------------------------------------------------------------------------

    async def _reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reload; the answer has the backends with flows that it took out, and how many flows stay, move and end."""
        warnings, left = await self._balancer.reload()
        named = {"left": [each._asdict() for each in left[:MAX_LEFT]], "flows": totals(left)} if left else {}
        return {**self._balancer.world.configuration.summary(), "warnings": list(warnings), **named}

    def _stop(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Stop as by SIGTERM; with ``handover``, what stays over a crash stays, and the answer says what that is."""
        handover = request.get("handover") is True
        told = self._balancer.describe()
        self._balancer.stop(handover)
        if not handover:
            return {}
        return {name: told[name] for name in HANDED_OVER} | {"flows": self._balancer.pipelines[0].flow_count()}
