"""packet_path.py: guards and workers follow the host's links, dead workers are replaced, stuck ones end it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any, NoReturn

import pytest
import structlog

from fastlb.daemon import packet_path
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.packet_path import MAX_REPLACEMENTS, REPLACED_WITHIN, PacketPath
from fastlb.daemon.world import World
from fastlb.errors import KernelError
from fastlb.kernel import cpus
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.hostview import KernelView, Link
from tests import ebpf_machine, hostviews
from tests import fake_route as fakes
from tests.balancers import service
from tests.ebpf_machine import BpfKernel
from tests.fake_route import FakeRoute
from tests.unit.daemon.worlds import data_path_of, followed, reloaded, world_of

bpf_kernel, fake_route = ebpf_machine.bpf_kernel, fakes.fake_route
LINKS = hostviews.LINKS
WEB = service("nat", name="web")


class Left(Exception):
    """Stands for the end of the process."""


class FakeWorkers:
    """Workers whose threads do as the test says."""

    def __init__(self, *given: Any) -> None:
        self.config, self.pipelines, self.classifier, self.cores, links, self.open_blocks = given[:6]
        self.give_up: Callable[[Sequence[int]], NoReturn] = given[6]
        self.links, self.earlier = dict(links), list(given[7])
        self.done: list[str] = []
        self.died: list[int] = []
        self.stand: list[int] = []
        self.offloaded: Sequence[int] = ()

    def start(self, view: KernelView, links_out: set[int]) -> None:
        self.done.append("start")

    def close(self) -> None:
        self.done.append("close")

    def poll(self, view: KernelView, links_out: set[int]) -> None:
        self.done.append("poll")

    def offload_tunnels(self, links: Sequence[int]) -> None:
        self.offloaded = links

    def dead(self) -> list[int]:
        return self.died

    def stuck(self) -> list[int]:
        return self.stand

    def totals(self) -> list[dict[str, int]]:
        return [{"transmitted": 7}]

    def counters(self) -> dict[str, int]:
        return {"transmitted": 7}

    def transmit_paths(self, view: KernelView, links_out: set[int]) -> dict[str, str]:
        return dict.fromkeys(self.links, "sendmmsg")

    def describe(self, pipelines: object, view: KernelView, links_out: set[int]) -> list[dict[str, Any]]:
        return [{"core": core} for core in self.cores.workers]


class Stage:
    """An open packet path on a host without a kernel."""

    def __init__(self, route: FakeRoute, world: World, workers: int = 1) -> None:
        self.route, self.world, self.lifecycle, self.stack = route, world, Lifecycle(), ExitStack()
        self.made: list[FakeWorkers] = []
        self.refused: KernelError | None = None
        self.abandoned = 0
        self.data_path = data_path_of(world, workers)
        self.data_path.classifier = self.stack.enter_context(Classifier(workers))
        cores = cpus.plan(range(workers + 1), workers)
        self.part = PacketPath(
            self.data_path, self.lifecycle, cores, self.abandon, self.make, lambda *_: True, self.leave
        )
        assert self.part.open(self.stack, world) is world

    def make(self, *given: Any) -> Any:
        if self.refused is not None:
            raise self.refused
        self.made.append(FakeWorkers(*given))
        return self.made[-1]

    def abandon(self) -> None:
        self.abandoned += 1

    def leave(self, status: int) -> NoReturn:
        raise Left(status)

    @property
    def workers(self) -> FakeWorkers:
        return self.made[-1]

    def links(self, *links: Link) -> list[str]:
        """Apply a view with these links only; return what is logged."""
        self.world = followed(self.world, view=hostviews.view(links={link.index: link for link in links}))
        with structlog.testing.capture_logs() as logs:
            self.part.apply(self.world)
        return [line["event"] for line in logs]

    def guards(self) -> set[str]:
        return {self.route.links[each.index] for each in self.route.filters if each.index in self.route.links}


@pytest.fixture
def stage(fake_route: FakeRoute, bpf_kernel: BpfKernel) -> Iterator[Stage]:
    staged = Stage(fake_route, world_of(WEB))
    yield staged
    staged.stack.close()


GONE, NEW = "interface is gone; waiting for it", "an interface is new; opening the rings again"


def test_guards_and_workers_from_the_start_to_the_end(fake_route: FakeRoute, bpf_kernel: BpfKernel) -> None:
    stage = Stage(fake_route, world_of(WEB), workers=2)
    assert stage.guards() == {"eth0", "eth1"}
    assert {each.program for each in fake_route.filters} == {stage.data_path.programs.guard_fd}
    assert stage.workers.links == {"eth0": 2, "eth1": 3}
    assert (stage.workers.open_blocks, stage.workers.cores.workers) == (True, (1, 2))
    assert stage.workers.pipelines is stage.data_path.pipelines
    assert stage.workers.done == ["start", "poll"]
    stage.stack.close()
    assert stage.workers.done == ["start", "poll", "close"]
    assert stage.guards() == set()


def test_a_handover_leaves_the_guards(fake_route: FakeRoute, bpf_kernel: BpfKernel) -> None:
    stage = Stage(fake_route, world_of(WEB))
    stage.lifecycle.stop(handover=True)
    stage.stack.close()
    assert stage.guards() == {"eth0", "eth1"}


def test_workers_that_cannot_be_opened_at_the_start(fake_route: FakeRoute, bpf_kernel: BpfKernel) -> None:
    """Nothing is left behind, though `open` has not returned."""
    world = world_of(WEB)
    data_path = data_path_of(world)
    with Classifier() as data_path.classifier, ExitStack() as stack:

        def refuse(*_: Any) -> Any:
            raise KernelError("no ring")

        part = PacketPath(data_path, Lifecycle(), cpus.plan([0], 1), lambda: None, refuse, lambda *_: False)
        with pytest.raises(KernelError, match="no ring"):
            part.open(stack, world)
        assert fake_route.filters
        stack.close()
        assert fake_route.filters == []


def test_without_links_nothing_is_due(stage: Stage) -> None:
    """A world of the same view leaves the rings alone, whatever else it has."""
    stage.part.apply(reloaded(stage.world, service("nat", name="api")))
    assert stage.links(*LINKS.values()) == []
    assert len(stage.made) == 1


def test_an_interface_that_goes_and_comes_back(stage: Stage) -> None:
    """Its rings are not opened before; the other's go on till then."""
    first = stage.workers
    assert stage.links(LINKS[2]) == [GONE]
    assert (stage.made, "close" in first.done) == ([first], False)
    stage.route.links = {1: "lo", 2: "eth0", 9: "eth1"}
    assert stage.links(LINKS[2], Link(9, "eth1", LINKS[3].mac, 1500, True)) == [NEW]
    assert first.done[-1] == "close"
    assert stage.workers.links == {"eth0": 2, "eth1": 9}
    assert stage.workers.earlier == first.totals()
    assert stage.workers.done == ["start"]
    assert {each.index for each in stage.route.filters} >= {2, 9}


