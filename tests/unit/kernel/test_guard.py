"""guard.py: what is asked of traffic control, and what its answers mean."""

from __future__ import annotations

import errno

import pytest

from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.guard import GuardInfo
from fastlb.model.names import GUARD_NAME
from tests.fake_route import INGRESS, FakeRoute, Filter

EGRESS = 0xFFFF_FFF3


def test_it_comes_and_goes(fake_route: FakeRoute) -> None:
    assert guard.show() == []
    guard.attach("eth0", 17)
    guard.attach("eth1", 18)
    assert fake_route.qdiscs == {2: "clsact", 3: "clsact"}
    assert {each.name for each in fake_route.filters} == {GUARD_NAME}
    assert guard.show() == [GuardInfo("eth0", 17), GuardInfo("eth1", 18)]
    assert guard.detach("eth0")
    assert not guard.detach("eth0")
    assert guard.show() == [GuardInfo("eth1", 18)]
    assert fake_route.qdiscs == {3: "clsact"}


def test_another_one_takes_its_place_in_one_step(fake_route: FakeRoute) -> None:
    guard.attach("eth0", 17)
    fake_route.asked.clear()
    guard.attach("eth0", 18)
    assert guard.show() == [GuardInfo("eth0", 18)]
    assert fake_route.asked == ["tc add", "tc replace-filter"]


def test_an_older_ingress_qdisc_serves_and_stays(fake_route: FakeRoute) -> None:
    fake_route.qdiscs[2] = "ingress"
    guard.attach("eth0", 17)
    guard.detach("eth0")
    assert fake_route.qdiscs == {2: "ingress"}


@pytest.mark.parametrize("parent", [INGRESS, EGRESS])
def test_other_people_s_filters_stay(fake_route: FakeRoute, parent: int) -> None:
    foreign = Filter(2, parent, 1, "foreign", 99)
    fake_route.filters.append(foreign)
    fake_route.qdiscs[2] = "clsact"
    guard.attach("eth0", 17)
    assert guard.show() == [GuardInfo("eth0", 17)]
    guard.detach("eth0")
    assert (fake_route.filters, fake_route.qdiscs) == ([foreign], {2: "clsact"})


def test_a_filter_that_only_looks_like_it_is_not_it(fake_route: FakeRoute) -> None:
    guard.attach("eth0", 17)
    fake_route.filters[0].name = "another"
    assert guard.show() == []
    assert not guard.detach("eth0")


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({2: "clsact"}, {2: "clsact"})])
def test_what_is_refused_changes_nothing(fake_route: FakeRoute, before: dict[int, str], after: dict[int, str]) -> None:
    fake_route.qdiscs = before
    fake_route.refused["tc replace-filter"] = errno.EINVAL
    with pytest.raises(KernelError, match=r"eth0: cannot attach the guard: Invalid argument .does a filter of another"):
        guard.attach("eth0", 17)
    assert (fake_route.filters, fake_route.qdiscs) == ([], after)


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.EPERM, "this needs root or CAP_NET_ADMIN"), (errno.ENOENT, "the kernel must have CONFIG_NET_SCH_INGRESS")],
)
def test_what_would_help(fake_route: FakeRoute, code: int, hint: str) -> None:
    fake_route.refused["tc add"] = code
    with pytest.raises(KernelError, match=hint):
        guard.attach("eth0", 17)


def test_an_interface_that_is_not_there(fake_route: FakeRoute) -> None:
    with pytest.raises(KernelError, match=r"eth9: .*: No such device .there is no such interface"):
        guard.attach("eth9", 17)
    assert not guard.detach("eth9")


def test_a_kernel_that_tells_no_ids(fake_route: FakeRoute) -> None:
    guard.attach("eth0", 17)
    fake_route.knows_ids = False
    with pytest.raises(KernelError, match=r"does not tell the id of a filter's program .Linux 4\.13"):
        guard.show()
