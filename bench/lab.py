"""How fast does fastlb carry real traffic? NAT through fastlb, next to a reflector that only forwards.

One lab, one client, one backend. The two forwarders take turns on the balancer's host; each turn moves a big file and a
flood of small packets through it. See README.md beside this file for how to read the numbers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "netns-lab"))

from extension import build
from namespaces import become_root
from report import Bar, Spread, print_table, write
from topology import VIPS, Lab, LabError, address

HERE = Path(__file__).resolve().parent

BACKEND = "b1"
FILE = 200_000_000  # bytes
CHUNK = 1 << 20
PAIRS = 5
FLOOD = 2.0  # seconds
FLOWS = 1024
START_TIMEOUT = 20.0  # seconds
STOP_TIMEOUT = 10.0
TARGET = 0.8  # of the reflector's rate, for the file
FILE_PORT, FLOOD_PORT = 8080, 9


# --- the two forwarders ---------------------------------------------------------------------------------------------


@contextmanager
def fastlb(lab: Lab) -> Iterator[str]:
    """fastlb in the balancer; the address that the client asks for the file."""
    services = [item for item in lab.config()["services"] if item["name"] in ("web-nat-4", "discard-dsr-4")]
    for item in services:
        item["backends"] = [b for b in item["backends"] if b["address"] == address(BACKEND, "eth0", 4)]
    command = command_line("run", "-c", lab.write_config(services=services))
    with running(lab, command, lab.run_dir / "fastlb.log") as process:
        wait_until(process, lambda: status(lab) is not None)
        yield f"{VIPS['nat', 4]}:80"


def command_line(*words: str | Path) -> list[str | Path]:
    """This environment's fastlb command."""
    return [sys.executable, "-m", "fastlb", *words]


@contextmanager
def reflector(lab: Lab) -> Iterator[str]:
    """The reflector in the balancer; the client asks the backend itself, and the router sends that by the balancer."""
    backend = address(BACKEND, "eth0", 4)
    taken = [f"{backend}:{FILE_PORT}/tcp", f"{VIPS['dsr', 4]}:{FLOOD_PORT}/udp"]
    hops = ["eth0", lab.mac("router", "l0"), "eth1", lab.mac(BACKEND, "eth0")]
    log = lab.run_dir / "reflector.log"
    with running(lab, [sys.executable, HERE / "reflector.py", *hops, *taken], log) as process:
        wait_until(process, lambda: "ready" in log.read_text())
        yield f"{backend}:{FILE_PORT}"


@contextmanager
def running(lab: Lab, command: list[str | Path], log: Path) -> Iterator[subprocess.Popen[Any]]:
    """A process in the balancer's namespace; raises LabError with its log when it fails."""
    with log.open("wb") as out:
        process = lab.run("lb", command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=HERE.parent)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT)
    if code != 0:
        raise LabError(f"{command[1:4]}: exit code {code}: {log.read_text().strip()}")


def wait_until(process: subprocess.Popen[Any], ready: Callable[[], bool]) -> None:
    """Raises LabError when the process ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabError("the forwarder did not start")
        time.sleep(0.1)


def status(lab: Lab) -> dict[str, Any] | None:
    """What fastlb says of itself; None while it does not answer."""
    command = command_line("status", "--json", "--socket", lab.socket_path)
    answer = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=10)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


# --- the traffic ----------------------------------------------------------------------------------------------------


def fetch(host: str, size: int) -> float:
    """Seconds that ``size`` bytes take over HTTP. They are thrown away: hashing would be a third of the time."""
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/bytes/{size}")
    answer = connection.getresponse()
    start, got, buffer = time.monotonic(), 0, bytearray(CHUNK)  # the server is ready to send by now
    while count := answer.readinto(buffer):
        got += count
    seconds = time.monotonic() - start
    if got != size:
        raise OSError(f"{got} bytes instead of {size}")
    return seconds


def gigabits(lab: Lab, host: str) -> float:
    """Gbit/s of one big file, from the client's namespace."""
    seconds = float(lab.check("client", [sys.executable, __file__, "--fetch", host]))
    return FILE * 8 / seconds / 1e9


