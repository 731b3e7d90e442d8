"""What does a change cost where there are thousands of backends? SERVICES services of ten each, without checks.

First one backend after the other gets weight 0 while SYNs come for its service: how much processor time the event loop
spends on it (above what it spends on nothing), and when the last new flow comes to the backend.

Then the file is reloaded with another tenth of the backends: once all of a tenth of the services, once one in each, so
that all tables are built again. Both by themselves; the first also by turns with nothing while 50,000 packets a second
of one more service pass. The event loop is on the generator's core where there are two,
so that both are slower than alone; stamps tell what packets wait in the balancer.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from statistics import median
from typing import Any

from checks import flowing, watching
from extension import build
from gateway import Asker, Balancer, address_of, balancer, gateway, services, until, write_config
from latency import BUSY, RATE, Distribution
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from rig import Rig, RigError, cores, on_core
from sockets import STAMP_SLOT, open_stamp_ring

SERVICES, EACH = 1000, 10
CHANGES = 10  # backends that get weight 0
TURNS = 5
START = 60.0  # seconds until it must answer
SECONDS = 4  # of load, in which a reload must end
SETTLE = 0.5  # seconds of load before a reload begins
LOOP_BOUND, FLOW_BOUND, RELOAD_BOUND, LATENCY_BOUND = 0.010, 0.200, 1.5, 2.0
QUIET, RELOADING = "before", "while reloading"


def run(pairs: int) -> None:
    """Measure, print and write."""
    os.sched_setaffinity(0, set(cores()))
    load = build("_load")
    with gateway() as rig, balancer(rig, configured(0)) as lb:
        with Asker(lb.socket_path).asking() as asker:
            if until(lambda: asker.first, START) is None:
                raise RigError(f"no answer within {START:g} s")
        changes = [change(rig, load, lb, number) for number in range(CHANGES)]
        alone = [reload(rig, lb, turn) for turn in range(1, max(TURNS, pairs) + 1)]
        spread = [reload(rig, lb, turn, spread=True) for turn in range(1, max(TURNS, pairs) + 1)]
        generator = load.Load(rig.sender(), rig.frames(checksum=False))
        found: dict[str, list[Distribution]] = {QUIET: [], RELOADING: []}
        loaded = []
        with on_core(cores()[0]):
            rig.warm_up(generator)
            for turn in range(max(TURNS, pairs)):
                found[QUIET].append(passing(rig, load, generator))
                with ThreadPoolExecutor(1) as thread:
                    reloading = thread.submit(later, rig, lb, turn)
                    found[RELOADING].append(passing(rig, load, generator))
                    loaded.append(reloading.result())
    tell(changes, alone, spread, loaded, found)


def configured(turn: int, *, spread: bool = False) -> list[dict[str, Any]]:
    """SERVICES services, a tenth of whose backends are other ones from turn to turn, and the one that the load is for.

    ``spread``: one backend of each service, and not all of a tenth of the services. No turn has a backend of the one
    before it, so that no table of that is still there.
    """
    count = SERVICES * EACH
    many = services(count, SERVICES, {})
    backends = [each for service in many for each in service["backends"]]
    for at, backend in enumerate(backends[::EACH] if spread else backends[:SERVICES]):
        backend["address"] = address_of(count + turn % 3 * SERVICES + at)
    plain: dict[str, Any] = {"name": "discard", "vip": "203.0.113.20", "port": 9, "protocol": "udp", "forward": "dsr"}
    return [plain | {"backends": [{"address": "10.3.0.11"}]}, *many]


# --- one backend changes ---------------------------------------------------------------------------------------------


def change(rig: Rig, load: Any, lb: Balancer, number: int) -> tuple[float, float, float]:
    """Seconds of the loop, until the answer, and until the last new flow, when a backend gets weight 0."""
    service = lb.services[1 + number * SERVICES // CHANGES]
    victim = service["backends"][number % EACH]["address"]
    names = {"service": service["name"], "backend": victim}
    with watching(rig, [victim]) as last, flowing(rig, load, [service["port"]]):
        time.sleep(1.0)
        quiet = loop_seconds(lb)
        time.sleep(1.0)
        quiet, began, asked = loop_seconds(lb) - quiet, loop_seconds(lb), time.monotonic()
        lb.ask("weight", **names, weight=0)
        answered = time.monotonic()
        time.sleep(max(0.0, asked + 1.0 - answered))
        spent = loop_seconds(lb) - began - quiet
    if victim not in last:
        raise RigError(f"no flow came to {victim}")
    lb.ask("enable", **names)
    return spent, answered - asked, max(0.0, last[victim] - asked)


def loop_seconds(lb: Balancer) -> float:
    """Processor time of the event loop's thread."""
    with open(f"/proc/{lb.process.pid}/task/{lb.process.pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


# --- a reload --------------------------------------------------------------------------------------------------------


def reload(rig: Rig, lb: Balancer, turn: int, *, spread: bool = False) -> float:
    """Seconds from the request to the answer."""
    write_config(rig, configured(turn, spread=spread))
    asked = time.monotonic()
    lb.ask("reload")
    return time.monotonic() - asked


def later(rig: Rig, lb: Balancer, turn: int) -> float:
    """The same, when the load has begun."""
    write_config(rig, configured(turn))
    time.sleep(SETTLE)
    asked = time.monotonic()
    lb.ask("reload")
    return time.monotonic() - asked


def passing(rig: Rig, load: Any, generator: Any) -> Distribution:
    """What RATE packets a second wait, for SECONDS."""
    times = array("q", (at * 1_000_000_000 // RATE for at in range(RATE * SECONDS)))
    with rig.inside("sink"), closing(open_stamp_ring("s0", len(times))) as ring:
        generator.send_stamped(times)
        rig.settled()
        found = load.read_latencies(ring.address, len(times), STAMP_SLOT)
    if not found:
        raise RigError(f"none of {len(times)} packets arrived")
    return Distribution.of(found, len(times))


# --- what is told ----------------------------------------------------------------------------------------------------


def tell(
    changes: Sequence[tuple[float, float, float]], alone: Sequence[float], spread: Sequence[float],
    loaded: Sequence[float], found: dict[str, list[Distribution]],
) -> None:  # fmt: skip
    """The tables, the targets, JSON and the picture."""
    title = f"{BUSY}, {SERVICES:,} services, {SERVICES * EACH:,} backends: latency in µs, medians of {len(alone)} turns"
    rows = []
    for name, turns in found.items():
        *columns, lost = zip(*turns, strict=True)
        rows.append((name, *(f"{median(column):.1f}" for column in columns), f"{sum(lost)}"))
    print_table((title, *Distribution._fields), rows)
    loop, answers, flows = zip(*changes, strict=True)
    ratio = [one.p99 / other.p99 for one, other in zip(found[RELOADING], found[QUIET], strict=True)]
    goals = [
        Goal("one backend changes: the loop's time", Spread.of(loop), LOOP_BOUND, at_most=True, unit=" s"),
        Goal("one backend changes: the last new flow", Spread.of(flows), FLOW_BOUND, at_most=True, unit=" s"),
        Goal("reload: answer, without load", Spread.of(alone), RELOAD_BOUND, at_most=True, unit=" s"),
        Goal("reload: answer, one of each service", Spread.of(spread), RELOAD_BOUND, at_most=True, unit=" s"),
        Goal("reload: answer, under load", Spread.of(loaded), RELOAD_BOUND, at_most=True, unit=" s"),
        Goal("reload: p99 beside before", Spread.of(ratio), LATENCY_BOUND, at_most=True, unit=" times"),
        Goal("reload: packets lost", Spread.of(each.lost for each in found[RELOADING]), 0, at_most=True),
    ]
    print_table(GOAL_COLUMNS, [(name, shown, *rest) for name, shown, *rest in (goal.row() for goal in goals)])
    values = {"loop": loop, "answer": answers, "flow": flows, "alone": alone, "spread": spread,
              "loaded": loaded,
              "latency": {name: [each._asdict() for each in turns] for name, turns in found.items()},
              "goals": [asdict(goal) for goal in goals]}  # fmt: skip
    bars = [Bar(f"p99, {name}", Spread.of(each.p99 for each in turns)) for name, turns in found.items()]
    write("lab-reload", title, values, bars, "µs")
