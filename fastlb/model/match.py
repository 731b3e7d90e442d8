"""How much of an address and a port an entry of a table looks at.

A service for a prefix or for a range of ports is found by leading bits. Entries that look at the same number of bits of
address and port have one *mask*, and a mask costs one look-up, however many entries it has: tuple space search
(Srinivasan, Suri and Varghese, SIGCOMM 1999). Whole addresses with whole ports are asked for first, so they do not pay
for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import NamedTuple

from fastlb.model.net import Address

PORT_BITS = 16
LATER = 0x80  # in the protocol of a key: for fragments without ports, as LATER_BIT of types.pxd
MAX_ENTRIES = 262_144  # of VIPs, and again of the replies of each mode: 10,000 services or backends many times over
MAX_MASKS = 31  # of VIPs, and again of replies: what fits into a byte beside the IP version


class Block(NamedTuple):
    """The ports that have their first ``bits`` bits in common with ``port``; the others of ``port`` are 0."""

    port: int
    bits: int


ANY_PORT = Block(0, 0)


class Mask(NamedTuple):
    """How many bits count, of an address and of a port."""

    version: int
    prefix: int
    bits: int

    @property
    def is_whole(self) -> bool:
        """Return True if every bit of both counts."""
        return self.bits == PORT_BITS and self.prefix == (32 if self.version == 4 else 128)


def blocks_of(first: int, last: int) -> Iterator[Block]:
    """Yield the fewest blocks that make up a range of ports, both ends included; at most 30."""
    while first <= last:
        size = first & -first or 1 << PORT_BITS
        while first + size - 1 > last:
            size >>= 1
        yield Block(first, PORT_BITS + 1 - size.bit_length())
        first += size


class Key(NamedTuple):
    """An endpoint: where clients send to (a VIP), or where replies come from (a backend)."""

    address: Address
    port: int  # 0: any
    protocol: int  # IPPROTO_TCP or IPPROTO_UDP; with port 0 also LATER + one of them, and 0: echo requests
    prefix: int | None = None  # how many bits of the address count; None: all
    port_bits: int | None = None  # and of the port; None: all, or none with port 0

    @property
    def mask(self) -> Mask:
        """Return which bits of an address and a port the entry looks at."""
        bits = PORT_BITS if self.port or not 0 < self.protocol < LATER else 0
        return Mask(
            self.address.version,
            self.address.max_prefixlen if self.prefix is None else self.prefix,
            bits if self.port_bits is None else self.port_bits,
        )


class Keys(NamedTuple):
    """What is ours, apart from the source ports of full NAT."""

    vips: Set[Key] = frozenset()
    replies: Set[Key] = frozenset()  # of nat
    full_replies: Set[Key] = frozenset()  # of fullnat

    def __and__(self, other: Keys) -> Keys:
        """Return the keys that are in both."""
        return Keys(*(mine & theirs for mine, theirs in zip(self, other, strict=True)))
