"""How long does it take to build the tables of the hash schedulers, from the backends' keys to what the workers read?

Cases take turns. Every build has keys of its own, so that nothing is shared with an earlier one; a rebuild has the keys
of the build before it, one of them with another weight. "populate" has its hashes already. "plan" is all that a change
costs the thread that looks after things: every table of a service, and the structures around them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from report import GOAL_COLUMNS, Bar, Goal, Spread, announce, print_table, progress, shown, write
from xxhash import xxh64_intdigest

from fastlb._core import MaglevTable
from fastlb.config import Config
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.ketama import build_ring
from fastlb.plan.maglev import build_table
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table

ROUNDS, QUICK_ROUNDS = 25, 7
SIZE = 65537
POINTS = 256
POOLS = (10, 100, 1000, 10_000)
TARGETS = {100: 2.0, 1000: 4.0}  # ms, of a Maglev table
WEIGHTS: dict[str, Callable[[int], int]] = {
    "equal weights": lambda number: 1,
    "unequal weights": lambda number: 1 + number * 7919 % 100,
}
FIRST, REBUILD, POPULATE, RING, RING_AGAIN, PLAN = (
    "Maglev", "Maglev, one changed", "Maglev, populate alone", "ketama", "ketama, one changed", "plan, one changed",
)  # fmt: skip
MAGLEV = (FIRST, REBUILD, POPULATE)
COLUMNS = (*MAGLEV, RING, RING_AGAIN, PLAN)


@dataclass
class Pool:
    """The backends of one turn; each method takes the milliseconds of what its name says."""

    keys: list[str]
    weights: list[int]

    @classmethod
    def make(cls, backends: int, number: int, weight: Callable[[int], int]) -> Pool:
        keys = sorted(f"10.{number}.{host >> 8}.{host & 255}:443" for host in range(backends))
        return cls(keys, [weight(host) for host in range(backends)])

    def changed(self) -> list[int]:
        """The weights after the last one's has changed."""
        return [*self.weights[:-1], self.weights[-1] + 1]

    def measure(self) -> dict[str, float]:
        """Milliseconds of everything that this pool can tell, by title."""
        turns = [(xxh64_intdigest(key, 0), xxh64_intdigest(key, 1), weight) for key, weight in self.items()]
        return {
            FIRST: timed(build_table, self.keys, self.weights, SIZE, 0),
            REBUILD: timed(build_table, self.keys, self.changed(), SIZE, 0),
            POPULATE: timed(MaglevTable, turns, SIZE),
            RING: timed(build_ring, self.keys, self.weights, POINTS, 0),
            RING_AGAIN: timed(build_ring, self.keys, self.changed(), POINTS, 0),
            PLAN: self.plan(),
        }

    def items(self) -> list[tuple[bytes, int]]:
        return [(key.encode(), weight) for key, weight in zip(self.keys, self.weights, strict=True)]

    def plan(self) -> float:
        """As `fastlb weight` and each step of a slow start cause it, with one Maglev service."""
        backends = [
            {"address": key.partition(":")[0], "weight": weight}
            for key, weight in zip(self.keys, self.weights, strict=True)
        ]
        service = {"name": "web", "vip": "203.0.113.10", "port": 443, "protocol": "tcp", "forward": "dsr"}
        config = Config.from_dict({"services": [service | {"backends": backends}]})
        standings, ids = BackendStates(), BackendIds()
        standings.apply_config(config, 0.0)
        before = build(config, ids, standings)
        standings.set_weight(("web", self.keys[-1]), self.weights[-1] + 1, 0.0)
        took = timed(build, config, ids, standings)
        del before  # until here it was in use, as by the workers
        return took


def build(config: Config, ids: BackendIds, standings: BackendStates) -> object:
    """What the engine makes of a configuration and how its backends stand."""
    plans = plan_services(config, ids.copy(), 0.0, standings)
    return plans, services_table(config, plans)


def timed(function: Callable[..., object], *arguments: Any) -> float:
    """Milliseconds of one call, of this thread's own time: who else uses the core does not count."""
    start = time.thread_time()
    kept = function(*arguments)
    took = time.thread_time() - start
    del kept
    return took * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds that Maglev tables and ketama rings take to build.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    rounds = QUICK_ROUNDS if quick else ROUNDS
    announce("tables.py, how long tables take to build", "half a minute" if quick else "two minutes")
    found: dict[tuple[int, str, str], list[float]] = {}
    for number in progress(range(rounds), "round"):
        for backends in POOLS:
            for at, (title, weight) in enumerate(WEIGHTS.items(), number * len(WEIGHTS)):
                for what, took in Pool.make(backends, at, weight).measure().items():
                    found.setdefault((backends, title, what), []).append(took)
    tell({case: Spread.of(values) for case, values in found.items()}, rounds)


def tell(found: dict[tuple[int, str, str], Spread], rounds: int) -> None:
    """The tables, the targets, JSON and the picture."""
    title = f"ms to build tables (Maglev: M = {SIZE:,}; ketama: {POINTS} points a backend), {rounds} rounds"
    print_table((title, *COLUMNS), rows(found))
    goals = [
        Goal(f"{what}, {backends:,} backends, {weights}", spread, TARGETS[backends], at_most=True, unit=" ms")
        for (backends, weights, what), spread in found.items()
        if backends in TARGETS and what in (FIRST, REBUILD)
    ]
    print()
    print_table(("from the keys to the table", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    bars = [
        Bar(f"{what}, {backends:,}, {weights.partition(' ')[0]}", spread, int(weights != "equal weights"),
            TARGETS.get(backends) if what in (FIRST, REBUILD) else None)
        for (backends, weights, what), spread in found.items()
        if backends <= 1000 and what in MAGLEV
    ]  # fmt: skip
    values = [
        {"backends": backends, "weights": weights, "what": what, **asdict(spread)}
        for (backends, weights, what), spread in found.items()
    ]
    write("tables", title, {"values": values, "goals": [asdict(goal) for goal in goals]}, bars, "ms")


def rows(found: dict[tuple[int, str, str], Spread]) -> list[Sequence[str]]:
    return [
        (f"{backends:,} backends, {weights}", *(shown(found[backends, weights, what])[0] for what in COLUMNS))
        for backends in POOLS
        for weights in WEIGHTS
    ]


if __name__ == "__main__":
    main()
