"""A balancer in a cgroup with little memory: it refuses what does not fit, and is never killed for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fastlb.kernel import guard
from tests.netns.balancer import ROOT, Balancer, fastlb, until, within

sys.path.insert(0, str(ROOT / "netns-lab"))
from topology import VIPS, Lab, own_prefix

LIMIT = 128 << 20
NEEDS = "needs root, and a memory controller of cgroups that this process may make groups in"
WHY = r".*the memory limit of 128 MiB in \S+ leaves \d+ MiB"
LIMITS = ("memory.max", "memory.limit_in_bytes")


def make_group() -> Path | None:
    """Return a new group with the limit; None where there is no such thing."""
    for top in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")):
        group = top / f"fastlb-test-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            limits = [group / name for name in LIMITS if (group / name).exists()]
            if limits:
                limits[0].write_text(str(LIMIT))
                return group
            group.rmdir()
    return None


@pytest.fixture(scope="module")
def group() -> Iterator[Path]:
    made = make_group() if os.geteuid() == 0 else None
    if made is None:
        pytest.skip(NEEDS)
    try:
        yield made
    finally:
        assert until(lambda: not (made / "cgroup.procs").read_text())
        made.rmdir()


@pytest.fixture(scope="module")
def lab(group: Path) -> Iterator[Lab]:
    with Lab(own_prefix("test") + "mem-") as lab:
        yield lab


def killed(group: Path) -> int:
    """Return how many processes of the group were killed for want of memory."""
    for name in ("memory.events", "memory.oom_control"):
        with suppress(OSError):
            return int(dict(line.split() for line in (group / name).read_text().splitlines())["oom_kill"])
    raise AssertionError(f"{group} does not tell")


@pytest.fixture
def balancer(lab: Lab, tmp_path: Path) -> Iterator[Balancer]:
    """One that a test starts in the group."""
    services = [each for each in lab.config()["services"] if each["name"] == "web-nat-4"]
    balancer = Balancer(lab.namespace("lb"), lab.config(workers=1, flows=20_000, services=services), tmp_path)
    with ExitStack() as stack:
        stack.push(balancer.__exit__)
        yield balancer
        balancer.show_log()


def join(group: Path) -> Callable[[], None]:
    """Return what a child does before its exec."""
    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return enter


def test_a_flow_table_that_does_not_fit(group: Path, balancer: Balancer) -> None:
    """Nothing is left of the start; `check --host` says the same."""
    balancer.configure({**balancer.config, "flows": 3_000_000})
    process = balancer.launch(preexec_fn=join(group))
    assert process.wait(60) == 1
    told = balancer.log_path.read_text()
    assert re.match(rf"fastlb: a full flow table takes \d+ MiB, {WHY}; try fewer flows, or raise the limit", told)
    assert within(balancer.namespace, guard.show) == []
    checked = fastlb(
        "check", "--host", "-c", balancer.config_path, namespace=balancer.namespace, preexec_fn=join(group)
    )
    assert (checked.returncode, re.sub(r"\d+", "", checked.stderr)) == (1, re.sub(r"\d+", "", told))
    assert killed(group) == 0


def test_services_that_do_not_fit(lab: Lab, group: Path, balancer: Balancer) -> None:
    """A reload with them is refused, and the balancer goes on."""
    balancer.start(preexec_fn=join(group))
    (web,) = balancer.config["services"]
    more = [
        {**web, "name": f"web{n}", "port": n, "backends": [{**each, "port": n} for each in web["backends"]]}
        for n in range(1000, 1060)
    ]
    done = balancer.reload({**balancer.config, "services": [web, *more], "maglev_size": 1048573})
    assert done.returncode == 1
    assert re.match(rf"fastlb: the tables of 61 services take \d+ MiB, {WHY}; try fewer services", done.stderr)
    assert lab.client("fetch", VIPS["nat", 4], "--count", 20)["answered"] == 20
    assert killed(group) == 0
