"""What commands have in common: which socket is asked, and numbers on the command line."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

import pytest

from fastlb.cli.main import parser
from fastlb.cli.options import ENVIRONMENT, number, socket_of
from fastlb.errors import ConfigError
from fastlb.model.names import DEFAULT_CONTROL

ELSEWHERE = "/run/elsewhere.sock"


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], None, DEFAULT_CONTROL),
        ([], "", DEFAULT_CONTROL),
        ([], ELSEWHERE, ELSEWHERE),
        (["--socket", "/run/named.sock"], None, "/run/named.sock"),
        (["--socket", "/run/named.sock"], ELSEWHERE, "/run/named.sock"),
        (["-c", "named.yaml"], None, "/run/configured.sock"),
        (["-c", "named.yaml"], ELSEWHERE, "/run/configured.sock"),
        (["-c", "unnamed.yaml"], ELSEWHERE, DEFAULT_CONTROL),
    ],
)
def test_which_socket(
    words: list[str], environment: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option wins over the environment: also a configuration that leaves ``control`` at its default."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.yaml").write_text("control: /run/configured.sock\nservices: 7\n")
    (tmp_path / "unnamed.yaml").write_text("services: []\n")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if environment is not None:
        monkeypatch.setenv(ENVIRONMENT, environment)
    assert socket_of(parser().parse_args(["status", *words])) == expected


def test_the_socket_of_a_process(tmp_path: Path) -> None:
    """Whatever a file or the environment says."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "fastlb.sock"))
        listener.listen()
        arguments = parser().parse_args(["reload", "--pid", str(os.getpid())])
        assert socket_of(arguments) == str(tmp_path / "fastlb.sock")


@pytest.mark.parametrize("other", [["-c", "x"], ["--socket", "x"]])
def test_a_process_or_something_else(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["reload", "--pid", "7", *other])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        socket_of(parser().parse_args(["status", "-c", str(tmp_path / "none.yaml")]))


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("9", 9), ("0x9", 9)])
def test_numbers(text: str, value: int) -> None:
    assert number(0, 9)(text) == value


@pytest.mark.parametrize("text", ["10", "-1"])
def test_numbers_out_of_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not in 0..9"):
        number(0, 9)(text)


@pytest.mark.parametrize("text", ["", "nine", "1.5", "٨", "８", "०", "⁸", "٠x٨"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        number(0, 9)(text)
