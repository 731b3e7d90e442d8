"""The shipped unit under a real systemd: it waits, it is ready when it says so, and a restart hands over."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastlb.control.client import call
from fastlb.kernel import guard
from fastlb.workers import flow_places
from tests.netns import systemd
from tests.netns.balancer import ROOT, until, within
from tests.netns.systemd import Systemd

sys.path.insert(0, str(ROOT / "netns-lab"))
from topology import VIPS, Lab, own_prefix

pytestmark = pytest.mark.skipif(systemd.missing() is not None, reason=str(systemd.missing()))

VIP = VIPS["nat", 4]
CONNECTIONS = 12
BALANCING = "Balancing: services 1, backends 3"
REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "unit-") as lab:
        yield lab


class Service:
    """The unit, and the file that it reads."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.path = lab, folder / "fastlb.yaml"
        self.systemd = Systemd(folder, lab.namespace("lb"), self.path)
        self.socket = self.systemd.runtime / "fastlb/fastlb.sock"
        services = [{**each, "scheduler": "rr"} for each in lab.config()["services"] if each["name"] == "web-nat-4"]
        self.config = lab.config(workers=1, flows=20_000, services=services, control=str(self.socket))
        self.elsewhere = str(self.socket.with_name("elsewhere.sock"))
        self.first = self.config
        self.write()

    def write(self, **changes: Any) -> None:
        self.config = {**self.config, **changes}
        self.path.write_text(yaml.safe_dump(self.config))

    def spoil(self) -> None:
        self.path.write_text(self.path.read_text() + "services: [\n")

    def does(self, *words: str) -> bool:
        """Whether systemctl says that it has worked."""
        return self.systemd.control(*words, "fastlb").returncode == 0

    def answer(self) -> dict[str, Any]:
        status: dict[str, Any] = call(self.config["control"], "status")
        return status


@pytest.fixture(scope="module")
def unit(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(lab, tmp_path_factory.mktemp("unit"))
    try:
        with service.systemd:
            yield service
    finally:
        for found in within(lab.namespace("lb"), guard.show):
            within(lab.namespace("lb"), guard.detach, found.interface)
        within(lab.namespace("lb"), lambda: flow_places.remove_files(flow_places.left_files()))


@pytest.fixture
def service(unit: Service) -> Service:
    """The unit, with a file that is right."""
    unit.write(**unit.first)
    return unit


@pytest.fixture
def running(service: Service) -> Service:
    """It runs, as it does after most tests."""
    assert service.does("start")
    return service


def test_it_is_started_when_it_balances(running: Service) -> None:
    """Its status says what it does."""
    assert running.lab.client("fetch", VIP, "--count", 20)["answered"] == 20
    state = running.systemd.show("ActiveState", "SubState", "StatusText", "MainPID")
    assert state == ["active", "running", BALANCING, str(running.answer()["pid"])]


def test_reloads(running: Service) -> None:
    """They return when the file holds, fail when it is refused, and ask the process that runs, whatever it says."""
    (web,) = running.config["services"]
    running.write(services=[web, {**web, "name": "more", "port": 81}])
    assert running.does("reload")
    assert [each["name"] for each in running.answer()["services"]] == ["web-nat-4", "more"]
    running.write(services=[web], control=running.elsewhere)
    assert not running.does("reload")
    running.spoil()
    assert not running.does("reload")
    running.write(control=str(running.socket))
    assert len(running.answer()["services"]) == 2
    assert running.systemd.show("ActiveState", "SubState", "NRestarts") == ["active", "running", "0"]
    assert running.does("reload")
    assert until(lambda: running.systemd.show("StatusText") == [BALANCING])


class Connections:
    """Connections of a client that stay open, each with the backend that it has."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        def connect() -> list[socket.socket]:
            return [socket.create_connection((VIP, 80), timeout=30.0) for _ in range(CONNECTIONS)]

        self._open = [stack.enter_context(each) for each in within(lab.namespace("client"), connect)]

    def backends(self) -> list[str]:
        """Ask on each connection who answers."""
        for each in self._open:
            each.sendall(REQUEST)
        return [self._answer(each) for each in self._open]

    def _answer(self, connection: socket.socket) -> str:
        got = b""
        while not got.endswith(b"\n") or b"\r\n\r\n" not in got or not got.partition(b"\r\n\r\n")[2]:
            got += connection.recv(4096)
            assert got, "the connection was closed"
        return got.partition(b"\r\n\r\n")[2].split()[0].decode()


def unchanged(service: Service) -> None:
    """A restart of what is there."""
    assert service.does("restart")


def control_moved(service: Service) -> None:
    """A restart with the file edited."""
    service.write(control=service.elsewhere)
    assert service.does("restart")


def broken_and_mended(service: Service) -> None:
    """A restart with a file that is not valid, which is not tried again, and a start when it is."""
    service.spoil()
    assert not service.does("restart")
    state = service.systemd.show("ActiveState", "Result", "ExecMainStatus", "NRestarts")
    assert state == ["failed", "exit-code", "2", "0"]
    service.write()
    assert service.does("start")


def test_restarts_keep_connections(running: Service) -> None:
    """Whatever has become of the file since it was read."""
    with ExitStack() as stack:
        connections = Connections(running.lab, stack)
        before = connections.backends()
        assert len(set(before)) == 3
        for change in (unchanged, control_moved, broken_and_mended):
            pid = running.answer()["pid"]
            change(running)
            assert running.answer()["pid"] != pid
            assert connections.backends() == before, change.__name__


def test_a_stop_hands_over(running: Service) -> None:
    """It is a clean end, and leaves guard and flows."""
    assert running.does("stop")
    assert running.systemd.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert [each.interface for each in within(running.lab.namespace("lb"), guard.show)] == ["eth0", "eth1"]
    assert [each.state for each in within(running.lab.namespace("lb"), flow_places.left_files)] == ["left over"]


def test_an_interface_that_comes_late(service: Service) -> None:
    """The start waits for it. A stop while it waits leaves what another process has left."""
    service.does("stop")
    service.write(interfaces=["eth0", "eth1", "late0"])
    for stops in (True, False):
        assert service.does("start", "--no-block")
        assert until(lambda: service.systemd.show("StatusText") == ["Waiting for interface late0"])
        assert service.systemd.show("ActiveState") == ["activating"]
        if stops:
            assert service.does("stop")
            assert service.systemd.show("ActiveState", "Result") == ["inactive", "success"]
            (left,) = within(service.lab.namespace("lb"), flow_places.left_files)
            assert left.state == "left over"
    with service.lab.rtnl("lb") as rtnl:
        rtnl.link("add", ifname="late0", kind="veth", peer={"ifname": "late1"})
        assert service.does("start")
        assert service.systemd.show("ActiveState", "NRestarts") == ["active", "0"]
        assert service.answer()["interfaces"] == ["eth0", "eth1", "late0"]
