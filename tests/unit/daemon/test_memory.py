"""memory.py: what does not fit is refused before it is taken, on the host and within each limit of a cgroup."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from fastlb.config import Config
from fastlb.daemon import memory
from fastlb.errors import KernelError
from fastlb.kernel.cgroup import MemoryLimit
from tests.balancers import config, service
from tests.unit.daemon.worlds import INTERFACES

PLENTY = 1 << 20  # MiB
RING = {"block_size": "1MiB", "blocks": 64}
FILE = "/sys/fs/cgroup/web/memory.max"
ADVICE = r", or raise the limit \(MemoryMax= of the unit, --memory of the container\)$"

Told = Callable[..., None]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Say how many MiB are free on the host, and within limits of how many MiB; 10 are used of each."""

    def tell(free: int = PLENTY, *limits: int) -> None:
        text = f"MemTotal: 1 kB\nMemAvailable: {free << 10} kB\n"
        monkeypatch.setattr(memory, "open", lambda path: io.StringIO({"/proc/meminfo": text}[path]), raising=False)
        found = [MemoryLimit(FILE, each << 20, 10 << 20) for each in limits]
        monkeypatch.setattr(memory, "memory_limits", lambda: found)

    return tell


TABLE = 86 + 1  # MiB of 1 << 20 flows and 1 << 17 clients


@pytest.mark.parametrize(("free", "limits", "problem"), [
    (1000, [], None),
    (255, [], r"^the receive rings take 256 MiB, and 255 MiB are free; try fewer ring\.blocks$"),
    (300, [], r"^a full flow table takes 87 MiB, and 300 MiB are free; try fewer flows$"),
    (PLENTY, [TABLE + memory.OWN_MIB + 10], None),  # a cgroup is not charged for rings
    (PLENTY, [TABLE + memory.OWN_MIB + 9],
     rf"^a full flow table takes 87 MiB, all else about {memory.OWN_MIB} MiB, and the memory limit of 136 MiB in "
     rf"{FILE} leaves 126 MiB; try fewer flows{ADVICE}"),
    (PLENTY, [PLENTY, 100], "the memory limit of 100 MiB"),
    (PLENTY, [100, PLENTY], "the memory limit of 100 MiB"),
    (PLENTY, [5], "leaves 0 MiB"),
])  # fmt: skip
def test_flows_and_rings(there: Told, free: int, limits: list[int], problem: str | None) -> None:
    """Two workers with rings on two interfaces, and a table of 1 million flows."""
    there(free, *limits)
    conf = config(
        interfaces=INTERFACES, ring=RING, flows=1 << 20, affinity_entries=1 << 17, flow_file="none"
    )
    if problem is None:
        memory.check_memory(conf, 2)
        return
    with pytest.raises(KernelError, match=problem):
        memory.check_memory(conf, 2)


def many(count: int, weight: int = 1, **settings: Any) -> Config:
    """Return a configuration of so many services, each of which takes 2 MiB and a little."""
    services = [
        service("nat", name=f"web{n}", port=n + 1,
                backends=[{"address": "10.3.1.1", "port": 8080 + n, "weight": weight}])
        for n in range(count)
    ]  # fmt: skip
    return config(*services, **{"maglev_size": 1048573} | settings)


PLANS = r"^the tables of {services} services take \d+ MiB, and {room}.*; try fewer services, or a smaller maglev_size"


@pytest.mark.parametrize(("free", "limits", "room"), [
    (25, [], None), (15, [], "15 MiB are free"),
    (PLENTY, [40], None), (PLENTY, [25], rf"the memory limit of 25 MiB in {FILE} leaves 15 MiB"),
])  # fmt: skip
def test_plans(there: Told, free: int, limits: list[int], room: str | None) -> None:
    there(free, *limits)
    if room is None:
        memory.check_plans(many(10))
        return
    with pytest.raises(KernelError, match=PLANS.format(services=10, room=room)):
        memory.check_plans(many(10))


def test_plans_of_a_reload(there: Told) -> None:
    """Those that stay take nothing; all are new when what they share is another."""
    there(PLENTY, 25)
    memory.check_plans(many(10), many(10))
    memory.check_plans(many(14), many(10))
    for after, services in ((many(20), 10), (many(10, weight=2), 10), (many(10, hash_seed=7), 10)):
        with pytest.raises(KernelError, match=PLANS.format(services=services, room="the memory limit of 25 MiB in ")):
            memory.check_plans(after, many(10))


def test_what_plans_take() -> None:
    """By services, backends and the points of a ring; services of the same backends share a table."""
    three = many(3).services
    base = memory.plan_bytes(many(3), three[:1])
    assert 2 * 1048573 < base < 2.1 * 1048573
    assert memory.plan_bytes(many(3), three) == 3 * base
    for same, earlier in (([three[0]] * 2, []), (three[:1], three[:1])):
        more = memory.plan_bytes(many(3), same, earlier) - (base if not earlier else 0)
        assert 0 < more < 0.1 * 1048573
    ring = config(service("nat", name="web", scheduler="ketama"), ring_points=1000)
    plain = config(service("nat", name="web"), ring_points=1000)
    more = memory.plan_bytes(ring, ring.services) - memory.plan_bytes(plain, plain.services)
    assert more == len(ring.services[0].backends) * 1000 * memory.RING_BYTES