def million_packets(lab: Lab) -> tuple[float, float]:
    """Small UDP packets, in millions per second: (offered by the sender, arrived at the backend)."""
    before = lab.counters(BACKEND)["eth0"].rx_packets
    sent = lab.generate(VIPS["dsr", 4], "--seconds", str(FLOOD), "--flows", FLOWS, node="router")
    time.sleep(0.3)  # what is still in the ring
    arrived = lab.counters(BACKEND)["eth0"].rx_packets - before
    return sent["frames"] / sent["seconds"] / 1e6, arrived / sent["seconds"] / 1e6


def verify(lab: Lab, host: str) -> None:
    """One file with its checksum, before anything is timed; raises LabError."""
    name, _, port = host.partition(":")
    answer = lab.client("download", name, "--port", port, "--bytes", FILE)
    if not answer["verified"]:
        raise LabError(f"the file came through {host} with other bytes: {answer}")


def measure(lab: Lab, pairs: int, fetches: int) -> dict[str, dict[str, list[float]]]:
    """Let the forwarders take turns; one value a turn, by forwarder and quantity."""
    found: dict[str, dict[str, list[float]]] = {}
    for pair in range(pairs):
        for forwarder in (fastlb, reflector):
            values = found.setdefault(forwarder.__name__, {"gbit": [], "mpps": [], "offered": []})
            with forwarder(lab) as host:
                if pair == 0:
                    verify(lab, host)
                values["gbit"].append(median(gigabits(lab, host) for _ in range(fetches)))
                offered, arrived = million_packets(lab)
                values["offered"].append(offered)
                values["mpps"].append(arrived)
    return found


# --- what is told ---------------------------------------------------------------------------------------------------

QUANTITIES = {"gbit": "200 MB by HTTP, Gbit/s", "mpps": "64-byte UDP, Mpackets/s"}


def tell(found: dict[str, dict[str, list[float]]]) -> None:
    """Print the table and the ratios; write JSON and the picture."""
    rows: list[tuple[str, ...]] = []
    ratios: dict[str, Spread] = {}
    bars: list[Bar] = []
    for colour, (key, title) in enumerate(QUANTITIES.items()):
        ours, bare = found["fastlb"][key], found["reflector"][key]
        ratio = ratios[key] = Spread.of(one / other for one, other in zip(ours, bare, strict=True))
        target = TARGET * median(bare) if key == "gbit" else None
        spreads = {"fastlb": Spread.of(ours), "reflector": Spread.of(bare)}
        rows += [(f"{title}: {name}", *shown(spread)) for name, spread in spreads.items()]
        rows.append(("  fastlb / reflector, by pair", *shown(ratio)))
        bars.append(Bar(f"fastlb, {title}", spreads["fastlb"], 2 * colour, target))
        bars.append(Bar(f"reflector, {title}", spreads["reflector"], 1))
    title = f"fastlb and a bare reflector in one lab, {len(found['fastlb']['gbit'])} pairs"
    print(title)
    print_table(("", "median", "p10 .. p90"), rows)
    print(f"the target for the file: a ratio of at least {TARGET}")
    data = {"ratios": {key: asdict(ratio) for key, ratio in ratios.items()}, "values": found}
    write("lab", title, data, bars, "Gbit/s, or million packets/s")


def shown(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.2f}", f"{spread.p10:.2f} .. {spread.p90:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="fastlb's throughput next to that of a bare reflector.")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"turns of each forwarder, at least {PAIRS}")
    parser.add_argument("--fetches", type=int, default=3, help="files a turn")
    parser.add_argument("--fetch", metavar="HOST:PORT", help=argparse.SUPPRESS)  # the client's side
    options = parser.parse_args()
    if options.fetch:
        print(fetch(options.fetch, FILE))
        return
    become_root()
    build("_reflect")
    pairs = max(PAIRS, options.pairs)
    with Lab("fastlb-bench-") as lab:
        with lab.rtnl("router") as rtnl:
            rtnl.route("add", dst=f"{address(BACKEND, 'eth0', 4)}/32", gateway=address("lb", "eth0", 4))
        found = measure(lab, pairs, options.fetches)
    tell(found)


if __name__ == "__main__":
    main()
