"""`fastlb status`: an answer in words, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.main import main
from fastlb.cli.status import describe, state_of
from tests.control_sockets import serving

BACKEND = {
    "backend": "10.0.0.1:80", "weight": 1, "slow_start": None, "state": "up", "reason": "", "drain_remaining": None,
    "packets": 30, "bytes": 1800, "reply_packets": 20, "reply_bytes": 1200, "new_flows": 7, "active_flows": 5,
}  # fmt: skip
SERVICE = {
    "name": "web", "vip": "203.0.113.10", "port": 80, "protocol": "tcp", "forward": "nat", "scheduler": "maglev",
    "paths": {}, "drops": {}, "events": {}, "backends": [BACKEND],
}  # fmt: skip
STATUS: dict[str, Any] = {
    "version": "9.9", "pid": 42, "uptime": 12.6, "interfaces": ["eth0", "eth1"],
    "transmit": {"eth0": "xdp", "eth1": "sendmmsg"}, "open_blocks": True,
    "counters": {
        "packets": 31, "forwarded": 30, "transmitted": 29, "ring_drops": 1, "flows_evicted": 2, "flows_untracked": 3,
        "affine": 0, "drops": {"no_route": 0, "no_backend": 4}, "passed": {"not_ip": 0},
    },
    "flows": {"active": 5, "entries": 4096, "source_ports": []},
    "affinity": {"clients": 0, "entries": 65536},
    "workers": [
        {"core": 2, "packets": 31, "transmitted": 29, "transmitted_xdp": 9, "read_early": 8, "sleeps": 7},
    ],
    "services": [SERVICE],
}  # fmt: skip


def lines(**changes: Any) -> list[str]:
    return "\n".join(describe(STATUS | changes)).splitlines()


def test_every_line() -> None:
    assert lines() == [
        "fastlb 9.9, pid 42, up 13 s, on eth0, eth1, transmit eth0 xdp, eth1 sendmmsg, open blocks read",
        "packets 31, forwarded 30, transmitted 29, lost by the ring 1",
        "flows 5 of 4096 entries, evicted 2, untracked 3",
        "drops no_backend 4",
        "passed to the host none",
        "",
        "WORKER  CORE  PACKETS  TRANSMITTED  TRANSMITTED_XDP  READ_EARLY  SLEEPS",
        "0       2     31       29           9                8           7",
        "",
        "SERVICE  VIP                  FORWARD  BACKEND      STATE  WEIGHT  FLOWS  NEW  PACKETS  REPLIES",
        "web      203.0.113.10 80/tcp  nat      10.0.0.1:80  up     1       5      7    30       20",
    ]


def test_lines_that_are_there_only_when_they_say_something() -> None:
    ports = [{"version": 4, "protocol": "tcp", "taken": 9, "all": 64512}]
    shown = lines(
        open_blocks=False,
        flows=STATUS["flows"] | {"source_ports": ports},
        affinity={"clients": 3, "entries": 65536},
        counters=STATUS["counters"] | {"affine": 9},
        services=[SERVICE | {"drops": {"no_backend": 4}, "events": {"affine": 9, "load_moved": 1}}],
    )
    assert shown[0].endswith("open blocks not read")
    assert "source ports IPv4 tcp: 9 of 64512 taken" in shown
    assert "affinity 3 clients remembered, room for 65536; 9 new flows by affinity" in shown
    assert shown[-3:] == [
        "",
        "SERVICE  DROPS         PATHS  EVENTS",
        "web      no_backend 4  none   affine 9, load_moved 1",
    ]


@pytest.mark.parametrize(
    ("change", "cells"),
    [
        ({"backends": []}, ["-"] * 7),
        ({"forward": "dsr"}, ["10.0.0.1:80", "up", "1", "5", "7", "30", "-"]),
    ],
)
def test_rows_of_services(change: dict[str, Any], cells: list[str]) -> None:
    assert lines(services=[SERVICE | change])[-1].split()[4:] == cells


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "up"),
        ({"state": "down", "reason": "connection refused"}, "down: connection refused"),
        ({"state": "down"}, "down"),
        ({"state": "draining", "drain_remaining": 12.4}, "draining, 12 s left"),
        ({"state": "draining"}, "draining"),
        ({"state": "drained", "drain_remaining": 0}, "drained"),
        ({"slow_start": 0.25}, "up, 25%"),
    ],
)
def test_states(change: dict[str, Any], expected: str) -> None:
    assert state_of(BACKEND | change) == expected


def test_of_a_running_fastlb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.sock"
    with serving(path, {"status": lambda request: STATUS}):
        assert main(["status", "--socket", str(path)]) == 0
        printed = capsys.readouterr().out
        assert main(["status", "--socket", str(path), "--json"]) == 0
    assert printed.splitlines() == lines()
    assert json.loads(capsys.readouterr().out) == STATUS
