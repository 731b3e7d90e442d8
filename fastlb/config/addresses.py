"""Addresses, prefixes, ports and paths: from what is written to values.

The parsers raise ValueError for what is not of the kind at all, which the types in `fastlb.config.fields` turn into
a sentence, and `refusal` where they can say more precisely what would be right.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import Literal, TypeVar

from fastlb.config.refusal import refusal, show
from fastlb.model.net import Address, Network, PortRange, address_of, parse_endpoint

MAX_SOURCES = 255  # source addresses of one IP version, as in sourceport.pxd
MAX_SOCKET_PATH = 107  # bytes of sun_path, unix(7)

_PORT_RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")

_SPECIAL = [
    (ip_network(prefix), kind)
    for prefix, kind in (
        ("0.0.0.0/32", "the unspecified address"),
        ("127.0.0.0/8", "a loopback address"),
        ("224.0.0.0/4", "a multicast address"),
        ("255.255.255.255/32", "the broadcast address"),
        ("::/128", "the unspecified address"),
        ("::1/128", "a loopback address"),
        ("ff00::/8", "a multicast address"),
        ("::ffff:0:0/96", "an IPv4 address written as IPv6"),
    )
]
_LINK_LOCAL = "a link-local address"
# IP version: (first, last, kind), as numbers; a configuration may have 100,000 addresses.
_SPECIAL_RANGES = {
    version: [
        (int(prefix.network_address), int(prefix.broadcast_address), kind)
        for prefix, kind in _SPECIAL
        if prefix.version == version
    ]
    for version in (4, 6)
}


def parse_address(value: object) -> Address:
    """Return an address from text or from ipaddress' types; ValueError for anything else, numbers too."""
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    if not isinstance(value, str):
        raise ValueError("not an address")
    return address_of(value)


def _kind_of(address: Address) -> str | None:
    """Return the kind of an address that no service and no backend can have, or None."""
    if isinstance(address, IPv6Address) and address.scope_id:
        return "an address with a zone"
    number = int(address)
    for first, last, kind in _SPECIAL_RANGES[address.version]:
        if first <= number <= last:
            return kind
    return None


def _address_alone(value: object, *, with_port: bool) -> Address:
    """Return the address in the value. What newcomers write in its place is refused with advice."""
    try:
        return parse_address(value)
    except ValueError:
        if isinstance(value, str):
            _advise(value, with_port)
        raise


def _advise(text: str, with_port: bool) -> None:
    """Refuse an address with a port, in brackets or with host bits, and a host name; return for anything else."""
    try:
        address, port = parse_endpoint(text)
    except ValueError:
        pass
    else:
        beside = f" and port: {port} beside it" if with_port else ", without a port"
        raise refusal(f"found {show(text)}; write the address alone, {show(str(address))}{beside}")
    for bare in (text[1:-1] if text.startswith("[") and text.endswith("]") else "", _host_of(text)):
        if _is_address(bare):
            raise refusal(f"found {show(text)}; write the address alone, {show(bare)}")
    if _HOST_NAME.fullmatch(text):
        raise refusal(f"found {show(text)}; host names are not looked up, so write an IPv4 or IPv6 address")


