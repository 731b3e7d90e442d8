"""Whether what a configuration needs of memory is there: on the host, and within the limits of this process's cgroups.

The kernel hands out memory until none is left, and then kills a process: refuse what there is not. Rings belong to the
kernel, and no cgroup is charged for them; all else is charged.
"""

from __future__ import annotations

from collections.abc import Collection

from fastlb.config import Config
from fastlb.config.schema import Service
from fastlb.errors import KernelError
from fastlb.kernel.cgroup import memory_limits
from fastlb.model.modes import SCHEDULERS
from fastlb.plan.ketama import MAX_POINTS
from fastlb.plan.plan import SHARED_SETTINGS
from fastlb.workers import flow_places

FLOW_BYTES = 86  # of the flow table, hot and cold, for each of config.flows
SLOT_BYTES = 8  # of the affinity table, for each of config.affinity_entries
OWN_MIB = 40  # maps, buffers and the like from the start until it runs: 33 MiB were measured
SERVICE_BYTES, BACKEND_BYTES = 4096, 1536  # of a plan, beside its tables
MAGLEV_BYTES, RING_BYTES = 2, 16  # of a slot, and of a point

HOST = "{need}, and {free} MiB are free; try {less}"
CGROUP = (
    "{need}, {own}and the memory limit of {limit} MiB in {file} leaves {free} MiB; try {less}, or raise the limit "
    "(MemoryMax= of the unit, --memory of the container)"
)


def check_memory(config: Config, workers: int) -> None:
    """Raise KernelError unless rings and the tables of flows and of affinity fit."""
    rings = config.ring.block_size * config.ring.blocks * len(config.interfaces) * workers >> 20
    slots = config.affinity_entries * SLOT_BYTES
    table = max(0, config.flows * FLOW_BYTES - flow_places.held_bytes(config)) + slots >> 20
    free = free_on_host()
    if rings > free:
        raise KernelError(HOST.format(need=f"the receive rings take {rings} MiB", free=free, less="fewer ring.blocks"))
    full = f"a full flow table takes {table} MiB"
    if rings + table > free:
        raise KernelError(HOST.format(need=full, free=free, less="fewer flows"))
    _check_limits(table, OWN_MIB, full, "fewer flows")


def check_plans(config: Config, before: Config | None = None) -> None:
    """Raise KernelError unless the tables fit by which backends are chosen, in addition to those of ``before``."""
    shared = before is not None and all(getattr(before, key) == getattr(config, key) for key in SHARED_SETTINGS)
    earlier = {service.name: service for service in before.services} if before is not None and shared else {}
    fresh = [service for service in config.services if earlier.get(service.name) != service]
    size = plan_bytes(config, fresh, earlier.values()) >> 20 if fresh else 0
    need, free = f"the tables of {len(fresh)} services take {size} MiB", free_on_host()
    less = "fewer services, or a smaller maglev_size"
    if size > free:
        raise KernelError(HOST.format(need=need, free=free, less=less))
    _check_limits(size, 0, need, less)


def plan_bytes(config: Config, services: Collection[Service], earlier: Collection[Service] = ()) -> int:
    """Return about how much memory the plans of services take, with their tables.

    Services of the same backends share tables, also with those that are there ``earlier``.
    """
    plans = sum(SERVICE_BYTES + len(service.backends) * BACKEND_BYTES for service in services)
    tables = set(map(_backends, services)) - set(map(_backends, earlier))
    rings = set(map(_backends, filter(_has_ring, services))) - set(map(_backends, filter(_has_ring, earlier)))
    points = sum(min(config.ring_points * len(backends), MAX_POINTS) for backends in rings)
    return plans + len(tables) * config.maglev_size * MAGLEV_BYTES + points * RING_BYTES


def _backends(service: Service) -> frozenset[object]:
    """Return what a service's tables follow from, besides what all services share."""
    port = service.single_port
    return frozenset((backend.address, backend.port or port, backend.weight) for backend in service.backends)


def _has_ring(service: Service) -> bool:
    return SCHEDULERS[service.scheduler].table == "ring"


def free_on_host() -> int:
    """Return how many MiB the host can still give."""
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:")) >> 10


def _check_limits(size: int, own: int, need: str, less: str) -> None:
    """Raise KernelError where a cgroup's limit leaves no room for so many MiB, and ``own`` for all else."""
    for each in memory_limits():
        if size + own > each.free >> 20:
            rest = f"all else about {own} MiB, " if own else ""
            raise KernelError(CGROUP.format(
                need=need, own=rest, limit=each.limit >> 20, file=each.file, free=each.free >> 20, less=less
            ))  # fmt: skip
