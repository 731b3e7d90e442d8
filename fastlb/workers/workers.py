"""The packet path while it is open: rings, doorbells, fanout groups, workers and their threads.

              interface eth0                 interface eth1
    worker 0  ring, doorbell, XSK queue 0    ring, doorbell, XSK queue 0      core 2, shards 0 .. 31
    worker 1  ring, doorbell, XSK queue 1    ring, doorbell, XSK queue 1      core 3, shards 32 .. 63
              '- one fanout group -'         '- one fanout group -'

One worker needs no group: its rings have the receive filter instead. All of it is opened together and closed together:
where one part has to be replaced (an interface that came back as another, a worker that died), the group must be built
anew as a whole (fanout.py). Pipelines, with the flow table and their counters, outlive that; the totals of rings and
transmission are handed on.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import structlog

from fastlb._core import AffinityMemory, FlowMemory, Pipeline, Ring, RingMemory, Worker
from fastlb.config import Config
from fastlb.errors import KernelError
from fastlb.kernel import cpus
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.counters import add_up
from fastlb.model.hostview import KernelView
from fastlb.model.names import SHARDS, owner_of_shard
from fastlb.workers.fanout import Group
from fastlb.workers.transmit import TransmitPaths

END_TIMEOUT = 5.0  # seconds that a worker may take to finish its block
BLOCK_TIMEOUT, OPEN_BLOCK_TIMEOUT = 1, 20  # ms
STUCK = 5.0  # seconds without a round of its loop, which takes 100 ms when there is nothing to do

_SO_ATTACH_BPF, _SOL_PACKET, _PACKET_IGNORE_OUTGOING, _ETH_P_ALL = 50, 263, 23, 3
_COUNTERS = (  # of a worker, which may have no ring yet
    "transmitted", "transmitted_bytes", "transmitted_xdp", "tunnels_offloaded", "blocks_read", "read_early", "sleeps",
    "ring_packets", "ring_drops", "ring_freezes",
)  # fmt: skip
_BELL_BUFFER = 1  # bytes that are asked for; the kernel makes it its minimum, a few frames' worth

log = structlog.get_logger()


def open_pipelines(config: Config, workers: int, memory: FlowMemory | None = None) -> list[Pipeline]:
    """Open one for each worker, over one flow table and one affinity table.

    ``memory``: that flow table, where it is not of this process alone.
    """
    memory = memory or FlowMemory(config.flows, sources=config.snat, ports=config.snat_ports)
    affinity = AffinityMemory(config.affinity_entries)
    owned: list[list[int]] = [[] for _ in range(workers)]
    for shard in range(SHARDS):
        owned[owner_of_shard(shard, workers)].append(shard)
    pipelines = [Pipeline(memory, shards=shards, affinity=affinity) for shards in owned]
    for pipeline in pipelines if config.flow_log else ():
        pipeline.log_flows()
    return pipelines


class Workers:
    """Opened at once; KernelError, with nothing left open, when a part cannot be had.

    ``links``: the interfaces to receive on, up where there are several workers, with their indices. ``pipelines``:
    one for each worker. ``open_blocks``: read them. ``give_up``: ends the process, told the numbers of workers that do
    not stop: their rings must not be unmapped under them. ``earlier``: the ``totals`` of those that these replace.
    """

    def __init__(
        self,
        config: Config,
        pipelines: Sequence[Pipeline],
        classifier: Classifier,
        plan: cpus.Plan,
        links: Iterable[str],
        open_blocks: bool,
        give_up: Callable[[Sequence[int]], NoReturn],
        earlier: Sequence[Mapping[str, int]] = (),
    ) -> None:
        self._config, self._classifier, self._plan = config, classifier, plan
        self._spin_us = round(config.ring.spin * 1e6)
        self._open_blocks = open_blocks
        self._give_up = give_up
        self._totals = [dict(each) for each in earlier] or [dict.fromkeys(_COUNTERS, 0) for _ in pipelines]
        self._members: list[_Member] = []
        self._groups: list[Group] = []
        with ExitStack() as stack:
            self._open(pipelines, list(links), stack)
            self._stack = stack.pop_all()

    def _open(self, pipelines: Sequence[Pipeline], interfaces: list[str], stack: ExitStack) -> None:
        count = len(pipelines) if interfaces else 0  # a worker without a ring has nothing to do
        memories = [self._memory(len(interfaces), stack) for _ in range(count)]
        bells: list[list[int]] = [[] for _ in range(count)]
        rings: list[list[Ring]] = [[] for _ in range(count)]
        self._classifier.set_workers([owner_of_shard(shard, len(pipelines)) for shard in range(SHARDS)])
        for interface in interfaces:
            for number in range(count if self._open_blocks else 0):
                bells[number] += self._bell(interface, number, stack)
            group = self._group(interface, stack) if count > 1 else None
            for number, memory in enumerate(memories):
                rings[number].append(self._ring(interface, memory, group, stack))
        for number, pipeline in enumerate(pipelines[:count]):
            asleep = self._classifier.asleep(number) if bells[number] else None
            worker = Worker(pipeline, rings[number], bells[number], asleep, self._spin_us)
            stack.callback(worker.close)
            paths = TransmitPaths(worker, self._config.transmit, number, count)
            self._members.append(_Member(number, worker, paths, self._plan.workers[number]))
        stack.callback(self._end)
        for group in self._groups:
            stack.callback(group.stop)

    def _memory(self, rings: int, stack: ExitStack) -> RingMemory:
        memory = RingMemory(rings, int(self._config.ring.block_size), self._config.ring.blocks)
        stack.callback(memory.close)
        return memory

    def _bell(self, interface: str, number: int, stack: ExitStack) -> list[int]:
        """Open a doorbell socket, and return its descriptor; none where the kernel has no doorbells."""
        program = self._classifier.bell_fd(number)
        if program is None:
            return []
        bell = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        try:
            bell.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, program)
            bell.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BELL_BUFFER)
            bell.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            bell.bind((interface, _ETH_P_ALL))
        except OSError as error:
            raise KernelError(f"cannot open a doorbell on {interface}: {error.strerror}") from error
        return [bell.fileno()]

    def _group(self, interface: str, stack: ExitStack) -> Group:
        group = stack.enter_context(Group(interface, self._classifier.nothing_fd))
        self._groups.append(group)
        return group

    def _block_timeout(self) -> int:
        """Return the milliseconds until the kernel hands over a block that is not full.

        A worker that reads open blocks, and is woken by a doorbell, does not wait for that. Each expiry is an
        interrupt, for every ring: 30 µs on some virtual machines, which is what a packet that came then waits.
        """
        timeout = self._config.ring.timeout
        if timeout != "auto":
            return round(timeout * 1000)
        return OPEN_BLOCK_TIMEOUT if self._open_blocks else BLOCK_TIMEOUT

    def _ring(self, interface: str, memory: RingMemory, group: Group | None, stack: ExitStack) -> Ring:
        ring = self._config.ring
        program = self._classifier.filter_fd if group is None else self._classifier.nothing_fd
        try:
            opened = Ring(interface, program, memory, self._block_timeout(), self._open_blocks)
            stack.callback(opened.close)
            if group is not None:
                opened.join(group.join_argument)
        except OSError as error:
            size = ring.block_size * ring.blocks >> 20
            short = error.errno in (errno.ENOMEM, errno.ENOBUFS)
            hint = f"; it takes {size} MiB, try fewer ring.blocks" if short else ""
            raise KernelError(f"cannot open a receive ring on {interface}: {error.strerror}{hint}") from error
        return opened

    # --- running -------------------------------------------------------------------------------------------

    def start(self, view: KernelView, links_out: set[int]) -> None:
        """Open the ways out, start the threads, let frames in. Raises KernelError; close this then."""
        for member in self._members:
            member.paths.open(view, links_out)
        for member in self._members:
            member.start()
        for group in self._groups:
            group.start(self._classifier.steer_fd)
        cpus.keep_off(self._plan, [member.thread_id for member in self._members])

    def poll(self, view: KernelView, links_out: set[int]) -> None:
        """Open ways out that are missing, and close those of links that have gone; several times a second."""
        for member in self._members:
            member.paths.poll(view, links_out)

    def offload_tunnels(self, links: Sequence[int]) -> None:
        """Leave it to the kernel, from now on, to segment GSO packets in tunnels that go by these interfaces."""
        for member in self._members:
            member.worker.offload_tunnels(links)

    def dead(self) -> list[int]:
        """Return the numbers of workers whose thread has ended though nobody stopped it."""
        return [member.number for member in self._members if member.has_ended()]

    def stuck(self) -> list[int]:
        """Return the numbers of workers that live, and have not gone round their loop for STUCK seconds."""
        now = time.monotonic()
        return [member.number for member in self._members if member.is_stuck(now)]

    def close(self) -> None:
        """End the threads and close everything; does nothing twice."""
        self._stack.close()

    def _end(self) -> None:
        """Stop the workers, and keep their totals; those that do not stop are for ``give_up``."""
        for member in self._members:
            member.worker.stop()
        deadline = time.monotonic() + END_TIMEOUT
        while left := [member for member in self._members if member.runs()]:
            now = time.monotonic()
            if now > deadline or all(member.is_stuck(now) for member in left):
                self._give_up([member.number for member in left])
            time.sleep(0.001)
        self._totals, self._members = self.totals(), []

    # --- what can be seen ----------------------------------------------------------------------------------

    def totals(self) -> list[dict[str, int]]:
        """Return what each worker counts of rings and transmission; after the end too."""
        totals = list(self._totals)
        for member in self._members:
            totals[member.number] = add_up((totals[member.number], member.worker.counters()))
        return totals

    def counters(self) -> dict[str, int]:
        """Return the sum of `totals`."""
        return add_up(self.totals())

    def transmit_paths(self, view: KernelView, links_out: set[int]) -> dict[str, str]:
        """Return the way out by interface: "xdp", "sendmmsg", or "xdp+sendmmsg" where the workers' ways differ."""
        found: dict[str, list[str]] = {}
        for member in self._members:
            for name, path in member.paths.describe(view, links_out).items():
                found.setdefault(name, []).append(path)
        return {name: "+".join(sorted(set(paths), reverse=True)) for name, paths in found.items()}

    def describe(self, pipelines: Sequence[Pipeline], view: KernelView, links_out: set[int]) -> list[dict[str, Any]]:
        """Describe each worker: its core, what it had to do, its ways out."""
        described = []
        totals = self.totals()
        for member in self._members:
            seen, moved = pipelines[member.number].counters(), totals[member.number]
            described.append({
                "core": member.core,
                "packets": seen["packets"],
                **{name: moved[name] for name in ("transmitted", "transmitted_xdp", "read_early", "sleeps")},
                "transmit": member.paths.describe(view, links_out),
            })
        return described


class _Member:
    """One worker with its thread."""

    def __init__(self, number: int, worker: Worker, paths: TransmitPaths, core: int) -> None:
        self.number, self.worker, self.paths, self.core = number, worker, paths, core
        self._thread = threading.Thread(target=self._run, name=f"worker-{number}", daemon=True)
        self._rounds = (0, time.monotonic())  # when they were last seen to grow

    def start(self) -> None:
        self._thread.start()

    @property
    def thread_id(self) -> int:
        return self._thread.native_id or 0

    def _run(self) -> None:
        cpus.name_thread(self._thread.name)
        cpus.pin_worker(self.core)
        self.worker.run()

    def runs(self) -> bool:
        """Return True if the thread runs; to Python, one that ended by itself, from within C, is alive for ever."""
        return self._thread.is_alive() and cpus.exists(self.thread_id)

    def has_ended(self) -> bool:
        return self._thread.ident is not None and not self.runs()

    def is_stuck(self, now: float) -> bool:
        if self._rounds[0] != self.worker.rounds:
            self._rounds = (self.worker.rounds, now)
        return self.runs() and now - self._rounds[1] > STUCK
