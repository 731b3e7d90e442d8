"""The kernel's links, addresses, routes and neighbours as they stand, put together from its messages; without a socket.

Routes have a module of their own, host_routes.py.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from enum import Flag, auto
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

from fastlb.kernel import host_routes, netlink
from fastlb.kernel.host_routes import MainTable, nexthop_number
from fastlb.kernel.netlink import decode
from fastlb.model.hostview import KernelView, Link, NextHop, Route, RouteTable
from fastlb.model.net import Address

FAMILIES = (socket.AF_INET, socket.AF_INET6)  # that are kept

_UP = 0x1 | 0x10000  # IFF_UP | IFF_LOWER_UP: switched on, and with carrier
_CONFIRMED = 0x02 | 0x08 | 0x10 | 0x40 | 0x80  # NUD_REACHABLE, DELAY, PROBE, NOARP, PERMANENT: no need to ask
_USABLE = _CONFIRMED | 0x04  # NUD_STALE: good until the kernel knows better
_NTF_PROXY = 0x08


class Change(Flag):
    """What a message may have changed."""

    NOTHING = 0
    VIEW = auto()  # what others see
    ROUTES = auto()  # what the routes amount to: `count_routes` tells, at the cost of a pass over all of them
    DOUBT = auto()  # routes, in a way that the kernel does not tell: they have to be dumped again


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
_NO_LINK = Link(0, "", b"", 0, False)
_OF_ROUTES = {
    host_routes.SAME: Change.NOTHING, host_routes.CHANGED: Change.ROUTES, host_routes.UNSURE: Change.DOUBT,
}  # fmt: skip


@dataclass
class HostTables:
    """The tables: `apply` takes in one message, `count_routes` what all routes amount to, and `view` hands out a copy.

    ``late``: events are older than what was dumped last.
    """

    links: dict[int, Link] = field(default_factory=dict)
    table: MainTable = field(default_factory=MainTable)
    routes: tuple[Route, ...] | RouteTable = ()
    late: bool = False
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
            return _OF_ROUTES[self.table.apply(data, offset, self.late)]
        if kind in (netlink.NEWNEXTHOP, netlink.DELNEXTHOP):  # whose routes are gone without a word
            return Change.DOUBT if self.table.leads_to(nexthop_number(data, offset)) else Change.NOTHING
        if kind in (netlink.NEWLINK, netlink.DELLINK):
            return self._apply_link(kind, decode(kind, data, offset))
        if kind in (netlink.NEWADDR, netlink.DELADDR):
            return self._apply_address(kind, decode(kind, data, offset))
        if kind in (netlink.NEWNEIGH, netlink.DELNEIGH):
            return self._apply_neighbour(kind, decode(kind, data, offset))
        return Change.NOTHING

    def count_routes(self) -> None:
        """Let the view have the routes as they are now."""
        self.routes = self.table.routes(self.links)

    def _apply_link(self, kind: int, message: Any) -> Change:
        mtu = message.get_attr("IFLA_MTU")
        if message["family"] != socket.AF_UNSPEC or mtu is None:
            return Change.NOTHING  # a bridge port (its DELLINK means "left the bridge"), or a wireless event
        index = message["index"]
        before = self.links.get(index)
        if kind == netlink.NEWLINK:
            name, mac = message.get_attr("IFLA_IFNAME"), _mac(message.get_attr("IFLA_ADDRESS"))
            self.links[index] = Link(
                index, name, mac, mtu, up=message["flags"] & _UP == _UP,
                master=message.get_attr("IFLA_MASTER") or 0, parent=_parent(message),
            )  # fmt: skip
        else:
            self.links.pop(index, None)
            self.neighbours = {hop: known for hop, known in self.neighbours.items() if hop[0] != index}
            self.addresses = {entry for entry in self.addresses if entry[0] != index}
        return self._change_of_link(before, self.links.get(index))

    def _change_of_link(self, before: Link | None, after: Link | None) -> Change:
        """Routes of a link that goes down or away are gone without a word."""
        if before == after:
            return Change.NOTHING
        went_or_came = before is None or after is None or before.up != after.up
        index = (before or after or _NO_LINK).index
        doubt = went_or_came and self.table.leads_through(index)
        return Change.VIEW | Change.ROUTES | (Change.DOUBT if doubt else Change.NOTHING)

    def _apply_address(self, kind: int, message: Any) -> Change:
        if message["family"] not in FAMILIES:
            return Change.NOTHING
        own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")  # ADDRESS may be the peer's
        entry = (message["index"], message["prefixlen"], ip_address(own))
        if kind == netlink.NEWADDR:
            change = Change.NOTHING if entry in self.addresses else Change.VIEW
            self.addresses.add(entry)
            return change
        self.addresses.discard(entry)
        return Change.VIEW | Change.DOUBT  # routes from this address are gone without a word

    def _apply_neighbour(self, kind: int, message: Any) -> Change:
        address = message.get_attr("NDA_DST")
        if message["family"] not in FAMILIES or message["flags"] & _NTF_PROXY or address is None:
            return Change.NOTHING  # a bridge's forwarding entry comes through the same group
        hop = (message["ifindex"], ip_address(address))
        before = self.neighbours.pop(hop, _UNKNOWN)
        after = _UNKNOWN
        if kind == netlink.NEWNEIGH:
            after = self.neighbours[hop] = _Neighbour(message["state"], _mac(message.get_attr("NDA_LLADDR")))
        return Change.NOTHING if before.usable_mac == after.usable_mac else Change.VIEW


def _parent(message: Any) -> int:
    """Return the index of the link that a VLAN is on; 0 of another link. A veth names its peer in the same place."""
    info = message.get_attr("IFLA_LINKINFO")
    is_vlan = info is not None and info.get_attr("IFLA_INFO_KIND") == "vlan"
    return message.get_attr("IFLA_LINK") or 0 if is_vlan else 0


def _mac(text: str | None) -> bytes:
    """Return the 6 bytes of "02:00:00:00:00:01"; b"" for none and for the addresses of tunnels."""
    return bytes.fromhex(text.replace(":", "")) if text and len(text) == 17 and text[2] == ":" else b""
