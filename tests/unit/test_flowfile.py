"""flowfile.py and takeover.pxd: what one process leaves, another one takes over, or sets aside with a reason.

A `Life` is what a process has of it, without rings: the file, pipelines over it, frames. Files are in /dev/shm.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import structlog

from fastlb import flowfile, reconcile
from fastlb._core import FlowMemory, Pipeline, Routes, flow_layout
from fastlb.config import Config
from fastlb.flowfile import FlowFileError, FlowFileUsedError, open_file
from fastlb.workers import open_pipelines
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, reply_to, service
from tests.frames import frame, take_apart

PAGE, LARGE_PAGE = 4096, 2 << 20
ENTRY, TUPLE, BUCKET = 16, 48, 64
SNAT = ["10.3.0.5", "fd00:3::5"]
MODES = ("nat", "fullnat", "dsr", "ipip")
SERVICES = [service(mode, vip=f"203.0.113.{10 + at}") for at, mode in enumerate(MODES)]
SERVICES += [service("fullnat", 6, "udp"), service("dsr", 6)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastlb-test-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowfile, "LOCK_PATIENCE", 0.0)


def settings(folder: Path, *services: dict[str, Any], **changes: Any) -> Config:
    plain = {"snat": SNAT, "flow_file": str(folder / "flows"), "maglev_size": 251}
    return config(*(services or SERVICES), **{**plain, **changes})


class Life:
    """One process: from the opening of its file on."""

    def __init__(self, settings: Config, workers: int = 1) -> None:
        with structlog.testing.capture_logs() as self.logs:
            self._open(settings, workers)

    def _open(self, settings: Config, workers: int) -> None:
        self.ids = reconcile.BackendIds()
        self.plans = reconcile.plan_services(settings, self.ids, 0.0)
        file = open_file(settings, {"ids": self.ids.saved()})
        assert file is not None
        self.file, memory = file, None
        if file.found is not None:
            self.ids = reconcile.BackendIds.restored(file.found["ids"], 0.0)
            self.plans = reconcile.plan_services(settings, self.ids, 0.0)
            memory = file.take_over(settings, reconcile.services_table(settings, self.plans), self.ids.highest)
            file.save({"ids": self.ids.saved()})
        self.pipelines = open_pipelines(settings, workers, memory or file.memory(settings))
        self.publish(settings)

    def publish(self, settings: Config) -> None:
        self.plans = reconcile.plan_services(settings, self.ids, 0.0)
        self.keys = {member.id: (plan.name, member.key) for plan in self.plans for member in plan.members}
        for pipeline in self.pipelines:
            pipeline.publish(reconcile.services_table(settings, self.plans), routes_for(self.plans))

    def send(self, raw: bytes) -> tuple[str, list[bytes], tuple[str, str] | None]:
        """(reason, what would be sent, service and backend), by whichever worker has the packet's shard."""
        for pipeline in self.pipelines:
            _, reason, sent, backend, _ = pipeline.process([raw], clock())[0]
            if reason != "wrong_worker":
                return reason, sent, self.keys.get(backend)
        raise AssertionError("no worker has this shard")

    def flows(self) -> set[tuple[Any, ...]]:
        """Without the time of the last packet."""
        return {flow[:7] for flow in self.pipelines[0].flow_list(1 << 30)}

    def ports(self) -> dict[tuple[int, int], int]:
        """Source ports that are taken, by IP version and protocol."""
        found = self.pipelines[0].source_ports()
        return {(version, protocol): taken for version, protocol, taken, _ in found}

    def counts_agree(self) -> bool:
        """Do the counts of entries, and of each backend's flows that are not over, equal what a walk finds?"""
        walked = Counter(flow[5] for flow in self.flows() if flow[6] not in ("closing", "reset"))
        counted = Counter({
            number: sum(pipeline.backend_stats(number)["active_flows"] for pipeline in self.pipelines)
            for number in range(self.ids.highest + 1)
        })  # fmt: skip
        return +counted == walked and self.pipelines[0].flow_count() == len(self.flows())

    def said(self) -> str:
        """The reason why a file was set aside, or "taken over", or "" for a new one."""
        for line in self.logs:
            if "set aside" in line["event"]:
                return str(line["reason"])
        return "taken over" if any(line["event"] == "flows taken over" for line in self.logs) else ""

    def end(self, keep: bool = True) -> None:
        """As a kill does: nothing more is written."""
        self.pipelines = []
        self.file.close(keep)


def routes_for(plans: list[reconcile.Plan]) -> Routes:
    """One gateway to everywhere."""
    everywhere = [(ip_network("0.0.0.0/0"), 1, 0), (ip_network("::/0"), 1, 0)]
    members = [member.id for plan in plans for member in plan.members]
    sources = dict.fromkeys(members, ip_network("10.3.0.2"))
    return Routes([(b"\2\0\0\0\1\0", b"\2\0\0\0\0\1", 1, 1500, None)], everywhere, {}, dict.fromkeys(members, 0), sources)


def clock() -> int:
    return time.monotonic_ns() // 1_000_000 % (1 << 32)


def opening(at: int, client: int, letters: str = "S") -> bytes:
    """A packet of a client of the service at this position of SERVICES."""
    spec = SERVICES[at]
    version = 6 if ":" in spec["vip"] else 4
    host = f"10.1.{client >> 8}.{client & 255}" if version == 4 else f"fd00:1::{client:x}"
    return frame(host, 1024 + client, spec["vip"], 80, spec["protocol"], flags=flags(letters))


def fill(life: Life, clients: int = 40) -> dict[tuple[int, int], tuple[str, str] | None]:
    """Open flows of every service; which backend has which."""
    placed = {}
    for at in range(len(SERVICES)):
        for client in range(clients):
            reason, sent, placed[at, client] = life.send(opening(at, client))
            assert reason == "scheduled"
            if SERVICES[at]["forward"] in ("nat", "fullnat"):
                assert life.send(reply_to(sent[0]))[0] == "conntrack"
    return placed
