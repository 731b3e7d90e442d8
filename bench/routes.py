"""What does a routing daemon with the internet's routes cost? A million of them in the balancer's namespace, half of
each IP version, by turns through two next hops, so that no neighbouring two can be taken for one.

fastlb starts without them and with them: seconds until it answers, memory, processor time when nothing happens. Then
CHANGES of them change each second, while the route to the backend of a service goes (it becomes unreachable) and comes
back: seconds until packets stop, and until they arrive again.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from extension import build
from gateway import Balancer, balancer, until
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from rig import BACKEND, PORT, PREFIX, VIP, Rig, RigError, cores, on_core, rtnl
from topology import index_of

ROUTES = 1_000_000
CHANGES, EVERY = 1000, 0.02  # routes that change a second, and seconds between some of them
TURNS = 3
WATCHED = 10.0  # seconds
PATIENCE = 120.0
NETWORK = "10.9.0.0/24"  # of the service's backend
FRAMES, RATE = 20, 2000  # that tell whether packets arrive
PASSAGE = 0.02  # seconds that they take at most
NEXT_HOPS = {4: (f"via {BACKEND} dev out0", "via 10.2.0.1 dev in0"),
             6: ("via fd00:3::b dev out0", "via fd00:2::1 dev in0")}  # fmt: skip
START_BOUND, MEMORY_BOUND, IDLE_BOUND, STATUS_BOUND, ACT_BOUND = 3.0, 100.0, 1.0, 1.0, 1.0


@dataclass
class Cost:
    """Of one fastlb: seconds, MB, percent of a core."""

    start: float
    memory: float
    idle: float
    status: float


def run(pairs: int) -> None:
    """Measure, print and write."""
    os.sched_setaffinity(0, set(cores()))
    load = build("_load")
    turns = max(TURNS, pairs)
    with Rig() as rig:
        prepare(rig)
        without = [cost(rig) for _ in range(turns)]
        change(batch("add", range(ROUTES), 0))
        with_all = [cost(rig) for _ in range(turns)]
        generator = load.Load(rig.sender(), rig.frames(checksum=False))
        with balancer(rig, service()) as lb:
            answers(lb)
            with on_core(cores()[0]):
                rig.warm_up(generator)
                began, spent = time.monotonic(), seconds_of(lb)
                with changing():
                    acts = [act(rig, generator) for _ in range(2 * turns)]
                busy = 100 * (seconds_of(lb) - spent) / (time.monotonic() - began)
    tell(without, with_all, acts, busy)


def prepare(rig: Rig) -> None:
    """Next hops of both versions, none of which has to be asked for."""
    for name in ("all", "default", "in0", "out0"):
        rig.run("lb", ["sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=0"]).wait()
    rig.run("lb", ["sysctl", "-qw", "net.ipv6.route.max_size=2147483647"]).wait()
    with rtnl("lb") as ipr:
        for interface, peer, base in (("in0", "g0", "fd00:2::"), ("out0", "s0", "fd00:3::")):
            index, mac = index_of(ipr, interface), rig.macs[peer].hex(":")
            ipr.addr("add", index=index, address=f"{base}2", prefixlen=64, flags=2)  # without DAD
            address = f"{base}1" if interface == "in0" else f"{base}b"
            ipr.neigh("add", dst=address, lladdr=mac, ifindex=index, state="permanent")
    change([f"route replace {NETWORK} {NEXT_HOPS[4][0]}"])


def service() -> list[dict[str, Any]]:
    plain = {"name": "discard", "vip": VIP, "port": PORT, "protocol": "udp", "forward": "nat"}
    return [plain | {"backends": [{"address": NETWORK.replace(".0/24", ".1")}]}]


def batch(verb: str, numbers: Sequence[int], turn: int) -> list[str]:
    """Lines for `ip -batch`; with another ``turn`` each route has the other next hop."""
    lines = []
    for number in numbers:
        at = number // 2
        target4 = f"{20 + (at >> 16)}.{at >> 8 & 255}.{at & 255}.0/24"
        version, target = (4, target4) if number % 2 else (6, f"2a00:{at >> 16:x}:{at & 0xFFFF:x}::/48")
        lines.append(f"route {verb} {target} {NEXT_HOPS[version][(at + turn) % 2]}")
    return lines


def change(lines: Sequence[str]) -> None:
    """Let the balancer's namespace have them. Raises RigError."""
    done = subprocess.run(["ip", "-n", f"{PREFIX}lb", "-batch", "-"], input="\n".join(lines), text=True,
                          capture_output=True)  # fmt: skip
    if done.returncode:
        raise RigError(f"ip -batch: {done.stderr.strip()[-200:]}")


