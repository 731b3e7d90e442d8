"""leftovers.py: what a crash leaves is listed, and removed unless a running fastlb uses it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from fastlb.config import Config
from fastlb.daemon import leftovers
from fastlb.daemon.leftovers import Leftover
from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.claim import claim
from fastlb.kernel.vips import add_vip
from fastlb.workers import flow_places
from tests import fake_route as fakes
from tests.fake_route import FakeRoute

fake_route = fakes.fake_route
NAMES = [f"t{os.getpid()}{which}" for which in "ab"]  # claims are of this network namespace
VIP = ip_address("198.51.100.1")


@pytest.fixture
def host(fake_route: FakeRoute) -> FakeRoute:
    fake_route.links = dict(enumerate(NAMES, 2))
    return fake_route


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Of a flow file in a folder of its own."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(flow_places, "SHARED_MEMORY", Path(folder))
        yield Config.from_dict({"interfaces": ["eth0"], "services": [], "flow_file": f"{folder}/flows"})


def test_nothing(host: FakeRoute, config: Config) -> None:
    assert leftovers.show(config) == leftovers.remove(config) == ([], [])


def test_what_a_crash_left_is_removed(host: FakeRoute, config: Config) -> None:
    """VIPs first, so that the host never answers for them."""
    guard.attach(NAMES[0], 17)
    add_vip(NAMES[0], VIP)
    add_vip(NAMES[1], VIP)
    Path(config.flow_file).touch()
    found, files = leftovers.show(config)
    assert found == [Leftover(NAMES[0], 17, (str(VIP),), False), Leftover(NAMES[1], None, (str(VIP),), False)]
    assert [(each.path, each.state) for each in files] == [(config.flow_file, "left over")]
    host.asked.clear()
    assert leftovers.remove(config) == (found, files)
    assert host.asked == ["addr del", "addr del", "tc del-filter", "tc del"]
    assert leftovers.show(config) == ([], [])


def test_what_is_in_use_keeps_everything(host: FakeRoute, config: Config) -> None:
    for name in NAMES:
        guard.attach(name, 17)
    with claim(NAMES[1]):
        assert [each.in_use for each in leftovers.interfaces()] == [False, True]
        with pytest.raises(KernelError, match=f"a running fastlb uses {NAMES[1]}; stop it"):
            leftovers.remove(config)
    assert len(leftovers.interfaces()) == 2


def test_a_flow_file_in_use_keeps_everything(host: FakeRoute, config: Config) -> None:
    guard.attach(NAMES[0], 17)
    path = Path(config.flow_file)
    path.touch()
    with path.open() as held:
        flow_places.lock(held.fileno(), path)
        with pytest.raises(KernelError, match=f"a running fastlb uses {path}; stop it"):
            leftovers.remove(config)
    assert (len(leftovers.interfaces()), path.exists()) == (1, True)