def test_an_interface_that_is_another_one_at_once(stage: Stage) -> None:
    stage.route.links[9] = stage.route.links.pop(3)
    assert stage.links(LINKS[2], Link(9, "eth1", LINKS[3].mac, 1500, True)) == [NEW]
    assert stage.workers.links == {"eth0": 2, "eth1": 9}


@pytest.mark.parametrize(("workers", "at_first"), [(1, {"eth0", "eth2"}), (2, {"eth0"})])
def test_an_interface_that_was_never_up(
    fake_route: FakeRoute, bpf_kernel: BpfKernel, workers: int, at_first: set[str]
) -> None:
    """Several workers need a group, which wants a link that was up; once it was, it may go down."""
    fake_route.links[4] = "eth2"
    stage = Stage(fake_route, world_of(WEB, interfaces=["eth0", "eth2"]), workers)
    assert stage.workers.links.keys() == at_first
    up = Link(4, "eth2", LINKS[4].mac, 9000, True)
    assert stage.links(LINKS[2], up) == ([NEW] if workers > 1 else [])
    assert stage.workers.links.keys() == {"eth0", "eth2"}
    assert stage.links(LINKS[2], LINKS[4]) == []
    stage.stack.close()


def reopening_fails(stage: Stage) -> list[str]:
    stage.refused = KernelError("the interface went away")
    stage.route.links[9] = stage.route.links.pop(3)
    return stage.links(LINKS[2], Link(9, "eth1", LINKS[3].mac, 1500, True))


