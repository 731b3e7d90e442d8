"""preflight.py: what must hold before anything is opened, and what is only warned of."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from fastlb.config import Config
from fastlb.daemon import leftovers, memory, preflight
from fastlb.errors import ConfigError, FastlbError, KernelError
from fastlb.kernel import guard
from fastlb.kernel.cgroup import MemoryLimit
from fastlb.model.hostview import KernelView
from tests import fake_route as fakes
from tests import hostviews
from tests.balancers import config, service
from tests.fake_route import FakeRoute
from tests.unit.daemon.worlds import CHECKED, INTERFACES, world_of, written

fake_route = fakes.fake_route
WEB = service("nat", name="web")
ALL_CAPABILITIES = 0x1FF_FFFF_FFFF
CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 13, 21, 38, 39

Proc = Callable[..., None]


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Proc:
    """Say what /proc tells of this process's capabilities, and that there is memory without end."""

    def tell(capabilities: int = ALL_CAPABILITIES) -> None:
        files = {
            "/proc/self/status": f"Name:\tfastlb\nCapEff:\t{capabilities:016x}\n",
            "/proc/sys/kernel/cap_last_cap": "40\n",
        }
        monkeypatch.setattr(preflight, "open", lambda path: io.StringIO(files[path]), raising=False)
        monkeypatch.setattr(memory, "free_on_host", lambda: 1 << 20)
        monkeypatch.setattr(memory, "memory_limits", list)

    return tell


@pytest.mark.parametrize(("without", "missing"), [
    ((), None), ((CAP_NET_ADMIN,), "CAP_NET_ADMIN missing"), ((CAP_NET_RAW,), "CAP_NET_RAW missing"),
    ((CAP_NET_RAW, CAP_NET_ADMIN), "CAP_NET_ADMIN and CAP_NET_RAW missing"),
    ((CAP_SYS_ADMIN, CAP_PERFMON), "CAP_PERFMON missing"), ((CAP_PERFMON, CAP_BPF), None),
])  # fmt: skip
def test_privileges(proc: Proc, without: tuple[int, ...], missing: str | None) -> None:
    proc(ALL_CAPABILITIES & ~sum(1 << bit for bit in without))
    if missing is None:
        preflight.check_privileges()
        return
    needed = "without root it needs CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF and CAP_PERFMON"
    with pytest.raises(KernelError, match=rf"^fastlb run needs root: {missing} \({needed}\)$"):
        preflight.check_privileges()


def test_interfaces_are_needed() -> None:
    preflight.check_runnable("file", config(interfaces=INTERFACES))
    with pytest.raises(ConfigError, match="fastlb run needs at least one interface"):
        preflight.check_runnable("file", config())


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    with structlog.testing.capture_logs() as logs:
        assert preflight.plan_cores(config(workers="auto")).workers == (5,)
        assert logs == []
        assert len(preflight.plan_cores(config(workers=3)).workers) == 3
    assert [(line["event"], line["workers"], line["cores"]) for line in logs] == [("workers share cores", 3, 2)]


@pytest.mark.parametrize("hard", [100, 1 << 20])
def test_files(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    """Each target of a check needs one, whatever number of services have it."""
    monkeypatch.setattr(preflight, "hard_file_limit", lambda: hard)
    backends = [{"address": f"10.3.1.{n}", "port": 80} for n in range(200)]
    checked = service("nat", name="web", backends=backends, **CHECKED)
    lines = preflight.check_files(config(checked, interfaces=INTERFACES), 1)
    assert [line.startswith("too few open files: ") for line in lines] == ([True] if hard == 100 else [])
    assert preflight.check_files(config(service("nat", name="web", backends=backends)), 1) == []


INTERFACE_FAULTS = [
    (["eth0", "eth1"], None),
    (["eth7"], "interface eth7 does not exist; there are: eth0, eth1, eth2, lo, tun0"),
    (["tun0"], "interface tun0 has no MAC address"),
]


@pytest.mark.parametrize(("interfaces", "problem"), INTERFACE_FAULTS)
def test_links(interfaces: list[str], problem: str | None) -> None:
    conf, view = config(interfaces=interfaces), hostviews.view()
    assert preflight.missing_interfaces(conf, view) == [name for name in interfaces if name == "eth7"]
    if problem is None:
        preflight.check_interfaces(conf, view)
        return
    with pytest.raises(KernelError, match=problem):
        preflight.check_interfaces(conf, view)


REACH: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    (service("dsr", backends=[{"address": "10.3.0.11"}]), {}, None),
    (service("dsr", backends=[{"address": "10.6.0.1"}]), {}, r"10\.6\.0\.1"),
    (WEB, {"addresses": frozenset({ip_address("10.3.0.12")})}, r"10\.3\.0\.12"),
    (service("nat", vip="203.0.113.0/24"), {"addresses": frozenset({ip_address("203.0.113.9")})}, "203.0.113.9"),
]


@pytest.mark.parametrize(("asked", "host", "problem"), REACH)
def test_backends_and_vips(asked: dict[str, Any], host: dict[str, Any], problem: str | None) -> None:
    view = hostviews.view(**host)
    world = world_of(asked)
    if problem is None:
        preflight.check_host(world.configuration.config, world.configuration.plans, view)
        return
    with pytest.raises(FastlbError, match=problem):
        preflight.check_host(world.configuration.config, world.configuration.plans, view)


def test_what_is_a_mistake_mostly() -> None:
    world = world_of(service("fullnat", name="web", backends=[{"address": "10.7.0.1"}]), snat=["10.3.0.5"])
    configuration = world.configuration
    events = {event for event, _ in preflight.host_warnings(configuration.config, configuration.plans, world.view)}
    assert events >= {"backend unreachable", "answers must be routed here"}
    plain = world_of(WEB).configuration
    assert preflight.host_warnings(plain.config, plain.plans, hostviews.view()) == []


