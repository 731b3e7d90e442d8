"""How much real traffic does fastlb carry? NAT through fastlb, next to a reflector that only forwards.

One lab, one client, one backend. The two forwarders take turns on the balancer's host; each turn moves a big file and a
flood of small packets through it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import forwarders
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, shown, write
from topology import VIPS, Lab, LabError, address, own_prefix

HERE = Path(__file__).resolve().parent

PAIRS = 5
FETCHES = 3  # files a turn
BACKEND = "b1"
FILE = 200_000_000  # bytes
FLOOD = 2.0  # seconds
FLOWS = 1024
FILE_PORT, FLOOD_PORT = 8080, 9
QUANTITIES = {"gbit": "200 MB by HTTP, Gbit/s", "mpps": "64-byte UDP, Mpackets/s"}

Found = dict[str, dict[str, list[float]]]
"""By forwarder and quantity, one value for each turn."""


def run(pairs: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench")) as lab:
        with lab.rtnl("router") as rtnl:
            rtnl.route("add", dst=f"{address(BACKEND, 'eth0', 4)}/32", gateway=address("lb", "eth0", 4))
        found = measure(lab, max(PAIRS, pairs))
    tell(found)


# --- the two forwarders ---------------------------------------------------------------------------------------------


@contextmanager
def fastlb(lab: Lab) -> Iterator[str]:
    """fastlb in the balancer; the address that the client asks for the file."""
    services = [item for item in lab.config()["services"] if item["name"] in ("web-nat-4", "discard-dsr-4")]
    for item in services:
        item["backends"] = [b for b in item["backends"] if b["address"] == address(BACKEND, "eth0", 4)]
    with forwarders.fastlb(lab, lab.write_config(services=services), lab.socket_path):
        yield f"{VIPS['nat', 4]}:80"


@contextmanager
def reflector(lab: Lab) -> Iterator[str]:
    """The reflector in the balancer; the client asks the backend itself, and the router sends that by the balancer.

    GSO packets leave by sendmmsg alone.
    """
    backend = address(BACKEND, "eth0", 4)
    take = [f"{backend}:{FILE_PORT}/tcp", f"{VIPS['dsr', 4]}:{FLOOD_PORT}/udp"]
    reflect = [f"eth0:eth1:{lab.mac(BACKEND, 'eth0')}", f"eth1:eth0:{lab.mac('router', 'l0')}"]
    with forwarders.reflector(lab, "sendmmsg", reflect, take):
        yield f"{backend}:{FILE_PORT}"


# --- the traffic ----------------------------------------------------------------------------------------------------


def measure(lab: Lab, pairs: int) -> Found:
    """Let the forwarders take turns."""
    found: Found = {}
    for pair in range(pairs):
        for forwarder in (fastlb, reflector):
            values = found.setdefault(forwarder.__name__, {"gbit": [], "mpps": [], "offered": []})
            with forwarder(lab) as host:
                if pair == 0:
                    verify(lab, host)
                values["gbit"].append(median(gigabits(lab, host) for _ in range(FETCHES)))
                offered, arrived = million_packets(lab)
                values["offered"].append(offered)
                values["mpps"].append(arrived)
    return found


def verify(lab: Lab, host: str) -> None:
    """One file with its checksum, before anything is timed; raises LabError."""
    name, _, port = host.partition(":")
    answer = lab.client("download", name, "--port", port, "--bytes", FILE)
    if not answer["verified"]:
        raise LabError(f"the file came through {host} with other bytes: {answer}")


def gigabits(lab: Lab, host: str) -> float:
    """Gbit/s of one big file, from the client's namespace."""
    return FILE * 8 / float(lab.check("client", [sys.executable, HERE / "fetch.py", host, str(FILE)])) / 1e9


def million_packets(lab: Lab) -> tuple[float, float]:
    """Small UDP packets, in millions per second: (offered by the sender, arrived at the backend)."""
    before = lab.counters(BACKEND)["eth0"].rx_packets
    sent = lab.generate(VIPS["dsr", 4], "--seconds", str(FLOOD), "--flows", FLOWS, node="router")
    time.sleep(0.3)  # what is still in the ring
    arrived = lab.counters(BACKEND)["eth0"].rx_packets - before
    return sent["frames"] / sent["seconds"] / 1e6, arrived / sent["seconds"] / 1e6


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The table, the ratios, JSON and the picture."""
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, Spread] = {}
    bars: list[Bar] = []
    for colour, (key, title) in enumerate(QUANTITIES.items()):
        ours, bare = found["fastlb"][key], found["reflector"][key]
        ratios[key] = Spread.of(one / other for one, other in zip(ours, bare, strict=True))
        spreads = {"fastlb": Spread.of(ours), "reflector": Spread.of(bare)}
        rows += [(f"{title}: {name}", *shown(spread)) for name, spread in spreads.items()]
        bars.append(Bar(f"fastlb, {title}", spreads["fastlb"], 2 * colour))
        bars.append(Bar(f"reflector, {title}", spreads["reflector"], 1))
    title = f"transfers through fastlb and a bare sendmmsg reflector, {len(found['fastlb']['gbit'])} interleaved turns"
    goal = Goal(QUANTITIES["gbit"], ratios["gbit"], 0.8)
    print_table((title, "median", "p10 .. p90"), rows)
    print_table(
        ("fastlb over the reflector, by turn", *GOAL_COLUMNS[1:]),
        [goal.row(), (QUANTITIES["mpps"], *shown(ratios["mpps"]), "", "")],
    )
    data = {"ratios": {key: asdict(ratio) for key, ratio in ratios.items()}, "goals": [asdict(goal)], "values": found}
    write("lab-transfer", title, data, bars, "Gbit/s, or million packets/s")
