"""Which processor core each worker has to itself.

A worker shares its core with no other thread of fastlb: one Python call there would hold up every packet for as long as
it takes. Where there are no cores left for the other threads, they run at the lowest priority.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from fastlb.model.names import MAX_WORKERS

LOWEST_PRIORITY = 19
OWN_PRIORITY = os.getpriority(os.PRIO_PROCESS, 0)  # that the process was started with: by nice(1), or systemd's Nice=


@dataclass(frozen=True)
class Plan:
    """Cores by number. ``others``: those of every thread but the workers'; ``crowded``: they meet workers there."""

    workers: tuple[int, ...]
    others: frozenset[int]
    crowded: bool


def count_workers(wanted: int | Literal["auto"], cores: int) -> int:
    """Return the configuration's ``workers`` as a number; ``cores``: how many there are."""
    return min(max(1, cores - 1), MAX_WORKERS) if wanted == "auto" else wanted


def plan(cores: Collection[int], workers: int) -> Plan:
    """Give the highest cores to the workers, the rest to the others; with more workers than cores they share."""
    ordered = sorted(cores)
    kept = tuple(ordered[-1 - worker % len(ordered)] for worker in range(workers))
    others = frozenset(ordered) - set(kept)
    return Plan(tuple(reversed(kept)), others or frozenset(ordered), crowded=not others)


def name_thread(name: str) -> None:
    """Name the calling thread, as ps and top show it: at most 15 bytes."""
    with open("/proc/thread-self/comm", "w") as comm:
        comm.write(name)


def pin_worker(core: int) -> None:
    """Run the calling thread on this core from now on, at the priority that the process was started with."""
    os.sched_setaffinity(0, {core})
    with suppress(PermissionError):  # back from the lowest one, where fastlb has no CAP_SYS_NICE
        os.setpriority(os.PRIO_PROCESS, 0, OWN_PRIORITY)


def keep_off(cores: Plan, workers: Collection[int]) -> None:
    """Move every thread of this process but ``workers`` (thread ids) off the workers' cores.

    What these threads start inherits it.
    """
    for thread in all_threads():
        if thread in workers:
            continue
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(thread, cores.others)
            if cores.crowded:
                os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)


def exists(thread: int) -> bool:
    """Return True if this process still has the thread, by its id (threading.get_native_id())."""
    return os.path.exists(f"/proc/self/task/{thread}")


def all_threads() -> Iterable[int]:
    """Return the ids of this process's threads."""
    return map(int, os.listdir("/proc/self/task"))
