"""The rig of rig.py with thousands of backends: one host behind a gateway's address has them all.

    gen ──── lb ──── sink 10.3.0.11, the gateway to 10.128.0.0/16, every address of which is the sink's own

A route makes addresses local, so ten thousand of them need no ten thousand interfaces, and no neighbours. Of a backend
that shall hang, the address is routed nowhere; one that shall refuse has a port of its own, whose server ends.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from forwarders import command_line
from rig import BACKEND, VIP, Rig, RigError, end, rtnl
from topology import index_of

from fastlb.kernel import guard

HERE = Path(__file__).resolve().parent
GATEWAY, NETWORK, FIRST = BACKEND, "10.128.0.0/16", 1
CLIENTS, CLIENT_GATEWAY = "100.0.0.0/8", "10.2.0.1"
SERVER_PORT = 8080
FIRST_PORT = 1000  # of the services, all of one VIP
SOFT_LIMIT = 1024  # open files, as most systems have it
LOCAL_TABLE = 255
ASK_EVERY = 0.5  # seconds
LONGEST_ANSWER = 120.0  # seconds that a status may take
STOP_TIMEOUT = 30.0
FLOWS = 200_000


def address_of(number: int) -> str:
    return f"10.128.{(FIRST + number) >> 8}.{(FIRST + number) & 255}"


def services(backends: int, count: int, ports: Mapping[str, int], **more: Any) -> list[dict[str, Any]]:
    """So many backends in so many services; ``ports`` of some, by address; ``more`` of each service."""
    shares = [range(at * backends // count, (at + 1) * backends // count) for at in range(count)]
    plain = {"vip": VIP, "protocol": "tcp", "forward": "nat", **more}
    return [
        {"name": f"s{at}", "port": FIRST_PORT + at, **plain,
         "backends": [{"address": each, "port": ports.get(each, SERVER_PORT)} for each in map(address_of, share)]}
        for at, share in enumerate(shares)
    ]  # fmt: skip


@contextmanager
def gateway() -> Iterator[Rig]:
    """The rig, with routes, and the soft limit of open files that most systems have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(SOFT_LIMIT, hard), hard))
    try:
        with Rig() as rig:
            give_routes(rig)
            yield rig
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def give_routes(rig: Rig) -> None:
    """The sink has all backends and answers by way of the balancer, which knows the way back to clients."""
    with rig.inside("sink"):
        guard.detach("s0")  # which drops everything
    with rtnl("sink") as ipr:
        ipr.addr("add", index=index_of(ipr, "s0"), address=GATEWAY, prefixlen=24)
        ipr.link("set", index=index_of(ipr, "lo"), state="up")
        ipr.route("add", dst=NETWORK, type="local", table=LOCAL_TABLE, oif=index_of(ipr, "lo"), scope=254)
        ipr.route("add", dst=CLIENTS, gateway="10.3.0.2")
    with rtnl("lb") as ipr:
        ipr.route("add", dst=NETWORK, gateway=GATEWAY)
        ipr.route("add", dst=CLIENTS, gateway=CLIENT_GATEWAY)


def silence(rig: Rig, destination: str, silent: bool = True) -> None:
    """Let nothing answer for an address or a prefix; or take that back."""
    words = ["ip", "route", "add" if silent else "del", "blackhole", destination, "table", "local"]
    with rig.inside("sink"):
        subprocess.run(words, check=True, timeout=10)


@contextmanager
def acceptor(rig: Rig, port: int = SERVER_PORT) -> Iterator[subprocess.Popen[str]]:
    """The server of all backends, from when it listens."""
    child = rig.run("sink", [sys.executable, HERE / "acceptor.py", str(port)], stdout=subprocess.PIPE, text=True)
    try:
        if child.stdout is None or child.stdout.readline() != "ready\n":
            raise RigError("acceptor.py does not listen")
        yield child
    finally:
        end(child)