def _host_of(text: str) -> str:
    """Return the address of "10.0.0.1/24", which is one of a host in its network; "" for anything else."""
    try:
        interface = ip_interface(text)
    except ValueError:
        return ""
    is_network = interface.ip == interface.network.network_address and interface.network.num_addresses > 1
    return "" if is_network else str(interface.ip)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def parse_vip(value: object) -> Address | Network:
    """Return an address, or a prefix; one of all bits is an address. ValueError for anything else."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str) or "/" not in value:
        return _address_alone(value, with_port=True)
    prefix = ip_network(value, strict=False)
    return prefix.network_address if prefix.prefixlen == prefix.max_prefixlen else prefix


def vip(value: object) -> Address | Network:
    """Return the address or prefix of a service."""
    found = parse_vip(value)
    address = found if isinstance(found, IPv4Address | IPv6Address) else found.network_address
    if kind := _kind_of(address) or (_LINK_LOCAL if address.is_link_local else None):
        raise refusal(f"{address} is {kind}; a VIP must be a unicast address that clients can reach")
    if isinstance(value, str) and "/" in value:
        _without_host_bits(value)
    return found


def _without_host_bits(text: str) -> Network:
    """Return the prefix; one with host bits is refused, and is most likely meant to be one address."""
    prefix = ip_network(text, strict=False)
    address = text.partition("/")[0]
    if prefix.network_address != ip_address(address):
        raise refusal(
            f"found {show(text)}; host bits are set: for one address write {show(address)}, "
            f"for the whole prefix {show(str(prefix))}"
        )
    return prefix


def backend_address(value: object) -> Address:
    """Return the address of a backend."""
    address = _address_alone(value, with_port=True)
    if kind := _kind_of(address):
        raise refusal(f"{address} is {kind}; it must be the unicast address of a backend")
    return address


def source_address(value: object) -> Address:
    """Return an address that packets to backends can come from."""
    address = _address_alone(value, with_port=False)
    if kind := _kind_of(address) or (_LINK_LOCAL if address.is_link_local else None):
        raise refusal(f"{address} is {kind}; it must be a unicast address to which backends can answer")
    return address


def source_prefix(value: object) -> Network:
    """Return the prefix of a tunnel's outer source addresses."""
    if not isinstance(value, str):
        raise ValueError("not a prefix")
    prefix = ip_network(value)
    if kind := _kind_of(prefix.network_address):
        raise refusal(f"{value} begins with {kind}; it must be a prefix of unicast addresses")
    return prefix


def client_network(value: object) -> Network:
    """Return a prefix of clients' addresses."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError("not a prefix")
    return _without_host_bits(value)


def parse_ports(value: object) -> int | PortRange | Literal["any"]:
    """Return a port, a range of ports, or any; a range of one port is a port. ValueError for anything else."""
    if value == "any":
        return "any"
    if isinstance(value, str | PortRange):
        ports = port_range(value)
        return ports if ports.first < ports.last else ports.first
    if type(value) is not int or not 1 <= value <= 65535:
        raise ValueError("not a port")
    return value


def port_range(value: object) -> PortRange:
    """Return a range of ports from text such as "8000-8099"; ValueError for anything else."""
    if isinstance(value, PortRange):
        return value
    parts = _PORT_RANGE.fullmatch(value) if isinstance(value, str) else None
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]) <= 65535:
        raise ValueError("not a range")
    return PortRange(int(parts[1]), int(parts[2]))


def file_path(value: str) -> str:
    """Return the value if it is an absolute path; ValueError for anything else."""
    if not value.startswith("/") or b"\0" in os.fsencode(value):  # which refuses what no name can hold
        raise ValueError("not a path")
    return value


def socket_path(value: str) -> str:
    """Return the value if a Unix socket can be bound to it; ValueError for anything else."""
    if len(os.fsencode(file_path(value))) > MAX_SOCKET_PATH:
        raise ValueError("too long for a socket's path")
    return value


Listed = TypeVar("Listed", str, Network, Address)


def all_different(listed: tuple[Listed, ...]) -> tuple[Listed, ...]:
    """Return the list if nothing comes twice in it."""
    seen: set[Listed] = set()
    for one in listed:
        if one in seen:
            raise refusal(f'"{one}" is listed twice; keep one')
        seen.add(one)
    return listed


def few_sources(addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """Return the addresses if none comes twice, and there are no more than the source ports' numbers can tell apart."""
    for version in (4, 6):
        count = sum(address.version == version for address in all_different(addresses))
        if count > MAX_SOURCES:
            raise refusal(f"{count} IPv{version} addresses; at most {MAX_SOURCES} can be used")
    return addresses
