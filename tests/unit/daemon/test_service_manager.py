"""service_manager.py: what systemd hears, on a real datagram socket, and when."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog

from fastlb.daemon.service_manager import STATUS_EVERY, ServiceManager, sender
from tests.balancers import service
from tests.unit.daemon.worlds import CHECKED, KEYS, with_backend, world_of

WEB = service("nat", name="web", **CHECKED)

Heard = Callable[[], list[list[str]]]


@pytest.fixture(params=["path", "abstract"])
def heard(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Be a service manager; return the lines of each message that has come since it was asked last."""
    address = str(tmp_path / "notify")
    name = address if request.param == "path" else "\0" + address
    monkeypatch.setenv("NOTIFY_SOCKET", address if request.param == "path" else "@" + address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.setblocking(False)

        def messages() -> list[list[str]]:
            found = []
            while True:
                try:
                    found.append(listener.recv(4096).decode().split("\n"))
                except BlockingIOError:
                    return found

        yield messages


def test_from_the_start_to_the_end(heard: Heard) -> None:
    """It is not ready before the first tick, and tells of the end before anything else is taken down."""
    manager, world = ServiceManager(), world_of(WEB)
    manager.waits(["eth0", "eth1"])
    assert heard() == [["STATUS=Waiting for interface eth0 and eth1"]]
    with ExitStack() as stack:
        stack.callback(lambda: ended.extend(heard()))
        ended: list[list[str]] = []
        assert manager.open(stack, world) is world
        assert heard() == []
        manager.tick(0.0)
        assert heard() == [["READY=1", f"STATUS=Balancing: services 1, backends {len(KEYS)}"]]
        manager.tick(100.0)
        assert heard() == []
    assert ended == [["STOPPING=1", "STATUS=Stopping"]]


def test_the_status_follows_the_backends(heard: Heard) -> None:
    """Not more often than it says, and only when it is another one."""
    manager, world = ServiceManager(), world_of(WEB)
    with ExitStack() as stack:
        manager.open(stack, world)
        manager.tick(0.0)
        heard()
        world = with_backend(world, KEYS[0], "down")
        manager.apply(world)
        manager.tick(STATUS_EVERY / 2)
        assert heard() == []
        manager.tick(STATUS_EVERY)
        assert heard() == [[f"STATUS=Balancing: services 1, backends {len(KEYS)}, down 1"]]
        world.states.drain(("web", KEYS[1]), None)
        manager.apply(world)
        manager.tick(2 * STATUS_EVERY)
        assert heard() == [[f"STATUS=Balancing: services 1, backends {len(KEYS)}, down 1, draining 1"]]
        manager.apply(world)
        manager.tick(3 * STATUS_EVERY)
        assert heard() == []


def test_reloads(heard: Heard) -> None:
    """With the time of the beginning, by which systemd tells one from another; ready again after the last of them."""
    manager = ServiceManager()
    before = time.monotonic_ns() // 1000
    with manager.reloading():
        (begun,) = heard()
        with manager.reloading():
            assert len(heard()) == 1
        assert heard() == []
    assert heard() == [["READY=1"]]
    assert begun[0] == "RELOADING=1"
    assert before <= int(begun[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_reload_that_is_refused(heard: Heard) -> None:
    """The balancer goes on as it was, and is as ready."""
    manager = ServiceManager()
    with pytest.raises(KeyError), manager.reloading():
        raise KeyError
    assert [lines[0] for lines in heard()] == ["RELOADING=1", "READY=1"]


@pytest.mark.parametrize("address", ["", "vsock:2:1"])
def test_nobody_wants_to_know(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert sender(address) is None
    manager, world = ServiceManager(), world_of(WEB)
    with ExitStack() as stack, structlog.testing.capture_logs() as logs:
        manager.open(stack, world)
        manager.tick(0.0)
        with manager.reloading():
            manager.apply(world)
    assert logs == []


def test_a_manager_that_has_gone_costs_a_line(tmp_path: Path) -> None:
    send = sender(str(tmp_path / "none"))
    assert send is not None
    with structlog.testing.capture_logs() as logs:
        send("READY=1")
    assert [(line["event"], line["error"]) for line in logs] == [
        ("the service manager was not told", "No such file or directory")
    ]
