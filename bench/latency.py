"""How long does a packet stay in the balancer? At 50,000 packets a second, and after a pause.

The sender stamps each frame just before it sends it; the sink's kernel stamps its arrival by the same clock, into a
ring that is read when all is over. So the path needs two cores and no third: the sender's, which takes a frame as far
as the balancer's ring, and the forwarder's, which takes it on to the sink.

"wire" is the same path where the kernel hands every frame on by itself, in the sender's own context. What a
forwarder takes longer than that is what it adds. "machine" has no packets at all: a thread on the sender's core writes
the time, and one on the forwarder's looks for it, by spinning or, after a pause, from its sleep in poll(). Nothing
that hands packets from core to core can be quicker than that.
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import asdict
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

from extension import build
from forwarders import fastlb_on, reflector_on
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from rig import Rig, RigError, cores, on_core
from sockets import STAMP_SLOT, open_stamp_ring

PAIRS = 5
RATE = 50_000  # packets a second of a busy link
BUSY_PACKETS = 50_000
IDLE_PACKETS = 50  # each turn
IDLE_GAPS = (0.020, 0.050)  # seconds between them, at random
PATIENCE = 5.0  # seconds after the last is due
PERCENTILES = (50, 90, 99, 100)  # the last is the maximum


class Distribution(NamedTuple):
    """Of one turn: PERCENTILES in microseconds, and how many packets never arrived."""

    p50: float
    p90: float
    p99: float
    max: float
    lost: int

    @classmethod
    def of(cls, nanoseconds: Sequence[int], sent: int) -> Distribution:
        ordered = sorted(nanoseconds)
        p50, p90, p99, highest = (ordered[max(0, len(ordered) * share // 100 - 1)] / 1e3 for share in PERCENTILES)
        return cls(p50, p90, p99, highest, sent - len(ordered))


def evenly() -> array[int]:
    """When each packet of a busy link is due, in nanoseconds."""
    return array("q", (at * 1_000_000_000 // RATE for at in range(BUSY_PACKETS)))


def after_pauses() -> array[int]:
    """So that the forwarder sleeps by the time a packet comes."""
    gaps = (int(random.uniform(*IDLE_GAPS) * 1e9) for _ in range(IDLE_PACKETS))
    return array("q", accumulate(gaps))


MACHINE, WIRE, OURS, BARE = "machine", "wire", "fastlb", "reflector, AF_XDP over the ring"
FORWARDERS: Mapping[str, Callable[[Rig], AbstractContextManager[None]]] = {
    WIRE: Rig.wire,
    OURS: fastlb_on,
    BARE: lambda rig: reflector_on(rig, "xdp"),
}
BUSY, IDLE = f"{RATE:,} packets/s", "after a pause"
LOADS = {BUSY: evenly, IDLE: after_pauses}

Found = dict[tuple[str, str], list[Distribution]]
"""By load and forwarder, one for each turn."""


def run(pairs: int) -> None:
    """Measure, print and write."""
    found: Found = {(name, title): [] for name in LOADS for title in (MACHINE, *FORWARDERS)}
    with Rig() as rig:
        load = build("_load").Load(rig.sender(), rig.frames(checksum=False))
        for _ in range(max(PAIRS, pairs)):
            for name, times in LOADS.items():
                found[name, MACHINE].append(without_packets(times(), asleep=name == IDLE))
            for title, forwarder in FORWARDERS.items():
                with forwarder(rig), on_core(cores()[0]):
                    rig.warm_up(load)
                    for name, times in LOADS.items():
                        found[name, title].append(distribution(rig, load, times()))
    tell(found)


def distribution(rig: Rig, load: Any, times: array[int]) -> Distribution:
    """Send a packet at each of these times. Raises RigError when none arrives."""
    with rig.inside("sink"), closing(open_stamp_ring("s0", len(times))) as ring:
        load.send_stamped(times)
        rig.settled()
        found = build("_load").read_latencies(ring.address, len(times), STAMP_SLOT)
    if not found:
        raise RigError(f"none of {len(times)} packets arrived")
    return Distribution.of(found, len(times))


def without_packets(times: array[int], asleep: bool) -> Distribution:
    """From one core to the other through memory."""
    bell = os.eventfd(0) if asleep else -1
    handover = build("_load").Handover(len(times), bell)
    sender, forwarder = cores()

    def watch() -> array[int]:
        with on_core(forwarder):
            found: array[int] = handover.watch(times[-1] / 1e9 + PATIENCE)
            return found

    with ThreadPoolExecutor(1) as pool, on_core(sender):
        watching = pool.submit(watch)
        handover.post(times)
        found = watching.result()
    if asleep:
        os.close(bell)
    return Distribution.of(found, len(times))


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Found) -> None:
    """The tables, the targets, JSON and the picture."""
    title = f"latency of 64-byte frames from sender to sink, µs, medians of {len(found[BUSY, OURS])} interleaved turns"
    rows = []
    for (name, forwarder), turns in found.items():
        *columns, lost = zip(*turns, strict=True)
        rows.append((f"{name}: {forwarder}", *(f"{median(column):.1f}" for column in columns), f"{sum(lost)}"))
    print_table((title, *Distribution._fields), rows)
    goals = [
        Goal(f"{BUSY}: p50", added(found, BUSY, "p50"), 5, at_most=True),
        Goal(f"{BUSY}: p99", added(found, BUSY, "p99"), 50, at_most=True),
        Goal(f"{IDLE}: p50", added(found, IDLE, "p50"), 100, at_most=True),
    ]
    print_table(("what fastlb adds to the wire's p50, µs, by turn", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    values = {f"{name}: {forwarder}": [each._asdict() for each in turns] for (name, forwarder), turns in found.items()}
    bars = [
        Bar(f"{forwarder}, {name}", Spread.of(each.p50 for each in turns), list(LOADS).index(name))
        for (name, forwarder), turns in found.items()
    ]
    write("lab-latency", title, {"values": values, "goals": [asdict(goal) for goal in goals]}, bars, "µs, p50")


def added(found: Found, load: str, percentile: str) -> Spread:
    """What this percentile through fastlb is above the wire's median, turn by turn."""
    pairs = zip(found[load, OURS], found[load, WIRE], strict=True)
    return Spread.of(getattr(through, percentile) - wire.p50 for through, wire in pairs)
