"""The rules between the fields of a configuration: what no value shows by itself.

A field of a model is None here where what was written is faulty or missing (`fastlb.config.salvage`); the rules say
nothing about such a field: one fault, one message. None of them compares each backend with each other one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from fastlb.config.fields import MAX_BACKENDS, MAX_BURST
from fastlb.config.schema import Backend, Service
from fastlb.config.yaml import Loc
from fastlb.model.checks import OPTIONS
from fastlb.model.match import MAX_ENTRIES, MAX_MASKS, PORT_BITS, Block, Mask
from fastlb.model.modes import HASHES, MODES, SCHEDULERS, TUNNEL_OPTIONS
from fastlb.model.names import MAX_BACKEND_ID, MAX_SERVICE_SLOT
from fastlb.model.net import Address, Network, PortRange

Found = Iterator[tuple[Loc, str]]


def broken_rules(
    services: tuple[Service, ...], snat: tuple[Address, ...] | None, vip_address: str | None, maglev_size: int | None
) -> Found:
    """Yield whatever breaks a rule that involves more than one field, with its key path; None is an unknown field."""
    yield from _in_all(services)
    yield from _named_twice(services)
    yield from _listening_twice(services)
    yield from _overlapping(services)
    yield from _masks(services)
    yield from _groups(services)
    vips = _Vips(services)
    for number, service in enumerate(services):
        loc: Loc = ("services", number)
        own = (
            *_any_port(service), *_check(service), *_response_times(service), *_too_many(service, maglev_size),
            *_tunnel(service), *_prefix(service), *_bounded_load(service), *_source_ports(service, snat),
            *_held(service, vip_address), *_timeouts(service), *_clamp(service), *_clients(service),
            *_source_limit(service),
        )  # fmt: skip
        for path, message in (*own, *_backends(service, vips)):
            yield (*loc, *path), message
    yield from _sources(services, snat or (), vips)


def _in_all(services: tuple[Service, ...]) -> Found:
    """Find what exceeds the numbers and the entries that all services share."""
    if len(services) > MAX_SERVICE_SLOT:
        yield ("services",), f"{len(services)} services; there can be at most {MAX_SERVICE_SLOT}"
    backends = sum(len(service.backends) for service in services)
    if backends > MAX_BACKEND_ID:
        yield (
            ("services",),
            f"{backends} backends in all; flows can be told apart by at most {MAX_BACKEND_ID}",
        )
    for name, mode in MODES.items():
        of_mode = [service for service in services if service.forward == name] if mode.sees_replies else []
        if (entries := _reply_entries(of_mode)) > MAX_ENTRIES:
            yield (
                ("services",),
                f"replies of backends with forward: {name} take {entries} entries in the receive filter, and it holds "
                f"at most {MAX_ENTRIES}: each address takes one, and each port of it another one; use fewer backends, "
                "or a mode in which they answer clients directly",
            )


def _reply_entries(services: list[Service]) -> int:
    """Return how many entries the receive filter needs; at most that, where it is few enough in any case."""
    most = sum(len(service.backends) * (1 + len(service.blocks)) for service in services if service.port)
    if most <= MAX_ENTRIES:
        return most
    entries: set[tuple[object, ...]] = set()
    for service in services:
        blocks = service.blocks if service.port else ()
        for backend in service.backends:
            ports = (Block(backend.port, PORT_BITS),) if backend.port else blocks
            entries.update((backend.address, service.protocol, port) for port in (None, *ports))
    return len(entries)


def _named_twice(services: tuple[Service, ...]) -> Found:
    first: dict[str, int] = {}
    for number, service in enumerate(services):
        if service.name and first.setdefault(service.name, number) != number:
            yield (
                ("services", number, "name"),
                f'"{service.name}" is already the name of services[{first[service.name]}]; give each its own',
            )


def _listening_twice(services: tuple[Service, ...]) -> Found:
    first: dict[tuple[object, object, str], int] = {}
    for number, service in enumerate(services):
        listens = (service.vip, service.port, service.protocol)
        if all(listens) and first.setdefault(listens, number) != number:
            yield (
                ("services", number),
                f"services[{first[listens]}] already has VIP {service.vip}, port {service.port}, "
                f"{service.protocol}; change one of the three, or put the backends into one service",
            )


def _overlapping(services: tuple[Service, ...]) -> Found:
    """Find ranges of which neither lies within the other: for the ports of both, neither is the more specific."""
    ranges: dict[tuple[object, str], list[tuple[PortRange, int]]] = {}
    for number, service in enumerate(services):
        if service.vip and service.protocol and isinstance(service.port, PortRange):
            ranges.setdefault((service.vip, service.protocol), []).append((service.port, number))
    for one_vip in ranges.values():
        for number, other in sorted(_crossing(one_vip)):
            yield (
                ("services", number, "port"),
                f"{services[number].port} overlaps {services[other].port} of services[{other}], which has the same VIP "
                "and protocol; one must lie within the other, or they must have no port in common",
            )


def _crossing(ranges: list[tuple[PortRange, int]]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of two ranges that cross, the later one of the file first."""
    open_ones: list[tuple[int, int]] = []  # (last port, number) of ranges that began earlier, by last port
    for (first, last), number in sorted(ranges, key=lambda each: (each[0].first, -each[0].last)):
        del open_ones[: bisect_left(open_ones, (first,))]
        for _, other in open_ones[: bisect_left(open_ones, (last,))]:
            yield max(number, other), min(number, other)
        insort(open_ones, (last, number))


