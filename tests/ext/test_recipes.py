"""Follows CONTRIBUTING's recipe for a scheduler: in a copy of the sources, a scheduler that takes the first backend.

Only files that the recipe names are changed. The copy is built, and a data path with the new scheduler places flows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = shutil.ignore_patterns("*.so", "_core*.c", "__pycache__")
MOST_FILES = {"A scheduler": 4, "A tunnel mode": 6}
PROFILE = "quick"
NOT_THEIRS = {"LD_PRELOAD"}  # of `make asan`: nothing here is instrumented

# file of the recipe: what stands there now, and what stands there with the new scheduler
FIRST = {
    "fastlb/model/modes.py": {
        '    Scheduler("lc",': '    Scheduler("first", "the first one that has room"),\n        Scheduler("lc",',
    },
    "fastlb/dataplane/schedule.pxd": {
        "BY_LEAST_FLOWS = 5 ": "BY_FIRST = 5\n    BY_LEAST_FLOWS = 6 ",
        "BY_LEAST_RESPONSE = 6 ": "BY_LEAST_RESPONSE = 7 ",
        "BY_P2C = 7 ": "BY_P2C = 8 ",
        "    if service.scheduler == BY_P2C:\n        return better_of_two": (
            "    if service.scheduler == BY_FIRST:\n"
            "        return &service.candidates[attempt % service.candidate_count]\n"
            "    if service.scheduler == BY_P2C:\n        return better_of_two"
        ),
    },
    "fastlb/dataplane/snapshot.pxi": {'"random": BY_RANDOM': '"first": BY_FIRST, "random": BY_RANDOM'},
    "fastlb/_core.pyx": {" BY_KETAMA, BY_LEAST_FLOWS,": " BY_FIRST, BY_KETAMA, BY_LEAST_FLOWS,"},
}
PROGRAM = """
import json
from struct import pack
import fastlb

service = {"name": "web", "vip": "203.0.113.10", "port": 443, "protocol": "tcp", "forward": "dsr",
           "scheduler": "first", "backends": [{"address": f"10.0.0.{host}", "max_flows": 3} for host in (11, 12, 13)]}
dp = fastlb.Datapath(fastlb.Config.from_dict({"flows": 1000, "maglev_size": 251, "services": [service]}))
for host in (11, 12, 13):
    dp.set_neighbour(f"10.0.0.{host}", f"02:00:00:00:00:{host}")
chosen = []
for port in range(4000, 4007):
    tcp = pack("!HHIIBBHHH", port, 443, 0, 0, 0x50, 0x02, 65535, 0, 0)
    ip = pack("!BBHHHBBH4B4B", 0x45, 0, 40, 0, 0, 64, 6, 0, 198, 51, 100, 7, 203, 0, 113, 10)
    chosen.append(dp.process(bytes.fromhex("020000000001 020000000007 0800") + ip + tcp).backend)
[why] = [step.says for step in dp.trace("198.51.100.7", 4999, "203.0.113.10", 443, "tcp").steps
         if step.stage == "scheduler"]
print(json.dumps({"file": fastlb.__file__, "chosen": chosen, "why": why}))
"""


def recipe(title: str) -> list[str]:
    """Return the files of the product that a recipe names, in its order."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"\n### {title}\n")[1]
    steps = re.findall(r"^\d+\. (.*)$", text.split("\n### ")[0], re.MULTILINE)
    named = [path for step in steps for path in re.findall(r"^`(fastlb/[\w./]+)`", step)]
    return list(dict.fromkeys(named))


@pytest.mark.parametrize(("title", "most"), MOST_FILES.items())
def test_a_recipe_names_few_files_that_are_there(title: str, most: int) -> None:
    files = recipe(title)
    assert 0 < len(files) <= most
    assert [path for path in files if not (ROOT / path).exists()] == []


def run(copy: Path, *words: str) -> str:
    """Run Python in the copy; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_THEIRS}
    environment |= {"FASTLB_PROFILE": PROFILE, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the new scheduler, built."""
    made = tmp_path_factory.mktemp("recipe") / "sources"
    shutil.copytree(ROOT / "fastlb", made / "fastlb", ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, made)
    for path, changes in FIRST.items():
        text = (made / path).read_text()
        for before, after in changes.items():
            assert text.count(before) == 1, f"{path}: {before}"
            text = text.replace(before, after)
        (made / path).write_text(text)
    run(made, "setup.py", "--quiet", "build_ext", "--inplace")
    return made


def test_the_recipe_for_a_scheduler_is_enough(copy: Path) -> None:
    assert list(FIRST) == recipe("A scheduler")
    found: dict[str, Any] = json.loads(run(copy, "-c", PROGRAM))
    assert Path(found["file"]) == copy / "fastlb/__init__.py"
    assert found["chosen"] == ["10.0.0.11:443"] * 3 + ["10.0.0.12:443"] * 3 + ["10.0.0.13:443"]
    assert "first: the first one that has room" in found["why"]


def test_the_new_scheduler_is_in_the_schema(copy: Path) -> None:
    assert '"first"' in run(copy, "-m", "fastlb", "schema")
