"""Runs what the documentation shows: Python, configurations and commands."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.unit.docs.pages import PAGES, README, ROOT, Block, blocks, commands

PYTHON = blocks("python")
YAML = blocks("yaml")
OPTION = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")


def fastlb(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command and keep what it prints."""
    return subprocess.run(
        [sys.executable, "-m", "fastlb", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@cache
def help_of(*words: str) -> str:
    return fastlb(*words, "--help").stdout


def sub_commands() -> set[str]:
    """Return the commands that `fastlb --help` lists."""
    return set(re.findall(r"^    ([a-z]+) ", help_of(), re.MULTILINE))


def ids(blocks: list[Block]) -> list[str]:
    return [block.name for block in blocks]


@pytest.mark.parametrize("block", PYTHON, ids=ids(PYTHON))
def test_python_runs_and_prints_what_it_says(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, block.name, "exec"), {})
    expected = re.findall(r"^print\(.*\)\s+# (.*)$", block.text, re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


def test_the_readme_has_a_snippet_of_each_kind() -> None:
    assert {block.language for block in blocks("python", "yaml", "sh", pages=(README,))} == {"python", "yaml", "sh"}


@pytest.mark.parametrize("block", YAML, ids=ids(YAML))
def test_configurations_are_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / "fastlb.yaml").write_text(block.text)
    done = fastlb("check", "-c", "fastlb.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_example_is_valid_and_shows_a_check_and_affinity() -> None:
    example = ROOT / "examples/fastlb.yaml"
    done = fastlb("check", "-c", str(example))
    assert (done.returncode, done.stderr) == (0, "")
    services = yaml.safe_load(example.read_text())["services"]
    assert any("check" in service for service in services)
    assert any("affinity" in service for service in services)


def test_commands_of_the_readme_that_need_no_root_run(tmp_path: Path) -> None:
    [configuration] = blocks("yaml", pages=(README,))
    (tmp_path / "fastlb.yaml").write_text(configuration.text)
    lines = [line for block in blocks("sh", pages=(README,)) for line in block.text.splitlines()]
    free = [line.partition("#")[0].split() for line in lines if not line.startswith(("sudo", "make"))]
    assert free
    for program, *words in free:
        assert program == "fastlb"
        done = fastlb(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    for command in commands("fastlb", page):
        words = re.sub(r"[\[\]]", " ", command).split()[1:]
        if words[0] == "COMMAND" or words[0].startswith("-"):
            shown, known = help_of(), True
        else:
            shown, known = help_of(words[0]), words[0] in sub_commands()
        assert known, f"{page.name}: {command}: no such command"
        missing = set(OPTION.findall(" ".join(words))) - set(OPTION.findall(shown))
        assert not missing, f"{page.name}: {command}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands("make", page):
        [target, *_] = [word for word in command.split()[1:] if "=" not in word] or [""]
        assert target in targets, f"{page.name}: {command}"
