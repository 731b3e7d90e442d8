"""path_mtus.py: errors of routers are heard by version, believed about our tunnels, and marked once a tick."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from ipaddress import ip_address

import dpkt
import structlog

from fastlb.daemon.path_mtus import PathMtuErrors
from fastlb.daemon.world import Marks, World
from fastlb.plan.pathmtu import FORGET_AFTER
from tests import hostviews
from tests.balancers import service
from tests.unit.daemon.worlds import reloaded, world_of

OURS, BACKEND, ROUTER = "10.3.0.2", "10.3.0.11", "10.3.0.254"


def tunnel_world() -> World:
    tunnel = service("ipip", name="tun")
    return world_of(tunnel, view=hostviews.view(placed=frozenset({(3, 24, ip_address(OURS))})))


def error(mtu: int, to: str = BACKEND) -> bytes:
    """What a router says of a packet of 1,500 bytes in an IPIP tunnel."""
    packed = {name: ip_address(name).packed for name in (OURS, ROUTER, to)}
    outer = dpkt.ip.IP(p=4, src=packed[OURS], dst=packed[to], len=1500, df=1).pack_hdr()
    said = bytes((3, 4, 0, 0)) + mtu.to_bytes(4, "big") + outer + bytes(8)
    return bytes(dpkt.ip.IP(p=1, src=packed[ROUTER], dst=packed[OURS], data=said))


class Stage:
    """An open part whose sockets are pairs; ``say`` is the router's end."""

    def __init__(self, world: World, versions: tuple[int, ...] = (4, 6)) -> None:
        self.marks, self.stack, self.routers = Marks(), ExitStack(), dict[int, socket.socket]()
        self.versions = versions
        self.part = PathMtuErrors(self.marks, self.listen)
        assert self.part.open(self.stack, world) is world

    def listen(self, version: int) -> socket.socket | None:
        if version not in self.versions:
            return None
        ours, self.routers[version] = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        return ours

    def say(self, *errors: bytes) -> None:
        for each in errors:
            self.routers[4].send(each)
        self.part.hear(4)

    def ticked(self, later: float = 0.0) -> dict[str, int] | None:
        """What a tick marks, by backend."""
        self.part.tick(time.monotonic() + later)
        marked = self.marks.take().path_mtus
        return None if marked is None else {str(backend): mtu for backend, mtu in marked.items()}


def test_what_routers_say_is_marked_once_a_tick() -> None:
    stage = Stage(tunnel_world())
    assert stage.ticked() is None
    with structlog.testing.capture_logs() as logs:
        stage.say(error(1400), error(1300), error(1300, "10.3.0.12"))
        assert not stage.marks.due
        assert stage.ticked() == {BACKEND: 1300, "10.3.0.12": 1300}
        assert stage.ticked() is None
        stage.say(error(1300))  # nothing new
        assert stage.ticked() is None
    lines = [(line["event"], line["backend"], line["mtu"]) for line in logs]
    assert lines == [("the way to a backend is narrower", backend, 1300) for backend in (BACKEND, "10.3.0.12")]


def test_what_is_old_is_forgotten() -> None:
    stage = Stage(tunnel_world())
    stage.say(error(1400))
    assert stage.ticked() == {BACKEND: 1400}
    assert stage.ticked(FORGET_AFTER + 1) == {}
    assert stage.ticked(FORGET_AFTER + 2) is None


def test_only_tunnels_of_this_world_are_believed() -> None:
    before = tunnel_world()
    stage = Stage(before)
    stage.say(error(1400, "10.3.0.99"))
    assert stage.ticked() is None
    stage.part.apply(reloaded(before, service("nat", name="web")))
    stage.say(error(1400))
    assert stage.ticked() is None
    stage.part.apply(before)
    stage.say(error(1400))
    assert stage.ticked() == {BACKEND: 1400}


def test_a_kernel_without_ipv6() -> None:
    stage = Stage(tunnel_world(), versions=(4,))
    assert set(stage.part.listeners) == {4}


def test_listeners_are_closed() -> None:
    stage = Stage(tunnel_world())
    assert set(stage.part.listeners) == {4, 6}
    stage.stack.close()
    assert [each.fileno() for each in stage.part.listeners.values()] == [-1, -1]
