"""Client-IP affinity with real connections: to its clients a site's two ports are one, whichever worker has them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import PATIENCE, Balancer, fastlb, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, address, own_prefix  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

AFFINITY = {"by": "client-ip", "timeout": "300s", "group": "site"}
PORTS = {"nat": {80: 80, 443: 8080}, "dsr": {80: 80, 8080: 8080}}  # of the VIP, and where the servers listen
CLIENTS = 8
LENGTH = {4: 32, 6: 128}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "stick-") as lab:
        yield lab


@pytest.fixture(params=[4, 6])
def clients(lab: Lab, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The client's node has addresses enough for all."""
    first = ip_interface(address("client", "eth0", request.param)).ip
    addresses = [str(first + 16 + number) for number in range(CLIENTS)]
    with lab.rtnl("client") as rtnl:
        [index] = rtnl.link_lookup(ifname="eth0")
        for each in addresses:
            rtnl.addr("add", index=index, address=each, prefixlen=LENGTH[request.param], flags=0x02)  # without DAD
    with lab.rtnl("router") as rtnl:
        for each in addresses:
            rtnl.route("add", dst=f"{each}/{LENGTH[request.param]}", gateway=str(first))
    yield addresses
    with lab.rtnl("router") as rtnl:
        for each in addresses:
            rtnl.route("del", dst=f"{each}/{LENGTH[request.param]}", gateway=str(first))
    with lab.rtnl("client") as rtnl:
        for each in addresses:
            rtnl.addr("del", index=index, address=each, prefixlen=LENGTH[request.param])


def config(lab: Lab, forward: str, version: int, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Both services by turns, which alone would part any client's connections."""
    kept = [address(node, "eth0", version) for node in BACKENDS if node not in without]
    services = [
        {
            "name": f"site-{port}", "vip": VIPS[forward, version], "port": port, "protocol": "tcp", "forward": forward,
            "scheduler": "rr", "affinity": AFFINITY,
            "backends": [{"address": each} | ({"port": behind} if port != behind else {}) for each in kept],
        }
        for port, behind in PORTS[forward].items()
    ]  # fmt: skip
    return lab.config(workers=2, services=services)


def ask(lab: Lab, client: str, vip: str, port: int) -> str:
    """The name of the backend that answers a new connection."""
    with closing(within(
        lab.namespace("client"), socket.create_connection, (vip, port), PATIENCE, (client, 0)
    )) as opened:  # fmt: skip
        opened.sendall(b"GET / HTTP/1.0\r\nHost: lab\r\n\r\n")
        answer = b""
        while more := opened.recv(4096):
            answer += more
    return answer.partition(b"\r\n\r\n")[2].decode().split()[0]


def placed(lab: Lab, forward: str, clients: list[str]) -> dict[str, str]:
    """Who has each client, whichever port it connects to, again and again."""
    vip = VIPS[forward, 6 if ":" in clients[0] else 4]
    found = {}
    for number, client in enumerate(clients):
        ports = list(PORTS[forward])[:: 1 if number % 2 else -1]
        names = {ask(lab, client, vip, port) for port in (*ports, *ports, *ports)}
        assert len(names) == 1
        found[client] = names.pop()
    return found


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_site_of_two_ports(lab: Lab, tmp_path: Path, clients: list[str], forward: str) -> None:
    version = 6 if ":" in clients[0] else 4
    with Balancer(lab.namespace("lb"), config(lab, forward, version), tmp_path) as balancer:
        before = placed(lab, forward, clients)
        assert len(set(before.values())) > 1
        assert placed(lab, forward, clients) == before
        assert balancer.status()["affinity"]["clients"] == CLIENTS
        assert balancer.status()["counters"]["affine"] == CLIENTS * 11
        shown = fastlb("status", "--socket", balancer.socket_path).stdout
        assert f"affinity {CLIENTS} clients remembered, room for 65536; {CLIENTS * 11} new flows by affinity" in shown

        gone = before[clients[0]]
        assert balancer.reload(config(lab, forward, version, without=(gone,))).returncode == 0
        after = placed(lab, forward, clients)
        assert gone not in after.values()
        assert {client: name for client, name in after.items() if before[client] != gone} == {
            client: name for client, name in before.items() if name != gone
        }

        left = after[clients[0]]
        port, behind = next(iter(PORTS[forward].items()))
        host = address(left, "eth0", version)
        key = f"[{host}]:{behind}" if version == 6 else f"{host}:{behind}"
        drained = fastlb("drain", f"site-{port}", key, "--socket", balancer.socket_path)
        assert drained.returncode == 0, drained.stderr
        name = ask(lab, clients[0], VIPS[forward, version], port)
        assert name not in (gone, left)
        assert placed(lab, forward, clients[:1]) == {clients[0]: name}  # the other port follows
