"""vips.py: the first interface holds exactly the VIPs of the world, and a handover leaves them there."""

from __future__ import annotations

from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.vips import Vips
from fastlb.daemon.world import World
from fastlb.errors import KernelError
from fastlb.kernel.vips import add_vip
from tests import fake_route as fakes
from tests.balancers import service
from tests.fake_route import FakeRoute
from tests.unit.daemon.worlds import followed, reloaded, world_of

fake_route = fakes.fake_route
HELD = {"vip_address": "interface"}
OLD, NEW, BOTH = "203.0.113.10", "203.0.113.11", "203.0.113.12"


def services(*vips: str) -> list[dict[str, object]]:
    return [service("nat", name=f"s{vip}", vip=vip) for vip in vips]


def held_world(*vips: str) -> World:
    return world_of(*services(*vips), **HELD)


@pytest.mark.parametrize("keeps", [False, True])
def test_they_are_held_until_a_clean_stop(fake_route: FakeRoute, keeps: bool) -> None:
    lifecycle = Lifecycle()
    vips, world = Vips(lifecycle), held_world(OLD, BOTH)
    with ExitStack() as stack:
        assert vips.open(stack, world) is world
        assert fake_route.held("eth0") == {OLD, BOTH}
        assert vips.describe() == {"vips": [OLD, BOTH]}
        lifecycle.stop(handover=keeps)
    assert fake_route.held("eth0") == ({OLD, BOTH} if keeps else set())
    assert fake_route.held("eth1") == set()


def test_what_a_crash_left(fake_route: FakeRoute) -> None:
    """What is wanted stays all the time, the rest goes."""
    for vip in (OLD, BOTH):
        add_vip("eth0", ip_address(vip))
    fake_route.asked.clear()
    Vips(Lifecycle()).open(ExitStack(), held_world(BOTH, NEW))
    assert fake_route.held("eth0") == {BOTH, NEW}
    assert fake_route.asked == ["addr add", "addr del"]


def test_a_reload(fake_route: FakeRoute) -> None:
    before = held_world(OLD, BOTH)
    vips = Vips(Lifecycle())
    vips.open(ExitStack(), before)
    fake_route.asked.clear()
    after = reloaded(before, *services(BOTH, NEW), **HELD)
    vips.apply(after)
    assert fake_route.held("eth0") == {BOTH, NEW}
    assert fake_route.asked == ["addr add", "addr del"]
    vips.apply(after)
    vips.apply(followed(after, path_mtus={}))
    vips.tick(1.0)
    assert len(fake_route.asked) == 2


def test_one_that_the_kernel_refuses(fake_route: FakeRoute) -> None:
    """The old ones are held as before; going back takes the other new ones away."""
    before = held_world(OLD)
    vips = Vips(Lifecycle())
    vips.open(ExitStack(), before)
    fake_route.refused["addr add"] = 1
    with pytest.raises(KernelError, match=f"cannot add the address {NEW} on eth0"):
        vips.apply(reloaded(before, *services(NEW), **HELD))
    fake_route.refused.clear()
    vips.apply(before)
    assert fake_route.held("eth0") == {OLD}


def test_without_the_option_there_are_none(fake_route: FakeRoute) -> None:
    vips = Vips(Lifecycle())
    assert vips.describe() == {"vips": []}
    vips.open(ExitStack(), world_of(*services(OLD)))
    assert fake_route.asked == []
    assert vips.describe() == {"vips": []}


def test_all_are_given_up_at_once(fake_route: FakeRoute) -> None:
    """By a process that goes without its workers; one that has not come so far has none."""
    vips = Vips(Lifecycle())
    vips.give_up()
    vips.open(ExitStack(), held_world(OLD, NEW))
    vips.give_up()
    assert fake_route.held("eth0") == set()
