"""Addresses, prefixes, ports and protocols, and how they are written."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import NamedTuple

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PROTOCOL_NUMBERS = {"tcp": IPPROTO_TCP, "udp": IPPROTO_UDP}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOL_NUMBERS.items()}


class PortRange(NamedTuple):
    """A range of ports, from the first to the last, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@lru_cache(maxsize=1 << 17)
def address_of(text: str) -> Address:
    """Return the address that a text means; raises ValueError.

    The same text gives the same object, as long as it is remembered: sets of 10,000 addresses, one before a reload and
    one after it, then find them equal without a call of Python for each.
    """
    return ip_address(text)


def host_text(address: Address | str) -> str:
    """Return an address as it stands in front of a port: an IPv6 address in brackets (RFC 3986 section 3.2.2)."""
    text = str(address)
    return f"[{text}]" if ":" in text else text


def endpoint_text(address: Address | str, port: int) -> str:
    """Return ``ADDR:PORT`` as people write it, "10.0.0.11:8080" or "[fd00::11]:8080"."""
    return f"{host_text(address)}:{port}"


def parse_endpoint(text: str) -> tuple[Address, int]:
    """Return the address and the port of ``ADDR:PORT``; raises ValueError, which says what would be right."""
    matched = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*)):([0-9]{1,5})", text)
    if not matched or int(matched[3]) > 0xFFFF:
        raise ValueError(f"{text!r} is not ADDRESS:PORT, as in 198.51.100.7:40000 or [2001:db8::7]:40000")
    try:
        return ip_address(matched[1] or matched[2]), int(matched[3])
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
