"""world.py: what is marked and taken, and what parts share of the data path."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.daemon.world import DataPath, Marks
from tests import hostviews
from tests.balancers import CLIENT, VIP
from tests.frames import frame
from tests.unit.daemon.worlds import KEYS, data_path_of, world_of


def test_nothing_is_due_at_first() -> None:
    assert not Marks().due
    assert not Marks().take().due


@pytest.mark.parametrize("marked", [
    {"backends": {"web": {"a"}}}, {"removed": {"web"}}, {"view": hostviews.view(links={}, routes=())},
    {"path_mtus": {}},
])  # fmt: skip
def test_everything_that_is_marked_is_due_once(marked: dict[str, Any]) -> None:
    """That nothing is known of path MTUs any more is a change, too."""
    marks = Marks(**marked)
    assert marks.due
    taken = marks.take()
    assert {name: getattr(taken, name) for name in marked} == marked
    assert taken.due
    assert not marks.due


def test_backends_and_whole_services() -> None:
    marks = Marks()
    marks.mark(("web", "a"))
    marks.mark(("web", "b"))
    marks.mark_service("api")
    marks.mark(("api", "a"))  # all of it stays all of it
    assert marks.backends == {"web": {"a", "b"}, "api": None}
    marks.mark_service("web")
    assert marks.backends["web"] is None


def test_what_is_taken_is_marked_no_more() -> None:
    """And does not wake the loop, which the marks go on to do."""
    woken: list[str] = []
    marks = Marks(wake=lambda: woken.append("wake"))
    marks.mark(("web", "a"))
    marks.removed.add("web")
    taken = marks.take()
    marks.mark(("web", "b"))
    marks.removed.add("api")
    assert (taken.backends, taken.removed) == ({"web": {"a"}}, {"web"})
    assert (marks.backends, marks.removed) == ({"web": {"b"}}, {"api"})
    taken.wake()
    assert woken == []
    marks.wake()
    assert woken == ["wake"]


def test_flows_of_a_backend_are_those_of_all_workers() -> None:
    world = world_of()
    data_path = data_path_of(world, workers=2)
    for pipeline in data_path.pipelines:
        pipeline.publish(world.configuration.services, world.ways.routes)
    opened = [frame(CLIENT[4], sport, VIP[4], 80) for sport in range(40000, 40040)]
    for pipeline in data_path.pipelines:
        pipeline.process(opened, 0)
    found = [data_path.flows_of(world.configuration.ids.by_name["web", key]) for key in KEYS]
    assert sum(found) == sum(pipeline.flow_count() for pipeline in data_path.pipelines[:1])
    assert all(found)


def test_the_classifier_is_there_once_it_is_open() -> None:
    with pytest.raises(AssertionError, match="the classifier was opened"):
        _ = DataPath().programs
