"""host.py: views are handed over to the loop, next hops and clients asked for, links and lost backends told of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
import structlog

from fastlb.daemon.host import ASKED_FOR, MAX_ASKED, Host
from fastlb.daemon.world import DataPath, Marks, World
from fastlb.errors import KernelError
from fastlb.model.hostview import KernelView, NextHop
from tests import hostviews
from tests.balancers import service
from tests.unit.daemon.worlds import CHECKED, KEYS, followed, with_backend, world_of

VIEW = hostviews.view()


class FakeMirror:
    """A mirror that tells when it is told to."""

    def __init__(self, tell: Callable[[KernelView], None]) -> None:
        self.tell = tell
        self.wanted: list[set[NextHop]] = []
        self.closed = False

    def start(self) -> KernelView:
        return VIEW

    def want(self, next_hops: Iterable[NextHop]) -> None:
        self.wanted.append(set(next_hops))

    def close(self) -> None:
        self.closed = True


class FakePipeline:
    """A pipeline that packets to some clients have met."""

    def __init__(self) -> None:
        self.unresolved: set[NextHop] = set()

    def take_unresolved(self) -> set[NextHop]:
        found, self.unresolved = self.unresolved, set()
        return found


class Stage:
    """A host without a kernel; what is handed over to the event loop waits in ``handed``."""

    def __init__(self, world: World | None = None) -> None:
        self.handed: list[Callable[[], None]] = []
        self.claims: list[str] = []
        self.woken = 0
        self.marks, self.stack = Marks(wake=self.wake), ExitStack()
        self.pipelines: list[Any] = [FakePipeline(), FakePipeline()]
        self.host = Host(DataPath(self.pipelines), self.marks, self.handed.append, self.make, self.claim)
        if world is not None:
            assert self.host.open(self.stack, world) is world

    def wake(self) -> None:
        self.woken += 1

    def make(self, tell: Callable[[KernelView], None]) -> FakeMirror:
        self.mirror = FakeMirror(tell)
        return self.mirror

    @contextmanager
    def claim(self, interface: str) -> Iterator[None]:
        if interface == "taken":
            raise KernelError("a running fastlb uses taken")
        self.claims.append(interface)
        yield
        self.claims.remove(interface)

    def applied(self, world: World) -> list[tuple[str, str]]:
        with structlog.testing.capture_logs() as logs:
            self.host.apply(world)
        return [(line["event"], line.get("interface") or line.get("problem", "")) for line in logs]


def test_interfaces_are_claimed_until_the_end() -> None:
    stage = Stage()
    stage.host.claim_interfaces(stage.stack, ["eth0", "eth1"])
    assert stage.claims == ["eth0", "eth1"]
    with pytest.raises(KernelError, match="a running fastlb uses taken"):
        stage.host.claim_interfaces(stage.stack, ["taken"])
    stage.stack.close()
    assert stage.claims == []


def test_the_mirror_runs_until_the_end() -> None:
    stage = Stage()
    assert stage.host.start(stage.stack) is VIEW
    assert not stage.mirror.closed
    stage.stack.close()
    assert stage.mirror.closed


def test_a_new_view_is_marked_within_the_event_loop() -> None:
    """The mirror's own thread marks nothing."""
    stage, later = Stage(), hostviews.view(routes=())
    stage.mirror.tell(VIEW)
    stage.mirror.tell(later)
    assert (stage.marks.due, stage.woken) == (False, 0)
    for function in stage.handed:
        function()
    assert (stage.marks.view, stage.woken) == (later, 2)


def test_next_hops_are_wanted() -> None:
    world = world_of()
    stage = Stage(world)
    assert stage.mirror.wanted == [world.ways.next_hops]
    down = hostviews.view(routes=())
    assert stage.applied(followed(world, view=down)) == []
    assert stage.mirror.wanted[1:] == [set()]


def test_states_of_backends_ask_the_kernel_nothing() -> None:
    world = world_of(service("nat", name="web", **CHECKED))
    stage = Stage(world)
    stage.applied(with_backend(world, KEYS[0], "down"))
    assert len(stage.mirror.wanted) == 1


def test_clients_that_packets_could_not_reach() -> None:
    """Of all workers; each is asked for once, and let go of when it has been for long."""
    world = world_of()
    stage = Stage(world)
    clients = [(2, ip_address(f"10.2.0.{number}")) for number in (21, 22)]
    for pipeline, client in zip(stage.pipelines, clients, strict=True):
        pipeline.unresolved = {client}
    stage.host.tick(10.0)
    assert stage.mirror.wanted[1:] == [world.ways.next_hops | set(clients)]
    stage.pipelines[0].unresolved = {clients[1]}
    stage.host.tick(10.0 + ASKED_FOR)
    assert len(stage.mirror.wanted) == 2
    stage.host.tick(10.1 + ASKED_FOR)
    assert stage.mirror.wanted[2:] == [world.ways.next_hops]


def test_forged_clients_do_not_fill_the_kernel_s_table() -> None:
    world = world_of()
    stage = Stage(world)
    first = ip_address("10.2.16.0")
    for turn, pipeline in enumerate(stage.pipelines):
        pipeline.unresolved = {(2, first + turn * MAX_ASKED + number) for number in range(MAX_ASKED)}
        stage.host.tick(10.0 + turn)
        assert len(stage.mirror.wanted[-1] - world.ways.next_hops) == MAX_ASKED
    stage.host.tick(10.1 + ASKED_FOR)
    stage.pipelines[0].unresolved = {(2, ip_address("10.2.99.1"))}
    stage.host.tick(10.2 + ASKED_FOR)
    assert (2, ip_address("10.2.99.1")) in stage.mirror.wanted[-1]


def with_link(view: KernelView, index: int, up: bool) -> KernelView:
    return replace(view, links={**view.links, index: replace(view.links[index], up=up)})


def test_links_that_go_down_and_come_up_are_told_of_once() -> None:
    """Interfaces that are not configured are nobody's concern; one that is gone is the packet path's."""
    world = world_of()
    stage = Stage(world)
    down = followed(world, view=with_link(with_link(VIEW, 3, False), 5, False))
    assert stage.applied(down) == [("interface is down", "eth1")]
    assert stage.applied(followed(down, path_mtus={})) == []
    assert stage.applied(followed(down, view=VIEW)) == [("interface is up", "eth1")]
    gone = hostviews.view(links={index: link for index, link in VIEW.links.items() if link.name != "eth1"})
    assert stage.applied(followed(down, view=gone)) == []


def test_backends_that_go_out_of_reach_are_told_of_once() -> None:
    world = world_of(service("dsr", name="web", backends=[{"address": "10.3.0.11"}]))
    stage = Stage(world)
    routed = tuple(route for route in VIEW.routes if str(route.prefix) != "10.3.0.0/24")
    lost = followed(world, view=hostviews.view(routes=routed))
    ((event, problem),) = stage.applied(lost)
    assert (event, "10.3.0.11" in problem) == ("backend unreachable", True)
    assert stage.applied(followed(lost, path_mtus={})) == []
    assert stage.applied(followed(lost, view=VIEW)) == [("every dsr backend is on-link again", "")]
