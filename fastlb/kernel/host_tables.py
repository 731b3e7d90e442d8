"""The kernel's links, addresses, routes and neighbours as they stand, put together from its messages; without a socket.

What is not kept: policy rules, VRFs and any table but main, routes by TOS or by source, a route's tunnel
encapsulation, IPv6 router preference, nexthop objects when net.ipv4.nexthop_compat_mode is 0.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from ipaddress import ip_address, ip_network
from types import MappingProxyType
from typing import Any

from fastlb.kernel import netlink
from fastlb.kernel.netlink import decode
from fastlb.model.hostview import KernelView, Link, NextHop, Route
from fastlb.model.net import Address, Network

ANYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # the families that are kept

_UNICAST = 1  # RTN_UNICAST
_REFUSING = (6, 7, 8, 9)  # RTN_BLACKHOLE, UNREACHABLE, PROHIBIT, THROW
_NEXTHOP_DEAD = 0x01 | 0x10  # RTNH_F_DEAD | RTNH_F_LINKDOWN
_UP = 0x1 | 0x10000  # IFF_UP | IFF_LOWER_UP: switched on, and with carrier
_CONFIRMED = 0x02 | 0x08 | 0x10 | 0x40 | 0x80  # NUD_REACHABLE, DELAY, PROBE, NOARP, PERMANENT: no need to ask
_USABLE = _CONFIRMED | 0x04  # NUD_STALE: good until the kernel knows better
_NTF_PROXY = 0x08


class Change(Flag):
    """What a message may have changed: what others see, or the routes, which then have to be read again."""

    NOTHING = 0
    VIEW = auto()
    ROUTES = auto()


@dataclass(frozen=True)
class _Neighbour:
    """What the kernel says of one address on a link."""

    state: int  # NUD_*
    mac: bytes  # b"": none, or not an Ethernet one

    @property
    def usable_mac(self) -> bytes:
        """The MAC address while it is good to send to, else b""."""
        return self.mac if self.state & _USABLE else b""


_UNKNOWN = _Neighbour(0, b"")


@dataclass
class HostTables:
    """The tables: `apply` takes in one message, `apply_routes` all routes at once, and `view` hands out a copy."""

    links: dict[int, Link] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    neighbours: dict[NextHop, _Neighbour] = field(default_factory=dict)
    addresses: set[tuple[int, int, Address]] = field(default_factory=set)  # link, prefix length, address

    def view(self) -> KernelView:
        """Return the tables as they are now, for others to keep."""
        macs = {hop: known.usable_mac for hop, known in self.neighbours.items() if known.usable_mac}
        return KernelView(
            links=MappingProxyType(dict(self.links)),
            routes=self.routes,
            neighbours=MappingProxyType(macs),
            addresses=frozenset(address for _, _, address in self.addresses),
            placed=frozenset(self.addresses),
        )

    def should_ask(self, hop: NextHop) -> bool:
        """Return True if the kernel does not know for sure where this next hop is, and could find out."""
        link = self.links.get(hop[0])
        return link is not None and link.up and not self.neighbours.get(hop, _UNKNOWN).state & _CONFIRMED

    def apply(self, kind: int, data: bytes, offset: int) -> Change:
        """Take in one message, and return what may differ now."""
        if kind in (netlink.NEWROUTE, netlink.DELROUTE):
            return Change.ROUTES
        if kind in (netlink.NEWLINK, netlink.DELLINK):
            return self._apply_link(kind, decode(kind, data, offset))
        if kind in (netlink.NEWADDR, netlink.DELADDR):
            return self._apply_address(kind, decode(kind, data, offset))
        if kind in (netlink.NEWNEIGH, netlink.DELNEIGH):
            return self._apply_neighbour(kind, decode(kind, data, offset))
        return Change.NOTHING

    def apply_routes(self, routes: Iterable[Any]) -> None:
        """Replace all routes by these RTM_NEWROUTE messages."""
        self.routes = best_routes(routes, self.links)

    def _apply_link(self, kind: int, message: Any) -> Change:
        mtu = message.get_attr("IFLA_MTU")
        if message["family"] != socket.AF_UNSPEC or mtu is None:
            return Change.NOTHING  # a bridge port (its DELLINK means "left the bridge"), or a wireless event
        index = message["index"]
        if kind == netlink.NEWLINK:
            name, mac = message.get_attr("IFLA_IFNAME"), _mac(message.get_attr("IFLA_ADDRESS"))
            self.links[index] = Link(index, name, mac, mtu, up=message["flags"] & _UP == _UP)
        else:
            self.links.pop(index, None)
            self.neighbours = {hop: known for hop, known in self.neighbours.items() if hop[0] != index}
            self.addresses = {entry for entry in self.addresses if entry[0] != index}
        return Change.VIEW | Change.ROUTES

    def _apply_address(self, kind: int, message: Any) -> Change:
        if message["family"] not in ANYWHERE:
            return Change.NOTHING
        own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")  # ADDRESS may be the peer's
        entry = (message["index"], message["prefixlen"], ip_address(own))
        if kind == netlink.NEWADDR:
            self.addresses.add(entry)
        else:
            self.addresses.discard(entry)
        return Change.VIEW | Change.ROUTES

    def _apply_neighbour(self, kind: int, message: Any) -> Change:
        address = message.get_attr("NDA_DST")
        if message["family"] not in ANYWHERE or message["flags"] & _NTF_PROXY or address is None:
            return Change.NOTHING  # a bridge's forwarding entry comes through the same group
        hop = (message["ifindex"], ip_address(address))
        before = self.neighbours.pop(hop, _UNKNOWN)
        after = _UNKNOWN
        if kind == netlink.NEWNEIGH:
            after = self.neighbours[hop] = _Neighbour(message["state"], _mac(message.get_attr("NDA_LLADDR")))
        return Change.NOTHING if before.usable_mac == after.usable_mac else Change.VIEW


def best_routes(routes: Iterable[Any], links: Mapping[int, Link]) -> tuple[Route, ...]:
    """Choose one route a prefix: a live link before a dead one, then the lowest metric, then the first named."""
    best: dict[Network, tuple[tuple[bool, int], Route]] = {}
    for message in routes:
        for rank, route in _candidates(message, links):
            held = best.get(route.prefix)
            if held is None or rank < held[0]:
                best[route.prefix] = rank, route
    return tuple(route for _, route in best.values())


def _candidates(message: Any, links: Mapping[int, Link]) -> Iterator[tuple[tuple[bool, int], Route]]:
    """Yield every next hop of one RTM_NEWROUTE, as a route of its own with its rank (lower is better)."""
    if message["tos"] or message["src_len"]:
        return
    prefix = ip_network((message.get_attr("RTA_DST") or ANYWHERE[message["family"]], message["dst_len"]))
    metric = message.get_attr("RTA_PRIORITY") or 0
    if message["type"] in _REFUSING:
        yield (False, metric), Route(prefix, None, 0)
    if message["type"] != _UNICAST:
        return
    mtu = message.get_nested("metrics", "mtu") or 0
    for hop in message.get_attr("RTA_MULTIPATH") or [message]:
        index = hop["oif"] if hop is not message else message.get_attr("RTA_OIF")
        link = links.get(index)
        if link is not None:
            dead = not link.up or bool(hop["flags"] & _NEXTHOP_DEAD)
            yield (dead, metric), Route(prefix, _gateway(hop), link.index, mtu)


def _gateway(hop: Any) -> Address | None:
    """Return the router that a next hop names; None for one on the link."""
    via = hop.get_attr("RTA_VIA")  # an IPv4 route through an IPv6 gateway (RFC 5549)
    text = via["addr"] if via else hop.get_attr("RTA_GATEWAY")
    return ip_address(text) if text else None


def _mac(text: str | None) -> bytes:
    """Return the 6 bytes of "02:00:00:00:00:01"; b"" for none and for the addresses of tunnels."""
    return bytes.fromhex(text.replace(":", "")) if text and len(text) == 17 and text[2] == ":" else b""
