"""What does each way to forward cost a real transfer? A big upload, in GSO packets, through every mode in turn.

One lab, one fastlb with a service for each mode and IP version. Tunnels end in `fastlb decap` at the backends. All take
a turn in each round, so that the machine's moods hit all of them.
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
MODES = tuple(dict.fromkeys(forward for forward, _ in ALL_VIPS))
VERSIONS = (4, 6)
TUNNELS = ("ipip", "gre", "gue")
LEAST = 0.5  # of what nat carries, in a tunnel


def run(rounds: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench"), every_mode=True) as lab:
        services = [each for each in lab.config()["services"] if each["name"].startswith("web-")]
        own = {address(BACKEND, "eth0", version) for version in VERSIONS}
        for each in services:
            each["backends"] = [one for one in each["backends"] if one["address"] in own]
        with forwarders.fastlb(lab, lab.write_config(services=services), lab.socket_path):
            found = measure(lab, max(ROUNDS, rounds))
    tell(found)


Way = tuple[str, int]
"""Mode and IP version, of client and backend."""


def measure(lab: Lab, rounds: int) -> dict[Way, list[float]]:
    """Gbit/s by way, one value a round; raises LabError when a byte arrives changed."""
    found: dict[Way, list[float]] = {(mode, version): [] for version in VERSIONS for mode in MODES}
    for _ in range(rounds):
        for way, values in found.items():
            answer = lab.client("upload", ALL_VIPS[way], "--bytes", FILE)
            if not answer["verified"]:
                raise LabError(f"the file came through {named(way)} with other bytes: {answer}")
            values.append(answer["bytes"] * 8 / answer["seconds"] / 1e9)
    return found


def named(way: Way) -> str:
    """As it is printed."""
    mode, version = way
    return f"{mode}, IPv{version}"


def tell(found: Mapping[Way, Sequence[float]]) -> None:
    """The table, the ratios to nat, JSON and the picture."""
    spreads = {way: Spread.of(values) for way, values in found.items()}
    ratios = {
        (mode, version): Spread.of(one / nat for one, nat in zip(values, found["nat", version], strict=True))
        for (mode, version), values in found.items()
    }
    title = f"a 200 MB upload through each mode, Gbit/s, {len(found['nat', 4])} rounds"
    print_table((title, "median", "p10 .. p90"), [(named(way), *shown(spread)) for way, spread in spreads.items()])
    goals = [Goal(f"{named(way)}, over nat", ratio, LEAST) for way, ratio in ratios.items() if way[0] in TUNNELS]
    others = [
        (f"{named(way)}, over nat", *shown(ratio), "", "")
        for way, ratio in ratios.items() if way[0] not in ("nat", *TUNNELS)
    ]  # fmt: skip
    print_table(("by round", *GOAL_COLUMNS[1:]), [*(goal.row() for goal in goals), *others])
    bars = [Bar(named(way), spread, int(way[0] in TUNNELS)) for way, spread in spreads.items()]
    told = {
        "ratios": {named(way): asdict(ratio) for way, ratio in ratios.items()},
        "values": {named(way): values for way, values in found.items()},
    }
    write("lab-modes", title, {**told, "goals": [asdict(goal) for goal in goals]}, bars, "Gbit/s")
