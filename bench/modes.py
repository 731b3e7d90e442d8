"""What does each way to forward cost a real transfer? A big upload, in super-frames, through every mode in turn.

One lab, one fastlb with a service for each mode. Tunnels end in `fastlb decap` at the backends. All modes take a turn
in each round, so that the machine's moods hit all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import forwarders
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, shown, write
from topology import ALL_VIPS, BACKENDS, Lab, LabError, address, own_prefix

ROUNDS = 5
BACKEND = BACKENDS[0]
FILE = 200_000_000  # bytes
MODES = tuple(forward for forward, version in ALL_VIPS if version == 4)
TUNNELS = ("ipip", "gre", "gue")
LEAST = 0.5  # of what nat carries, in a tunnel


def run(rounds: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench"), every_mode=True) as lab:
        services = [each for each in lab.config()["services"] if each["name"] in {f"web-{mode}-4" for mode in MODES}]
        for each in services:
            each["backends"] = [one for one in each["backends"] if one["address"] == address(BACKEND, "eth0", 4)]
        with forwarders.fastlb(lab, lab.write_config(services=services), lab.socket_path):
            found = measure(lab, max(ROUNDS, rounds))
    tell(found)


def measure(lab: Lab, rounds: int) -> dict[str, list[float]]:
    """Gbit/s by mode, one value a round; raises LabError when a byte arrives changed."""
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            answer = lab.client("upload", ALL_VIPS[mode, 4], "--bytes", FILE)
            if not answer["verified"]:
                raise LabError(f"the file came through {mode} with other bytes: {answer}")
            found[mode].append(answer["bytes"] * 8 / answer["seconds"] / 1e9)
    return found


def tell(found: Mapping[str, Sequence[float]]) -> None:
    """The table, the ratios to nat, JSON and the picture."""
    spreads = {mode: Spread.of(values) for mode, values in found.items()}
    ratios = {
        mode: Spread.of(one / nat for one, nat in zip(values, found["nat"], strict=True))
        for mode, values in found.items()
    }
    title = f"a 200 MB upload through each mode, Gbit/s, {len(found['nat'])} rounds"
    print_table((title, "median", "p10 .. p90"), [(mode, *shown(spread)) for mode, spread in spreads.items()])
    goals = [Goal(f"{mode} over nat", ratios[mode], LEAST) for mode in TUNNELS]
    others = [(f"{mode} over nat", *shown(ratios[mode]), "", "") for mode in MODES if mode not in ("nat", *TUNNELS)]
    print_table(("by round", *GOAL_COLUMNS[1:]), [*(goal.row() for goal in goals), *others])
    bars = [Bar(mode, spread, int(mode in TUNNELS)) for mode, spread in spreads.items()]
    told = {"ratios": {mode: asdict(ratio) for mode, ratio in ratios.items()}, "values": found}
    write("lab-modes", title, {**told, "goals": [asdict(goal) for goal in goals]}, bars, "Gbit/s")
