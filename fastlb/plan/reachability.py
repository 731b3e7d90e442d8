"""What of a configuration the host's links, addresses and routes cannot serve, as lines for people. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from fastlb.model.hostview import KernelView, Link
from fastlb.model.modes import MODES, TUNNELS, TWO_WAY
from fastlb.plan.plan import Member, Plan
from fastlb.plan.routes import own_address_towards, tunnel_sources

LEAST4 = 92  # bytes: 32 of a packet behind the longest IPv4 header, what each segment has at least (segments.pxd)
LEAST6 = 1280  # RFC 8200 section 5


def own_addresses(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Backends that are this host: its frames do not leave it, so fastlb cannot send them any."""
    return [
        f"service {plan.name}: backend {member.address} is an address of this host; it must be another host's"
        for plan in plans
        for member in plan.members
        if member.address in view.addresses and not member.removed
    ]


def replies_elsewhere(view: KernelView, plans: Iterable[Plan], interfaces: Iterable[str]) -> list[str]:
    """Report backends of the NAT modes that are reached by an interface without a ring: fastlb misses their replies.

    A line for each service and interface. Links over one of the interfaces (a VLAN, a bridge) are for
    `replies_over_another_link`.
    """
    rings = list(interfaces)
    return [
        f"service {plan.name}: backend {first.address}{_and_more(count)} is reached by {link.name}, which is not among "
        f"the interfaces, so that replies would not be seen; add it: interfaces: [{', '.join([*rings, link.name])}]"
        for plan, link, first, count in _without_ring(view, plans, rings)
        if not _is_over(view, link, rings)
    ]


def replies_over_another_link(view: KernelView, plans: Iterable[Plan], interfaces: Iterable[str]) -> list[str]:
    """Report backends of the NAT modes that are reached by a link over one of the interfaces: that may be meant."""
    rings = list(interfaces)
    return [
        f"service {plan.name}: backend {first.address}{_and_more(count)} is reached by {link.name}, which is not among "
        "the interfaces, but lies over one of them"
        for plan, link, first, count in _without_ring(view, plans, rings)
        if _is_over(view, link, rings)
    ]


def _without_ring(
    view: KernelView, plans: Iterable[Plan], rings: Collection[str]
) -> Iterator[tuple[Plan, Link, Member, int]]:
    """Yield each service of the NAT modes with each link to its backends that has no ring, the first backend there, and
    how many there are."""
    for plan in plans:
        found: dict[int, list[Member]] = {}
        for member in plan.members if plan.forward in TWO_WAY else ():
            next_hop = view.next_hop(member.address)
            link = view.links.get(next_hop[0]) if next_hop else None
            if link is not None and link.name not in rings and not member.removed:
                found.setdefault(link.index, []).append(member)
        for index, members in found.items():
            yield plan, view.links[index], members[0], len(members)


def _is_over(view: KernelView, link: Link, names: Collection[str]) -> bool:
    """True if what comes in by one of these links passes to ``link``: a VLAN of it, a bridge or bond that has it."""
    below = {link.index, link.parent} - {0}
    return any(
        each.name in names and (each.index in below or each.master in below) for each in view.links.values()
    )


def _and_more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def replies_lost_here(view: KernelView, plans: Iterable[Plan], holds_vips: bool) -> list[str]:
    """Report backends whose replies cannot pass this host, which holds the VIP, where no other router is known.

    Linux drops a packet that comes in from an address of its own (IPv4). Only modes in which backends answer clients
    directly, and only networks on which this host knows no gateway.
    """
    if not holds_vips:
        return []
    routers = {link for gateway, link, _ in view.ways if gateway is not None and gateway.version == 4}
    lines = []
    for plan in plans:
        if plan.forward in TWO_WAY or plan.network.version == 6:
            continue
        alone = [member for member in plan.members if not member.removed and _on_link_by(view, member) not in routers]
        for member in [each for each in alone if _on_link_by(view, each)][:1]:
            name = view.links[_on_link_by(view, member)].name
            lines.append(
                f"service {plan.name}: if this host is the gateway of backend {member.address} on {name}, its replies "
                f"are lost: they come from {plan.vip}, which this host holds (vip_address: interface), and Linux drops "
                "them; let backends answer by another router, or use vip_address: none, or forward: nat"
            )
    return lines


def _on_link_by(view: KernelView, member: Member) -> int:
    """Return the link on which a backend is a neighbour; 0 if it is on none."""
    route = view.route(member.address)
    return route.link if route is not None and route.gateway is None and route.link in view.links else 0


