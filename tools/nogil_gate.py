"""The gate on the packet path: its generated C must never touch Python.

``nogil`` in a signature only promises that a function *may* run without the GIL. Cython still takes the GIL
in it to look for an exception (a callee that is not ``noexcept``), to report one, or for a ``with gil``
block, and each costs more than a packet may. So the C that Cython wrote is read, release profile, and a
function of the packet path that names any of Python's API is refused.

The packet path is every C function made from ``fastlb/dataplane/*.pxd`` (its mangled name contains
``__pyx_f_`` and ``_9dataplane_``) or marked ``nogil`` in an included ``.pxi``, and every C function that
those call.

Usage: ``python tools/nogil_gate.py [--minimum N] [fastlb/_core.c]``; exit code 1 on a finding, or when fewer
functions than ``--minimum`` were found, since then the gate has lost sight of what it guards.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Column 0, one line, ends in "{": the form in which Cython writes every function's head. The function's name
# is the word before the first parenthesis (argument types may well contain "_9dataplane_").
FUNCTION_HEAD = re.compile(r"^(?:static |CYTHON_\w+ |__PYX_\w+ )[^;={}(]*?\b(\w+)\(.*\{\s*$")
COMMENT_OR_STRING = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
SOURCE_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
MARKED_LINE = re.compile(r"^ \* (.*?)\s*# <<<<<<<<<<<<<<$([\s\S]*)", re.MULTILINE)
NOGIL_SIGNATURE = re.compile(r"^c(?:p)?def\b[^:]*\([^:]*\)[^:]*\bnogil\s*:", re.DOTALL)

PYTHON_API = re.compile(r"\b(?:_?Py(?:_\w+|[A-Z]\w*)|__Pyx_\w+|__PYX_ERR)\b")
HARMLESS = re.compile(
    r"^(?:Py_ssize_t|Py_hash_t"  # plain integers
    r"|__Pyx_(?:div|mod|pow)_\w+"  # C arithmetic with Python's rounding
    r"|__Pyx_\w+_t)$"  # type names
)


@dataclass(frozen=True)
class Function:
    """One C function: ``source`` is all its text, ``code`` without comments and strings."""

    name: str
    source: str
    code: str


@dataclass(frozen=True)
class Finding:
    """A function of the packet path and the names of Python's API in it, each once, in order."""

    function: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.function}: {', '.join(self.names)}"


def functions(generated: str) -> dict[str, Function]:
    """Every function defined in the generated C, by name."""
    found = {}
    for name, source in _split(generated.splitlines(keepends=True)):
        found[name] = Function(name, source, COMMENT_OR_STRING.sub(" ", source))
    return found


def _split(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of each function; a function ends at the first ``}`` in column 0."""
    name = ""
    start = 0
    for number, line in enumerate(lines):
        if not name and (head := FUNCTION_HEAD.match(line)):
            name, start = head[1], number
        elif name and line.startswith("}"):
            yield name, "".join(lines[start : number + 1])
            name = ""


def packet_path(defined: dict[str, Function]) -> dict[str, Function]:
    """The functions of the packet path: the roots and everything of ours that they reach."""
    reached: dict[str, Function] = {}
    ours = (f for f in defined.values() if "__pyx_f_" in f.name)  # not the converters of structs and enums
    waiting = [f for f in ours if "_9dataplane_" in f.name or _is_nogil(f)]
    while waiting:
        function = waiting.pop()
        if function.name in reached:
            continue
        reached[function.name] = function
        called = set(re.findall(r"\b__pyx_\w+", function.code)) - reached.keys()
        waiting += [defined[name] for name in called if name in defined]
    return reached


def _is_nogil(function: Function) -> bool:
    """Whether Cython's copy of the ``cdef`` line says ``nogil`` (it shows two lines after the first)."""
    for comment in SOURCE_COMMENT.findall(function.source):
        if marked := MARKED_LINE.search(comment):
            signature = marked[1] + "".join(line.removeprefix(" *") for line in marked[2].splitlines())
            if NOGIL_SIGNATURE.match(signature):
                return True
    return False


def findings(generated: str) -> tuple[int, list[Finding]]:
    """How many functions of the packet path the text holds, and those among them that touch Python."""
    path = packet_path(functions(generated))
    bad = []
    for function in path.values():
        names = dict.fromkeys(n for n in PYTHON_API.findall(function.code) if not HARMLESS.match(n))
        if names:
            bad.append(Finding(function.name, tuple(names)))
    return len(path), sorted(bad, key=lambda finding: finding.function)


def main(arguments: list[str] | None = None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description="Refuse generated C that touches Python in the packet path.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("fastlb/_core.c"))
    parser.add_argument("--minimum", type=int, default=20, help="fewest functions expected (default 20)")
    options = parser.parse_args(arguments)
    try:
        generated = options.file.read_text()
    except OSError as error:
        print(f"nogil gate: {options.file}: {error.strerror}; build first (make build)", file=sys.stderr)
        return 1
    checked, bad = findings(generated)
    too_few = checked < max(options.minimum, 1)
    print(f"nogil gate: {checked} functions of the packet path, {len(bad)} touch Python")
    for finding in bad:
        print(f"  {finding}", file=sys.stderr)
    if too_few:
        print(f"nogil gate: at least {options.minimum} expected: has the naming changed?", file=sys.stderr)
    return 1 if bad or too_few else 0


if __name__ == "__main__":
    sys.exit(main())
