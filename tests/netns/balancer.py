"""``fastlb run`` as a child process in a network namespace, for tests.

    with Balancer(lab.namespace("lb"), lab.config(workers=1), tmp_path) as balancer:
        balancer.status()["counters"]["packets"]

It is running when the block begins. Whatever happens, the process is ended by its own number, and what a
killed one leaves behind, its guard and its flow file, is removed; when the block fails, its log is printed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml
from pyroute2 import IPRoute, NetlinkError, netns

from fastlb.config import Config
from fastlb.control.client import call
from fastlb.errors import ConfigError, ControlError
from fastlb.kernel import guard
from fastlb.model.files import set_aside
from fastlb.workers import flow_places
from tests.netns.fork_server import Forked

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds until something that should have happened is called missing
NUD_DYNAMIC = 0x3F  # every state but NOARP and PERMANENT

T = TypeVar("T")


def within(namespace: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function in a network namespace, on a thread that lives there; what it opens belongs to it."""
    with ThreadPoolExecutor(1, initializer=netns.setns, initargs=(namespace, 0)) as thread:
        return thread.submit(function, *args, **kwargs).result()


def until(condition: Callable[..., object], *args: Any) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + PATIENCE
    while not condition(*args):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def fastlb(*words: str | Path, namespace: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a ``fastlb`` command to its end, in a namespace when one is named."""
    command = [sys.executable, "-m", "fastlb", *map(str, words)]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, **options)

    return within(namespace, run) if namespace else run()


class Balancer:
    """One ``fastlb run``; it can be started again after its end."""

    def __init__(self, namespace: str, config: Mapping[str, Any], directory: Path) -> None:
        self.namespace = namespace
        self.config_path = directory / "fastlb.yaml"
        self.socket_path = directory / "fastlb.sock"
        self.log_path = directory / "fastlb.log"
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._log_shown = 0
        self.configure(config)

    def __enter__(self) -> Balancer:
        try:
            self.start()
        except BaseException:
            self.show_log()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None and self._process.poll() is None:
                self.terminate()
        finally:
            self._end()
            if error is not None:
                self.show_log()

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, which takes effect at the next start or reload."""
        self.config = {**config, "control": str(self.socket_path)}
        written = self.config_path.with_suffix(".new")
        written.write_text(yaml.safe_dump(self.config, sort_keys=False))
        written.replace(self.config_path)  # in one step: a reload may be reading it

    def start(self, **popen: Any) -> None:
        """Start it and wait until it answers; AssertionError, with its log, when it ends instead."""
        self._process = self.launch(**popen)
        assert until(lambda: self._answers() or not self.running), "it neither answers nor ends"
        assert self.running, f"exit code {self._process.returncode}: {self.log_path.read_text()}"

    def launch(self, **popen: Any) -> subprocess.Popen[bytes] | Forked:
        """Start it and do not wait; the caller ends it.

        With options for Popen it is a process of its own, and also where gcc counts lines: it writes the counts when a
        process ends, but not when a forked one does.
        """
        if not popen and os.environ.get("FASTLB_PROFILE") != "coverage":
            return Forked(["run", "-c", str(self.config_path)], self.namespace, self.log_path)
        command = [sys.executable, "-m", "fastlb", "run", "-c", str(self.config_path)]
        with self.log_path.open("ab") as log:
            options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **popen}
            return within(self.namespace, subprocess.Popen, command, **options)

    def _answers(self) -> bool:
        with suppress(ControlError, ValueError):
            return bool(self.status()["pid"] == self.pid)
        return False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def status(self) -> dict[str, Any]:
        """What ``fastlb status --json`` prints."""
        status: dict[str, Any] = call(str(self.socket_path), "status")
        return status

    def reload(self, config: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """``fastlb reload``, after writing the configuration when one is given."""
        if config is not None:
            self.configure(config)
        return fastlb("reload", "--socket", self.socket_path)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit code."""
        self.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended by itself."""
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _end(self) -> None:
        """Nothing of it is left after this."""
        if self._process is not None:
            self.kill()
        for found in within(self.namespace, guard.show):
            within(self.namespace, guard.detach, found.interface)
        for path in self.flow_files():
            path.unlink(missing_ok=True)

    def flow_files(self) -> list[Path]:
        """Where its flow table may be, and where one that was set aside is."""
        with suppress(ConfigError):
            found = flow_places.places(Config.from_dict(self.config))
            return [each for path in found for each in (path, set_aside(path))]
        return []

    def logs(self) -> list[dict[str, Any]]:
        """What it has logged, one dict an event; lines that are not JSON become {"event": line}."""
        return list(map(_parse_line, whole_lines(self.log_path)))

    def show_log(self) -> None:
        """Print what it has logged since the last time; pytest shows that with a test that fails."""
        text = self.log_path.read_text()
        if fresh := text[self._log_shown :]:
            print(f"--- {self.log_path.name} of {self.namespace}\n{fresh}", end="", file=sys.stderr)
        self._log_shown = len(text)


def whole_lines(path: Path) -> list[str]:
    """The lines of a log that are written to their ends."""
    return path.read_text().rpartition("\n")[0].splitlines()


def _parse_line(line: str) -> dict[str, Any]:
    with suppress(ValueError):
        parsed = json.loads(line)
        if isinstance(parsed, dict):
            return parsed
    return {"event": line}


def drops(status: Mapping[str, Any]) -> dict[str, int]:
    """The drops that happened, by reason."""
    return {name: count for name, count in status["counters"]["drops"].items() if count}


def backends(status: Mapping[str, Any], service: str) -> dict[str, dict[str, int]]:
    """The counters of a service's backends, by their key."""
    (found,) = (each for each in status["services"] if each["name"] == service)
    return {each["backend"]: each for each in found["backends"]}


def forget_neighbours(rtnl: IPRoute, version: int) -> None:
    """Delete every dynamic neighbour entry of a namespace."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    for entry in rtnl.get_neighbours(family=family):
        if entry["state"] & NUD_DYNAMIC:
            with suppress(NetlinkError):  # it has just gone by itself
                rtnl.neigh("del", dst=entry.get_attr("NDA_DST"), ifindex=entry["ifindex"])


def snmp() -> dict[str, int]:
    """The calling thread's namespace's IP, ICMP, TCP and UDP counters, as "TcpOutRsts" and "Ip6InReceives"."""
    return dict(_snmp_lines())


def _snmp_lines() -> Iterator[tuple[str, int]]:
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        protocol, *columns = names.split()
        yield from ((protocol.rstrip(":") + name, int(value)) for name, value in
                    zip(columns, values.split()[1:], strict=True))  # fmt: skip
    for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
        name, value = line.split()
        yield name, int(value)
