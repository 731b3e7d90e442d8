"""Does a flood of SYNs cost anybody his connection? A generator at full rate beside 2,000 connections that stay.

The rig has a kernel at either end here: clients in gen hold TCP connections through a `nat` service to an echo server
in the sink, with a line to and fro on each every two seconds. Meanwhile a generator sends SYNs from random sources to a
`dsr` service as fast as one core can. Its backend sinks them: they leave for a MAC address that nobody has. Clients,
server and generator share a core; fastlb's one worker has the other.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from extension import build
from forwarders import fastlb
from generator import checksum
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from rig import BACKEND, VIP, Rig, RigError, cores, on_core, rtnl
from topology import index_of

from fastlb.control.client import call
from fastlb.kernel import guard

ECHOES = Path(__file__).resolve().parent.parent / "netns-lab" / "echoes.py"
CONNECTIONS = 2000
SECONDS = 20.0
CHUNK = 50_000  # SYNs between two looks at the clock
SAMPLES = 2.0  # seconds between looks at the balancer
STEADY_VIP, STEADY_PORT = "203.0.113.30", 7
FLOOD_PORT = 80
SINKING, NOBODY = "10.3.0.99", "02:00:00:00:00:99"
PATIENCE = 60.0  # seconds for what the clients have to say
WANTED = 300  # thousand SYNs a second


def run(pairs: int) -> None:
    """Measure, print and write; ``pairs`` means nothing here: there is one flood."""
    with Rig() as rig:
        give_kernels(rig)
        load = build("_load").Load(rig.sender(), syns(rig), scattered=True)
        with balancer(rig), echoes(rig, "sink", "serve", STEADY_PORT):
            with echoes(rig, "gen", "hold", STEADY_VIP, STEADY_PORT, CONNECTIONS) as clients:
                before = ask(rig)
                rows, sent, seconds = flood(rig, load)
                held = end_of(clients)
            after = ask(rig)
    tell(before, after, rows, sent / seconds, held)


# --- the rig ---------------------------------------------------------------------------------------------------------


def give_kernels(rig: Rig) -> None:
    """Addresses and routes for real connections, and a backend that nobody is."""
    with rig.inside("sink"):
        guard.detach("s0")  # which drops everything
    with rtnl("sink") as ipr:
        ipr.addr("add", index=index_of(ipr, "s0"), address=BACKEND, prefixlen=24)
        ipr.route("add", dst="10.2.0.0/24", gateway="10.3.0.2")
    with rtnl("gen") as ipr:
        ipr.route("add", dst=f"{STEADY_VIP}/32", gateway="10.2.0.2")
    with rtnl("lb") as ipr:
        ipr.neigh("add", dst=SINKING, lladdr=NOBODY, ifindex=index_of(ipr, "out0"), state="permanent")


@contextmanager
def balancer(rig: Rig) -> Iterator[None]:
    """`fastlb run` with both services."""
    both = {"protocol": "tcp"}
    services = [
        {"name": "steady", "vip": STEADY_VIP, "port": STEADY_PORT, "forward": "nat",
         "backends": [{"address": BACKEND}], **both},
        {"name": "flooded", "vip": VIP, "port": FLOOD_PORT, "forward": "dsr",
         "backends": [{"address": SINKING}], **both},
    ]  # fmt: skip
    path = rig.run_dir / "fastlb.yaml"
    path.write_text(yaml.safe_dump(rig.config(interfaces=["in0", "out0"], services=services)))
    with fastlb(rig, path, rig.socket_path):
        yield


@contextmanager
def echoes(rig: Rig, node: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """netns-lab/echoes.py on the generator's core, from when it is ready."""
    with on_core(cores()[0]):
        child = rig.run(
            node, [sys.executable, ECHOES, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    if line_of(child) != "ready\n":
        raise RigError(f"echoes.py {words[0]} did not begin")
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], PATIENCE)[0]:
        raise RigError("echoes.py says nothing")
    return child.stdout.readline()


def end_of(clients: subprocess.Popen[str]) -> dict[str, Any]:
    """What came of the connections."""
    assert clients.stdin is not None
    clients.stdin.write("\n")
    clients.stdin.flush()
    found: dict[str, Any] = json.loads(line_of(clients))
    return found


def syns(rig: Rig) -> list[bytes]:
    """SYNs to the flooded service; the generator gives each a source of its own."""
    return [syn(rig, FLOOD_PORT)] * 1024