# --- the balancer ----------------------------------------------------------------------------------------------------


def ask(path: Path, command: str, patience: float = LONGEST_ANSWER, **arguments: Any) -> Any:
    """The answer of a running fastlb, over its control socket. Raises OSError while there is none, and RigError."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(patience)
        client.connect(str(path))
        client.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        with client.makefile("rb") as lines:
            line = lines.readline()
    if not line:
        raise ConnectionResetError("no answer")
    answer = json.loads(line)
    if not answer["ok"]:
        raise RigError(f"{command}: {answer['error']}")
    return answer["result"]


@dataclass
class Balancer:
    """`fastlb run` as a process. Times are seconds of the monotonic clock."""

    process: subprocess.Popen[bytes]
    services: list[dict[str, Any]]
    socket_path: Path
    log_path: Path
    started: float

    def ask(self, command: str, **arguments: Any) -> Any:
        return ask(self.socket_path, command, **arguments)

    def logged(self) -> list[dict[str, Any]]:
        """What it has logged."""
        found = []
        for line in self.log_path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def cpu_seconds(self, workers: Sequence[int]) -> float:
        """Processor time of all threads but those that are alone on one of the workers' cores."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # it has just ended
                if os.sched_getaffinity(int(task.name)).issubset(workers) and int(task.name) != self.process.pid:
                    continue
                total += int(task.joinpath("schedstat").read_text().split()[0])
        return total / 1e9


@contextmanager
def balancer(rig: Rig, services: list[dict[str, Any]]) -> Iterator[Balancer]:
    """It is ended with the block, whatever state it is in."""
    config, log = rig.run_dir / "fastlb.yaml", rig.run_dir / "fastlb.log"
    write_config(rig, services)
    with log.open("wb") as out:
        started = time.monotonic()
        process = rig.run("lb", command_line("run", "-c", config), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                          cwd=HERE.parent)  # fmt: skip
    try:
        yield Balancer(process, services, rig.socket_path, log, started)
        if process.poll() is not None:
            raise RigError(f"fastlb ended with exit code {process.returncode}: {log.read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT)
        end(process)


def write_config(rig: Rig, services: list[dict[str, Any]]) -> None:
    """In one step: a reload may be reading the file."""
    both = {"interfaces": ["in0", "out0"], "flows": FLOWS, "services": services}
    written = rig.run_dir / "fastlb.new"
    written.write_text(yaml.dump(rig.config(**both), Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    written.replace(rig.run_dir / "fastlb.yaml")


@dataclass
class Asker:
    """Asks for the status every ASK_EVERY seconds, from a thread of its own. Times are of the monotonic clock."""

    path: Path
    first: float | None = None  # when the first answer came
    slowest: float = 0.0  # seconds that an answer took, from the second one on
    states: Counter[str] = field(default_factory=Counter)  # of backends, by the last answer
    went_down: set[str] = field(default_factory=set)  # backends that any answer called down
    last: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def asking(self) -> Iterator[Asker]:
        over = threading.Event()

        def go_on() -> None:
            while not over.wait(ASK_EVERY if self.first else 0.05):
                with suppress(OSError, RigError):  # not yet, or it ends
                    self._ask()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join(LONGEST_ANSWER)

    def _ask(self) -> None:
        asked = time.monotonic()
        status = ask(self.path, "status")
        answered = time.monotonic()
        if self.first is None:
            self.first = answered
        else:
            self.slowest = max(self.slowest, answered - asked)
        backends = [each for service in status["services"] for each in service["backends"]]
        self.went_down |= {each["backend"] for each in backends if each["state"] == "down"}
        self.states, self.last = Counter(each["state"] for each in backends), status


def until(wanted: Callable[[], object], patience: float) -> float | None:
    """When it was found that something has come true, by the monotonic clock; None: not in time."""
    deadline = time.monotonic() + patience
    while not wanted():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return time.monotonic()
