"""Embedding: the very pipeline that the workers run, without root, sockets or threads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import ip_address, ip_network
from typing import Any

from fastlb._core import FlowMemory, Pipeline, Routes, Services, flow_hash_of
from fastlb.config import Config
from fastlb.model.names import BackendName
from fastlb.model.net import PROTOCOL_NAMES, PROTOCOL_NUMBERS, Address
from fastlb.observe import status, trace
from fastlb.observe.explanation import Context, Explanation, FiveTuple, Step
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.routes import tunnel_sources
from fastlb.plan.tables import services_table

Frame = bytes | bytearray | memoryview

EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))
MIN_MTU, MAX_MTU = 20, 65535  # bytes: of an IPv4 header, and of the longest packet


class Verdict(IntEnum):
    """How a packet ended."""

    FORWARD = 0
    PASS = 1
    DROP = 2


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one frame.

    ``frames``: what would be sent. ``backend``: the backend's key, ``address:port``, or None. ``reason``: the path
    ("conntrack", "scheduled", "maglev", "rejected"), or why the packet was passed on or dropped.
    """

    verdict: Verdict
    frames: list[bytes]
    backend: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """Where the next packet of a client would go, and why: by its entry, its affinity, or the scheduler.

    ``verdict`` and ``reason`` say what would become of it; ``steps`` are the stages that decide so, in words and as
    values, as `fastlb trace` prints them.
    """

    service: str | None
    backend: str | None
    why: str
    state: str | None = None  # of the flow's entry
    flow_hash: int | None = None
    slot: int | None = None  # of the service's Maglev table
    verdict: Verdict = Verdict.PASS
    reason: str = "no_service"
    steps: tuple[Step, ...] = field(default=(), compare=False)


class Datapath:
    """A balancer without a network: frames in, verdicts and frames out.

    Every address is on-link: its next hop is itself, reachable once `set_neighbour` has given its MAC. ``mac`` is the
    balancer's own, the source of what it sends; ``mtu`` is that of the link; ``addresses`` are the balancer's own, one
    of each IP version at most, from which its tunnels come unless their service says otherwise. Not safe for use by two
    threads at once. Raises TypeError and ValueError for what is none of these.
    """

    def __init__(
        self,
        config: Config,
        *,
        mac: str = "02:00:00:00:00:01",
        mtu: int = 1500,
        addresses: Iterable[str] = ("192.0.2.1", "2001:db8::1"),
    ) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config is what load_config or Config.from_dict returns, not {type(config).__name__}")
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"an MTU is {MIN_MTU} to {MAX_MTU} bytes, not {mtu}")
        networks = [ip_network(address) for address in addresses]
        if len({network.version for network in networks}) < len(networks):
            raise ValueError(f"at most one address of each IP version, not {', '.join(map(str, networks))}")
        self.pipeline = Pipeline(
            FlowMemory(config.flows, sources=config.snat, ports=config.snat_ports), affinity=config.affinity_entries
        )
        self._ids = BackendIds()
        self._states = BackendStates()
        self._mac = parse_mac(mac)
        self._mtu = mtu
        self._sources = {network.version: network for network in networks}
        self._neighbours: dict[Address, bytes] = {}
        self.reload(config)

    def reload(self, config: Config, now: float = 0.0) -> None:
        """Go on with another configuration; flows whose backend is still in it stay where they are.

        What becomes of the other flows, their service's ``on_leave`` says. A backend that keeps flows after it left the
        configuration is kept until a reload finds that the last of them is long over. ``now`` in seconds, as for
        `process`. ``flows``, ``affinity_entries``, ``snat`` and ``snat_ports`` stay what they were.
        """
        ids, states = self._ids.copy(), self._states.copy()
        states.drop_removed(self._flows_of, now)
        states.apply_config(config, now)
        plans = plan_services(config, ids, now, states)
        services = services_table(config, plans)
        self._ids, self._config, self._states = ids, config, states
        self.pipeline.renew(ids.reused, ids.services.reused)
        self._use(plans, services, now)

    def _use(self, plans: list[Plan], services: Services, now: float) -> None:
        """Have the next frame, and those after it, meet these services."""
        self._plans, self._services, self._planned = plans, services, now
        self._keys = {member.id: member.key for plan in plans for member in plan.members}
        self._stale = True

    def _go_on_with_slow_starts(self, now: float) -> None:
        if self._states.slow and self._states.due(self._planned, now):
            plans = plan_services(self._config, self._ids, now, self._states)
            self._use(plans, services_table(self._config, plans), now)

    def _flows_of(self, backend: BackendName) -> int:
        return self.pipeline.backend_stats(self._ids.by_name[backend])["active_flows"]

    def set_neighbour(self, next_hop: str | Address, mac: str) -> None:
        """Say the MAC address ("02:00:00:00:00:0b") of a backend or client."""
        self._neighbours[ip_address(next_hop)] = parse_mac(mac)
        self._stale = True

    def process(self, frame: Frame, now: float = 0.0) -> Result:
        """Run one Ethernet frame (bytes-like, not modified) through the pipeline; ``now`` in seconds."""
        return self.process_batch([frame], now)[0]

    def process_batch(self, frames: Iterable[Frame], now: float = 0.0) -> list[Result]:
        """Run frames through the pipeline in their order, all at the same time ``now`` in seconds."""
        self._go_on_with_slow_starts(now)
        self._publish()
        milliseconds = round(now * 1000) & 0xFFFFFFFF
        return [
            Result(Verdict(verdict), sent, self._keys.get(backend), reason)
            for verdict, reason, sent, backend, _ in self.pipeline.process(frames, milliseconds)
        ]

    def trace(
        self, src: str | Address, sport: int, dst: str | Address, dport: int, proto: str | int
    ) -> Trace:
        """Return which backend a client's packet would get at this moment, and why; asking changes nothing.

        ``proto``: "tcp" or "udp", or its number. Raises ValueError for what is no tuple.
        """
        self._publish()
        packet = FiveTuple(
            ip_address(src), sport, ip_address(dst), dport, PROTOCOL_NAMES[protocol_number(proto)]
        )
        context = Context(self._plans, self._config.services, self._states)
        return _trace_of(trace.explain(self.pipeline, packet, context, self.pipeline.now_ms))

    def stats(self) -> dict[str, Any]:
        """Return counters, services with their backends, and the flow table, as `fastlb status --json` shows them."""
        return {
            "counters": status.split_counters(self.pipeline.counters()),
            "services": status.describe_services([self.pipeline], self._plans, self._states),
            "flows": status.describe_flows(self.pipeline),
            "affinity": status.describe_affinity(self.pipeline),
        }

    def _publish(self) -> None:
        """Bring services and neighbours to the pipeline, if they changed since the last frame."""
        if not self._stale:
            return
        hops = [(mac, self._mac, 0, self._mtu, None) for mac in self._neighbours.values()]
        positions = {address: position for position, address in enumerate(self._neighbours)}
        unresolved = len(hops)
        backends = {
            member.id: positions.get(member.address, unresolved) for plan in self._plans for member in plan.members
        }
        routes = Routes(
            [*hops, (b"", b"", 0, 0, "no_neighbour")],
            [(network, 0, None) for network in EVERYWHERE],
            {(0, address): position for address, position in positions.items()},
            backends,
            tunnel_sources(self._plans, lambda address: self._sources.get(address.version)),
        )
        self.pipeline.publish(self._services, routes)
        self._stale = False


