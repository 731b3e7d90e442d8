"""publisher.py: the order in which filter and pipelines learn of a world, and what they are spared."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb._core import Pipeline
from fastlb.daemon.publisher import Publisher
from fastlb.daemon.world import DataPath, World
from fastlb.errors import KernelError
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.tables import Sources
from fastlb.model.match import Keys
from fastlb.model.net import Address
from tests import ebpf_machine, hostviews
from tests.balancers import CLIENT, VIP, service
from tests.ebpf_machine import BpfKernel
from tests.frames import frame
from tests.unit.daemon.worlds import CHECKED, KEYS, data_path_of, followed, reloaded, with_backend, world_of

bpf_kernel = ebpf_machine.bpf_kernel
WEB, API = service("nat", name="web", **CHECKED), service("nat", name="api", port=81)


class FakeClassifier:
    """A classifier that notes what it is told, and refuses the call of a number."""

    def __init__(self, done: list[tuple[Any, ...]]) -> None:
        self.done, self.refuses, self.calls = done, 0, 0
        self.keys = Keys()

    def __enter__(self) -> FakeClassifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.append(("close",))

    def replace(self, keys: Keys, addresses: Collection[Address]) -> None:
        self.calls += 1
        if self.calls == self.refuses:
            raise KernelError("no room")
        self.keys = keys
        self.done.append(("replace", keys))

    def set_locals(self, addresses: Collection[Address]) -> None:
        self.done.append(("locals", addresses))


class NotedPipeline:
    """A pipeline whose calls are noted."""

    def __init__(self, of: Pipeline, done: list[tuple[Any, ...]]) -> None:
        self.of, self.done = of, done

    def renew(self, backends: Collection[int], services: Collection[int]) -> None:
        self.done.append(("renew", set(backends), set(services)))
        self.of.renew(backends, services)

    def publish(self, services: Any, routes: Any) -> None:
        self.done.append(("publish", services, routes))
        self.of.publish(services, routes)

    def reclaim(self) -> None:
        self.done.append(("reclaim",))
        self.of.reclaim()


class Stage:
    """An open publisher."""

    def __init__(self, world: World, workers: int = 1) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.data_path, self.stack = data_path_of(world, workers), ExitStack()
        self.pipelines = list(self.data_path.pipelines)
        noted: list[Any] = [NotedPipeline(each, self.done) for each in self.pipelines]
        self.data_path.pipelines = noted
        self.classifier: Any = FakeClassifier(self.done)
        self.publisher = Publisher(self.data_path, workers, self.make)
        assert self.publisher.open(self.stack, world) is world

    def make(self, workers: int, sources: Sources | None) -> Classifier:
        self.done.append(("make", workers, sources))
        made: Classifier = self.classifier
        return made

    def apply(self, world: World) -> list[tuple[Any, ...]]:
        self.done.clear()
        self.publisher.apply(world)
        return self.done


def published(world: World) -> tuple[Any, ...]:
    return "publish", world.configuration.services, world.ways.routes


def test_the_first_world() -> None:
    """For every worker, and it is in the data path that packets meet."""
    world = world_of(service("nat", name="web", backends=[{"address": "10.3.0.11", "port": 8080}]))
    stage = Stage(world, workers=2)
    keys = ("replace", world.configuration.keys)
    assert stage.done == [("make", 2, None), keys, published(world), published(world)]
    assert stage.data_path.programs is stage.classifier
    ((_, reason, *_),) = stage.pipelines[0].process([frame(CLIENT[4], 40000, VIP[4], 80)], 0)
    assert reason == "scheduled"
    stage.stack.close()
    assert stage.done[-1] == ("close",)


def test_sources_of_full_nat() -> None:
    stage = Stage(world_of(service("fullnat", name="web"), snat=["10.3.0.5"], snat_ports="2000-2999"))
    assert stage.done[0] == ("make", 1, Sources(frozenset({ip_address("10.3.0.5")}), 2000, 2999))


def test_the_order_of_a_reload() -> None:
    """An old VIP goes out of the filter before the data path forgets it, a new one comes in when it is known."""
    before = world_of(WEB)
    stage, after = Stage(before), reloaded(before, API)
    both = before.configuration.keys & after.configuration.keys
    assert both not in (before.configuration.keys, after.configuration.keys)
    assert stage.apply(after) == [
        ("renew", set(), set()), ("replace", both), published(after), ("replace", after.configuration.keys),
    ]  # fmt: skip


def test_states_replace_nothing_and_keep_the_routes() -> None:
    before = world_of(WEB)
    stage = Stage(before)
    after = with_backend(before, KEYS[0], "down")
    assert after.configuration.services is not before.configuration.services
    assert after.ways is before.ways
    assert stage.apply(after) == [published(after)]
    assert stage.apply(after) == []


def test_another_view_of_the_host() -> None:
    before = world_of(WEB)
    stage, addresses = Stage(before), frozenset({ip_address("10.3.0.2")})
    after = followed(before, view=hostviews.view(addresses=addresses))
    assert stage.apply(after) == [("locals", addresses), published(after)]
    assert after.configuration.services is before.configuration.services


def test_path_mtus_are_routes() -> None:
    before = world_of(WEB)
    stage = Stage(before)
    after = followed(before, path_mtus={ip_address("10.3.0.11"): 1400})
    assert stage.apply(after) == [published(after)]


def test_numbers_that_something_new_has_got_are_renewed_once() -> None:
    before = world_of(WEB)
    stage, after = Stage(before), reloaded(before, API)
    after.configuration.ids.reused.add(3)
    after.configuration.ids.services.reused.add(1)
    assert stage.apply(after)[0] == ("renew", {3}, {1})
    stage.apply(before)
    assert stage.apply(after)[0] == ("renew", set(), set())


@pytest.mark.parametrize("refuses", [2, 3])
def test_the_way_back_from_what_the_kernel_refuses(refuses: int) -> None:
    """The first call is of the start: whatever refuses, the world before holds again, and a VIP is let in last."""
    before = world_of(WEB)
    stage, after = Stage(before), reloaded(before, API)
    stage.classifier.refuses = refuses
    with pytest.raises(KernelError):
        stage.publisher.apply(after)
    back = stage.apply(before)
    assert stage.classifier.keys == before.configuration.keys
    if refuses == 2:  # nothing had changed
        assert back == []
        return
    both = before.configuration.keys & after.configuration.keys
    assert back[1:] == [("replace", both), published(before), ("replace", before.configuration.keys)]


def test_snapshots_are_freed_in_the_ticks() -> None:
    stage = Stage(world_of(WEB), workers=2)
    stage.done.clear()
    stage.publisher.tick(1.0)
    assert stage.done == [("reclaim",), ("reclaim",)]


def test_with_the_classifier_itself(bpf_kernel: BpfKernel) -> None:
    """The filter takes what the world has, and after a reload what that has."""
    before = world_of(WEB)
    data_path = DataPath(data_path_of(before).pipelines)
    publisher = Publisher(data_path, 1)

    def taken() -> list[bool]:
        frames = [bytes(6) + frame(CLIENT[4], 40000, VIP[4], port)[6:] for port in (80, 81)]  # to this host
        return [bpf_kernel.run(data_path.programs.filter_fd, each) != 0 for each in frames]

    with ExitStack() as stack:
        publisher.open(stack, before)
        assert taken() == [True, False]
        publisher.apply(reloaded(before, API))
        assert taken() == [False, True]
