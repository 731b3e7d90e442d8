"""`fastlb guard`: what is found is shown or removed; what the kernel says is a stand-in here."""

from __future__ import annotations

import json

import pytest

from fastlb.cli.guard import describe
from fastlb.cli.main import main
from fastlb.daemon import leftovers
from fastlb.daemon.leftovers import Leftover
from fastlb.workers.flow_places import LeftFile

FOUND = [Leftover("eth0", 7, ("203.0.113.10",), True), Leftover("eth1", None, (), False)]
FILES = [LeftFile("/dev/shm/fastlb-1", 3 << 20, "left over")]


def test_tables() -> None:
    interfaces, files = describe(FOUND, [("/dev/shm/fastlb-1", 3 << 20, "left over")])
    assert interfaces == (
        "INTERFACE  PROGRAM  VIPS          STATE\n"
        "eth0       7        203.0.113.10  in use\n"
        "eth1       -        -             left over"
    )
    assert files == "FLOW FILE          SIZE   STATE\n/dev/shm/fastlb-1  3 MiB  left over"


def test_a_table_of_what_there_is() -> None:
    assert len(list(describe(FOUND, []))) == 1
    assert len(list(describe([], [("/dev/shm/fastlb-1", 0, "left over")]))) == 1


@pytest.mark.parametrize(
    ("action", "expected"),
    [("show", "INTERFACE  PROGRAM"), ("remove", "removed from: eth0, eth1, /dev/shm/fastlb-1\n")],
)
def test_found(
    action: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leftovers, action, lambda config: (FOUND, FILES))
    assert main(["guard", action]) == 0
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize("action", ["show", "remove"])
def test_nothing(action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(leftovers, action, lambda config: ([], []))
    assert main(["guard", action]) == 0
    assert capsys.readouterr().out == "nothing is left over: there is no guard, VIP or flow file of fastlb here\n"
    assert main(["guard", action, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"interfaces": [], "flow_files": []}


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(leftovers, "show", lambda config: (FOUND, FILES))
    assert main(["guard", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["interfaces"][0] == {
        "interface": "eth0", "program_id": 7, "vips": ["203.0.113.10"], "in_use": True,
    }  # fmt: skip
    assert shown["flow_files"] == [{"path": "/dev/shm/fastlb-1", "bytes": 3 << 20, "state": "left over"}]
