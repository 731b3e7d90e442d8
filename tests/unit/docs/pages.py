"""The pages of the documentation, and what is written in them: blocks of code, links, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", *sorted((ROOT / "docs").glob("*.md")))


class Block(NamedTuple):
    """A block of code in a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str, pages: tuple[Path, ...] = PAGES) -> list[Block]:
    """Return the fenced blocks of these languages."""
    found = []
    for page in pages:
        text = page.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def links(page: Path) -> Iterator[str]:
    """Yield what the links of a page lead to, those to the network left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            yield target


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(name: str, page: Path) -> Iterator[str]:
    """Yield the calls of the command ``name`` in a page: in blocks, in indented lines and in the prose's `code`."""
    text = page.read_text()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks("sh", pages=(page,)) for line in block.text.splitlines()]
    typed = "".join(block.text for block in blocks("console", pages=(page,)))
    lines += re.findall(r"^\$ (.*)$", typed, re.MULTILINE)
    lines += re.findall(r"^    (.*)$", text, re.MULTILINE)
    shell = r"^(?:sudo )?(?:\S*=)?(?:ip netns exec \w+ )?(?:\S*/bin/)?"
    for words in (*inline, *lines):
        if found := re.match(rf"{shell}({name} .*)", words.strip()):
            yield re.split(r" (?:#|\||&|>|2>)", found[1])[0].strip()
