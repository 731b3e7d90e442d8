"""The rules between the fields of a configuration: what no value shows by itself.

They see models of which a field may be None where what was written is faulty or missing (`config._salvage`), and say
nothing about such a field: one fault, one message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastlb.config import fields
from fastlb.config.fields import MAX_BACKENDS
from fastlb.config.yaml import Loc
from fastlb.model.match import MAX_MASKS, Mask
from fastlb.model.modes import HASHES, ONE_WAY, TUNNELS
from fastlb.model.net import Address, Network, PortRange

if TYPE_CHECKING:
    from fastlb.config.schema import Backend, Service

Found = Iterator[tuple[Loc, str]]


def broken_rules(
    services: tuple[Service, ...], snat: tuple[Address, ...] | None, vip_address: str | None, maglev_size: int | None
) -> Found:
    """Whatever breaks a rule that involves more than one field. None is an unknown field."""
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
    """Ranges of which neither lies within the other: for the ports of both, neither is the more specific."""
    ranges: dict[tuple[object, str], list[tuple[int, PortRange]]] = {}
    for number, service in enumerate(services):
        if service.vip and service.protocol and isinstance(service.port, PortRange):
            ranges.setdefault((service.vip, service.protocol), []).append((number, service.port))
    for listed in ranges.values():
        for at, (number, ports) in enumerate(listed):
            for other, others in listed[:at]:
                (first, last), (low, high) = ports, others
                if first < low <= last < high or low < first <= high < last:
                    yield (
                        ("services", number, "port"),
                        f"{ports} overlaps {others} of services[{other}], which has the same VIP and protocol; "
                        "one must lie within the other, or they must have no port in common",
                    )


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
    """Who has an address as a VIP."""

    def __init__(self, services: tuple[Service, ...]) -> None:
        named = [
            (service.vip, f'service "{service.name}"' if service.name else f"services[{number}]")
            for number, service in reversed(list(enumerate(services)))
            if service.vip
        ]
        self._addresses = {vip: owner for vip, owner in named if isinstance(vip, Address)}
        self._prefixes = [(vip, owner) for vip, owner in reversed(named) if isinstance(vip, Network)]

    def owner(self, address: Address) -> str | None:
        """Whose VIP it is, or lies within; None: nobody's."""
        within = (f"in {prefix}, the VIP of {owner}" for prefix, owner in self._prefixes if address in prefix)
        exactly = self._addresses.get(address)
        return f"the VIP of {exactly}" if exactly else next(within, None)


def _any_port(service: Service) -> Found:
    nat_any = service.forward == "nat" and service.port == "any"
    if nat_any and service.nat_any_port is False:
        yield (
            ("port",),
            "forward: nat with port: any cuts every connection that a backend opens through this host; "
            "give a port, or accept that with nat_any_port: true",
        )
    if not nat_any and service.nat_any_port and service.forward and service.port:
        yield ("nat_any_port",), "it is only for forward: nat with port: any; leave it out"


def _check(service: Service) -> Found:
    """What cannot be checked."""
    check = service.check
    if check is not None and check.port is None and service.port and not service.single_port:
        yield ("check",), f"a service with port: {service.port} has no one port to check; give the check one"
    if check is not None and check.type == "tcp":
        for key in sorted({"path", "host"} & check.model_fields_set):
            yield ("check", key), "it is only for type: http; leave it out"


def _response_times(service: Service) -> Found:
    """A scheduler that goes by nothing else must have them from somewhere."""
    if service.check is not None or service.scheduler != "lrt":
        return
    blind = f"forward: {service.forward}" if service.forward in ONE_WAY else ""
    if not blind and service.protocol == "udp":
        blind = "protocol: udp"
    if blind:
        yield (
            ("scheduler",),
            f"{blind} does not show how long backends take to answer, so lrt needs response times of a check; "
            "give the service a check, or use wlc",
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
    """One client must be the same to all services of a group, and be forgotten by all at once."""
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
    if service.forward != "fullnat" or service.vip is None or snat is None:
        return
    if service.vip.version not in {address.version for address in snat}:
        yield (
            ("forward",),
            f"fullnat needs an IPv{service.vip.version} address to send from; add one of this host's to snat, "
            "which stands beside services",
        )


def _clients(service: Service) -> Found:
    """Prefixes that no client of the VIP has, or of which nobody could say what they mean."""
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
    if limit is not None and limit.burst is not None and limit.burst > limit.rate * fields.MOST_BURST:
        yield (
            ("source_limit", "burst"),
            f"found {limit.burst}; at {limit.rate} a second it must be at most {limit.rate * fields.MOST_BURST}, "
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
    """Keys that the mode does not have."""
    if service.tunnel is None or service.forward is None:
        return
    given = service.tunnel.model_fields_set
    modes = {"source": TUNNELS, "df": TUNNELS, "key": ("gre",), "port": ("gue",), "udp_checksum": ("gue",)}
    for key in sorted(given):
        if service.forward not in modes[key]:
            yield ("tunnel", key), f"it is only for forward: {', '.join(modes[key])}; leave it out"
    versions = [prefix.version for prefix in service.tunnel.source]
    if len(set(versions)) < len(versions):
        yield ("tunnel", "source"), "more than one prefix of an IP version; keep one of IPv4, one of IPv6"


def _timeouts(service: Service) -> Found:
    """Those of the other protocol."""
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
        yield ("backends",), f"{count} backends; a Maglev table takes at most {MAX_BACKENDS}"
    elif maglev_size is not None and count > maglev_size:
        yield (
            ("backends",),
            f"{count} backends, and {maglev_size} slots in a Maglev table; raise maglev_size, "
            "best to a hundred slots for each backend",
        )


def _backends(service: Service, vips: _Vips) -> Found:
    first: dict[str, int] = {}
    for number, backend in enumerate(service.backends):
        loc: Loc = ("backends", number)
        for path, message in (
            *_backend_port(service, backend),
            *_backend_address_fits(service, backend, vips),
        ):
            yield (*loc, *path), message
        if backend.address and service.port:
            key = service.key(backend)
            if first.setdefault(key, number) != number:
                shown = key.removesuffix(":0")
                yield loc, f"{shown} is already backends[{first[key]}]; keep one, with the sum of the weights"


def _backend_port(service: Service, backend: Backend) -> Found:
    if backend.port is None:
        return
    if service.forward in ONE_WAY:
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
    tunnelled = service.forward in TUNNELS
    if service.vip and service.vip.version != backend.address.version and not tunnelled:
        yield (
            ("address",),
            f"{backend.address} is IPv{backend.address.version} and the VIP {service.vip} is "
            f"IPv{service.vip.version}; both must be of one family (tunnels may mix them)",
        )
    if owner := vips.owner(backend.address):
        yield ("address",), f"{backend.address} is {owner}; it must be the server's own address"