def cost(rig: Rig) -> Cost:
    """Start one, watch it while nothing happens, and end it."""
    with balancer(rig, service()) as lb:
        start = answers(lb) - lb.started
        time.sleep(2.0)
        began, spent = time.monotonic(), seconds_of(lb)
        time.sleep(WATCHED)
        idle = 100 * (seconds_of(lb) - spent) / (time.monotonic() - began)
        asked = time.monotonic()
        lb.ask("status")
        return Cost(start, memory_of(lb), idle, time.monotonic() - asked)


def answers(lb: Balancer) -> float:
    """When it answers for the first time."""

    def asked() -> bool:
        try:
            return bool(lb.ask("status"))
        except OSError:
            return False

    found = until(lambda: asked() or lb.process.poll() is not None, PATIENCE)
    if found is None or lb.process.poll() is not None:
        raise RigError(f"fastlb does not answer: {lb.log_path.read_text()[-2000:]}")
    return found


def seconds_of(lb: Balancer) -> float:
    """Processor time of all its threads."""
    with open(f"/proc/{lb.process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(lb: Balancer) -> float:
    """MB that it has at most had in memory."""
    with open(f"/proc/{lb.process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024


@contextmanager
def changing() -> Iterator[None]:
    """Let CHANGES routes change each second, from another thread."""
    over = threading.Event()
    feed = subprocess.Popen(["ip", "-n", f"{PREFIX}lb", "-batch", "-"], stdin=subprocess.PIPE, text=True)

    def go_on() -> None:
        assert feed.stdin is not None
        step, at = round(CHANGES * EVERY), 0
        while not over.wait(EVERY):
            numbers = [number * 7919 % ROUTES for number in range(at, at + step)]
            feed.stdin.write("\n".join(batch("replace", numbers, 1 + at // ROUTES)) + "\n")
            feed.stdin.flush()
            at += step
        feed.stdin.close()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        time.sleep(2.0)
        yield
    finally:
        over.set()
        thread.join()
        if feed.wait():
            raise RigError("ip -batch cannot change routes")


def act(rig: Rig, generator: Any) -> tuple[float, float]:
    """Seconds from a change of the route that matters until packets stop, and until they arrive again."""
    found = []
    for line, arrive in ((f"route replace unreachable {NETWORK}", False),
                         (f"route replace {NETWORK} {NEXT_HOPS[4][0]}", True)):  # fmt: skip
        change([line])
        changed = time.monotonic()

        def acted(arrive: bool = arrive) -> bool:
            before = rig.arrived()
            generator.flood(FRAMES, RATE)
            time.sleep(PASSAGE)
            return (rig.arrived() > before) == arrive

        seen = until(lambda: acted() and acted(), PATIENCE)
        if seen is None:
            raise RigError(f"never acted: {line}")
        found.append(seen - changed)
        time.sleep(0.3)
    return found[0], found[1]


def tell(without: list[Cost], with_all: list[Cost], acts: list[tuple[float, float]], busy: float) -> None:
    """The table, the targets, JSON and the picture."""
    title = f"{ROUTES:,} routes"
    pairs = list(zip(with_all, without, strict=True))
    print(f"processor time while {CHANGES:,} routes change each second: {busy:.1f} % of a core")
    goals = [
        Goal("start, more than without", Spread.of(a.start - b.start for a, b in pairs), START_BOUND, True, " s"),
        Goal("memory, more than without", Spread.of(a.memory - b.memory for a, b in pairs), MEMORY_BOUND, True, " MB"),
        Goal("idle, more than without", Spread.of(a.idle - b.idle for a, b in pairs), IDLE_BOUND, True, " %"),
        Goal("status", Spread.of(each.status for each in with_all), STATUS_BOUND, True, " s"),
        Goal("a route that goes acts after", Spread.of(each[0] for each in acts), ACT_BOUND, True, " s"),
        Goal("a route that comes acts after", Spread.of(each[1] for each in acts), ACT_BOUND, True, " s"),
    ]
    print_table((title, *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    told = {"without": [asdict(each) for each in without], "with": [asdict(each) for each in with_all], "acts": acts,
            "busy": busy, "goals": [asdict(goal) for goal in goals]}  # fmt: skip
    bars = [Bar(f"start {name}", Spread.of(each.start for each in found), colour)
            for colour, (name, found) in enumerate((("without", without), ("with", with_all)))]  # fmt: skip
    bars += [Bar("a route goes", Spread.of(each[0] for each in acts), 1),
             Bar("a route comes", Spread.of(each[1] for each in acts), 1)]  # fmt: skip
    write("lab-routes", title, told, bars, "s")
