"""Does the balancer stay awake, and right, while it checks thousands of backends?

For each number of backends fastlb starts with a check by TCP at the default interval, and is asked for its status
every half a second all the time. When all are up it is watched for half a minute. Then a few backends stop answering
while SYNs come for their services; then all do. Balancer, backends and this program share two cores.

"down after" is from the moment when nothing answers any more to the line in the log that says so; "no flow after" to
the last SYN that still came to the backend. Nothing else may have been called down at any time.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from statistics import median
from typing import Any

from extension import build
from flood import syn
from gateway import (
    SERVER_PORT,
    Asker,
    Balancer,
    acceptor,
    address_of,
    balancer,
    gateway,
    services,
    silence,
    until,
)
from report import Bar, Spread, print_table, write
from rig import Rig, cores, end

SIZES = (100, 1000, 4000, 10_000)
MANY_SERVICES, FROM = 100, 1000  # so many services, from so many backends on; one below
CHECK = {"type": "tcp"}
INTERVAL, TIMEOUT, FALL, ALLOWED = 2.0, 1.0, 3, 0.2  # the defaults, and what may be added
BOUND = FALL * (INTERVAL + TIMEOUT) + ALLOWED
START_BOUND, LAG_BOUND, STATUS_BOUND = 20.0, 0.05, 1.0
PATIENCE = 90.0  # seconds until all are up, or down
WATCHED = 31.0  # seconds after the start; longer than the balancer remembers how late its loop was
KILLED = 3  # backends at a time
RATE = 1500  # SYNs a second for each of their services
HANGS, REFUSES = "hangs", "refuses"
HALVES = ("10.128.0.0/17", "10.128.128.0/17")
SO_ATTACH_FILTER = 26


@dataclass
class Found:
    """What one size gave; seconds, None where it did not happen in time."""

    backends: int
    services: int
    answered: float | None = None
    all_up: float | None = None
    called_down: int = 0  # backends that worked
    slowest_status: float = 0.0
    lag: Mapping[str, float] | None = None
    cpu: float | None = None  # of one core
    down: dict[str, list[float]] = field(default_factory=dict)  # by way
    last_flow: dict[str, list[float]] = field(default_factory=dict)
    all_down: float | None = None


def run(pairs: int, sizes: Sequence[int] = SIZES, count: int = 0) -> None:
    """Measure, print and write; ``count`` services (0: by size). ``pairs`` means nothing here."""
    os.sched_setaffinity(0, set(cores()))
    load = build("_load")
    found = []
    for size in sizes:
        found.append(measure(load, size, count or (MANY_SERVICES if size >= FROM else 1)))
        tell([found[-1]])
    write_down(found)


def measure(load: Any, size: int, count: int) -> Found:
    """One start of fastlb."""
    found = Found(size, count)
    hanging, refusing = spread_over(size, 0.25), spread_over(size, 0.75)
    ports = {victim: SERVER_PORT + at for at, victim in enumerate(refusing, 1)}
    with ExitStack() as stack:
        rig = stack.enter_context(gateway())
        stack.enter_context(acceptor(rig))
        servers = {victim: stack.enter_context(acceptor(rig, port)) for victim, port in ports.items()}
        configured = services(size, count, ports, check=CHECK)
        lb = stack.enter_context(balancer(rig, configured))
        asker = stack.enter_context(Asker(lb.socket_path).asking())
        up = until(lambda: asker.states["up"] == size or lb.process.poll() is not None, PATIENCE)
        found.answered = asker.first and asker.first - lb.started
        found.all_up = up and up - lb.started
        if up is None or lb.process.poll() is not None:
            found.called_down = len(asker.went_down)
        else:
            watch(lb, asker, found)
            hang = {victim: partial(silence, rig, f"{victim}/32") for victim in hanging}
            kill_some(rig, load, lb, found, HANGS, hang)
            for victim in hanging:
                silence(rig, f"{victim}/32", False)
            until(lambda: asker.states["up"] == size, PATIENCE)
            kill_some(rig, load, lb, found, REFUSES, {victim: partial(end, servers[victim]) for victim in refusing})
            kill_all(rig, lb, asker, found)
        found.slowest_status = asker.slowest
    return found


def watch(lb: Balancer, asker: Asker, found: Found) -> None:
    """Nothing happens for a while."""
    workers = {each["core"] for each in asker.last["workers"]}
    began, spent = time.monotonic(), lb.cpu_seconds(sorted(workers))
    time.sleep(WATCHED)
    found.cpu = (lb.cpu_seconds(sorted(workers)) - spent) / (time.monotonic() - began)
    found.lag = asker.last.get("event_loop")
    found.called_down = max(len(asker.went_down), len(downs(lb, lb.started)))


# --- some die --------------------------------------------------------------------------------------------------------


def spread_over(backends: int, turn: float) -> list[str]:
    """KILLED backends far from each other; ``turn``, from 0 to 1: which ones."""
    return [address_of(int((at + turn) * backends / KILLED)) for at in range(KILLED)]


def kill_some(
    rig: Rig, load: Any, lb: Balancer, found: Found, way: str, victims: Mapping[str, Callable[[], None]]
) -> None:
    """Let backends stop answering, each by what stands beside it, while SYNs come for their services."""
    holders = [service["port"] for service in lb.services
               if any(each["address"] in victims for each in service["backends"])]  # fmt: skip
    died: dict[str, float] = {}
    with watching(rig, list(victims)) as last, flowing(rig, load, holders):
        time.sleep(1.0)
        for victim, die in victims.items():
            die()
            died[victim] = time.monotonic()
            time.sleep(0.37)
        until(lambda: len(downs(lb, min(died.values()), list(victims))) == len(victims), 2 * BOUND)
        time.sleep(1.0)  # flows that would still come
    told = downs(lb, min(died.values()), list(victims))
    found.down[way] = [told[victim] - died[victim] for victim in victims if victim in told]
    found.last_flow[way] = [max(0.0, last[victim] - died[victim]) for victim in victims if victim in last]


def kill_all(rig: Rig, lb: Balancer, asker: Asker, found: Found) -> None:
    """Let nothing answer any more."""
    for half in HALVES:  # a route each, as the whole has one already
        silence(rig, half)
    died = time.monotonic()
    seen = until(lambda: asker.states["down"] == found.backends, PATIENCE)
    told = max(downs(lb, died).values(), default=seen)
    found.all_down = told - died if seen is not None and told is not None else None


def downs(lb: Balancer, since: float, names: Sequence[str] = ()) -> dict[str, float]:
    """When, by the monotonic clock, the log said that backends are down: by address; lines of many by themselves."""
    offset = time.time() - time.monotonic()
    found: dict[str, float] = {}
    for line in lb.logged():
        when = datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()
        if "down" not in line["event"] or "backend" not in line["event"] or when - offset < since:
            continue
        text = str(line)
        for name in names or [str(line.get("backend", len(found)))]:
            if name + ":" in text:
                found.setdefault(name, when - offset)
            elif not names:
                found[name] = when - offset
    return found


# --- flows -----------------------------------------------------------------------------------------------------------


@contextmanager
def flowing(rig: Rig, load: Any, ports: Sequence[int]) -> Iterator[None]:
    """SYNs from random sources to these ports of the VIP, RATE a second for each."""
    generator = load.Load(rig.sender(), [syn(rig, port) for port in ports] * 64, scattered=True)
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            generator.flood(RATE * len(ports) // 10, RATE * len(ports))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class SockFilter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(SockFilter)))


def only_clients_to(victims: Sequence[str]) -> SockFprog:
    """A classic BPF program: packets from 100.0.0.0/8 to one of these addresses."""
    count = len(victims)
    lines = [(0x30, 0, 0, 26), (0x15, 0, count + 1, 100), (0x20, 0, 0, 30)]  # ldb source; jeq 100; ld destination
    for at, victim in enumerate(victims):
        lines.append((0x15, count - at, 0, int.from_bytes(socket.inet_aton(victim), "big")))  # jeq: to the last line
    lines += [(0x06, 0, 0, 0), (0x06, 0, 0, 64)]  # ret
    return SockFprog(len(lines), (SockFilter * len(lines))(*(SockFilter(*line) for line in lines)))


@contextmanager
def watching(rig: Rig, victims: Sequence[str]) -> Iterator[dict[str, float]]:
    """When a client's packet last came to each of these backends' addresses."""
    last: dict[str, float] = {}
    over = threading.Event()
    with rig.inside("sink"):
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    program = only_clients_to(victims)
    sniffer.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(program))  # which points to the lines
    with sniffer:
        with rig.inside("sink"):
            sniffer.bind(("s0", 0x0800))
        sniffer.settimeout(0.1)

        def read() -> None:
            while not over.is_set():
                try:
                    frame = sniffer.recv(64)
                except TimeoutError:
                    continue
                last[socket.inet_ntoa(struct.unpack_from("!4s", frame, 30)[0])] = time.monotonic()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield last
        finally:
            over.set()
            thread.join()


# --- what is told ----------------------------------------------------------------------------------------------------


def tell(found: Sequence[Found]) -> None:
    """A table for each size."""
    for each in found:
        title = f"{each.backends:,} backends in {each.services} service{'s' * (each.services > 1)}"
        print_table((title, "seconds", "bound"), rows(each))
        print(flush=True)


def rows(found: Found) -> Iterator[tuple[str, str, str]]:
    up = f"≤ {START_BOUND:g}"
    yield "the control socket answers after", shown(found.answered, PATIENCE), up
    yield "all are up after", shown(found.all_up, PATIENCE), up
    yield "backends called down that worked", str(found.called_down), "0"
    yield "the slowest status took", f"{found.slowest_status:.2f}", f"≤ {STATUS_BOUND:g}"
    if found.lag is not None:
        yield "the event loop is late, p50", f"{found.lag['p50']:.4f}", ""
        yield "p99", f"{found.lag['p99']:.4f}", f"≤ {LAG_BOUND:g}"
    if found.cpu is not None:
        yield "processor time, without workers, of one core", f"{found.cpu * 100:.0f} %", ""
    for way in found.down:
        yield f"one {way}: down after", spread(found.down[way]), f"≤ {BOUND:g}"
        yield f"one {way}: no flow after", spread(found.last_flow[way]), f"≤ {BOUND + ALLOWED:g}"
    if found.down:
        yield "every one hangs: all down after", shown(found.all_down, PATIENCE), f"≤ {BOUND:g}"


def shown(seconds: float | None, patience: float) -> str:
    return f"not within {patience:g}" if seconds is None else f"{seconds:.2f}"


def spread(values: Sequence[float]) -> str:
    """The median and the highest of the backends that were killed."""
    return f"{median(values):.2f}, most {max(values):.2f} of {len(values)}" if values else "never"


def write_down(found: Sequence[Found]) -> None:
    title = "seconds from the start until all backends are up, with checks by TCP"
    bars = [
        Bar(f"{each.backends:,} backends", Spread.of([each.all_up or PATIENCE]), target=START_BOUND) for each in found
    ]
    write("lab-checks", title, {"sizes": [asdict(each) for each in found]}, bars, "seconds")
