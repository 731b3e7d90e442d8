"""What the control socket answers: a running fastlb looked at, and told what to do.

Everything here runs within the balancer's event loop, as all that changes the data path does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from inspect import isawaitable
from typing import Any

import structlog

from fastlb.config import drain_time
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
from fastlb.version import __version__

MAX_WEIGHT = 65535

log = structlog.get_logger()


class Commands:
    """The commands that one balancer answers. Each takes the request, and raises FastlbError to refuse it."""

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def by_name(self) -> Mapping[str, Command]:
        """For `ControlServer`."""
        return {
            "status": self._status, "conns": self._conns, "trace": self._trace,
            "drain": self._drain, "enable": self._enable, "weight": self._set_weight,
            "reload": self._reload, "stop": self._stop,
        }  # fmt: skip

    # --- looking -------------------------------------------------------------------------------------------

    async def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        balancer = self._balancer
        pipelines, view = balancer.pipelines, balancer.view
        offloaded = [view.links[index].name for index in balancer.tunnel_offload.interfaces() if index in view.links]
        services = await run_in_slices(
            status.services_in_steps(pipelines, balancer.now.plans, balancer.standings, time.monotonic())
        )
        found = [pipeline.counters() for pipeline in pipelines]
        counters = add_up((*found, balancer.classifier.host_counters())) | balancer.workers.counters()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - balancer.started, 1),
            "interfaces": list(balancer.now.config.interfaces),
            "transmit": balancer.paths(),
            "tunnel_offload": offloaded,
            "open_blocks": balancer.open_blocks,
            "workers": balancer.workers.describe(pipelines, view, balancer.links_out()),
            "counters": status.split_counters(counters),
            "services": services,
            "flows": status.describe_flows(pipelines[0]) | {"file": self._flow_file()},
            "affinity": status.describe_affinity(pipelines[0]),
        }

    def _flow_file(self) -> str | None:
        return str(self._balancer.flow_file.path) if self._balancer.flow_file is not None else None

    def _conns(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return flows.answer(self._balancer.pipelines[0], self._balancer.now.plans, request, flow_clock())

    def _trace(self, request: Mapping[str, Any]) -> dict[str, Any]:
        balancer, packet = self._balancer, trace.requested_tuple(request)
        owner = trace.owner_of(packet, balancer.count)
        context = Context(
            balancer.now.plans, balancer.now.config.services, balancer.standings, self._worker_of, self._next_hop,
            now=time.monotonic(),
        )  # fmt: skip
        return trace.explain(balancer.pipelines[owner], packet, context, flow_clock()).as_json()

    def _worker_of(self, shard: int) -> str:
        return f"{owner_of_shard(shard, self._balancer.count)} of {self._balancer.count}, "

    def _next_hop(self, address: Address) -> tuple[str, Address] | None:
        """The interface's name, and the neighbour there."""
        view = self._balancer.view
        next_hop = view.next_hop(address)
        if next_hop is None or next_hop[0] not in view.links:
            return None
        return view.links[next_hop[0]].name, next_hop[1]

    # --- how backends stand --------------------------------------------------------------------------------

    def _drain(self, request: Mapping[str, Any]) -> dict[str, str]:
        name, after = self._named(request), request.get("deadline")
        if after is None:
            self._balancer.standings.drain(name)
            return self._stands("draining", name)
        seconds = drain_time(after)
        self._balancer.standings.drain(name, time.monotonic() + seconds)
        return self._stands("draining", name, seconds=seconds)

    def _enable(self, request: Mapping[str, Any]) -> dict[str, str]:
        name = self._named(request)
        self._balancer.standings.enable(name, time.monotonic())
        return self._stands("enabled", name)

    def _set_weight(self, request: Mapping[str, Any]) -> dict[str, str]:
        name, weight = self._named(request), request.get("weight")
        if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight <= MAX_WEIGHT:
            raise FastlbError(f"a weight is a whole number from 0 to {MAX_WEIGHT}, not {weight!r}")
        self._balancer.standings.set_weight(name, weight, time.monotonic())
        return self._stands("weight set", name, weight=weight)

    def _named(self, request: Mapping[str, Any]) -> BackendName:
        return self._balancer.standings.find(str(request.get("service")), str(request.get("backend")))

    def _stands(self, event: str, name: BackendName, **more: object) -> dict[str, str]:
        log.info(event, service=name[0], backend=name[1], **more)
        self._balancer.plan_again()
        return {"service": name[0], "backend": name[1]}

    # --- all of it -----------------------------------------------------------------------------------------

    async def _reload(self, request: Mapping[str, Any]) -> dict[str, int]:
        done = self._balancer.reload()
        if isawaitable(done):
            await done
        return self._balancer.now.summary()

    def _stop(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Stop as by SIGTERM; with ``handover``, what stays over a crash stays, and the answer says what that is."""
        balancer, handover = self._balancer, request.get("handover") is True
        balancer.stop(handover)
        if not handover:
            return {}
        return {
            "interfaces": list(balancer.now.config.interfaces),
            "vips": balancer.vips.as_json(),
            "flow_file": self._flow_file(),
            "flows": balancer.pipelines[0].flow_count(),
        }
