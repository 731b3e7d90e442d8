"""What is ours: the maps that say so, and four eBPF programs over them, all of one classification (classification.py).

Invariant: a frame is taken by a ring or by the host, never by both and never by neither. What the programs do with a
frame that is ours:

    filter     one worker: the socket filter of its ring       keeps it
    steering   several: the program of a fanout group          names the worker that owns the client's shard
    guard      cls_bpf at clsact ingress                       takes it from the host
    bell       the socket filter of a sleeping worker's bell   keeps a byte of it, once

A shard comes from the client's address and port by ``shard_of`` of flowhash.pxd; the client is the source of a frame
to a VIP, the destination of a backend's reply. An answer in full NAT goes to a port of ours, which says its shard.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from ipaddress import ip_network
from types import TracebackType
from typing import NamedTuple

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import classification, fragments, syscall
from fastlb.kernel.ebpf.classification import CACHE_LINE, Maps
from fastlb.kernel.ebpf.frame import KEY_SIZE, LAST, MASK_SHIFT, SLOT_SHIFT, SLOTS_AT, Lookup
from fastlb.kernel.ebpf.host_counters import COUNTER_SIZE, PASSED
from fastlb.kernel.ebpf.syscall import SCHED_CLS, SOCKET_FILTER
from fastlb.model.match import LATER, MAX_MASKS, PORT_BITS, Key, Keys, Mask
from fastlb.model.names import GUARD_NAME, SHARDS
from fastlb.model.net import Address

MAX_ENTRIES = 262_144  # of each map: 10,000 services, or their backends, many times over
FILTER_NAME = "fastlb_filter"
STEER_NAME = "fastlb_steer"
BELL_NAME = "fastlb_bell"
NOTHING_NAME = "fastlb_nothing"

_VALUE = struct.pack("=I", 1)


class Sources(NamedTuple):
    """The source addresses of full NAT, and the range of their ports, both ends included."""

    addresses: frozenset[Address]
    first: int
    last: int


class Classifier:
    """The maps and the programs. A context manager; what is attached outlives it.

    ``filter_fd`` is for SO_ATTACH_BPF on an AF_PACKET socket, ``guard_fd`` for ``fastlb.kernel.guard.attach``.
    With several workers ``steer_fd`` is for ``fastlb.workers.fanout.Group.start``: its result is 1 + the worker, 0 for
    what is not ours; and
    ``nothing_fd`` for SO_ATTACH_BPF where no frame is wanted. One worker needs neither, and has -1.
    ``no_bells`` says why this kernel (before Linux 5.5) has no doorbells; None: it has.
    Its methods may be called from several threads.
    """

    filter_fd: int
    guard_fd: int
    steer_fd: int = -1
    nothing_fd: int = -1
    no_bells: str | None = None

    def __init__(self, workers: int = 1, sources: Sources | None = None) -> None:
        """Create and load everything; KernelError says what the kernel refused and what would help.

        ``sources``: of full NAT; without any the programs do not ask for its answers.
        """
        if not 1 <= workers <= SHARDS:
            raise ValueError(f"1 to {SHARDS} workers, not {workers}")
        syscall.raise_memlock_limit()
        self.workers = workers
        self._lock = threading.Lock()
        with ExitStack() as undo:
            self._vips, self._replies, self._full_replies, self._sources, self._locals = (
                _MirroredMap(f"fastlb_{name}", undo, masked)
                for name, masked in (
                    ("vips", True), ("replies", True), ("full", True), ("sources", False), ("locals", False)
                )
            )  # fmt: skip
            self.datagrams = fragments.new_map()
            undo.callback(self.datagrams.close)
            self._source_ports = None
            if sources is not None:
                self._source_ports = (sources.first, sources.last)
                self._sources.add({Key(address, 0, 0) for address in sources.addresses})
            self.filter_fd = _load(SOCKET_FILTER, classification.filter_program(self._maps()), FILTER_NAME, undo)
            self._passed = syscall.Value("fastlb_passed", COUNTER_SIZE * len(PASSED))
            undo.callback(self._passed.close)
            guard = classification.guard_program(self._maps(), self._passed.fd)
            self.guard_fd = _load(SCHED_CLS, guard, GUARD_NAME, undo)
            if workers > 1:
                self._load_steering(undo)
            self._load_bells(undo)
            self._resources = undo.pop_all()

    def replace(self, keys: Keys, locals_: Iterable[Address] = ()) -> None:
        """Make the maps hold exactly these.

        Only differences are written, what is new before what is gone, so that a frame that is ours before
        and after is ours all the time. KernelError when more than ``MAX_ENTRIES`` would be in a map at once;
        then nothing has changed.
        """
        wanted = {  # the host's own addresses first: a reply to one of them must never be taken from it
            self._locals: {Key(address, 0, 0) for address in locals_},
            self._vips: set(keys.vips),
            self._replies: set(keys.replies),
            self._full_replies: set(keys.full_replies),
        }
        with self._lock:
            for mirrored, listed in wanted.items():
                mirrored.check_room(listed)
            for mirrored, listed in wanted.items():
                mirrored.add(listed)
            for mirrored, listed in reversed(wanted.items()):
                mirrored.keep_only(listed)

    def set_locals(self, addresses: Iterable[Address]) -> None:
        """Make ``locals`` hold exactly the host's own addresses; errors as for ``replace``."""
        keys = {Key(address, 0, 0) for address in addresses}
        with self._lock:
            self._locals.check_room(keys)
            self._locals.add(keys)
            self._locals.keep_only(keys)

    def set_workers(self, owners: Sequence[int]) -> None:
        """Which worker owns each of the 64 shards; until then worker 0 owns all of them. Raises KernelError.

        Steering and bells see the old owner of a shard or the new one.
        """
        if len(owners) != SHARDS or not all(0 <= worker < self.workers for worker in owners):
            raise ValueError(f"{SHARDS} numbers below {self.workers} are wanted, not {list(owners)}")
        if self.workers > 1:
            with self._lock:
                self._owners.write(struct.pack(f"={SHARDS}I", *owners))

    def bell_fd(self, worker: int) -> int | None:
        """For SO_ATTACH_BPF on the worker's doorbell sockets (SOCK_RAW); None: see ``no_bells``.

        The program keeps one byte of the first frame that is the worker's after its word became 1, and then stores 0.
        It may ring twice when two cores receive at once. Taps are asked latest first: a bell that was bound before the
        ring rings when the frame is in it already.
        """
        return None if self.no_bells else self._bells[worker]

    def asleep(self, worker: int) -> memoryview | None:
        """The worker's word, 4 writable bytes: 1 makes its bells ring. On a cache line of its own.

        It stays in place for as long as it is in use, even when the classifier is closed before.
        """
        return None if self.no_bells else self._asleep.view(worker * CACHE_LINE, 4)

    def passed(self) -> dict[str, int]:
        """What the guard has left to the host though it was sent to a VIP, by reason. Raises KernelError."""
        return dict(zip(PASSED, struct.unpack(f"={len(PASSED)}Q", self._passed.read()), strict=True))

    def close(self) -> None:
        """Give up maps and programs; those that are attached stay, and keep the maps as they are now."""
        self._resources.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _maps(self) -> Maps:
        return Maps(
            self._vips.lookup, self._replies.lookup, self._full_replies.lookup, self._sources.lookup.map,
            self._locals.lookup.map, self.datagrams.fd, self._source_ports,
        )  # fmt: skip

    def _load_steering(self, undo: ExitStack) -> None:
        self._owners = syscall.Value("fastlb_owners", SHARDS * 4)
        undo.callback(self._owners.close)
        code = classification.steering_program(self._maps(), self._owners.fd)
        self.steer_fd = _load(SOCKET_FILTER, code, STEER_NAME, undo)
        self.nothing_fd = _load(SOCKET_FILTER, classification.nothing_program(), NOTHING_NAME, undo)

    def _load_bells(self, undo: ExitStack) -> None:
        try:
            self._asleep = syscall.SharedValue("fastlb_asleep", self.workers * CACHE_LINE)
        except KernelError as error:
            self.no_bells = str(error)
            return
        undo.callback(self._asleep.close)
        owners = self._owners.fd if self.workers > 1 else None
        codes = (
            classification.bell_program(self._maps(), worker, self._asleep.fd, owners) for worker in range(self.workers)
        )
        self._bells = [_load(SOCKET_FILTER, code, BELL_NAME, undo) for code in codes]