def test_rings_that_cannot_be_opened_again_are_tried_at_each_tick(stage: Stage) -> None:
    assert reopening_fails(stage) == [NEW, "the rings cannot be opened; trying again"]
    with structlog.testing.capture_logs() as logs:
        stage.part.tick(time.monotonic())
    assert (logs, stage.lifecycle.failure, len(stage.made)) == ([], None, 1)
    stage.refused = None
    stage.part.tick(time.monotonic())
    assert stage.workers.links == {"eth0": 2, "eth1": 9}
    stage.part.tick(time.monotonic())
    assert len(stage.made) == 2


def test_rings_that_stay_closed_end_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    reopening_fails(stage)
    monkeypatch.setattr(packet_path, "REOPENED_WITHIN", -1.0)
    stage.part.tick(time.monotonic())
    assert stage.lifecycle.failure is stage.refused


def test_dead_workers_are_replaced_so_many_times(stage: Stage) -> None:
    for turn in range(MAX_REPLACEMENTS):
        stage.workers.died = [0]
        stage.part.tick(100.0 + turn)
        assert len(stage.made) == 2 + turn
        assert stage.made[-2].done[-1] == "close"
    assert stage.lifecycle.failure is None
    stage.workers.died = [0]
    stage.part.tick(100.0 + MAX_REPLACEMENTS)
    assert str(stage.lifecycle.failure) == f"a worker has died {MAX_REPLACEMENTS + 1} times within 60 s; stopping"
    assert len(stage.made) == 1 + MAX_REPLACEMENTS


def test_replacements_of_long_ago_do_not_count(stage: Stage) -> None:
    for turn in range(3 * MAX_REPLACEMENTS):
        stage.workers.died = [0]
        stage.part.tick(100.0 + turn * REPLACED_WITHIN / MAX_REPLACEMENTS)
    assert stage.lifecycle.failure is None
    assert len(stage.made) == 1 + 3 * MAX_REPLACEMENTS


def test_a_worker_that_is_stuck_ends_it(stage: Stage) -> None:
    stage.workers.stand = [0, 3]
    stage.part.tick(100.0)
    assert str(stage.lifecycle.failure) == "worker 0, 3 is stuck; stopping"
    assert len(stage.made) == 1


def test_leaving_without_workers_that_do_not_stop(stage: Stage) -> None:
    """What others would miss is given up first; a handover has failed then."""
    stage.lifecycle.stop(handover=True)
    with structlog.testing.capture_logs() as logs, pytest.raises(Left, match="1"):
        stage.workers.give_up([0])
    assert [line["workers"] for line in logs] == [[0]]
    assert (stage.abandoned, stage.guards(), stage.lifecycle.keeps) == (1, set(), False)


def test_it_is_left_even_if_something_else_goes_wrong(stage: Stage) -> None:
    stage.route.refused["tc del-filter"] = 1
    with pytest.raises(Left):
        stage.workers.give_up([0])


def test_the_program_for_tunnels_follows_the_ways(fake_route: FakeRoute, bpf_kernel: BpfKernel) -> None:
    placed = frozenset({(3, 24, ip_address("10.3.0.2"))})
    stage = Stage(fake_route, world_of(service("gre", name="tun"), view=hostviews.view(placed=placed)))
    assert (stage.workers.offloaded, list(bpf_kernel.egress)) == ([3], [3])
    assert stage.part.describe(stage.world)["tunnel_offload"] == ["eth1"]
    stage.part.apply(reloaded(stage.world, WEB))
    stage.part.tick(100.0)
    assert stage.workers.offloaded == []
    stage.stack.close()


def test_what_status_shows(stage: Stage) -> None:
    shown = stage.part.describe(stage.world)
    assert shown.pop("passed") == stage.data_path.programs.host_counters()
    assert shown == {
        "transmit": {"eth0": "sendmmsg", "eth1": "sendmmsg"}, "tunnel_offload": [], "open_blocks": True,
        "workers": [{"core": 1}], "counters": {"transmitted": 7},
    }  # fmt: skip
