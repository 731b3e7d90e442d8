"""What the parts of lab.py have in common that look at schedulers: slow servers in the backends, and many clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from openloop import SOURCES
from topology import BACKENDS, Lab, LabError, add_address, address

HERE = Path(__file__).resolve().parent
SERVER_PORT = 8090
FIRST_SOURCE = "10.1.0.100"  # of the clients, beside the lab's own
MARGIN = 60.0  # seconds that the last clients may wait for their answers


def add_clients(lab: Lab) -> None:
    """The addresses that clients come from: SOURCES of them, so that a hash of the address alone has what to spread."""
    with lab.rtnl("client") as rtnl:
        for number in range(SOURCES):
            add_address(rtnl, "eth0", f"{ip_address(FIRST_SOURCE) + number}/24")


def start_server(lab: Lab, node: str, milliseconds: float) -> subprocess.Popen[Any]:
    """slowserver.py in a backend, once it listens; raises LabError when it does not."""
    command: list[str | Path] = [sys.executable, HERE / "slowserver.py", node, str(SERVER_PORT), str(milliseconds)]
    server = lab.run(node, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        raise LabError(f"{node}: slowserver.py did not start")
    server.stdout.close()
    return server


def service(name: str, vip: str, port: int, weights: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """A service over these servers, by ``nat``; ``weights`` of the backends by node."""
    backends = [
        {"address": address(node, "eth0", 4), "port": SERVER_PORT, "weight": weights[node]} for node in BACKENDS
    ]
    plain = {"name": name, "vip": vip, "port": port, "protocol": "tcp", "forward": "nat", "backends": backends}
    return plain | more


def clients(vip: str, rate: float, seconds: float, ports: Sequence[int]) -> list[str | Path]:
    """openloop.py's command line."""
    numbers = (str(rate), str(seconds), FIRST_SOURCE, *map(str, ports))
    return [sys.executable, HERE / "openloop.py", vip, *numbers]


def come(lab: Lab, vip: str, rate: float, seconds: float, port: int) -> list[tuple[str, float]]:
    """(backend, milliseconds) of every client of one port. Raises LabError when one got no answer."""
    found = json.loads(lab.check("client", clients(vip, rate, seconds, [port]), seconds + MARGIN))
    if found["failed"]:
        raise LabError(f"{found['failed']} clients got no answer")
    return [(backend, milliseconds) for backend, milliseconds in found["answers"][str(port)]]
