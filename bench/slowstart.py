"""How does a backend come to its share in slow start? New flows by second, beside the formula's curve.

A server stops, its health check says so, and it starts again: services that differ in scheduler and aggression see it
come back at the same moment, and clients connect to all of them all the time. Through one `fastlb run`, by `nat`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import crowd
import forwarders
from report import Curve, print_table, write_curves
from topology import BACKENDS, VIPS, Lab, LabError, own_prefix

from fastlb.config import SlowStart
from fastlb.control.client import call
from fastlb.plan.backends import ramp

WINDOW = 10.0  # seconds
AGGRESSIONS = (1.0, 2.0)
SCHEDULERS = ("wrr", "maglev", "p2c")
COLOUR = {"wrr": 0, "maglev": 2, "p2c": 3}
RATE = 80  # new flows a second, of each service
BEFORE, AFTER = 1.0, 3.0  # seconds that are looked at beside the window
STEP = 1.0  # seconds that one point stands for
RECOVERS = BACKENDS[2]
VIP, FIRST_PORT = VIPS["nat", 4], 8000
CHECK = {"type": "tcp", "interval": "100ms", "timeout": "1s", "rise": 2, "fall": 2}
PATIENCE = 20.0  # seconds for a change of state
GRID = 100  # points of the formula's curve

Service = tuple[str, float]
"""Scheduler and aggression."""

PORTS: Mapping[Service, int] = {
    (scheduler, aggression): FIRST_PORT + number
    for number, (scheduler, aggression) in enumerate(
        (scheduler, aggression) for aggression in AGGRESSIONS for scheduler in SCHEDULERS
    )
}


@dataclass(frozen=True)
class Sample:
    """What a service's backends have had in new flows by a moment, in seconds from the recovery."""

    at: float
    by_backend: tuple[int, ...]  # the one that recovers comes last

    def share_since(self, before: Sample) -> float:
        gained = [now - then for now, then in zip(self.by_backend, before.by_backend, strict=True)]
        return gained[-1] / max(1, sum(gained))


def run(_: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench")) as lab:
        crowd.add_clients(lab)
        servers = {node: crowd.start_server(lab, node, 0) for node in BACKENDS}
        config = lab.write_config(services=[configure(*each) for each in PORTS])
        with forwarders.fastlb(lab, config, lab.socket_path):
            found = measure(lab, servers[RECOVERS])
    tell(found)


def configure(scheduler: str, aggression: float) -> dict[str, Any]:
    slow = {"window": WINDOW, "aggression": aggression}
    weights = dict.fromkeys(BACKENDS, 1)
    name = name_of((scheduler, aggression))
    return crowd.service(
        name, VIP, PORTS[scheduler, aggression], weights, scheduler=scheduler, check=CHECK, slow_start=slow)


def name_of(service: Service) -> str:
    return f"{service[0]}-{service[1]:g}"


def measure(lab: Lab, server: subprocess.Popen[Any]) -> dict[Service, list[Sample]]:
    """Stop the server, start it, and count while clients come."""
    wait_for(lab, "up")
    server.terminate()
    server.wait()
    wait_for(lab, "down")
    seconds = BEFORE + WINDOW + AFTER + PATIENCE  # they are ended when all has been seen
    command = crowd.clients(VIP, RATE, seconds, list(PORTS.values()))
    coming = lab.run("client", command, stdout=subprocess.DEVNULL)
    try:
        time.sleep(BEFORE + STEP)
        crowd.start_server(lab, RECOVERS, 0)
        wait_for(lab, "up")
        return watch(lab, time.monotonic())
    finally:
        coming.terminate()
        coming.wait()


def wait_for(lab: Lab, state: str) -> None:
    """Until every service has the backend that recovers in this state."""
    deadline = time.monotonic() + PATIENCE
    while {row["state"] for row in recovering(lab)} != {state}:
        if time.monotonic() > deadline:
            raise LabError(f"{RECOVERS} is not {state} after {PATIENCE:g} s")
        time.sleep(0.02)


def status(lab: Lab) -> list[dict[str, Any]]:
    """Of the services, as their ports ascend."""
    services: list[dict[str, Any]] = call(str(lab.socket_path), "status")["services"]
    return sorted(services, key=lambda each: int(each["port"]))


def recovering(lab: Lab) -> list[dict[str, Any]]:
    return [each["backends"][-1] for each in status(lab)]  # keys ascend, as the nodes do


def watch(lab: Lab, start: float) -> dict[Service, list[Sample]]:
    """A sample each STEP, from the recovery on."""
    samples: dict[Service, list[Sample]] = {service: [] for service in PORTS}
    for number in range(round((WINDOW + AFTER) / STEP) + 1):
        time.sleep(max(0.0, start + number * STEP - time.monotonic()))
        at = time.monotonic() - start
        for service, row in zip(PORTS, status(lab), strict=True):
            samples[service].append(Sample(at, tuple(each["new_flows"] for each in row["backends"])))
    return samples


# --- what is told ---------------------------------------------------------------------------------------------------


def promised(aggression: float, at: float) -> float:
    """The share of one of three backends of one weight, of which it alone is in slow start."""
    part = ramp(SlowStart(window=WINDOW, aggression=aggression), at)
    return part / (len(BACKENDS) - 1 + part)


def tell(found: Mapping[Service, Sequence[Sample]]) -> None:
    """The table, JSON and the picture."""
    shares = {
        service: [((one.at + other.at) / 2, other.share_since(one)) for one, other in pairwise(each)]
        for service, each in found.items()
    }
    title = f"a backend of three in slow start ({WINDOW:g} s): % of the new flows"
    times = [at for at, _ in next(iter(shares.values()))]
    formulas = [(f"formula, aggression {each:g}", [promised(each, at) for at in times]) for each in AGGRESSIONS]
    measured = [(f"{name}, aggression {each:g}", [share for _, share in points])
                for (name, each), points in shares.items()]  # fmt: skip
    rows = [(name, *(f"{100 * share:.0f}" for share in values)) for name, values in (*formulas, *measured)]
    print_table((title, *(f"{at:.1f} s" for at in times)), rows)
    curves = [
        Curve(f"{name}, aggression {each:g}", [(at, 100 * share) for at, share in points], COLOUR[name],
              AGGRESSIONS.index(each))
        for (name, each), points in shares.items()
    ]  # fmt: skip
    end = WINDOW + AFTER
    lines = [
        Curve(f"formula, aggression {each:g}",
              [(end * n / GRID, 100 * promised(each, end * n / GRID)) for n in range(GRID + 1)], None, panel)
        for panel, each in enumerate(AGGRESSIONS)
    ]  # fmt: skip
    values = {name_of(service): points for service, points in shares.items()}
    write_curves("lab-slowstart", title, {"shares": values}, [*lines, *curves], ("s after it came up", "%"))