def _masks(services: tuple[Service, ...]) -> Found:
    masks = {
        Mask(service.network.version, service.network.prefixlen, block.bits)
        for service in services
        if service.vip and service.port
        for block in service.blocks
    }
    uncommon = [mask for mask in masks if not mask.is_whole]
    if len(uncommon) > MAX_MASKS:
        yield (
            ("services",),
            f"the prefixes and port ranges of VIPs take {len(uncommon)} look-ups of different kinds, and at most "
            f"{MAX_MASKS} are made; use fewer lengths of prefixes, or ranges that begin and end at multiples of a "
            "power of two (8000-8063, 32768-49151), or any",
        )


def _held(service: Service, vip_address: str | None) -> Found:
    if vip_address == "interface" and service.vip and service.network.num_addresses > 1:
        yield (
            ("vip",),
            f"vip_address: interface puts single addresses on the interface, and {service.vip} is a prefix; "
            "route it to this host, with vip_address: none",
        )


class _Vips:
    """Who has an address as a VIP. A look-up costs one step for each length of prefixes, not for each VIP."""

    def __init__(self, services: tuple[Service, ...]) -> None:
        self._addresses: dict[Address, str] = {}
        # IP version: {host bits: {network bits: (position in the file, whose VIP it is)}}
        self._prefixes: dict[int, dict[int, dict[int, tuple[int, str]]]] = {4: {}, 6: {}}
        for number, service in enumerate(services):
            if service.vip:
                self._add(number, service.vip, f'service "{service.name}"' if service.name else f"services[{number}]")

    def _add(self, number: int, vip: Address | Network, owner: str) -> None:
        if isinstance(vip, Address):
            self._addresses.setdefault(vip, f"the VIP of {owner}")
            return
        host_bits = vip.max_prefixlen - vip.prefixlen
        network = int(vip.network_address) >> host_bits
        of_length = self._prefixes[vip.version].setdefault(host_bits, {})
        of_length.setdefault(network, (number, f"in {vip}, the VIP of {owner}"))

    def owner(self, address: Address) -> str | None:
        """Return whose VIP it is, or lies within; None: nobody's."""
        if exactly := self._addresses.get(address):
            return exactly
        lengths = self._prefixes[address.version]
        if not lengths:
            return None
        number = int(address)
        within = [found for bits, networks in lengths.items() if (found := networks.get(number >> bits))]
        return min(within)[1] if within else None


def _any_port(service: Service) -> Found:
    mode = MODES.get(service.forward)
    nat_any = mode is not None and mode.takes_all_as_replies and service.port == "any"
    if nat_any and service.nat_any_port is False:
        yield (
            ("port",),
            f"forward: {service.forward} with port: any cuts every connection that a backend opens through this host; "
            "give a port, or accept that with nat_any_port: true",
        )
    if not nat_any and service.nat_any_port and service.forward and service.port:
        yield ("nat_any_port",), "it is only for forward: nat with port: any; leave it out"


