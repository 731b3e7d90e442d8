"""`fastlb drain`, `weight`, `enable`: the requests that they send, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.drain import deadline
from fastlb.cli.main import main
from tests.control_sockets import serving


@pytest.mark.parametrize(
    ("words", "request_sent", "expected"),
    [
        (["drain", "web", "10.0.0.1"], {"command": "drain", "deadline": None}, "draining: web 10.0.0.1:80\n"),
        (
            ["drain", "web", "10.0.0.1", "--deadline", "5m"],
            {"command": "drain", "deadline": 300.0},
            "draining: web 10.0.0.1:80\n",
        ),
        (["weight", "web", "10.0.0.1", "0"], {"command": "weight", "weight": 0}, "weight 0: web 10.0.0.1:80\n"),
        (["enable", "web", "10.0.0.1"], {"command": "enable"}, "enabled: web 10.0.0.1:80\n"),
    ],
)
def test_requests(
    words: list[str], request_sent: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fastlb.sock"
    requests: list[Any] = []

    def change(request: Any) -> dict[str, str]:
        requests.append(request)
        return {"service": request["service"], "backend": f"{request['backend']}:80"}

    with serving(path, dict.fromkeys(("drain", "weight", "enable"), change)):
        assert main([*words, "--socket", str(path)]) == 0
    assert requests == [{"service": "web", "backend": "10.0.0.1", **request_sent}]
    assert capsys.readouterr().out == expected


ANSWERS = [  # what a balancer answers beside the names; what is printed
    ({"flows": 0, "fate": "stay", "after_deadline": None, "takers": 2}, "draining: web b:80\n"),
    ({"flows": 1, "fate": "stay", "after_deadline": None, "takers": 2},
     "draining: web b:80; 1 flow stays until it ends\n"),
    ({"flows": 4, "fate": "stay", "after_deadline": "end", "takers": 0},
     "draining: web b:80; 4 flows stay until they end; at the deadline, those left end\n"
     "no backend of web takes new flows now\n"),
    ({"flows": 2, "fate": "move", "after_deadline": "move", "takers": 1},
     "draining: web b:80; 2 flows move to other backends\n"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_what_becomes_of_flows(
    answer: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fastlb.sock"
    with serving(path, {"drain": lambda request: {"service": "web", "backend": "b:80"} | answer}):
        assert main(["drain", "web", "b", "--socket", str(path)]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(("text", "seconds"), [("5m", 300.0), ("300", 300.0), ("1.5", 1.5), ("2h", 7200.0)])
def test_deadlines(text: str, seconds: float) -> None:
    assert deadline(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "5 parsecs", "٣٠٠", "３００", "³⁰⁰", "٥m", ".", "nan", "1e3"])
def test_what_is_no_deadline(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        deadline(text)
