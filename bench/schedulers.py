"""What does each scheduler make of servers that are not equally fast? Shares and response times of real clients.

Three backends serve one request after the other; each takes another time for it, so that lines form. Clients come at
random, at a rate that all backends together carry with ease, and of which the slowest cannot carry a third. One
`fastlb run` all the time, by `nat`; the scheduler changes by reload, and all of them take turns in each round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import crowd
import forwarders
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from topology import BACKENDS, VIPS, Lab, own_prefix

from fastlb.control.client import call

ROUNDS = 1
SECONDS = 4.0  # of clients, each turn
RATE = 450  # a second
VIP, PORT = VIPS["nat", 4], 80
TIMES = dict(zip(BACKENDS, (10.0, 5.0, 2.0), strict=True))  # ms a request: 100 + 200 + 500 requests a second
EVEN = dict.fromkeys(BACKENDS, 1)
BY_CAPACITY = dict(zip(BACKENDS, (1, 2, 5), strict=True))


class Variant(NamedTuple):
    """A scheduler that takes its turns. ``weighted``: by the servers' capacity; else all weigh the same."""

    scheduler: str
    weighted: bool = False

    @property
    def weights(self) -> Mapping[str, int]:
        return BY_CAPACITY if self.weighted else EVEN

    @property
    def title(self) -> str:
        return f"{self.scheduler}, weights {' '.join(map(str, self.weights.values()))}"


RR, LC, P2C, WLC = Variant("rr"), Variant("lc"), Variant("p2c"), Variant("wlc", weighted=True)
VARIANTS = (
    *(RR, Variant("random"), Variant("maglev"), Variant("ketama"), Variant("source-hash"), LC, Variant("lrt"), P2C),
    *(Variant("wrr", weighted=True), Variant("maglev", weighted=True), WLC, Variant("p2c", weighted=True)),
)


@dataclass(frozen=True)
class Turn:
    """Of one turn: the share of each backend in per cent, and response times in ms."""

    shares: tuple[float, ...]
    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, answers: Sequence[tuple[str, float]]) -> Turn:
        counts = Counter(backend for backend, _ in answers)
        times = sorted(milliseconds for _, milliseconds in answers)
        shares = tuple(100 * counts[node] / len(answers) for node in BACKENDS)
        return cls(shares, fmean(times), times[len(times) // 2], times[len(times) * 99 // 100])


Found = dict[Variant, list[Turn]]


def run(rounds: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench")) as lab:
        crowd.add_clients(lab)
        for node, milliseconds in TIMES.items():
            crowd.start_server(lab, node, milliseconds)
        with forwarders.fastlb(lab, configure(lab, RR), lab.socket_path):
            found = measure(lab, max(ROUNDS, rounds))
    tell(found)


def configure(lab: Lab, variant: Variant) -> Path:
    return lab.write_config(services=[crowd.service("web", VIP, PORT, variant.weights, scheduler=variant.scheduler)])


def measure(lab: Lab, rounds: int) -> Found:
    """Each turn ends when its last client has its answer, so that the next one finds no lines."""
    found: Found = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            configure(lab, variant)
            call(str(lab.socket_path), "reload")
            found[variant].append(Turn.of(crowd.come(lab, VIP, RATE, SECONDS, PORT)))
    return found


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Found) -> None:
    """The table, the targets, JSON and the picture."""
    count = len(found[RR])
    title = f"{RATE} clients a second over servers of {' '.join(f'{ms:g}' for ms in TIMES.values())} ms, {count} rounds"
    columns = (title, *(f"% to {ms:g} ms" for ms in TIMES.values()), "mean ms", "p50 ms", "p99 ms")
    print_table(columns, [row(variant, turns) for variant, turns in found.items()])
    goals = [
        Goal(f"{variant.title}, p99 over that of rr", ratio(found, variant), 1.0, at_most=True)
        for variant in (P2C, WLC, LC)
    ]
    print()
    print_table(("by round", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    bars = [
        Bar(variant.title, Spread.of(turn.p99 for turn in turns), int(variant.weighted))
        for variant, turns in found.items()
    ]
    values = {variant.title: [asdict(turn) for turn in turns] for variant, turns in found.items()}
    write("lab-schedulers", title, {"values": values, "goals": [asdict(goal) for goal in goals]}, bars, "ms, p99")


def row(variant: Variant, turns: Sequence[Turn]) -> tuple[str, ...]:
    shares = (f"{median(column):.1f}" for column in zip(*(turn.shares for turn in turns), strict=True))
    times = (median(getattr(turn, name) for turn in turns) for name in ("mean", "p50", "p99"))
    return (variant.title, *shares, *(f"{milliseconds:.1f}" for milliseconds in times))


def ratio(found: Found, variant: Variant) -> Spread:
    return Spread.of(ours.p99 / rr.p99 for ours, rr in zip(found[variant], found[RR], strict=True))
