"""`fastlb reload`: what is asked, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.main import main
from fastlb.errors import ConfigError
from tests.control_sockets import serving


@pytest.mark.parametrize(
    ("services", "expected"),
    [(0, "reloaded: 0 services\n"), (1, "reloaded: 1 service\n"), (2, "reloaded: 2 services\n")],
)
def test_reloaded(services: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.sock"
    with serving(path, {"reload": lambda request: {"services": services, "backends": 7}}):
        assert main(["reload", "--socket", str(path)]) == 0
    assert capsys.readouterr().out == expected


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.sock"
    answer = {"services": 1, "backends": 2, "warnings": ["9 of 10 services are gone", "it rains"]}
    with serving(path, {"reload": lambda request: answer}):
        assert main(["reload", "--socket", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "reloaded: 1 service", "warning: 9 of 10 services are gone", "warning: it rains",
    ]  # fmt: skip


def test_flows_of_backends_that_were_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = [{"service": "web", "backend": f"b{n}", "flows": n, "fate": "stay"} for n in range(1, 23)]
    path = tmp_path / "fastlb.sock"
    with serving(path, {"reload": lambda request: {"services": 1, "backends": 7, "left": left}}):
        assert main(["reload", "--socket", str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "reloaded: 1 service", "removed: web b1; 1 flow stays until it ends",
        "removed: web b2; 2 flows stay until they end",
    ]  # fmt: skip
    assert (len(told), told[-1]) == (22, "and 2 backends more")


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: Any) -> None:
        raise ConfigError.at("fastlb.yaml:3", "flows", "is too much")

    path = tmp_path / "fastlb.sock"
    with serving(path, {"reload": refuse}):
        assert main(["reload", "--socket", str(path)]) == 2
    assert capsys.readouterr() == ("", "fastlb: fastlb.yaml:3: flows: is too much\n")
