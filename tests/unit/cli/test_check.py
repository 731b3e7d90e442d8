"""`fastlb check` of files that are right, and of files that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlb.cli.main import main

SERVICE = """
  - {name: web, vip: 203.0.113.10, port: 80, protocol: tcp, forward: nat, backends: [{address: 10.0.0.1}]}
"""
EMPTY_NOTE = "note: `interfaces` is empty: enough for embedding, but fastlb run needs at least one\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"interfaces: [eth0]\nservices: {SERVICE}", "valid, 1 service, 1 backend\n"),
        ("services: []\n", f"valid, 0 services, 0 backends\n{EMPTY_NOTE}"),
    ],
)
def test_valid(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text(text)
    assert main(["check", "-c", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: {expected}"


def test_defaults_are_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text(f"workers: 1\nservices: {SERVICE}")
    assert main(["check", "-c", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["workers"], shown["maglev_size"], shown["services"][0]["scheduler"]) == (1, 65537, "maglev")


def test_every_mistake_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text("flows: many\nservices:\n  - {name: web, vip: nowhere}\n")
    assert main(["check", "-c", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert {"flows", "services[0].vip"} <= {line.split(": ")[2] for line in printed.err.splitlines()}
