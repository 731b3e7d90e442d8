"""The forwarders that are measured, as processes on the balancer's host: `fastlb run`, and the reflector."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml
from rig import PORT, VIP, Rig, cores

HERE = Path(__file__).resolve().parent
START_TIMEOUT = 20.0  # seconds
STOP_TIMEOUT = 10.0


BLOCKS = 64  # of a ring, fastlb's default


class ForwarderError(Exception):
    """A forwarder does not start, or ends with an error; the message is its log."""


class Place(Protocol):
    """Where forwarders run: the lab of netns-lab/, or the rig of rig.py."""

    run_dir: Path

    def run(self, node: str, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process in a namespace."""


@contextmanager
def fastlb(place: Place, config: Path, socket: Path) -> Iterator[dict[str, Any]]:
    """`fastlb run` with a configuration, which names the control socket; what it says of itself once it runs."""
    answers: list[dict[str, Any]] = []

    def is_ready() -> bool:
        answers.extend(status(socket))
        return bool(answers)

    with running(place, command_line("run", "-c", config), "fastlb.log", is_ready):
        yield answers[0]


@contextmanager
def reflector(place: Place, way_out: str, reflect: Sequence[str], take: Sequence[str], *more: str) -> Iterator[None]:
    """The yardstick; see reflector.py for the arguments."""
    program: list[str | Path] = [sys.executable, HERE / "reflector.py"]
    command = [*program, way_out, "--reflect", *reflect, "--take", *take, *more]
    log = "reflector.log"
    with running(place, command, log, lambda: "ready" in place.run_dir.joinpath(log).read_text()):
        yield


@contextmanager
def fastlb_on(rig: Rig, blocks: int = BLOCKS) -> Iterator[None]:
    """One worker of `fastlb run` in the rig, on the core that is meant for it."""
    config = rig.run_dir / "fastlb.yaml"
    config.write_text(yaml.safe_dump(rig.config(ring={"blocks": blocks})))
    with fastlb(rig, config, rig.socket_path) as answer:
        (worker,) = answer["workers"]
        if worker["core"] != cores()[1]:
            raise ForwarderError(f"fastlb's worker is on core {worker['core']}, not {cores()[1]}")
        yield


@contextmanager
def reflector_on(rig: Rig, way_out: str, blocks: int = BLOCKS) -> Iterator[None]:
    """The reflector in the rig, on the same core."""
    more = ("--core", str(cores()[1]), "--blocks", str(blocks))
    reflect, take = f"in0:out0:{rig.macs['s0'].hex(':')}", f"{VIP}:{PORT}/udp"
    with reflector(rig, way_out, [reflect], [take], *more):
        yield


@contextmanager
def running(place: Place, command: Sequence[str | Path], log: str, is_ready: Callable[[], bool]) -> Iterator[None]:
    """A process in the balancer's namespace, ended with SIGTERM. Raises ForwarderError with its log when it fails."""
    path = place.run_dir / log
    with path.open("wb") as out:
        process = place.run("lb", command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=HERE.parent)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ForwarderError(f"{log.partition('.')[0]} did not start: {path.read_text().strip()}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT)
    if code != 0:
        raise ForwarderError(f"{log.partition('.')[0]} ended with exit code {code}: {path.read_text().strip()}")


def command_line(*words: str | Path) -> list[str | Path]:
    """This environment's fastlb command."""
    return [sys.executable, "-m", "fastlb", *words]


def status(socket: Path) -> list[dict[str, Any]]:
    """What a running fastlb says of itself; empty while it does not answer."""
    command = command_line("status", "--json", "--socket", socket)
    answer = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=10)
    return [json.loads(answer.stdout)] if answer.returncode == 0 else []