def _trace_of(explained: Explanation) -> Trace:
    facts = {step.stage: step.facts for step in explained.steps}
    flow = facts.get("flow", {})
    why = explained.reason
    if why == "no_service":
        why = "no service has this address, port and protocol"
    elif explained.backend is not None and "scheduler" in facts:
        why = "affinity" if facts["scheduler"]["affinity"] else facts["scheduler"]["scheduler"]
    return Trace(
        explained.service,
        explained.backend,
        why,
        flow.get("state") if not flow.get("void") else None,
        explained.flow_hash,
        explained.slot,
        Verdict[explained.verdict],
        explained.reason,
        explained.steps,
    )


def parse_mac(text: str) -> bytes:
    """Return the six bytes of "02:00:00:00:00:0b"; raises ValueError for what is no MAC address."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise ValueError(f'{text!r} is not a MAC address like "02:00:00:00:00:0b"')
    return bytes.fromhex(text.replace(":", ""))


def protocol_number(proto: str | int) -> int:
    """Return 6 for "tcp" or 6, and 17 for "udp" or 17; raises ValueError otherwise."""
    number = PROTOCOL_NUMBERS.get(proto.lower(), 0) if isinstance(proto, str) else proto
    if number not in PROTOCOL_NUMBERS.values():
        raise ValueError(f'protocol {proto!r} is neither "tcp" (6) nor "udp" (17)')
    return number


def flow_hash(
    src: str | Address, sport: int, dst: str | Address, dport: int, proto: str | int, seed: int = 0
) -> int:
    """Return the flow hash that all balancers of a fleet agree on.

    XXH3-64 of source, destination, source port, destination port and protocol, in network order: 13 bytes for IPv4 and
    37 for IPv6, bit-equal to ``xxhash.xxh3_64_intdigest``. ``seed`` is the configuration's ``hash_seed``. Raises
    ValueError for ports, protocols or address pairs that cannot be.
    """
    return flow_hash_of(ip_address(src), sport, ip_address(dst), dport, protocol_number(proto), seed)


__all__ = ["Datapath", "Result", "Trace", "Verdict", "flow_hash"]