def test_warnings_are_logged(fake_route: FakeRoute, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that nobody uses is one of them."""
    monkeypatch.setattr(leftovers, "is_claimed", lambda interface: interface == "eth0")
    for name in ("eth0", "eth1"):
        guard.attach(name, 17)
    world = world_of(service("nat", name="web", backends=[{"address": "10.7.0.1"}]))
    with structlog.testing.capture_logs() as logs:
        preflight.warn(world.configuration.config, world.configuration.plans, world.view, 1)
    assert [line["event"] for line in logs if "problem" in line] == ["backend unreachable"]
    assert [line["interface"] for line in logs if "a crash left a guard" in line["event"]] == ["eth1"]


@pytest.mark.parametrize(("setting", "wrong"), [
    ("flow_file", "file/below"), ("flow_log", "file/below"), ("control", "file"),
])  # fmt: skip
def test_places_of_files(tmp_path: Path, setting: str, wrong: str) -> None:
    fine = {"flow_file": "/dev/shm/fastlb-flows", "flow_log": str(tmp_path / "log"), "control": str(tmp_path / "c")}
    preflight.check_paths(config(**fine))
    (tmp_path / "file").touch()
    with pytest.raises(FastlbError):
        preflight.check_paths(config(**fine | {setting: str(tmp_path / wrong)}))


NO_BELLS, NO_LUCK = "this kernel has no doorbells", "open blocks cannot be read"
OPEN_BLOCKS = [  # what is configured; what the classifier lacks; what the selftest finds; whether they are read
    ("auto", None, None, True), ("auto", NO_BELLS, None, False), ("auto", None, NO_LUCK, False),
    (False, None, None, False), (True, None, None, True),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "no_bells", "fault", "read"), OPEN_BLOCKS)
def test_open_blocks(
    monkeypatch: pytest.MonkeyPatch, wanted: str | bool, no_bells: str | None, fault: str | None, read: bool
) -> None:
    monkeypatch.setattr(preflight.selftest, "open_blocks_fault", lambda: fault)
    classifier: Any = SimpleNamespace(no_bells=no_bells)
    with structlog.testing.capture_logs() as logs:
        assert preflight.open_blocks(config(ring={"open_blocks": wanted}), classifier) is read
    assert [line["reason"] for line in logs] == [each for each in (no_bells, fault) if each]


@pytest.mark.parametrize(("no_bells", "fault"), [(NO_BELLS, None), (None, NO_LUCK)])
def test_open_blocks_that_must_be(monkeypatch: pytest.MonkeyPatch, no_bells: str | None, fault: str | None) -> None:
    monkeypatch.setattr(preflight.selftest, "open_blocks_fault", lambda: fault)
    classifier: Any = SimpleNamespace(no_bells=no_bells)
    with pytest.raises(KernelError, match=f"^ring.open_blocks: true, but {no_bells or fault}$"):
        preflight.open_blocks(config(ring={"open_blocks": True}), classifier)


class FakeWatcher:
    """A look at a host, which ends."""

    view: KernelView
    closed = 0

    def __init__(self, tell: object) -> None:
        """Tell nothing."""

    def start(self) -> KernelView:
        return self.view

    def close(self) -> None:
        type(self).closed += 1


def checked(
    tmp_path: Path, proc: Proc, monkeypatch: pytest.MonkeyPatch, view: KernelView, **settings: Any
) -> list[str]:
    """What `check --host` says of a configuration that is right."""
    proc()
    monkeypatch.setattr(preflight, "Watcher", FakeWatcher)
    monkeypatch.setattr(FakeWatcher, "view", view, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    before = FakeWatcher.closed
    conf = Config.from_dict({
        "services": [WEB], "interfaces": INTERFACES, "flow_file": "none", "control": str(tmp_path / "control")
    } | settings)  # fmt: skip
    try:
        return preflight.check_this_host(written(tmp_path / "file", WEB), conf)
    finally:
        assert FakeWatcher.closed == before + 1


def test_this_host(tmp_path: Path, proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(tmp_path, proc, monkeypatch, hostviews.view()) == []


def test_notes_about_this_host(tmp_path: Path, proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    links = dict(hostviews.LINKS)
    links[3] = replace(links[3], up=False)
    notes = checked(tmp_path, proc, monkeypatch, hostviews.view(links=links), workers=3)
    assert notes[:2] == ["interface is down: eth1", "workers share cores: 3 on 2"]


@pytest.mark.parametrize(("check", "refusal"), [
    ("check_plans", "the tables of 1 services take"), ("check_memory", "a full flow table takes"),
])  # fmt: skip
def test_memory_of_this_host(
    tmp_path: Path, proc: Proc, monkeypatch: pytest.MonkeyPatch, check: str, refusal: str
) -> None:
    """What a start would refuse for want of memory."""

    def limited(*arguments: Any) -> None:
        monkeypatch.setattr(memory, "memory_limits", lambda: [MemoryLimit("memory.max", 1, 0)])
        getattr(memory, check)(*arguments)

    monkeypatch.setattr(preflight, check, limited)
    with pytest.raises(KernelError, match=f"{refusal} .* MiB in memory.max leaves 0 MiB"):
        checked(tmp_path, proc, monkeypatch, hostviews.view(), flows=2_000_000, maglev_size=1048573)


def test_this_host_is_refused(tmp_path: Path, proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found, the look at the host has ended."""
    with pytest.raises(KernelError, match="interface eth9 does not exist"):
        checked(tmp_path, proc, monkeypatch, hostviews.view(), interfaces=["eth9"])
