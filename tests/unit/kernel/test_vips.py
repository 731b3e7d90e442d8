"""vips.py: which VIPs are put on an interface and taken back, and whose the others are."""

from __future__ import annotations

import errno
from ipaddress import ip_address

import pytest
import structlog
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastlb.errors import KernelError
from fastlb.kernel.vips import VIP_PROTO, HeldVips, add_vip, marked_vips, remove_vip
from tests.fake_route import FakeRoute

ONE, TWO, SIX = map(ip_address, ("198.51.100.1", "198.51.100.2", "2001:db8::1"))

PROTO = {"proto": VIP_PROTO}


def test_how_they_are_added(fake_route: FakeRoute) -> None:
    """IPv6 without duplicate address detection, and never as the host's own source."""
    assert add_vip("eth0", ONE)
    assert add_vip(3, SIX)
    assert fake_route.addresses == [
        {"index": 2, "address": str(ONE), "prefixlen": 32, **PROTO},
        {"index": 3, "address": str(SIX), "prefixlen": 128, **PROTO, "flags": IFA_F_NODAD, "preferred_lft": 0},
    ]
    assert marked_vips() == [("eth0", ONE), ("eth1", SIX)]


def test_what_is_there_already_is_the_administrator_s(fake_route: FakeRoute) -> None:
    fake_route.addresses.append({"index": 2, "address": str(ONE), "prefixlen": 24})
    assert not add_vip("eth0", ONE)
    assert marked_vips() == []
    held = HeldVips("eth0")
    held.add([ONE, TWO])
    held.drop()
    assert fake_route.held("eth0") == {str(ONE)}


def test_what_is_gone_already(fake_route: FakeRoute) -> None:
    assert not remove_vip("eth0", ONE)
    assert not remove_vip("eth9", ONE)
    add_vip("eth0", ONE)
    del fake_route.links[2]
    assert not remove_vip(2, ONE)


@pytest.mark.parametrize(("verb", "function"), [("add", add_vip), ("del", remove_vip)])
def test_refusals(fake_route: FakeRoute, verb: str, function: object) -> None:
    fake_route.refused[f"addr {verb}"] = errno.EPERM
    message = f"cannot {verb} the address 198.51.100.1 on eth0: Operation not permitted"
    with pytest.raises(KernelError, match=message):
        function("eth0", ONE)  # type: ignore[operator]


def test_an_interface_holds_what_is_wanted(fake_route: FakeRoute) -> None:
    held = HeldVips("eth0")
    held.add([ONE, SIX])
    held.add([ONE, TWO])
    assert held.as_json() == sorted(map(str, (ONE, TWO, SIX)))
    held.drop(keep=[TWO])
    assert (held.as_json(), fake_route.held("eth0")) == ([str(TWO)], {str(TWO)})
    held.drop()
    assert (held.as_json(), fake_route.addresses) == ([], [])


def test_what_a_crash_left_is_held_at_once(fake_route: FakeRoute) -> None:
    add_vip("eth0", ONE)
    add_vip("eth1", TWO)
    held = HeldVips("eth0")
    assert held.as_json() == [str(ONE)]
    held.drop()
    assert fake_route.held("eth1") == {str(TWO)}


def test_what_cannot_be_taken_back_is_logged(fake_route: FakeRoute) -> None:
    held = HeldVips("eth0")
    held.add([ONE])
    fake_route.refused["addr del"] = errno.EPERM
    with structlog.testing.capture_logs() as logs:
        held.drop()
    assert [(line["event"], line["vip"]) for line in logs] == [("VIP not removed", str(ONE))]
