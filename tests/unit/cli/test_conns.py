"""`fastlb conns`: filters go out, flows or their numbers come back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.conns import describe, describe_counts
from fastlb.cli.main import main
from tests.control_sockets import serving

FLOW = {
    "service": "web", "protocol": "tcp", "client": "198.51.100.7:40000", "vip": "203.0.113.10:80",
    "backend": "10.0.0.1:80", "source": None, "state": "established", "age": 12.345, "idle": 0.06,
}  # fmt: skip
COUNTS = {"service": "web", "backend": "10.0.0.1:80", "states": {"established": 2, "syn": 1}}


def test_a_table_of_flows() -> None:
    heads, row, translated = describe([FLOW, FLOW | {"source": "10.9.0.1:1024"}]).splitlines()
    assert heads.split() == [name.upper() for name in FLOW]
    assert row.split() == [
        "web", "tcp", "198.51.100.7:40000", "203.0.113.10:80", "10.0.0.1:80", "-", "established", "12.3", "0.1",
    ]  # fmt: skip
    assert translated.split()[5] == "10.9.0.1:1024"


def test_a_table_of_numbers() -> None:
    rows = [{"service": "web", "backend": "b", "flows": 3, "states": {"established": 2, "syn": 1}}]
    assert [line.split() for line in describe_counts(rows).splitlines()] == [
        ["SERVICE", "BACKEND", "FLOWS", "STATES"],
        ["web", "b", "3", "established", "2,", "syn", "1"],
        ["total", "3"],
    ]


class Balancer:
    """Answers with two slices of the table: a flow or its number in each."""

    def __init__(self) -> None:
        self.requests: list[Mapping[str, Any]] = []

    def conns(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        found = {"counts": [COUNTS]} if request.get("count") else {"flows": [FLOW]}
        return found | {"next": None if request["start"] else 4096}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], {"flows": [FLOW, FLOW], "more": False}),
        (["--json", "--limit", "1"], {"flows": [FLOW], "more": True}),
        (
            ["--json", "--count"],
            [{"service": "web", "backend": "10.0.0.1:80", "flows": 6, "states": {"established": 4, "syn": 2}}],
        ),
    ],
)
def test_for_programs(words: list[str], expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, balancer = tmp_path / "fastlb.sock", Balancer()
    with serving(path, {"conns": balancer.conns}):
        assert main(["conns", "--socket", str(path), *words]) == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_filters_and_the_hint_that_there_is_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, balancer = tmp_path / "fastlb.sock", Balancer()
    filters = {"service": "web", "backend": "10.0.0.1", "client": "198.51.100.0/24", "state": "syn"}
    words = [word for name, value in filters.items() for word in (f"--{name}", value)]
    with serving(path, {"conns": balancer.conns}):
        assert main(["conns", "--socket", str(path), "--limit", "1", *words]) == 0
    assert [each["start"] for each in balancer.requests] == [0, 4096]
    assert all(filters.items() <= each.items() for each in balancer.requests)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "there are more than 1: --limit shows more, --count counts them"
    )