class _MirroredMap:
    """A map and the set of keys that it holds, so that differences cost no system call to find; and their masks.

    ``masked``: keys may look at a part of address and port. A mask has a number while a key has it; it gets a slot
    before its first key, and loses it after its last.
    """

    def __init__(self, name: str, undo: ExitStack, masked: bool) -> None:
        self._map = syscall.HashMap(name, KEY_SIZE, len(_VALUE), MAX_ENTRIES)
        undo.callback(self._map.close)
        self._held: set[Key] = set()
        self._numbers: dict[Mask, int] = {}
        self.lookup = Lookup(self._map.fd, -1)
        if masked:
            self._slots = syscall.Value("fastlb_masks", SLOTS_AT + (MAX_MASKS << SLOT_SHIFT))
            undo.callback(self._slots.close)
            self.lookup = Lookup(self._map.fd, self._slots.fd)

    def check_room(self, keys: set[Key]) -> None:
        most = len(self._held | keys)
        if most > self._map.max_entries:
            raise KernelError(
                f"the map {self._map.name} would have to hold {most} entries at once: "
                f"its limit is {self._map.max_entries}"
            )
        masks = self._numbers.keys() | _masks_of(keys)
        if len(masks) > MAX_MASKS:
            raise KernelError(
                f"the map {self._map.name} would have to hold {len(masks)} kinds of prefixes and port ranges at once: "
                f"its limit is {MAX_MASKS}"
            )

    def add(self, keys: set[Key]) -> None:
        fresh = _masks_of(keys) - self._numbers.keys()
        free = (number for number in range(1, MAX_MASKS + 1) if number not in set(self._numbers.values()))
        for mask, number in zip(sorted(fresh), list(free), strict=False):
            self._numbers[mask] = number
        if fresh:
            self._write_slots()
        for key in keys - self._held:
            self._map.put(self._pack(key), _VALUE)
            self._held.add(key)

    def keep_only(self, keys: set[Key]) -> None:
        for key in self._held - keys:
            self._map.delete(self._pack(key))
            self._held.remove(key)
        gone = self._numbers.keys() - _masks_of(keys)
        for mask in gone:
            del self._numbers[mask]
        if gone:
            self._write_slots()

    def _pack(self, key: Key) -> bytes:
        kind = _kind(key.mask, self._numbers.get(key.mask, 0))
        return key.address.packed.rjust(16, b"\0") + struct.pack("!HBB", key.port, key.protocol, kind)

    def _write_slots(self) -> None:
        slots = bytearray(SLOTS_AT + (MAX_MASKS << SLOT_SHIFT))
        struct.pack_into("=I", slots, LAST, max(self._numbers.values(), default=0))
        for mask, number in self._numbers.items():
            anywhere = ip_network(f"{'0.0.0.0' if mask.version == 4 else '::'}/{mask.prefix}")
            ports = (1 << PORT_BITS) - (1 << PORT_BITS >> mask.bits)
            slot = anywhere.netmask.packed.rjust(16, b"\0") + struct.pack("!HB", ports, _kind(mask, number))
            at = SLOTS_AT + (number - 1 << SLOT_SHIFT)
            slots[at : at + len(slot)] = slot
        self._slots.write(bytes(slots))


def _masks_of(keys: set[Key]) -> set[Mask]:
    """Those that are not whole. Most keys are, as can be seen at once."""
    seldom = (key for key in keys if key[3:] != (None, None) or (key.port == 0 and 0 < key.protocol < LATER))
    return {mask for mask in {key.mask for key in seldom} if not mask.is_whole}


def _kind(mask: Mask, number: int) -> int:
    return mask.version | number << MASK_SHIFT


def _load(kind: int, code: bytes, name: str, undo: ExitStack) -> int:
    fd = syscall.load_program(kind, code, name)
    undo.callback(os.close, fd)
    return fd
