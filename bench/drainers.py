"""What can empty a ring that was filled before: fastlb's own workers and the reflectors, in threads of this process.

All of them stand behind fastlb's filter and guard, several workers also behind its fanout group, so that what fills
the rings has the same work. Each worker has one ring on in0, and sends by out0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from socket import IPPROTO_UDP, SOL_SOCKET, if_nametoindex
from typing import Any

from extension import build
from reflector import open_side
from rig import PORT, VIP, Rig
from sockets import BLOCK_SIZE, PACKET_FANOUT, SO_DETACH_FILTER, SOL_PACKET, Mapped, open_ring, patiently

from fastlb._core import Pipeline, Ring, RingMemory, Routes, Worker
from fastlb.config import Config
from fastlb.kernel import guard
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.match import Key, Keys
from fastlb.model.names import SHARDS, owner_of_shard
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from fastlb.workers.fanout import Group
from fastlb.workers.selftest import open_blocks_fault
from fastlb.workers.workers import open_pipelines

FILL_MS = 200  # a block that is not full is handed over after this time
MTU = 1500


@dataclass(frozen=True)
class Drainer:
    """One worker that waits to be started over its ring. ``run`` returns after ``stop``."""

    run: Callable[[], None]
    stop: Callable[[], None]
    transmitted: Callable[[], int]


@dataclass(frozen=True)
class Entry:
    """The way into the rings. Until ``start`` several workers' rings get nothing."""

    classifier: Classifier
    group: Group | None

    @classmethod
    def open(cls, workers: int, stack: ExitStack) -> Entry:
        classifier = stack.enter_context(Classifier(workers))
        classifier.replace(Keys({Key(ip_address(VIP), PORT, IPPROTO_UDP)}))
        classifier.set_workers([owner_of_shard(shard, workers) for shard in range(SHARDS)])
        stack.callback(guard.detach, "in0")
        guard.attach("in0", classifier.guard_fd)
        group = stack.enter_context(Group("in0", classifier.nothing_fd)) if workers > 1 else None
        return cls(classifier, group)

    @property
    def filter_fd(self) -> int:
        """What a ring has until it has joined the group, if there is one."""
        return self.classifier.nothing_fd if self.group else self.classifier.filter_fd

    def start(self) -> None:
        if self.group:
            self.group.start(self.classifier.steer_fd)


def open_fastlb(rig: Rig, way_out: str, workers: int, blocks: int, stack: ExitStack) -> list[Drainer]:
    """fastlb's workers for one dsr service, with what `fastlb run` uses by default. Call it inside lb."""
    config = Config.from_dict(rig.config())
    entry = Entry.open(workers, stack)
    pipelines = open_pipelines(config, workers)
    opened = [open_worker(entry, pipeline, blocks, stack) for pipeline in pipelines]
    for queue, worker in enumerate(opened):
        publish(rig, config, pipelines[queue])
        pipelines[queue].process(rig.frames(), time.monotonic_ns() // 1_000_000 & 0xFFFFFFFF)  # opens the flows
        if way_out == "xdp":
            open_xsk(worker, queue)
    entry.start()
    return [Drainer(worker.run, worker.stop, counter_of(worker)) for worker in opened]


def open_worker(entry: Entry, pipeline: Pipeline, blocks: int, stack: ExitStack) -> Worker:
    """With a ring of its own, which has joined the group."""
    memory = RingMemory(1, BLOCK_SIZE, blocks)
    stack.callback(memory.close)
    ring = Ring("in0", entry.filter_fd, memory, FILL_MS, open_blocks=open_blocks_fault() is None)
    stack.callback(ring.close)
    if entry.group:
        ring.join(entry.group.join_argument)
    worker = Worker(pipeline, [ring])
    stack.callback(worker.close)
    return worker


def open_xsk(worker: Worker, queue: int) -> None:
    index = if_nametoindex("out0")
    patiently(lambda: worker.open_xsk(index, queue))


def counter_of(worker: Worker) -> Callable[[], int]:
    return lambda: worker.counters()["transmitted"]


def publish(rig: Rig, config: Config, pipeline: Pipeline) -> None:
    """The configuration, and the one neighbour that all frames go to."""
    plans = plan_services(config, BackendIds(), 0.0)
    hop = (rig.macs["s0"], rig.macs["out0"], if_nametoindex("out0"), MTU, None)
    backends = {member.id: 0 for plan in plans for member in plan.members}
    pipeline.publish(services_table(config, plans), Routes([hop], [], {}, backends))


def open_reflectors(rig: Rig, way_out: str, workers: int, blocks: int, stack: ExitStack) -> list[Drainer]:
    """The yardstick, one for each worker. Call it inside lb."""
    entry = Entry.open(workers, stack)
    rings = [open_bare_ring(entry, blocks, stack) for _ in range(workers)]
    sides: list[Any] = [
        open_side(ring, "out0", rig.macs["s0"], way_out, queue, stack) for queue, ring in enumerate(rings)
    ]
    entry.start()
    reflectors = [build("_reflect").Reflector([side]) for side in sides]
    return [Drainer(each.run, each.stop, each.transmitted) for each in reflectors]


def open_bare_ring(entry: Entry, blocks: int, stack: ExitStack) -> Mapped:
    ring = open_ring("in0", entry.filter_fd, blocks, FILL_MS)
    stack.callback(ring.close)
    if entry.group:
        ring.socket.setsockopt(SOL_PACKET, PACKET_FANOUT, entry.group.join_argument)
        ring.socket.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)
    return ring
