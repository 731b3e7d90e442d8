"""Reloads while half of the backends come and go: each is answered, the last one holds, memory is flat."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fastlb.control.client import call
from tests.netns.balancer import Balancer, until, within

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "netns-lab"))

from topology import VIPS, Lab, address, own_prefix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

SERVICES, EACH = 20, 10
FIRST_PORT = 20_000  # of the backends, which are ports of one host
EVERY, FLAP = 0.1, 0.25  # seconds
CHECK = {"type": "tcp", "interval": "200ms", "timeout": "200ms", "rise": 1, "fall": 1}
SPARE = 24 << 10  # KiB that a process may grow while it learns how much it needs


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "storm-") as lab:
        yield lab


def settings(lab: Lab, turn: int) -> dict[str, Any]:
    """Services whose backends have another weight in each turn."""
    ports = [FIRST_PORT + number for number in range(SERVICES * EACH)]
    services = [
        {
            "name": f"s{number}", "vip": VIPS["nat", 4], "port": 9000 + number, "protocol": "tcp", "forward": "nat",
            "check": CHECK,
            "backends": [
                {"address": address("b1", "eth0", 4), "port": port, "weight": turn % 100 + 1}
                for port in ports[number * EACH :][:EACH]
            ],
        }
        for number in range(SERVICES)
    ]  # fmt: skip
    return lab.config(workers=1, services=services)


@contextmanager
def flapping(lab: Lab) -> Iterator[None]:
    """Listen on the ports of all backends; those of every other one close and open again, until the block ends."""
    over = threading.Event()

    def listener(port: int) -> socket.socket:
        return socket.create_server(("", port), backlog=64)

    def flap() -> None:
        steady = [listener(FIRST_PORT + number) for number in range(0, SERVICES * EACH, 2)]
        while not over.is_set():
            coming = []
            for number in range(1, SERVICES * EACH, 2):
                with suppress(OSError):
                    coming.append(listener(FIRST_PORT + number))
            over.wait(FLAP)
            for each in coming:
                each.close()
            over.wait(FLAP)
        for each in steady:
            each.close()

    thread = threading.Thread(target=within, args=(lab.namespace("b1"), flap))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def resident(balancer: Balancer) -> int:
    """KiB of memory that the process has."""
    status = Path(f"/proc/{balancer.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.long
def test_reloads_while_backends_flap(lab: Lab, tmp_path: Path, long: bool) -> None:
    """A minute with --long, else a few seconds."""
    seconds = 60.0 if long else 4.0
    with Balancer(lab.namespace("lb"), settings(lab, 0), tmp_path) as balancer, flapping(lab):
        assert until(lambda: {"up", "down"} <= states(balancer))
        began, turn, sizes = time.monotonic(), 0, []
        while time.monotonic() < began + seconds or turn < 10:
            turn += 1
            balancer.configure(settings(lab, turn))
            call(str(balancer.socket_path), "reload")  # raises ControlError for any other answer than yes
            sizes.append(resident(balancer))
            time.sleep(max(0.0, began + turn * EVERY - time.monotonic()))
        assert weights(balancer) == {turn % 100 + 1}
        assert until(lambda: states(balancer) <= {"up", "down"}), "checks have gone on"
        half = sizes[len(sizes) // 2 :]
        assert max(half) < max(sizes[: len(sizes) // 2]) + SPARE, sizes


def states(balancer: Balancer) -> set[str]:
    return {each["state"] for service in balancer.status()["services"] for each in service["backends"]}


def weights(balancer: Balancer) -> set[int]:
    """Of the backends that take flows: one that has just come up has none until it is planned."""
    found = [each for service in balancer.status()["services"] for each in service["backends"]]
    return {each["weight"] for each in found if each["state"] == "up" and each["weight"]}
