"""What a host has, as the kernel knows it at one moment: links, addresses, routes and neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fastlb.model.net import Address, Network

NextHop = tuple[int, Address]
"""An interface's index, and an address on that link."""

Way = tuple[Address | None, int, int]
"""What a `Route` has beside its prefix: gateway, link, MTU."""


@dataclass(frozen=True)
class Link:
    """One interface. ``mac`` has 6 bytes, or none where the link has no such address; ``mtu`` is in bytes."""

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool  # switched on, and with carrier
    master: int = 0  # the index of the bridge or bond that it is a port of
    parent: int = 0  # of a VLAN: the index of the link that it is on


@dataclass(frozen=True)
class Route:
    """The way to one prefix. ``gateway`` None: on-link. ``mtu`` 0: the link's.

    ``link`` 0: the kernel refuses the prefix (unreachable, blackhole, prohibit, throw); such a route is kept
    because it hides the shorter prefixes behind it.
    """

    prefix: Network
    gateway: Address | None
    link: int
    mtu: int = 0


class RouteTable(Protocol):
    """Routes in little room: a host may have a million. See `fastlb._core.HostRoutes`."""

    @property
    def ways_in_use(self) -> frozenset[Way]: ...
    def find(self, address: Address) -> Route | None: ...
    def __iter__(self) -> Iterator[Route]: ...


@dataclass(frozen=True)
class KernelView:
    """What the kernel knows at one moment. Immutable; compares by value.

    ``routes`` holds one route a prefix: of the next hops of all routes to it (several metrics, ECMP) the one
    with the lowest metric whose link is up, the first of equals. Those of two views
    are equal if every address has the same way. ``neighbours`` maps (interface index, address) to a 6-byte MAC and
    holds only usable states. ``addresses`` are the host's own, on every link; ``placed`` says where: (interface index,
    prefix length, address).
    """

    links: Mapping[int, Link]
    routes: tuple[Route, ...] | RouteTable
    neighbours: Mapping[NextHop, bytes]
    addresses: frozenset[Address]
    placed: frozenset[tuple[int, int, Address]] = frozenset()

    @cached_property
    def _by_length(self) -> dict[int, list[tuple[int, dict[int, Route]]]]:
        """Return the routes as IP version -> [(host bits, {network bits: route})], longest prefix first."""
        tables: dict[int, dict[int, dict[int, Route]]] = {4: {}, 6: {}}
        for route in self.routes:
            prefix = route.prefix
            host_bits = prefix.max_prefixlen - prefix.prefixlen
            network = int(prefix.network_address) >> host_bits
            tables[prefix.version].setdefault(host_bits, {})[network] = route
        return {version: sorted(table.items()) for version, table in tables.items()}

    @cached_property
    def has_on_link_mtu(self) -> bool:
        """True if an on-link route has an MTU of its own."""
        return any(mtu and gateway is None for gateway, _, mtu in self.ways)

    @cached_property
    def ways(self) -> frozenset[Way]:
        """The ways that routes have, each once."""
        if isinstance(self.routes, tuple):
            return frozenset((route.gateway, route.link, route.mtu) for route in self.routes)
        return self.routes.ways_in_use

    def route(self, address: Address) -> Route | None:
        """Return the route of the longest prefix that holds ``address``; None without one, or when it refuses."""
        if not isinstance(self.routes, tuple):
            found = self.routes.find(address)
            return found if found is not None and found.link else None
        number = int(address)
        for host_bits, networks in self._by_length[address.version]:
            route = networks.get(number >> host_bits)
            if route is not None:
                return route if route.link else None
        return None

    def next_hop(self, address: Address) -> NextHop | None:
        """Return (interface index, gateway or ``address`` itself) for packets to ``address``; None without a route."""
        route = self.route(address)
        return None if route is None else (route.link, route.gateway or address)
