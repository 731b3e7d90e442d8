"""The command as a whole: its exit codes, its help, and what it loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastlb.cli.main import main, parser
from fastlb.cli.options import ENVIRONMENT

NAMES = [
    *("run", "check", "status", "conns", "trace", "drain", "enable", "weight"),
    *("reload", "stop", "schema", "guard", "decap"),
]
FASTLB = [sys.executable, "-m", "fastlb"]


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: fastlb {name}")
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert re.findall(r"^    ([a-z]+)", listed, re.MULTILINE) == NAMES
    assert ENVIRONMENT in listed


@pytest.mark.parametrize(
    "words", [[], ["dance"], ["run"], ["guard"], ["status", "--socket", "a", "-c", "b"], ["weight", "web", "b", "-1"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: fastlb" in capsys.readouterr().err


def test_every_line_of_an_error_says_whose_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fastlb.yaml"
    path.write_text("flows: many\nworkers: -1\n")
    assert main(["check", "-c", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 2
    assert all(line.startswith(f"fastlb: {path}:") for line in printed.err.splitlines())


def test_a_failure_at_run_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--socket", str(tmp_path / "none.sock")]) == 1
    assert "no fastlb is running on" in capsys.readouterr().err


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlb.cli.schema.json_schema", interrupt)
    assert main(["schema"]) == 130


def test_a_reader_that_goes_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*FASTLB, "schema"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*FASTLB, "schema"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == b"fastlb: cannot write the output: No space left on device\n"


def test_only_what_runs_loads_netlink_and_ebpf() -> None:
    """`fastlb status` on a host with 10,000 backends must not begin with a second of imports."""
    look = (
        "import sys; from fastlb.cli.main import parser; parser();"
        "print([name for name in sys.modules if name.startswith(('asyncio', 'structlog', 'pyroute2', 'fastlb.kernel',"
        " 'fastlb.daemon', 'fastlb.workers', 'fastlb.health'))])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", ["status", "drain", "reload", "stop"])
def test_what_only_asks_does_without_the_configuration_s_models(command: str) -> None:
    look = (
        f"import sys; from fastlb.cli.main import parser; parser({command!r});"
        "print([name for name in sys.modules if name.startswith(('pydantic', 'yaml', 'fastlb.config'))])"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_an_option_may_be_abbreviated_as_ever() -> None:
    assert parser().parse_args(["stop", "--hand"]).handover