def _check(service: Service) -> Found:
    """Find what cannot be checked, and options of another type of check."""
    check = service.check
    if check is not None and check.port is None and service.port and not service.single_port:
        yield ("check",), f"a service with port: {service.port} has no one port to check; give the check one"
    if check is not None and check.type:
        for key, types in OPTIONS.items():
            if key in check.model_fields_set and check.type not in types:
                yield ("check", key), f"it is only for type: {', '.join(types)}; leave it out"


def _response_times(service: Service) -> Found:
    """Demand a check where a scheduler needs response times that the flows themselves do not show."""
    scheduler = SCHEDULERS.get(service.scheduler)
    if service.check is not None or scheduler is None or not scheduler.needs_response:
        return
    blind = f"forward: {service.forward}" if service.forward and not MODES[service.forward].sees_replies else ""
    if not blind and service.protocol == "udp":
        blind = "protocol: udp"
    if blind:
        yield (
            ("scheduler",),
            f"{blind} does not show how long backends take to answer, so {scheduler.name} needs response times of a "
            "check; give the service a check, or use wlc",
        )


def _prefix(service: Service) -> Found:
    for key, given in (("affinity", service.affinity), ("source_limit", service.source_limit)):
        prefix = given.prefix if given is not None else None
        if prefix is not None and service.vip is not None and prefix > service.network.max_prefixlen:
            yield (
                (key, "prefix"),
                f"found {prefix}; clients of VIP {service.vip} are IPv{service.vip.version}, so it must "
                f"be a whole number from 1 to {service.network.max_prefixlen}",
            )


def _groups(services: tuple[Service, ...]) -> Found:
    """Demand that one client is the same to all services of a group, and is forgotten by all at once."""
    first: dict[str, int] = {}
    for number, service in enumerate(services):
        if service.affinity is None or service.affinity.group is None or service.vip is None:
            continue
        group = service.affinity.group
        other = services[first.setdefault(group, number)]
        differs = {
            "IP version": (service.vip.version, other.vip.version),
            "prefix": (service.client_prefix, other.client_prefix),
            "timeout": (service.affinity.timeout, other.affinity.timeout if other.affinity else None),
        }
        for what, (own, others) in differs.items():
            if own != others:
                yield (
                    ("services", number, "affinity", "group"),
                    f"{what} {own} differs from {others} of services[{first[group]}], which is of group "
                    f'"{group}" too; services of a group must have the same, or choose another group',
                )
                break


def _bounded_load(service: Service) -> Found:
    if service.bounded_load is not None and service.scheduler is not None and service.scheduler not in HASHES:
        yield (
            ("bounded_load",),
            f"scheduler: {service.scheduler} goes by no hash; leave it out, or use one of: {', '.join(HASHES)}",
        )


def _source_ports(service: Service, snat: tuple[Address, ...] | None) -> Found:
    mode = MODES.get(service.forward)
    if mode is None or not mode.sends_from_snat or service.vip is None or snat is None:
        return
    if service.vip.version not in {address.version for address in snat}:
        yield (
            ("forward",),
            f"{service.forward} needs an IPv{service.vip.version} address to send from; add one of this host's to "
            "snat, which stands beside services",
        )


def _clients(service: Service) -> Found:
    """Find prefixes that no client of the VIP has, and those that are both allowed and denied."""
    if service.allow is None or service.deny is None:
        return
    for key, prefixes in (("allow", service.allow), ("deny", service.deny)):
        for number, prefix in enumerate(prefixes):
            if service.vip and prefix.version != service.vip.version:
                yield (
                    (key, number),
                    f"{prefix} is IPv{prefix.version} and the VIP {service.vip} is IPv{service.vip.version}; "
                    "no client of this service is in it; leave it out",
                )
    allowed = {prefix: number for number, prefix in enumerate(service.allow)}
    for number, prefix in enumerate(service.deny):
        if prefix in allowed:
            yield ("deny", number), f"{prefix} is allow[{allowed[prefix]}] as well; keep one of the two"


