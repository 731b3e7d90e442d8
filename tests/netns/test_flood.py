"""A flood of SYNs from random sources beside connections that stay: none is lost, and the table stays bounded."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from tests.frames import ROUTER_MAC, frame
from tests.netns.balancer import PATIENCE
from tests.netns.namespaces import Namespace
from tests.netns.rig import BACKEND, CLIENT, CORES, PORT, VIP, WORKERS, Rig, make_rig, settled

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from generator import open_sender, send  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
    pytest.mark.skipif(len(CORES) < 2, reason="needs two processor cores"),
]

REAL_CLIENT = "10.9.0.3"  # one that a kernel holds
CONNECTIONS = 100
SOURCES = 40_000  # different frames, each sent at least twice
SECONDS = 2.5
FLOWS = 2000
SOURCE_AT, PORT_AT = 26, 34  # of the client's address and port in a frame


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """With a client and a server whose kernels talk to each other."""
    for made in make_rig(WORKERS):
        made.client_side.add_address("c0", f"{REAL_CLIENT}/24")
        place = {"dst": REAL_CLIENT, "lladdr": ROUTER_MAC, "ifindex": made.host.index("l0"), "state": "permanent"}
        made.host.rtnl(methodcaller("neigh", "replace", **place))
        made.client_side.add_route(f"{VIP['nat', 4]}/32", "10.9.0.2")
        made.server_side.add_route("10.9.0.0/24", "10.8.0.2")
        yield made


def syns() -> list[bytes]:
    """From random addresses and ports. The checksum of TCP is wrong, which nobody on the way looks at."""
    dice = random.Random(1)
    made = bytearray(frame(CLIENT[4], 1, VIP["dsr", 4], PORT))
    frames = []
    for _ in range(SOURCES):
        made[SOURCE_AT : SOURCE_AT + 4] = bytes([100]) + dice.randbytes(3)
        made[PORT_AT : PORT_AT + 2] = dice.randbytes(2)
        frames.append(bytes(made))
    return frames


@contextmanager
def echoes(namespace: Namespace, *words: object) -> Iterator[subprocess.Popen[str]]:
    """echoes.py in a namespace, from when it is ready; ended by its own number."""
    command = [sys.executable, str(LAB_DIR / "echoes.py"), *map(str, words)]
    child = namespace.run(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert next_line(child) == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def next_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    assert select.select([child.stdout], [], [], 2 * PATIENCE)[0], "it says nothing"
    return child.stdout.readline()


def held(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What came of the connections, which end here."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    found: dict[str, Any] = json.loads(next_line(child))
    return found


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_connections_live_through_a_flood(rig: Rig, tmp_path: Path, workers: int) -> None:
    balancer = rig.balancer(tmp_path, workers=workers, flows=FLOWS)
    with balancer, echoes(rig.server_side, "serve", PORT), rig.client_side.run(open_sender, "c0") as sender:
        rig.reach(balancer, ("nat", 4), ("dsr", 4))
        with echoes(rig.client_side, "hold", VIP["nat", 4], PORT, CONNECTIONS, "--interval", 0.5) as client:
            sent = send(sender, syns(), SECONDS, 20 * SOURCES)
            found = held(client)
        status = settled(balancer)
    assert sent["frames"] > 2 * SOURCES
    assert found["held"] == CONNECTIONS
    assert found["lost"] == 0, found
    assert found["echoes"] >= 2 * CONNECTIONS
    by_name = {each["name"]: each for each in status["services"]}
    flooded, steady = by_name["dsr-4-tcp"], by_name["nat-4-tcp"]
    assert flooded["paths"]["overload"] > SOURCES
    assert not flooded["drops"]
    assert not steady["drops"]
    assert status["flows"]["active"] <= FLOWS + CONNECTIONS
    assert status["counters"]["flows_evicted"] == status["counters"]["flows_untracked"] == 0
    assert [each["backend"] for each in steady["backends"]] == [f"{BACKEND[4]}:{PORT}"]
    assert sum(each["new_flows"] for each in steady["backends"]) >= CONNECTIONS
