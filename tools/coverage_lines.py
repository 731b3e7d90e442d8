"""Which lines of the Cython sources have run, from the counters that gcc put into the generated C.

Build with ``FASTLB_PROFILE=coverage``, run the tests, then ``python tools/coverage_lines.py --floor 90 TREE``: every
counter file below TREE is read and each source file gets one line. The exit code is 1 when less of
``fastlb/dataplane`` ran than the floor says, or nothing was counted. (``make coverage`` does all of it.)

Why not Cython's own line tracing: it takes the GIL for each line (the tests took nine times as long), and its plugin
for coverage.py cannot report .pxd files. gcc's counters need neither, and the generated C tells whose each line is:
Cython puts a comment, ``/* "fastlb/dataplane/parse.pxd":48``, in front of what it made of line 48. Only the bodies of
functions count. What Cython adds around them, such as the unpacking of arguments, is not ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Lines = dict[str, Counter[int]]  # by source file: how often each line ran; 0 when it could have

MARKER = re.compile(r'\s*/\* "([^"]+)":(\d+)$')
BODY = re.compile(r"__pyx_(f|pf|gb)_")  # cdef functions, Python functions, bodies of generators
PACKET_PATH = "fastlb/dataplane/"


def origins(generated: Iterable[str]) -> list[tuple[str, int] | None]:
    """The source file and line that each line of the generated C was made of, from its first line on."""
    found: list[tuple[str, int] | None] = []
    origin = None
    for line in generated:
        if marker := MARKER.match(line):
            origin = marker[1], int(marker[2])
        found.append(origin)
    return found


def run_gcov(counters: Path) -> Iterator[dict[str, Any]]:
    """What gcov says of one counter file; GCOV names another gcov, which must be that of the compiler."""
    command = [os.environ.get("GCOV", "gcov"), "--json-format", "--stdout", counters.name]
    answer = subprocess.run(command, cwd=counters.parent, stdout=subprocess.PIPE, check=True, text=True)
    for line in filter(None, answer.stdout.splitlines()):
        yield json.loads(line)


def count(report: dict[str, Any], lines: Lines) -> None:
    """Add the counts of one of gcov's reports to those of the Cython sources."""
    for file in report["files"]:
        path = Path(report["current_working_directory"], file["file"])
        if path.suffix != ".c":
            continue  # a header
        with path.open() as generated:
            made_of = origins(generated)
        for line in file["lines"]:
            origin = made_of[line["line_number"] - 1]
            if origin is not None and BODY.match(line.get("function_name", "")):
                lines.setdefault(origin[0], Counter())[origin[1]] += line["count"]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: "3-5, 9"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def percent(counts: Iterable[Counter[int]]) -> float:
    """Of all lines, those that ran."""
    ran = [times > 0 for file in counts for times in file.values()]
    return 100 * sum(ran) / len(ran) if ran else 0.0


def show(lines: Lines) -> None:
    """One line for each file: how many lines, how many of them ran, which did not."""
    width = max(map(len, lines))
    print(f"{'file':{width}}  lines  ran %  not run")
    for name, file in sorted(lines.items()):
        missed = ranges(sorted(line for line, times in file.items() if not times))
        print(f"{name:{width}}  {len(file):5}  {percent([file]):5.1f}  {missed}".rstrip())


def main(arguments: list[str] | None = None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Which lines of the Cython sources have run?")
    parser.add_argument("tree", type=Path, help="where the coverage profile was built and the tests ran")
    parser.add_argument("--floor", type=float, default=0, metavar="PERCENT", help=f"least share of {PACKET_PATH}")
    options = parser.parse_args(arguments)
    lines: Lines = {}
    try:
        for counters in sorted(options.tree.rglob("*.gcda")):
            for report in run_gcov(counters):
                count(report, lines)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"gcov, of the compiler that built {options.tree}, is needed: {error}", file=sys.stderr)
        return 1
    if not lines:
        print(f"{options.tree}: no counters; build with FASTLB_PROFILE=coverage and run tests first", file=sys.stderr)
        return 1
    show(lines)
    reached = percent(file for name, file in lines.items() if name.startswith(PACKET_PATH))
    print(f"{PACKET_PATH}: {reached:.1f} % of its lines ran; the floor is {options.floor:g} %")
    return int(reached < options.floor)


if __name__ == "__main__":
    sys.exit(main())
