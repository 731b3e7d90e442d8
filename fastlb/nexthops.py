"""From the kernel's view of links, routes and neighbours to the data path's `Routes`. Pure.

A hop that cannot be used is kept with the reason, so that the data path drops under the right name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastlb._core import Routes
from fastlb.config import Address
from fastlb.neighbour import KernelView, NextHop
from fastlb.reconcile import Plan

HopTuple = tuple[bytes, bytes, int, int, str | None]  # destination MAC, source MAC, interface, MTU, fault


@dataclass
class _Hops:
    """Hops by (interface, address), each written once."""

    view: KernelView
    hops: list[HopTuple] = field(default_factory=list)
    positions: dict[tuple[int, Address | str], int] = field(default_factory=dict)

    def towards(self, next_hop: NextHop, mtu: int = 0) -> int:
        """The position of the hop to a neighbour; without its MAC a hop that says no_neighbour."""
        return self._position(next_hop, lambda: self._describe(next_hop, mtu))

    def refusing(self, fault: str) -> int:
        """The position of a hop that only names a fault."""
        return self._position((0, fault), lambda: (b"", b"", 0, 0, fault))

    def _position(self, key: tuple[int, Address | str], describe: object) -> int:
        position = self.positions.get(key)
        if position is None:
            position = self.positions[key] = len(self.hops)
            self.hops.append(describe())  # type: ignore[operator]
        return position

    def _describe(self, next_hop: NextHop, mtu: int) -> HopTuple:
        index, _ = next_hop
        link = self.view.links.get(index)
        if link is None or not link.up or not link.mac:
            return b"", b"", index, 0, "no_route"
        mac = self.view.neighbours.get(next_hop)
        fault = None if mac else "no_neighbour"
        return mac or b"", link.mac, index, min(mtu or link.mtu, link.mtu), fault


def routes_table(view: KernelView, plans: Iterable[Plan]) -> Routes:
    """The kernel's main table, its neighbours, and the hop of every backend."""
    hops = _Hops(view)
    neighbours = {next_hop: hops.towards(next_hop) for next_hop in view.neighbours}
    prefixes = []
    for route in view.routes:
        if not route.link:
            position: int | None = hops.refusing("no_route")
        elif route.gateway is None:
            position = None
        else:
            position = hops.towards((route.link, route.gateway), route.mtu)
        prefixes.append((route.prefix, route.link, position))
    backends = {}
    for plan in plans:
        for member in plan.members:
            backends[member.id] = _backend_hop(hops, plan.forward, member.address)
    return Routes(hops.hops, prefixes, neighbours, backends)


def _backend_hop(hops: _Hops, forward: str, address: Address) -> int:
    route = hops.view.route(address)
    if route is None:
        return hops.refusing("no_route")
    if forward == "dsr" and route.gateway is not None:
        return hops.refusing("not_on_link")
    return hops.towards((route.link, route.gateway or address), route.mtu)


def wanted_next_hops(view: KernelView, plans: Iterable[Plan]) -> set[NextHop]:
    """The neighbours that must stay resolved: those of backends, and every gateway a client may be behind."""
    gateways = {(route.link, route.gateway) for route in view.routes if route.gateway is not None and route.link}
    backends = {view.next_hop(member.address) for plan in plans for member in plan.members}
    return gateways | {next_hop for next_hop in backends if next_hop is not None}


def not_on_link(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """What `dsr` cannot reach: one line for each backend behind a gateway, or without a route."""
    lines = []
    for plan in plans:
        for member in plan.members if plan.forward == "dsr" else ():
            route = view.route(member.address)
            if route is None:
                lines.append(f"service {plan.name}: no route to dsr backend {member.address}; it must be on-link")
            elif route.gateway is not None:
                lines.append(
                    f"service {plan.name}: dsr backend {member.address} is behind gateway {route.gateway}; "
                    "it must be on-link (dsr only rewrites the MAC address), or use forward: nat"
                )
    return lines