def replies_by_a_router(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Report backends behind a gateway in modes whose replies go to the client's own address: this host cannot be
    their default gateway. A line a service."""
    lines = []
    for plan in plans:
        mode = MODES[plan.forward]
        if not mode.sees_replies or mode.sends_from_snat:
            continue
        routes = [(view.route(member.address), member) for member in plan.members if not member.removed]
        behind = [(route.gateway, member) for route, member in routes if route is not None and route.gateway]
        if behind:
            gateway, first = behind[0]
            lines.append(
                f"service {plan.name}: backend {first.address}{_and_more(len(behind))} is behind gateway {gateway}, so "
                f"this host is not its gateway; unless routers there send what is for clients back by this host, no "
                f"reply comes: use forward: fullnat"
            )
    return lines


def nobody_answers(view: KernelView, plans: Iterable[Plan], holds_vips: bool) -> list[str]:
    """Report VIPs on a network of this host's for which nobody answers ARP or ND. A line a VIP."""
    found: dict[str, str] = {}
    for plan in () if holds_vips else plans:
        vip = plan.network.network_address
        route = view.route(vip) if plan.network.num_addresses == 1 and vip not in view.addresses else None
        if route is not None and route.gateway is None and route.link in view.links:
            asks = "ARP" if vip.version == 4 else "ND"
            found.setdefault(str(vip), (
                f"service {plan.name}: {vip} is on the network of {view.links[route.link].name}, and this host does "
                f"not have it, so that nobody answers {asks} for it: use vip_address: interface, unless a router has a "
                "route for it to this host"
            ))
    return list(found.values())


def too_narrow(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Ways to backends whose MTU is below what the service's packets need, as no sender's packets can be that short."""
    lines = []
    for plan, member, mtu, room in _ways(view, plans):
        least = LEAST6 if plan.network.version == 6 and plan.forward not in TUNNELS else LEAST4
        if room < least:
            inside = f", which leaves {max(room, 0)} inside {plan.forward}" if plan.forward in TUNNELS else ""
            what = "a tunnel" if plan.forward in TUNNELS else f"IPv{plan.network.version}"
            lines.append(
                f"service {plan.name}: the MTU towards backend {member.address} is {mtu}{inside}; "
                f"{what} needs {least}: raise that of the link or route"
            )
    return lines


def narrow_tunnels(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Tunnels that IPv6 fits only in fragments of the tunnel's own packets."""
    return [
        f"service {plan.name}: the MTU towards backend {member.address} is {mtu}, which leaves {room} inside "
        f"{plan.forward}, and IPv6 needs {LEAST6}: longer packets leave in fragments, which fastlb decap does not take"
        for plan, member, mtu, room in _ways(view, plans)
        if plan.network.version == 6 and plan.forward in TUNNELS and LEAST4 <= room < LEAST6
    ]


def _ways(view: KernelView, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Member, int, int]]:
    """Each backend that there is a way to, with the way's MTU, and what a tunnel leaves of it."""
    for plan in plans:
        for member in plan.members:
            route = view.route(member.address)
            link = view.links.get(route.link) if route else None
            if route is not None and link is not None:
                mtu = min(route.mtu or link.mtu, link.mtu)
                yield plan, member, mtu, mtu - outer_length(plan, member.address.version)


def outer_length(plan: Plan, version: int) -> int:
    """Return the bytes that a tunnel's headers take, towards a backend of this IP version; 0 in the other modes."""
    return MODES[plan.forward].outer_bytes(version, plan.tunnel.key)


def without_route(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Report backends without a route, or without an address that a tunnel's packets can come from.

    Those of modes that need on-link backends are for `not_on_link` to report.
    """
    plans = list(plans)
    sources = tunnel_sources(plans, lambda address: own_address_towards(view, address))
    lines = []
    for plan in plans:
        for member in () if MODES[plan.forward].on_link else plan.members:
            if member.removed:
                continue
            if view.next_hop(member.address) is None:
                lines.append(f"service {plan.name}: no route to backend {member.address}")
            elif plan.forward in TUNNELS and member.id not in sources:
                lines.append(
                    f"service {plan.name}: no address of IPv{member.address.version} on the link towards backend "
                    f"{member.address}, which a tunnel's packets could come from: give one, or tunnel.source"
                )
    return lines


def not_on_link(view: KernelView, plans: Iterable[Plan]) -> list[str]:
    """Report backends behind a gateway, or without a route, in modes that need them on-link."""
    lines = []
    for plan in plans:
        for member in plan.members if MODES[plan.forward].on_link else ():
            route = view.route(member.address)
            if member.removed:
                continue
            if route is None:
                lines.append(
                    f"service {plan.name}: no route to {plan.forward} backend {member.address}; it must be on-link"
                )
            elif route.gateway is not None:
                lines.append(
                    f"service {plan.name}: {plan.forward} backend {member.address} is behind gateway {route.gateway}; "
                    f"it must be on-link ({plan.forward} only rewrites the MAC address), or use forward: nat"
                )
    return lines
