"""What of a configuration the host's links, addresses and routes cannot serve, as lines for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastlb.model.hostview import KernelView
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
    """Backends of the NAT modes that are reached by an interface without a ring: fastlb misses their replies."""
    rings = set(interfaces)
    lines = []
    for plan in plans:
        for member in plan.members if plan.forward in TWO_WAY else ():
            next_hop = view.next_hop(member.address)
            link = view.links.get(next_hop[0]) if next_hop else None
            if link is not None and link.name not in rings and not member.removed:
                lines.append(
                    f"service {plan.name}: backend {member.address} is reached by {link.name}, "
                    "which is not among the interfaces"
                )
    return lines


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