def _source_limit(service: Service) -> Found:
    limit = service.source_limit
    if limit is not None and limit.burst is not None and limit.burst > limit.rate * MAX_BURST:
        yield (
            ("source_limit", "burst"),
            f"found {limit.burst}; at {limit.rate} a second it must be at most {limit.rate * MAX_BURST}, "
            "an hour's worth",
        )


def _sources(services: tuple[Service, ...], snat: tuple[Address, ...], vips: _Vips) -> Found:
    backends = {backend.address for service in services for backend in service.backends}
    for number, address in enumerate(snat):
        if owner := vips.owner(address):
            yield ("snat", number), f"{address} is {owner}; it must be an address of its own"
        if address in backends:
            yield ("snat", number), f"{address} is a backend; it must be an address of this host"


def _tunnel(service: Service) -> Found:
    """Find keys that the mode does not have."""
    if service.tunnel is None or service.forward is None:
        return
    given = service.tunnel.model_fields_set
    for key, modes in TUNNEL_OPTIONS.items():
        if key in given and service.forward not in modes:
            yield ("tunnel", key), f"it is only for forward: {', '.join(modes)}; leave it out"
    versions = [prefix.version for prefix in service.tunnel.source]
    if len(set(versions)) < len(versions):
        yield ("tunnel", "source"), "more than one prefix of an IP version; keep one of IPv4, one of IPv6"


def _timeouts(service: Service) -> Found:
    """Find timeouts of the other protocol."""
    for key in sorted(service.timeouts.model_fields_set) if service.timeouts and service.protocol else ():
        protocol = key.split("_")[0]
        if protocol != service.protocol:
            yield ("timeouts", key), f"it is only for protocol: {protocol}; leave it out"


def _clamp(service: Service) -> Found:
    if service.mss_clamp and service.protocol == "udp":
        yield ("mss_clamp",), "it is only for protocol: tcp; leave it out"


def _too_many(service: Service, maglev_size: int | None) -> Found:
    count = len(service.backends)
    if count > MAX_BACKENDS:
        yield ("backends",), f"{count} backends; a Maglev table takes at most {MAX_BACKENDS}: use several services"
    elif maglev_size is not None and count > maglev_size:
        yield (
            ("backends",),
            f"{count} backends, and {maglev_size} slots in a Maglev table; raise maglev_size, "
            "best to a hundred slots for each backend",
        )


def _backends(service: Service, vips: _Vips) -> Found:
    first: dict[tuple[Address, int], int] = {}
    for number, backend in enumerate(service.backends):
        for path, message in (*_backend_port(service, backend), *_backend_address_fits(service, backend, vips)):
            yield ("backends", number, *path), message
        if backend.address and service.port:
            endpoint = (backend.address, backend.port or service.single_port)
            if first.setdefault(endpoint, number) != number:
                shown = service.key(backend).removesuffix(":0")
                yield (
                    ("backends", number),
                    f"{shown} is already backends[{first[endpoint]}]; keep one, with the sum of the weights",
                )


def _backend_port(service: Service, backend: Backend) -> Found:
    if backend.port is None:
        return
    if service.forward and not MODES[service.forward].sees_replies:
        yield (
            ("port",),
            f"forward: {service.forward} cannot change the port; leave it out (backends listen on the service's port), "
            "or use forward: nat",
        )
    elif service.port and not service.single_port:
        yield ("port",), f"a service with port: {service.port} keeps each packet's port; leave it out"


def _backend_address_fits(service: Service, backend: Backend, vips: _Vips) -> Found:
    if not backend.address:
        return
    mixes = bool(service.forward) and MODES[service.forward].is_tunnel
    if service.vip and service.vip.version != backend.address.version and not mixes:
        yield (
            ("address",),
            f"{backend.address} is IPv{backend.address.version} and the VIP {service.vip} is "
            f"IPv{service.vip.version}; both must be of one family (tunnels may mix them)",
        )
    if owner := vips.owner(backend.address):
        yield ("address",), f"{backend.address} is {owner}; it must be the server's own address"
