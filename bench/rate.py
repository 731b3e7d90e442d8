"""How many packets a second pass without a single one lost? One core generates, one core forwards.

The rate is what a generator can keep up for a second while every frame arrives at the sink. It is searched by bisection
below the generator's own limit; the forwarders take turns. Their rings are small, so that a rate that is a little too
high shows within that second instead of filling the ring.

To put a frame into the balancer's ring is the generator's work, and costs about as much as forwarding it. So a
forwarder may keep up with all that one core can generate; then that is said, and `drain` tells what lies beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from extension import build
from forwarders import fastlb_on, reflector_on
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, shown, write
from rig import Rig, cores, on_core

PAIRS = 3
SECONDS = 1.0  # of one try
TRIES = 2  # at a rate: a virtual machine loses a few milliseconds now and then
STEPS = 5  # of the bisection
LOWEST = 0.4  # of the generator's limit: where the search begins
BLOCKS = 32  # of a ring: about 32,000 frames, a few hundredths of what is sent in a second
PROBE = 100_000  # frames, from which the generator's limit is guessed

FORWARDERS: Mapping[str, Callable[[Rig], AbstractContextManager[None]]] = {
    "fastlb": lambda rig: fastlb_on(rig, BLOCKS),
    "reflector, AF_XDP over the ring": lambda rig: reflector_on(rig, "xdp", BLOCKS),
}
OURS, YARDSTICK = FORWARDERS


@dataclass(frozen=True)
class Found:
    """The highest rate without loss, in packets a second. ``limited``: by the generator, not by the forwarder."""

    rate: float
    limited: bool


def run(pairs: int) -> None:
    """Measure, print and write."""
    found: dict[str, list[Found]] = {title: [] for title in FORWARDERS}
    with Rig() as rig:
        load = build("_load").Load(rig.sender(), rig.frames())
        for _ in range(max(PAIRS, pairs)):
            for title, forwarder in FORWARDERS.items():
                with forwarder(rig), on_core(cores()[0]):
                    found[title].append(search(rig, load))
    tell(found)


def search(rig: Rig, load: Any) -> Found:
    """Full speed first; and where that loses frames, what does not, to a fiftieth of the generator's limit."""
    rig.warm_up(load)
    limit, _ = attempt(rig, load, PROBE, 0)
    for _ in range(TRIES):
        limit, passed = attempt(rig, load, round(limit * SECONDS), 0)
        if passed:
            return Found(limit, True)
    low, high = LOWEST * limit, limit
    best = 0.0
    for _ in range(STEPS):
        wanted = (low + high) / 2
        outcomes = (attempt(rig, load, round(wanted * SECONDS), wanted) for _ in range(TRIES))
        kept_up = next((rate for rate, passed in outcomes if passed), 0.0)
        best = max(best, kept_up)
        low, high = (wanted, high) if kept_up else (low, wanted)
    return Found(best, False)


def attempt(rig: Rig, load: Any, frames: int, rate: float) -> tuple[float, bool]:
    """Send so many frames at a rate, 0 for full speed; the rate that it became, and whether all of them arrived."""
    before = rig.arrived()
    seconds = load.flood(frames, rate)
    return frames / seconds, rig.settled() - before == frames


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Sequence[Found]]) -> None:
    """The table, the target, JSON and the picture."""
    spreads = {title: Spread.of(each.rate / 1e6 for each in turns) for title, turns in found.items()}
    limited = {title: sum(each.limited for each in turns) for title, turns in found.items()}
    count = len(found[OURS])
    title = f"loss-free rate of 64-byte frames, million packets/s, {count} interleaved turns"
    rows = [(name, *shown(each), f"{limited[name]} of {count}") for name, each in spreads.items()]
    print_table((title, "median", "p10 .. p90", "at the generator's limit"), rows)
    goal = Goal("fastlb over the AF_XDP reflector", ratio(found), 0.85)
    print_table(("rate ratio, by turn", *GOAL_COLUMNS[1:]), [goal.row()])
    if limited[OURS] and limited[YARDSTICK]:
        print("one core cannot generate more than both of them forward: their rates are at least those given")
    print("two workers leave no core for a generator here: see drain for what they bring")
    values = {name: [asdict(each) for each in turns] for name, turns in found.items()}
    bars = [Bar(name, each, 0 if name == OURS else 1) for name, each in spreads.items()]
    write("lab-rate", title, {"values": values, "goals": [asdict(goal)]}, bars, "million packets/s")


def ratio(found: Mapping[str, Sequence[Found]]) -> Spread:
    """fastlb's rate over the AF_XDP reflector's, turn by turn."""
    return Spread.of(
        ours.rate / bare.rate if bare.rate else 0.0
        for ours, bare in zip(found[OURS], found[YARDSTICK], strict=True)
    )
