"""Whether the documentation's links lead somewhere, and the README is a page that follows the rooms."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import fastlb
from tests.unit.docs.pages import PAGES, README, ROOT, anchors, links

MOST_LINES = 200
ROOMS = [
    "model", "config", "dataplane", "plan", "health", "kernel", "kernel/ebpf", "workers", "observe", "control",
    "daemon", "cli",
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_a_page() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_the_reading_order_follows_the_rooms() -> None:
    section = README.read_text().split("## The source, in reading order\n")[1]
    assert re.findall(r"^\| \[([\w/]+)\]", section, re.MULTILINE) == ROOMS
    there = {str(path.parent.relative_to(ROOT / "fastlb")) for path in (ROOT / "fastlb").glob("**/__init__.py")}
    assert there - {"."} | {"dataplane"} == set(ROOMS)


def test_the_menu_has_every_page() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w-]+\.md", str(menu))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_api_page_names_what_there_is_and_all_that_is_public() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert not module or hasattr(import_module(module), attribute), name
    shown = re.findall(r"^(?:        - |::: fastlb\.)(\w+)$", text, re.MULTILINE)
    assert set(fastlb.__all__) - {"__version__"} <= set(shown)
