"""The maps that say what is ours, each with a copy of its keys, so that finding differences costs no system call.

A map whose keys may look at a part of address and port has a second map beside it, of one value: a slot for each mask
that a key has (`if_masked` in frame.py walks them). A mask gets its slot before its first key, and loses it after its
last; so a program never finds a key whose mask it does not try.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from ipaddress import ip_network
from typing import NamedTuple, Protocol

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import fragments
from fastlb.kernel.ebpf.classification import Maps
from fastlb.kernel.ebpf.frame import KEY_SIZE, LAST, MASK_SHIFT, SLOT_SHIFT, SLOTS_AT, Lookup
from fastlb.kernel.ebpf.syscall import HashMap, Value
from fastlb.model.match import LATER, MAX_ENTRIES, MAX_MASKS, PORT_BITS, Key, Keys, Mask
from fastlb.model.net import Address

_VALUE = struct.pack("=I", 1)
_SLOTS_BYTES = SLOTS_AT + (MAX_MASKS << SLOT_SHIFT)


class Sources(NamedTuple):
    """The source addresses of full NAT, and the range of their ports, both ends included."""

    addresses: frozenset[Address]
    first: int
    last: int


class Entries(Protocol):
    """What is asked of the map of the keys."""

    name: str
    max_entries: int
    fd: int

    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...


class Slots(Protocol):
    """What is asked of the map of the masks."""

    fd: int

    def write(self, value: bytes) -> None: ...


class MirroredMap:
    """A map and the keys that it holds. ``slots``: None where every key looks at the whole of address and port."""

    def __init__(self, entries: Entries, slots: Slots | None = None) -> None:
        self._map, self._slots = entries, slots
        self._held: set[Key] = set()
        self._numbers: dict[Mask, int] = {}  # of the masks that keys have: 1 to MAX_MASKS

    @property
    def lookup(self) -> Lookup:
        """The descriptors that a program asks by."""
        return Lookup(self._map.fd, -1 if self._slots is None else self._slots.fd)

    def check_room(self, keys: set[Key]) -> None:
        """Raise KernelError when these keys, with those that are there now, are more than fit."""
        most = len(self._held | keys)
        if most > self._map.max_entries:
            raise KernelError(
                f"the map {self._map.name} would have to hold {most} entries at once: "
                f"its limit is {self._map.max_entries}"
            )
        masks = self._numbers.keys() | masks_of(keys)
        if len(masks) > MAX_MASKS:
            raise KernelError(
                f"the map {self._map.name} would have to hold {len(masks)} kinds of prefixes and port ranges at once: "
                f"its limit is {MAX_MASKS}"
            )

    def add(self, keys: set[Key]) -> None:
        """Write those that are missing, after their masks."""
        fresh = masks_of(keys) - self._numbers.keys()
        used = set(self._numbers.values())
        free = [number for number in range(1, MAX_MASKS + 1) if number not in used]
        self._numbers |= dict(zip(sorted(fresh), free, strict=False))
        if fresh:
            self._write_slots()
        for key in keys - self._held:
            self._map.put(self._pack(key), _VALUE)
            self._held.add(key)

    def keep_only(self, keys: set[Key]) -> None:
        """Delete all others, and then the masks that no key has any more."""
        for key in self._held - keys:
            self._map.delete(self._pack(key))
            self._held.remove(key)
        gone = self._numbers.keys() - masks_of(keys)
        for mask in gone:
            del self._numbers[mask]
        if gone:
            self._write_slots()

    def _pack(self, key: Key) -> bytes:
        kind = kind_of(key.mask, self._numbers.get(key.mask, 0))
        return key.address.packed.rjust(16, b"\0") + struct.pack("!HBB", key.port, key.protocol, kind)

    def _write_slots(self) -> None:
        assert self._slots is not None, "a key of this map looks at the whole of address and port"
        self._slots.write(pack_slots(self._numbers))


class Tables:
    """The maps of one classifier, new and empty. Raises KernelError; the stack closes them."""

    def __init__(self, sources: Sources | None, undo: ExitStack) -> None:
        self._vips, self._replies, self._full_replies = (_new(name, undo, True) for name in ("vips", "replies", "full"))
        self._sources, self._locals = (_new(name, undo, False) for name in ("sources", "locals"))
        self.datagrams = fragments.new_map()
        undo.callback(self.datagrams.close)
        if sources is not None:
            self._sources.add(whole_addresses(sources.addresses))
        self.maps = Maps(
            self._vips.lookup, self._replies.lookup, self._full_replies.lookup, self._sources.lookup.map,
            self._locals.lookup.map, self.datagrams.fd, None if sources is None else (sources.first, sources.last),
        )  # fmt: skip

    def replace(self, keys: Keys, locals_: Iterable[Address]) -> None:
        """Make the maps hold exactly these; see `replace`."""
        replace({  # the host's own addresses first: a reply to one of them must never be taken from it
            self._locals: whole_addresses(locals_),
            self._vips: set(keys.vips),
            self._replies: set(keys.replies),
            self._full_replies: set(keys.full_replies),
        })

    def set_locals(self, addresses: Iterable[Address]) -> None:
        """Make ``locals`` hold exactly these; see `replace`."""
        replace({self._locals: whole_addresses(addresses)})


def replace(wanted: dict[MirroredMap, set[Key]]) -> None:
    """Make each map hold exactly the keys beside it.

    What is new is written before what is gone is deleted, and in the opposite order. KernelError when a map would have
    to hold too much at once; then nothing has changed.
    """
    for mirrored, keys in wanted.items():
        mirrored.check_room(keys)
    for mirrored, keys in wanted.items():
        mirrored.add(keys)
    for mirrored, keys in reversed(wanted.items()):
        mirrored.keep_only(keys)


def whole_addresses(addresses: Iterable[Address]) -> set[Key]:
    """Return the keys of addresses whose ports and protocols do not matter."""
    return {Key(address, 0, 0) for address in addresses}


def masks_of(keys: Iterable[Key]) -> set[Mask]:
    """Return the masks that are not whole. Most keys have a whole one, as can be seen at once."""
    seldom = (key for key in keys if key[3:] != (None, None) or (key.port == 0 and 0 < key.protocol < LATER))
    return {mask for mask in {key.mask for key in seldom} if not mask.is_whole}


def kind_of(mask: Mask, number: int) -> int:
    """Return the last byte of a key: the family, and the number of its mask."""
    return mask.version | number << MASK_SHIFT


def pack_slots(numbers: Mapping[Mask, int]) -> bytes:
    """Return the value that tells the programs of these masks: the highest number, and a slot for each."""
    slots = bytearray(_SLOTS_BYTES)
    struct.pack_into("=I", slots, LAST, max(numbers.values(), default=0))
    for mask, number in numbers.items():
        anywhere = ip_network(f"{'0.0.0.0' if mask.version == 4 else '::'}/{mask.prefix}")
        ports = (1 << PORT_BITS) - (1 << PORT_BITS >> mask.bits)
        slot = anywhere.netmask.packed.rjust(16, b"\0") + struct.pack("!HB", ports, kind_of(mask, number))
        at = SLOTS_AT + (number - 1 << SLOT_SHIFT)
        slots[at : at + len(slot)] = slot
    return bytes(slots)


def _new(name: str, undo: ExitStack, masked: bool) -> MirroredMap:
    """Make a map, and one for its masks where its keys may have some."""
    entries = HashMap(f"fastlb_{name}", KEY_SIZE, len(_VALUE), MAX_ENTRIES)
    undo.callback(entries.close)
    slots = None
    if masked:
        slots = Value("fastlb_masks", _SLOTS_BYTES)
        undo.callback(slots.close)
    return MirroredMap(entries, slots)
