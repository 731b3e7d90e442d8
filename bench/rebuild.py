"""Do packets wait while tables are built? 50,000 packets a second, while nothing changes and while weights do.

One `dsr` service with Maglev over BACKENDS backends, all of them the sink. In every other turn `fastlb weight` changes
one of them every 50 ms, so that the whole table is built anew. That is the work of the thread that looks after things,
on the generator's core where there are only two: what it takes from the generator makes packets come in bursts, and
is not the balancer's latency.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import yaml
from extension import build
from forwarders import fastlb
from latency import BUSY, Distribution, distribution, evenly
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from rig import PORT, VIP, Rig, RigError, cores, on_core, rtnl
from topology import add_address, index_of

from fastlb.control.client import call

PAIRS = 7
BACKENDS = 1000
INTERVAL = 0.05  # seconds from one change to the next
NETWORK = "10.4.0.1/16"  # of the backends, on the wire to the sink
QUIET, CHANGING = "nothing changes", f"a weight changes every {INTERVAL * 1000:.0f} ms"
ALLOWED = 50  # µs that p99 may rise


def address_of(number: int) -> str:
    return f"10.4.{1 + (number >> 8)}.{number & 255}"


@dataclass
class Changer:
    """Sends `weight` commands from another thread, on the generator's core; ``done`` counts the answers."""

    rig: Rig
    core: int
    done: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        end = threading.Event()
        failures: list[Exception] = []

        def change() -> None:
            try:
                with on_core(self.core):
                    while not end.wait(INTERVAL):
                        self.change()
            except Exception as error:  # told by the main thread
                failures.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
        if failures:
            raise failures[0]

    def change(self) -> None:
        """One backend weighs one or two, in turn, so that each table differs from the one before."""
        backend = address_of(self.done % BACKENDS)
        weight = 2 if self.done // BACKENDS % 2 == 0 else 1
        call(str(self.rig.socket_path), "weight", service="discard", backend=backend, weight=weight)
        self.done += 1


def run(pairs: int) -> None:
    """Measure, print and write."""
    found: dict[str, list[Distribution]] = {QUIET: [], CHANGING: []}
    built: list[int] = []
    core, _ = cores()
    with Rig() as rig:
        load = build("_load").Load(rig.sender(), rig.frames(checksum=False))
        add_backends(rig)
        config = rig.run_dir / "fastlb.yaml"
        config.write_text(yaml.safe_dump(configuration(rig)))
        with fastlb(rig, config, rig.socket_path), on_core(core):
            rig.warm_up(load)
            for _ in range(max(PAIRS, pairs)):
                found[QUIET].append(distribution(rig, load, evenly()))
                changer = Changer(rig, core)
                with changer.running():
                    found[CHANGING].append(distribution(rig, load, evenly()))
                built.append(changer.done)
    if not all(built):
        raise RigError("no weight was changed")
    tell(found, built)


def add_backends(rig: Rig) -> None:
    """All of them have the sink's MAC address."""
    with rtnl("lb") as ipr:
        add_address(ipr, "out0", NETWORK)
        index, mac = index_of(ipr, "out0"), rig.macs["s0"].hex(":")
        for number in range(BACKENDS):
            ipr.neigh("add", dst=address_of(number), lladdr=mac, ifindex=index, state="permanent")


def configuration(rig: Rig) -> dict[str, Any]:
    service = {"name": "discard", "vip": VIP, "port": PORT, "protocol": "udp", "forward": "dsr"}
    backends = [{"address": address_of(number)} for number in range(BACKENDS)]
    return rig.config(services=[service | {"backends": backends}])


def tell(found: dict[str, list[Distribution]], built: list[int]) -> None:
    """The table, the target, JSON and the picture."""
    title = f"{BUSY}, {BACKENDS:,} backends: latency in µs, medians of {len(built)} interleaved turns"
    rows = []
    for name, turns in found.items():
        *columns, lost = zip(*turns, strict=True)
        rows.append((name, *(f"{median(column):.1f}" for column in columns), f"{sum(lost)}"))
    print_table((title, *Distribution._fields), rows)
    print(f"tables built in a turn: {min(built)} to {max(built)}")
    pairs = list(zip(found[CHANGING], found[QUIET], strict=True))
    goals = [Goal("p99", Spread.of(one.p99 - other.p99 for one, other in pairs), ALLOWED, at_most=True)]
    print_table(("what building tables adds, µs, by turn", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    values = {name: [each._asdict() for each in turns] for name, turns in found.items()}
    bars = [
        Bar(f"{percentile}, {name}", Spread.of(getattr(each, percentile) for each in turns), int(name == CHANGING))
        for percentile in ("p50", "p99")
        for name, turns in found.items()
    ]
    told = {"values": values, "built": built, "goals": [asdict(goal) for goal in goals]}
    write("lab-rebuild", title, told, bars, "µs")
