"""From the kernel's view of links, routes and neighbours to the data path's `Routes`. Pure.

A hop that cannot be used is kept with the reason, so that the data path drops under the right name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network

from fastlb._core import HostRoutes, Routes
from fastlb.model.hostview import KernelView, NextHop, Route, Way
from fastlb.model.modes import MODES, TUNNELS
from fastlb.model.net import Address, Network
from fastlb.plan.pathmtu import Tunnelled, Tunnels
from fastlb.plan.plan import Plan

NOTHING_HEARD: Mapping[Address, int] = {}
HopTuple = tuple[bytes, bytes, int, int, str | None]  # destination MAC, source MAC, interface, MTU, fault


@dataclass
class _Hops:
    """Hops in the order in which they were first asked for, each written once."""

    view: KernelView
    hops: list[HopTuple] = field(default_factory=list)
    positions: dict[object, int] = field(default_factory=dict)

    def towards(self, next_hop: NextHop, mtu: int = 0) -> int:
        """The position of the hop to a neighbour; ``mtu`` is the route's, 0 for none.

        Without the neighbour's MAC it is a hop that says no_neighbour.
        """
        position = self.positions.get((next_hop, mtu))
        return self._add((next_hop, mtu), self._describe(next_hop, mtu)) if position is None else position

    def refusing(self, fault: str) -> int:
        """The position of a hop that only names a fault."""
        position = self.positions.get(fault)
        return self._add(fault, (b"", b"", 0, 0, fault)) if position is None else position

    def _add(self, key: object, hop: HopTuple) -> int:
        self.positions[key] = len(self.hops)
        self.hops.append(hop)
        return self.positions[key]

    def _describe(self, next_hop: NextHop, mtu: int) -> HopTuple:
        index, _ = next_hop
        link = self.view.links.get(index)
        if link is None or not link.up or not link.mac:
            return b"", b"", index, 0, "no_route"
        mac = self.view.neighbours.get(next_hop)
        fault = None if mac else "no_neighbour"
        return mac or b"", link.mac, index, min(mtu or link.mtu, link.mtu), fault


def routes_table(view: KernelView, plans: Iterable[Plan], path_mtus: Mapping[Address, int] = NOTHING_HEARD) -> Routes:
    """The kernel's main table, its neighbours, and the hop of every backend.

    ``path_mtus``: of the ways on which routers have said that tunnels' packets do not fit, by backend.
    """
    hops = _Hops(view)
    neighbours = {next_hop: hops.towards(next_hop, _on_link_mtu(view, next_hop)) for next_hop in view.neighbours}
    host = host_routes(view)
    plans = list(plans)
    backends = {}
    for plan in plans:
        for member in plan.members:
            heard = path_mtus.get(member.address, 0) if plan.forward in TUNNELS else 0
            backends[member.id] = _backend_hop(hops, plan.forward, member.address, heard)
    sources = tunnel_sources(plans, lambda address: own_address_towards(view, address))
    ways = [(way[1], _towards_clients(hops, way)) for way in host.ways]
    return Routes(hops.hops, (host, ways), neighbours, backends, sources)


def host_routes(view: KernelView) -> HostRoutes:
    """Return the view's routes as the data path has them."""
    if isinstance(view.routes, HostRoutes):
        return view.routes
    return HostRoutes.of(((route.prefix, (route.gateway, route.link, route.mtu)) for route in view.routes), Route)


def _towards_clients(hops: _Hops, way: Way) -> int | None:
    """Return the position of the hop that a way leads to; None: each address is its own next hop."""
    gateway, link, mtu = way
    if not link:
        return hops.refusing("no_route")
    return None if gateway is None else hops.towards((link, gateway), mtu)


