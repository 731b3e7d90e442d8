"""Balancers for tests, small and without a network: services over the same few backends, every host on-link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

from fastlb import Config, Datapath
from fastlb._core import FlowMemory, Pipeline, Routes
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.routes import tunnel_sources
from fastlb.plan.tables import services_table
from tests import tables
from tests.frames import ACK, BALANCER_MAC, FIN, PSH, RST, SYN, TCP, frame, mac_bytes, mac_of, take_apart

CLIENT = {4: "10.1.0.2", 6: "fd00:1::2"}
VIP = {4: "203.0.113.10", 6: "2001:db8:cafe::10"}
BACKENDS = {
    4: ("10.3.0.11", "10.3.0.12", "10.3.0.13"),
    6: ("fd00:3::11", "fd00:3::12", "fd00:3::13"),
}
HOSTS = (*CLIENT.values(), *BACKENDS[4], *BACKENDS[6])
KEY = bytes(range(32))
FLAGS = {"S": SYN, "A": ACK, "F": FIN, "R": RST, "P": PSH}


def flags(letters: str) -> int:
    """ "SA" as the TCP flags SYN and ACK."""
    return sum(FLAGS[letter] for letter in letters)


def service(forward: str, version: int = 4, protocol: str = "tcp", **changes: Any) -> dict[str, Any]:
    """A service on port 80 with three backends; nat sends to port 8080."""
    backends = [{"address": address} | ({"port": 8080} if forward == "nat" else {}) for address in BACKENDS[version]]
    plain = {
        "name": f"{forward}{version}{protocol}", "vip": VIP[version], "port": 80, "protocol": protocol,
        "forward": forward, "backends": backends,
    }  # fmt: skip
    return plain | changes


def config(*services: Mapping[str, Any], **settings: Any) -> Config:
    plain = {"flows": 4096, "maglev_size": 251, "new_flow_rate": 1_000_000}
    return Config.from_dict({**plain, **settings, "services": list(services)})


def datapath(*services: Mapping[str, Any], mtu: int = 1500, **settings: Any) -> Datapath:
    """An embedded balancer that knows the MAC of every host."""
    balancer = Datapath(config(*services, **settings), mac=BALANCER_MAC, mtu=mtu)
    for host in HOSTS:
        balancer.set_neighbour(host, mac_of(host))
    return balancer


def reply_to(sent: bytes, letters: str = "SA", payload: bytes = b"") -> bytes:
    """What the backend answers to the frame that it was sent."""
    seen = take_apart(sent)
    proto = "tcp" if seen.protocol == TCP else "udp"
    return frame(seen.dst, seen.dport, seen.src, seen.sport, proto, flags=flags(letters), payload=payload)


class Balancer:
    """A bare pipeline: what an embedded balancer does not show, the flow table and interface numbers."""

    def __init__(self, settings: Config, *, hosts: Iterable[str] = HOSTS) -> None:
        self.pipeline = Pipeline(
            FlowMemory(settings.flows, KEY, sources=settings.snat, ports=settings.snat_ports))
        self.ids = BackendIds()
        self.standings = BackendStates()
        self.hosts = list(hosts)
        self.reload(settings)

    def reload(self, settings: Config, now: float = 0.0) -> None:
        self.settings = settings
        self.standings.apply_config(settings, now)
        self.plan(now)

    def plan(self, now: float = 0.0) -> None:
        """After the standings have changed."""
        self.plans = plan_services(self.settings, self.ids, now, self.standings)
        self.keys = {member.id: member.key for plan in self.plans for member in plan.members}
        self.pipeline.publish(services_table(self.settings, self.plans), self.routes())

    def routes(self) -> Routes:
        hops = [(mac_bytes(mac_of(host)), mac_bytes(BALANCER_MAC), 0, 1500, None) for host in self.hosts]
        positions = {ip_address(host): at for at, host in enumerate(self.hosts)}
        return Routes(
            [*hops, (b"", b"", 0, 0, "no_neighbour")],
            [(ip_network("0.0.0.0/0"), 0, None), (ip_network("::/0"), 0, None)],
            {(0, address): at for address, at in positions.items()},
            {member.id: positions.get(member.address, len(hops)) for plan in self.plans for member in plan.members},
            tunnel_sources(self.plans, lambda address: None),
        )

    def send(self, raw: bytes, now: float = 0.0) -> tuple[str, bytes | None, str | None]:
        """(reason, what would be sent, backend key) of one frame at ``now`` seconds."""
        _, reason, sent, backend, _ = self.pipeline.process([raw], round(now * 1000))[0]
        return reason, sent[0] if sent else None, self.keys.get(backend)

    def flows(self) -> list[tuple[Any, ...]]:
        return list(tables.flows(self.pipeline))

    def counts_agree(self) -> bool:
        """Do the counts of entries, and of each backend's flows that are not over, equal what a walk finds?"""
        flows = self.flows()
        walked = Counter(flow[5] for flow in flows if flow[6] not in ("closing", "reset"))
        counted = {
            number: self.pipeline.backend_stats(number)["active_flows"] for number in range(1, self.ids.highest + 1)
        }
        return (
            self.pipeline.flow_count() == len(flows)
            and +Counter(counted) == walked
            and min(counted.values(), default=0) >= 0
        )
