"""`fastlb trace`: of a running fastlb, and of a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.main import main
from tests.control_sockets import serving

SOURCE, DESTINATION = "198.51.100.7:40000", "203.0.113.10:80/tcp"
EXPLAINED = {
    "packet": f"{SOURCE} -> {DESTINATION}", "verdict": "PASS",
    "steps": [{"stage": "service", "says": "none has this address"}, {"stage": "verdict", "says": "PASS no_service"}],
}  # fmt: skip
CONFIG = """
services:
  - {name: web, vip: 203.0.113.10, port: 80, protocol: tcp, forward: nat, backends: [{address: 10.0.0.1}]}
"""


def test_a_running_fastlb_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.sock"
    requests: list[Any] = []

    def explain(request: Any) -> Any:
        requests.append(request)
        return EXPLAINED

    with serving(path, {"trace": explain}):
        assert main(["trace", "--socket", str(path), SOURCE, DESTINATION]) == 0
        printed = capsys.readouterr().out
        assert main(["trace", "--socket", str(path), "--json", SOURCE, DESTINATION]) == 0
    assert printed == f"{SOURCE} -> {DESTINATION}\n  service    none has this address\n  verdict    PASS no_service\n"
    assert json.loads(capsys.readouterr().out) == EXPLAINED
    assert requests == [{"command": "trace", "source": SOURCE, "destination": DESTINATION}] * 2


def test_a_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text(CONFIG)
    assert main(["trace", "--offline", "-c", str(path), "--json", SOURCE, DESTINATION]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert (explained["service"], explained["backend"], explained["verdict"]) == ("web", "10.0.0.1:80", "FORWARD")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--offline", SOURCE, DESTINATION], "--offline needs a configuration: -c FILE"),
        ([SOURCE, "203.0.113.10:80"], "a destination ends in /tcp or /udp"),
        (["[2001:db8::7]:40000", DESTINATION], "are of different IP versions"),
        (["198.51.100.7", DESTINATION], ""),
    ],
)
def test_what_is_no_question(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trace", *words])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
