"""Runs docs/first-steps.md as it stands, in namespaces that nobody else sees, and compares what it prints.

The page's commands run one after the other in one shell, with network, mount and process namespaces of its own: the
names of its network namespaces are its own, and everything ends with it. A block of output stands for its commands'
whole output, in which numbers and MAC addresses may differ.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/first-steps.md"
DEADLINE = 240  # seconds; an idle machine takes a tenth of it
MARK = "-- next block --"
PRIVATE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
PROLOGUE = "mount --make-rprivate /\nmount -t tmpfs tmpfs /run\n"
CURL = """#!{python}
import http.client, sys, urllib.parse
words = [word for word in sys.argv[1:] if word != "-s"]
source = words[1] if words[0] == "--interface" else ""
url = urllib.parse.urlsplit(words[-1])
connection = http.client.HTTPConnection(url.hostname, url.port or 80, source_address=(source, 0))
connection.request("GET", url.path)
sys.stdout.write(connection.getresponse().read().decode())
"""


def blocks() -> list[tuple[str, str]]:
    """Return (commands, expected output) of each block of commands; no output is expected where none is shown."""
    found = re.findall(r"^```(sh|text)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    [(drawing, _), *found] = found
    assert drawing == "text"
    pairs: list[tuple[str, str]] = []
    for language, text in found:
        if language == "sh":
            pairs.append((text, ""))
        else:
            pairs[-1] = (pairs[-1][0], text)
    return pairs


def normal(text: str) -> list[str]:
    """Return the words of an output, with its numbers and MAC addresses masked."""
    masked = re.sub(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC", text)
    return re.sub(r"(?<![\d.])\d+(?![\d.]*\.\d)", "N", masked).split()


def tools(path: Path) -> str:
    """Return a PATH that has fastlb, and curl, for which a few lines of Python stand in where there is none."""
    path.mkdir()
    (path / "fastlb").write_text(f'#!/bin/sh\nexec {sys.executable} -m fastlb "$@"\n')
    if shutil.which("curl") is None:
        (path / "curl").write_text(CURL.format(python=sys.executable))
    for each in path.iterdir():
        each.chmod(0o755)
    return f"{path}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block of the page prints."""
    here = tmp_path_factory.mktemp("first-steps")
    script = PROLOGUE + "".join(f"echo '{MARK}'\n{commands}" for commands, _ in blocks())
    environment = os.environ | {"PATH": tools(here / "bin"), "PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(
        [*PRIVATE, "bash", "-c", script], cwd=here, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert [path.name for path in here.iterdir()] == ["bin"]
    return done.stdout.split(f"{MARK}\n")[1:]


def test_every_block_prints_what_the_page_shows(printed: list[str]) -> None:
    assert len(printed) == len(blocks())
    for (commands, expected), output in zip(blocks(), printed, strict=True):
        assert normal(output) == normal(expected), commands


def test_the_page_shows_a_check_stickiness_and_a_drain() -> None:
    text = PAGE.read_text()
    for words in ("check: {type: http", "affinity: {", "fastlb drain web", "down: Connection refused"):
        assert words in text