def tunnel_sources(plans: Iterable[Plan], own: Callable[[Address], Network | None]) -> dict[int, Network]:
    """Return where each backend's tunnel comes from, by id: its service's prefix, or ``own`` for its address.

    A backend that has neither is left out.
    """
    sources = {}
    for plan in plans:
        for member in plan.members if plan.forward in TUNNELS else ():
            configured = (prefix for prefix in plan.tunnel.source if prefix.version == member.address.version)
            source = next(configured, None) or own(member.address)
            if source is not None:
                sources[member.id] = source
    return sources


def tunnels(view: KernelView, plans: Iterable[Plan]) -> Tunnels:
    """Return what tunnels' packets look like, by backend."""
    plans = list(plans)
    sources = tunnel_sources(plans, lambda address: own_address_towards(view, address))
    found: dict[Address, set[Tunnelled]] = {}
    for plan in plans:
        mode = MODES[plan.forward]
        if mode.outer_protocols is None:
            continue
        protocol = mode.outer_protocols[plan.network.version]
        port = plan.tunnel.port if "port" in mode.options else 0
        for member in plan.members:
            if member.id in sources:
                found.setdefault(member.address, set()).add(Tunnelled(sources[member.id], protocol, port))
    return found


def own_address_towards(view: KernelView, address: Address) -> Network | None:
    """An address of this host on the link by which packets to ``address`` leave: best one that the next hop shares."""
    next_hop = view.next_hop(address)
    if next_hop is None:
        return None
    index, gateway = next_hop

    def preference(placed: tuple[int, int, Address]) -> tuple[bool, int]:
        _, length, own = placed
        return gateway not in ip_network(f"{own}/{length}", strict=False), int(own)

    candidates = [
        placed
        for placed in view.placed
        if placed[0] == index and placed[2].version == address.version and not placed[2].is_link_local
    ]
    return ip_network(min(candidates, key=preference)[2]) if candidates else None


def _on_link_mtu(view: KernelView, next_hop: NextHop) -> int:
    """The MTU of the on-link route that holds a neighbour, where any such route has one; 0 for the link's."""
    if not view.has_on_link_mtu:
        return 0  # spares thousands of neighbours the look-up
    route = view.route(next_hop[1])
    return route.mtu if route is not None and route.gateway is None and route.link == next_hop[0] else 0


def _backend_hop(hops: _Hops, forward: str, address: Address, path_mtu: int) -> int:
    route = hops.view.route(address)
    if route is None:
        return hops.refusing("no_route")
    if MODES[forward].on_link and route.gateway is not None:
        return hops.refusing("not_on_link")
    mtu = min(route.mtu, path_mtu) if route.mtu and path_mtu else route.mtu or path_mtu
    return hops.towards((route.link, route.gateway or address), mtu)


def wanted_next_hops(view: KernelView, plans: Iterable[Plan]) -> set[NextHop]:
    """The neighbours that must stay resolved: those of backends, and every gateway a client may be behind."""
    gateways = {(link, gateway) for gateway, link, _ in view.ways if gateway is not None and link}
    backends = {view.next_hop(member.address) for plan in plans for member in plan.members}
    return gateways | {next_hop for next_hop in backends if next_hop is not None}


def outgoing_links(view: KernelView, plans: Iterable[Plan], interfaces: Iterable[str]) -> set[int]:
    """The links that frames may leave by: those of next hops, and those of clients, if they are up."""
    links = {index for index, _ in wanted_next_hops(view, plans)}
    links |= {link.index for link in view.links.values() if link.name in set(interfaces)}
    return {index for index in links if index in view.links and view.links[index].up and any(view.links[index].mac)}


def tunnel_links(view: KernelView, plans: Iterable[Plan]) -> set[int]:
    """The links with Ethernet addresses by which tunnels' packets leave."""
    towards = {view.next_hop(member.address) for plan in plans if plan.forward in TUNNELS for member in plan.members}
    links = {next_hop[0] for next_hop in towards if next_hop is not None}
    return {index for index in links & view.links.keys() if any(view.links[index].mac)}
