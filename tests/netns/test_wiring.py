"""Backends that pass their checks, and that no client gets through to: what status, trace and the log say of them.

One lab, in which the first backend's way to clients leads past the balancer: IPv4 and IPv6.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.netns.balancer import Balancer, backends, fastlb, until, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import APPLICATIONS, BACKENDS, BRIDGE, Lab, address, own_prefix, service  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

WEB, ASTRAY = APPLICATIONS[0], BACKENDS[0]
SILENCE = "no replies through this host"
CHECK = {"type": "tcp", "interval": "200ms", "timeout": "200ms", "rise": 1}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "wired-") as lab:
        for version, default in ((4, "0.0.0.0/0"), (6, "::/0")):
            with lab.rtnl(ASTRAY) as rtnl:
                rtnl.route("replace", dst=default, gateway=address("router", BRIDGE, version))
        yield lab


@pytest.fixture(scope="module")
def running(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    web = [service(WEB, "nat", version) | {
        "check": CHECK, "scheduler": "rr", "affinity": {"by": "client-ip"}} for version in (4, 6)]  # fmt: skip
    with Balancer(lab.namespace("lb"), lab.config(workers=1, services=web), tmp_path_factory.mktemp("wired")) as one:
        yield one


def attempt(vip: str) -> bool:
    with suppress(OSError), socket.create_connection((vip, WEB.port), 0.3):
        return True
    return False


@pytest.mark.parametrize("version", [4, 6])
def test_a_backend_whose_replies_go_past_this_host(lab: Lab, balancer: Balancer, version: int) -> None:
    web = service(WEB, "nat", version)
    host = address(ASTRAY, "eth0", version)

    def astray() -> dict[str, object]:
        return next(each for key, each in backends(balancer.status(), web["name"]).items() if host in key)

    assert until(lambda: {each["state"] for each in backends(balancer.status(), web["name"]).values()} == {"up"})
    connected = []

    def is_told() -> bool:
        connected.append(within(lab.namespace("client"), attempt, web["vip"]))
        return astray()["problem"] == SILENCE

    assert until(is_told)
    found = astray()
    assert (found["state"], found["answered_flows"], found["reply_packets"]) == ("up", 0, 0)
    shown = fastlb("status", "--socket", balancer.socket_path).stdout
    assert f"up, {SILENCE}" in shown
    warnings = [line for line in balancer.logs() if line["event"] == SILENCE and host in line["backend"]]
    assert len(warnings) == 1
    others = [each for key, each in backends(balancer.status(), web["name"]).items() if host not in key]
    assert {each["problem"] for each in others} == {None}
    # A client that could not connect is not bound: it gets another backend, and stays there.
    assert until(lambda: within(lab.namespace("client"), attempt, web["vip"]))
    assert all(within(lab.namespace("client"), attempt, web["vip"]) for _ in range(5))


def test_an_interface_that_replies_need(lab: Lab, balancer: Balancer, tmp_path: Path) -> None:
    """An error on this host; the file alone says nothing of it."""
    other = Balancer(lab.namespace("lb"), balancer.config | {"interfaces": ["eth0"]}, tmp_path)
    assert fastlb("check", "-c", other.config_path).returncode == 0
    refused = fastlb("check", "--host", "-c", other.config_path, namespace=lab.namespace("lb"))
    assert refused.returncode == 1
    assert "is reached by eth1, which is not among the interfaces" in refused.stderr


def test_dsr_on_the_host_that_holds_the_vip(lab: Lab, tmp_path: Path) -> None:
    """With the balancer as its backends' gateway, which is the only one that it knows there."""
    config = lab.config(workers=1, services=[service(WEB, "dsr", 4)], vip_address="interface")
    other = Balancer(lab.namespace("lb"), config, tmp_path)
    found = fastlb("check", "--host", "-c", other.config_path, namespace=lab.namespace("lb"))
    assert found.returncode == 0
    assert "note: replies may be lost: " in found.stdout
