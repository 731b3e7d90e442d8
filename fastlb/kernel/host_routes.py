"""The kernel's main routing table as fastlb follows it: in little room, and kept up by events rather than read again.

A host with the internet's routes has a million of them, of a few kinds: gateway, interface, metric and the like. The
extension keeps the prefixes (`fastlb._core.RouteStore`), and what is here decides, by kind, which route of a prefix is
the best and which way it goes.

What is not kept: policy rules, VRFs and any table but main, routes by TOS or by source, a route's tunnel encapsulation,
IPv6 router preference, nexthop objects when net.ipv4.nexthop_compat_mode is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from typing import Any

from fastlb._core import HostRoutes, RouteStore
from fastlb.kernel.netlink import NEWROUTE, decode
from fastlb.model.hostview import Link, Route, Way
from fastlb.model.net import Address

SAME, CHANGED, UNSURE = 0, 1, 2
"""What an event does to the table: nothing, it changes it, or the kernel has to be asked for all of it again."""

_UNICAST = 1  # RTN_UNICAST
_REFUSING = (6, 7, 8, 9)  # RTN_BLACKHOLE, UNREACHABLE, PROHIBIT, THROW
_NEXTHOP_DEAD = 0x01 | 0x10  # RTNH_F_DEAD | RTNH_F_LINKDOWN
_DEAD_RANK = 1 << 32  # above every metric
_NLMSG_HEADER, _RTMSG, _NHMSG = 16, 12, 8  # bytes
_RTA_NH_ID, _NHA_ID = 30, 1
SPARE_KINDS = 10_000  # kinds of routes beyond those of the last dump: then they are counted anew


@dataclass(frozen=True)
class Hop:
    """One next hop of a route."""

    link: int
    gateway: Address | None
    dead: bool


@dataclass(frozen=True)
class Kind:
    """All that a route has but its prefix."""

    refuses: bool
    metric: int
    mtu: int
    hops: tuple[Hop, ...]
    nexthop: int  # number of a nexthop object; 0: none
    more: tuple[Any, ...]  # what else tells two routes apart

    @cached_property
    def same(self) -> object:
        """Return what is equal for two routes that differ only in whether their next hops are dead."""
        hops = tuple((hop.link, hop.gateway) for hop in self.hops)
        return self.refuses, self.metric, self.mtu, hops, self.nexthop, self.more

    def ways(self, links: Mapping[int, Link]) -> Iterator[tuple[int, Way]]:
        """Yield every way that it may go with its rank; the lowest is the best, and the first of equals."""
        if self.refuses:
            yield self.metric, (None, 0, 0)
        for hop in self.hops:
            link = links.get(hop.link)
            if link is not None:
                dead = hop.dead or not link.up
                yield self.metric + dead * _DEAD_RANK, (hop.gateway, hop.link, self.mtu)


def kind_of(data: bytes) -> Kind:
    """Return what a route message says beside the prefix."""
    message = decode(NEWROUTE, data, 0)
    refuses = message["type"] in _REFUSING
    more = (message["family"], message["proto"], message["scope"], message["type"], message.get_attr("RTA_PREFSRC"))
    return Kind(
        refuses=refuses,
        metric=message.get_attr("RTA_PRIORITY") or 0,
        mtu=message.get_nested("metrics", "mtu") or 0,
        hops=() if refuses else tuple(_hops(message)),
        nexthop=_number(data, _NLMSG_HEADER + _RTMSG, _RTA_NH_ID),
        more=more,
    )


def _hops(message: Any) -> Iterator[Hop]:
    for hop in message.get_attr("RTA_MULTIPATH") or [message]:
        index = hop["oif"] if hop is not message else message.get_attr("RTA_OIF")
        if index is not None:
            yield Hop(index, _gateway(hop), bool(hop["flags"] & _NEXTHOP_DEAD))


def _gateway(hop: Any) -> Address | None:
    """Return the router that a next hop names; None for one on the link."""
    via = hop.get_attr("RTA_VIA")  # an IPv4 route through an IPv6 gateway (RFC 5549)
    text = via["addr"] if via else hop.get_attr("RTA_GATEWAY")
    return ip_address(text) if text else None


def _number(data: bytes, offset: int, wanted: int) -> int:
    """Return the 32 bits of an attribute that pyroute2 does not know; 0 without it."""
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if kind == wanted and length == 8:
            return int(struct.unpack_from("=I", data, offset + 4)[0])
        offset += max(length + 3 & ~3, 4)
    return 0


def nexthop_number(data: bytes, offset: int) -> int:
    """Return the number of the nexthop object that a message is about."""
    size = struct.unpack_from("=I", data, offset)[0]
    return _number(data[offset : offset + size], _NLMSG_HEADER + _NHMSG, _NHA_ID)


class MainTable:
    """The main table: `load` takes in a dump, `apply` an event, and `routes` returns what it amounts to."""

    def __init__(self) -> None:
        self._store = RouteStore(kind_of)
        self._loaded_kinds = 0
        self._ways: dict[Way, int] = {}
        self._links: Mapping[int, Link] = {}
        self._choices: list[tuple[int, int] | None] = []  # by kind: rank and way

    def load(self, data: bytes, family: int) -> int | None:
        """Take in a datagram of a dump; returns its errno with the last one, else None."""
        number = self._store.load(data, family)
        self._loaded_kinds = len(self._store.described)
        return number

    def apply(self, data: bytes, offset: int, late: bool = False) -> int:
        """Take in one event, and return what it does. ``late``: what was dumped may be newer."""
        done = self._store.apply(data, offset, late)
        crowded = len(self._store.described) > 2 * self._loaded_kinds + SPARE_KINDS
        return UNSURE if crowded else done

    def leads_through(self, link: int) -> bool:
        """Return whether any route has a next hop on this link."""
        return any(hop.link == link for kind in self._kinds for hop in kind.hops)

    def leads_to(self, nexthop: int) -> bool:
        """Return whether any route has this nexthop object."""
        return any(kind.nexthop == nexthop for kind in self._kinds)

    def routes(self, links: Mapping[int, Link]) -> HostRoutes:
        """Return one route a prefix: a live link before a dead one, then the lowest metric, then the first named."""
        if links != self._links:
            self._links, self._choices = dict(links), []
        for kind in self._kinds[len(self._choices) :]:
            best = min(kind.ways(links), key=lambda ranked: ranked[0], default=None)
            self._choices.append(None if best is None else (best[0], self._number_of(best[1])))
        return self._store.table(Route, list(self._ways), self._choices)

    @property
    def _kinds(self) -> list[Kind]:
        return self._store.described

    def _number_of(self, way: Way) -> int:
        return self._ways.setdefault(way, len(self._ways))
