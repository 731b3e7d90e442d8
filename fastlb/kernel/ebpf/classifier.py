"""What is ours: the maps that say so, and four eBPF programs over them, all of one classification (classification.py).

Invariant: a frame is taken by a ring or by the host, never by both and never by neither. What the programs do with a
frame that is ours:

    filter     one worker: the socket filter of its ring       keeps it
    steering   several: the program of a fanout group          names the worker that owns the client's shard
    guard      cls_bpf at clsact ingress                       takes it from the host
    bell       the socket filter of a sleeping worker's bell   keeps a byte of it, once

A shard comes from the client's address and port by `shard_of` of flowhash.pxd; the client is the source of a frame
to a VIP, the destination of a backend's reply. An answer in full NAT goes to a port of ours, which says its shard.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType

from fastlb.kernel.ebpf import classification, syscall
from fastlb.kernel.ebpf.bells import Bells
from fastlb.kernel.ebpf.frame import NOTHING
from fastlb.kernel.ebpf.host_counters import COUNTER_SIZE, REASONS
from fastlb.kernel.ebpf.syscall import SCHED_CLS, SOCKET_FILTER, Map, hold_program
from fastlb.kernel.ebpf.tables import Sources, Tables
from fastlb.model.match import Keys
from fastlb.model.names import GUARD_NAME, SHARDS
from fastlb.model.net import Address

FILTER_NAME = "fastlb_filter"
STEER_NAME = "fastlb_steer"
NOTHING_NAME = "fastlb_nothing"


class Classifier:
    """The maps and the programs. A context manager; what is attached outlives it.

    ``filter_fd`` is for SO_ATTACH_BPF on an AF_PACKET socket, ``guard_fd`` for `fastlb.kernel.guard.attach`.
    With several workers ``steer_fd`` is for `fastlb.workers.fanout.Group.start`: its result is 1 + the worker, 0 for
    what is not ours; and ``nothing_fd`` for SO_ATTACH_BPF where no frame is wanted. One worker needs neither, and has
    -1. Its methods may be called from several threads.
    """

    filter_fd: int
    guard_fd: int
    steer_fd: int = -1
    nothing_fd: int = -1

    def __init__(self, workers: int = 1, sources: Sources | None = None) -> None:
        """Create and load everything; KernelError says what the kernel refused and what would help.

        ``sources``: of full NAT; without any the programs do not ask for its answers.
        """
        if not 1 <= workers <= SHARDS:
            raise ValueError(f"1 to {SHARDS} workers, not {workers}")
        syscall.raise_memlock_limit()
        self.workers = workers
        self._lock = threading.Lock()
        self._owners: syscall.Value | None = None
        with ExitStack() as undo:
            self._tables = Tables(sources, undo)
            maps = self._tables.maps
            self.filter_fd = hold_program(undo, SOCKET_FILTER, classification.filter_program(maps), FILTER_NAME)
            self._counters = syscall.Value("fastlb_to_host", COUNTER_SIZE * len(REASONS))
            undo.callback(self._counters.close)
            guard = classification.guard_program(maps, self._counters.fd)
            self.guard_fd = hold_program(undo, SCHED_CLS, guard, GUARD_NAME)
            if workers > 1:
                self._owners = self._load_steering(undo)
            self._bells = Bells(maps, workers, self._owners.fd if self._owners else None, undo)
            self._resources = undo.pop_all()

    @property
    def no_bells(self) -> str | None:
        """Why this kernel (before Linux 5.5) has no doorbells; None: it has."""
        return self._bells.fault

    @property
    def datagrams(self) -> Map:
        """The map of datagrams of which the host got the first fragment (fragments.py)."""
        return self._tables.datagrams

    def replace(self, keys: Keys, locals_: Iterable[Address] = ()) -> None:
        """Make the maps hold exactly these.

        Only differences are written, what is new before what is gone, so that a frame that is ours before
        and after is ours all the time. KernelError when more than ``tables.MAX_ENTRIES`` would be in a map at once;
        then nothing has changed.
        """
        with self._lock:
            self._tables.replace(keys, locals_)

    def set_locals(self, addresses: Iterable[Address]) -> None:
        """Make ``locals`` hold exactly the host's own addresses; errors as for `replace`."""
        with self._lock:
            self._tables.set_locals(addresses)

    def set_workers(self, owners: Sequence[int]) -> None:
        """Say which worker owns each of the 64 shards; until then worker 0 owns all of them. Raises KernelError.

        Steering and bells see the old owner of a shard or the new one.
        """
        if len(owners) != SHARDS or not all(0 <= worker < self.workers for worker in owners):
            raise ValueError(f"{SHARDS} numbers below {self.workers} are wanted, not {list(owners)}")
        if self._owners is not None:
            with self._lock:
                self._owners.write(struct.pack(f"={SHARDS}I", *owners))

    def bell_fd(self, worker: int) -> int | None:
        """Return the program of the worker's doorbells: see `Bells.fd`."""
        return self._bells.fd(worker)

    def asleep(self, worker: int) -> memoryview | None:
        """Return the worker's word: see `Bells.asleep`."""
        return self._bells.asleep(worker)

    def host_counters(self) -> dict[str, int]:
        """Count, by reason, what the guard has left to the host though it was sent to a VIP. Raises KernelError."""
        return dict(zip(REASONS, struct.unpack(f"={len(REASONS)}Q", self._counters.read()), strict=True))

    def close(self) -> None:
        """Give up maps and programs; those that are attached stay, and keep the maps as they are now."""
        self._resources.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_steering(self, undo: ExitStack) -> syscall.Value:
        """Load what several workers need; returns the map of the shards' owners."""
        owners = syscall.Value("fastlb_owners", SHARDS * 4)
        undo.callback(owners.close)
        code = classification.steering_program(self._tables.maps, owners.fd)
        self.steer_fd = hold_program(undo, SOCKET_FILTER, code, STEER_NAME)
        self.nothing_fd = hold_program(undo, SOCKET_FILTER, classification.constant_program(NOTHING), NOTHING_NAME)
        return owners


__all__ = ["FILTER_NAME", "NOTHING_NAME", "STEER_NAME", "Classifier", "Sources"]
