"""What does forwarding a packet cost one core? By draining a ring that was filled before.

A generator fills a big ring while nobody reads it. Then the forwarder starts, on a core to itself, and empties it: the
time until the last frame has left, by the number of frames. The generator is done by then, so that neither waits for
the other. All that a packet costs from the ring to the sink is in it.

With two workers each has a ring of its own behind one fanout group, and both drain at once, on both cores.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple

from drainers import Drainer, open_fastlb, open_reflectors
from extension import build
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, shown, write
from rig import FLOWS, Rig, RigError, cores, on_core

PAIRS = 9
BLOCKS = 512  # a worker: 128 MiB
FRAMES_PER_BLOCK = 950  # a few less than a block holds, because flows do not share out evenly among workers
POLL = 0.001  # seconds between looks at what drains
TIMEOUT = 20.0  # seconds that a drain may take


class Variant(NamedTuple):
    """A forwarder that takes its turns."""

    opener: Callable[[Rig, str, int, int, ExitStack], list[Drainer]]
    way_out: str
    workers: int = 1


VARIANTS = {
    "fastlb, AF_XDP": Variant(open_fastlb, "xdp"),
    "fastlb, sendmmsg": Variant(open_fastlb, "sendmmsg"),
    "reflector, AF_XDP over the ring": Variant(open_reflectors, "xdp"),
    "reflector, sendmmsg": Variant(open_reflectors, "sendmmsg"),
    "reflector, TX ring": Variant(open_reflectors, "tx_ring"),
    "fastlb, AF_XDP, two workers": Variant(open_fastlb, "xdp", 2),
    "reflector, AF_XDP, two workers": Variant(open_reflectors, "xdp", 2),
}
OURS, YARDSTICK, MESSAGES, OURS_TWICE, YARDSTICK_TWICE = (list(VARIANTS)[at] for at in (0, 2, 3, 5, 6))


def run(pairs: int) -> None:
    """Measure, print and write."""
    with Rig() as rig:
        load = build("_load").Load(rig.sender(), rig.frames())
        found: dict[str, list[float]] = {title: [] for title in VARIANTS}
        for _ in range(max(PAIRS, pairs)):
            for title, variant in VARIANTS.items():
                found[title].append(nanoseconds(rig, load, variant))
    tell(found)


def nanoseconds(rig: Rig, load: Any, variant: Variant) -> float:
    """Of one drain, for each packet. Raises RigError when not every frame has arrived."""
    generating, forwarding = cores()
    frames = BLOCKS * FRAMES_PER_BLOCK * variant.workers
    with ExitStack() as stack, on_core(generating):
        with rig.inside("lb"):
            drainers = variant.opener(rig, variant.way_out, variant.workers, BLOCKS, stack)
        load.flood(frames)
        before = rig.arrived()
        seconds = drain(drainers, (forwarding, generating), frames)
        arrived = rig.arrived() - before
    if arrived != frames:
        raise RigError(f"{variant.way_out}: {arrived} of {frames} frames arrived")
    return seconds / frames * 1e9


def drain(drainers: Sequence[Drainer], on: Sequence[int], frames: int) -> float:
    """Start them, each on its core; the seconds until they have sent so many frames together."""
    begin = threading.Barrier(len(drainers) + 1)

    def work(drainer: Drainer, core: int) -> None:
        os.sched_setaffinity(0, {core})
        begin.wait()
        drainer.run()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(drainers, on, strict=False)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.monotonic()
    try:
        while sum(drainer.transmitted() for drainer in drainers) < frames:
            if time.monotonic() - start > TIMEOUT:
                raise RigError(f"{frames} frames are not sent after {TIMEOUT:g} s")
            time.sleep(POLL)
        return time.monotonic() - start
    finally:
        for drainer in drainers:
            drainer.stop()
        for thread in threads:
            thread.join()


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Sequence[float]]) -> None:
    """The table, the targets, JSON and the picture."""
    spreads = {title: Spread.of(values) for title, values in found.items()}
    goals = [
        Goal("fastlb over the AF_XDP reflector", ratio(found, YARDSTICK, OURS), 0.85),
        Goal("fastlb over the sendmmsg reflector", ratio(found, MESSAGES, OURS), 1.2),
        Goal("fastlb, two workers over one", ratio(found, OURS, OURS_TWICE), 1.6),
    ]
    title = f"drain of 64-byte frames of {FLOWS:,} flows, ns per packet, {len(found[OURS])} interleaved turns"
    rows = [(name, *shown(each, 0), f"{1e3 / each.median:.2f}") for name, each in spreads.items()]
    print_table((title, "median", "p10 .. p90", "Mpackets/s"), rows)
    print_table(("speed ratio, by turn", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    both = ratio(found, YARDSTICK, YARDSTICK_TWICE)
    print(f"what two cores bring the AF_XDP reflector here: {both.median:.2f} ({both.p10:.2f} .. {both.p90:.2f})")
    data = {"ns": found, "goals": [asdict(goal) for goal in goals], "reflector_two_over_one": asdict(both)}
    bars = [Bar(name, each, 0 if name.startswith("fastlb") else 1) for name, each in spreads.items()]
    write("lab-drain", title, data, bars, "ns per packet")


def ratio(found: Mapping[str, Sequence[float]], slower: str, faster: str) -> Spread:
    """How many times as fast the second is, turn by turn."""
    return Spread.of(one / other for one, other in zip(found[slower], found[faster], strict=True))