def syn(rig: Rig, port: int) -> bytes:
    """A SYN to a port of the VIP, in a 64-byte frame."""
    link = rig.macs["in0"] + rig.macs["g0"] + b"\x08\x00"
    source, target = socket.inet_aton("100.0.0.1"), socket.inet_aton(VIP)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, socket.IPPROTO_TCP, 0, source, target)
    tcp = struct.pack("!HHIIBBHHH", 1024, port, 1, 0, 0x50, 0x02, 65535, 0, 0)
    total = checksum(source + target + struct.pack("!HH", socket.IPPROTO_TCP, len(tcp)) + tcp)
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return (link + ip + tcp[:16] + struct.pack("!H", total) + tcp[18:]).ljust(64, b"\0")


# --- the flood -------------------------------------------------------------------------------------------------------


def flood(rig: Rig, load: Any) -> tuple[list[dict[str, float]], int, float]:
    """SYNs for SECONDS; what the balancer said meanwhile, how many were sent, and how long it really took."""

    def generate() -> tuple[int, float]:
        start, sent = time.monotonic(), 0
        with on_core(cores()[0]):
            while time.monotonic() - start < SECONDS:
                load.flood(CHUNK)
                sent += CHUNK
        return sent, time.monotonic() - start

    rows: list[dict[str, float]] = []
    with ThreadPoolExecutor(1) as thread:
        generating = thread.submit(generate)
        start, before = time.monotonic(), ask(rig)
        while not generating.done():
            time.sleep(SAMPLES)
            now = ask(rig)
            rows.append({"at": time.monotonic() - start, **between(before, now)})
            before = now
        return rows, *generating.result()


def ask(rig: Rig) -> dict[str, Any]:
    """The balancer's status, with the time."""
    status: dict[str, Any] = call(str(rig.socket_path), "status")
    return status | {"asked": time.monotonic()}


def between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Rates, thousand a second, and what stood in the table at the end."""
    seconds = (after["asked"] - before["asked"]) * 1e3

    def rate(name: str, group: str = "") -> float:
        old, new = (each["counters"][group] if group else each["counters"] for each in (before, after))
        return float((new[name] - old[name]) / seconds)

    return {
        "taken": rate("packets"), "sent on": rate("transmitted"), "new entries": rate("scheduled", "paths"),
        "without entry": rate("overload", "paths"), "lost by the ring": rate("ring_drops"),
        "flows": after["flows"]["active"],
    }  # fmt: skip


# --- what is told ----------------------------------------------------------------------------------------------------


def tell(
    before: dict[str, Any], after: dict[str, Any], rows: list[dict[str, float]], rate: float, held: dict[str, Any]
) -> None:
    """The tables, the targets, JSON and the picture."""
    title = f"SYNs from random sources for {SECONDS:.0f} s, beside {CONNECTIONS:,} connections; thousands a second"
    names = list(rows[0])
    print(title)
    print_table(
        ("second", *names[1:-1], "flows in the table"),
        [(f"{row['at']:.0f}", *(f"{row[name]:.0f}" for name in names[1:-1]), f"{row['flows']:,.0f}") for row in rows],
    )
    changes = {name: after["counters"][name] - before["counters"][name] for name in
               ("flows_evicted", "flows_untracked", "flows_expired")}  # fmt: skip
    print(f"table: {after['flows']['entries']:,} entries; {named(changes)}")
    for service in after["services"]:
        print(f"{service['name']}: paths {named(service['paths'])}; drops {named(service['drops'])}")
    print(
        f"connections: {held['held']:,} held, {held['lost']} lost; {held['echoes']:,} echoes, "
        f"median {held['median'] * 1e3:.1f} ms, slowest {held['slowest'] * 1e3:.0f} ms"
    )
    goals = [
        Goal("SYNs generated, thousand a second", Spread.of([rate / 1e3]), WANTED),
        Goal(f"of {CONNECTIONS:,} connections, lost", Spread.of([held["lost"]]), 0, at_most=True),
    ]
    print_table(GOAL_COLUMNS, [goal.row() for goal in goals])
    found = {"rows": rows, "rate": rate, "connections": held, "counters": changes,
             "services": {each["name"]: {key: each[key] for key in ("paths", "drops")} for each in after["services"]},
             "goals": [asdict(goal) for goal in goals]}  # fmt: skip
    shown = ("taken", "sent on", "new entries", "without entry", "lost by the ring")
    bars = [Bar(name, Spread.of(row[name] for row in rows), at) for at, name in enumerate(shown)]
    write("lab-flood", title, found, bars, "thousand packets/s")


def named(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
