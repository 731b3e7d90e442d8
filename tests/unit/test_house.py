"""Holds the structure of the package: which room may import what, and how large files, classes and functions may get.

CONTRIBUTING names the rooms. What does not hold yet stands in `NOT_YET`; an entry that holds after all fails, so that
the list only gets shorter.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastlb"

# Room: the rooms whose modules it may import, besides `errors` and itself. A module at the root is a room of its own.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "model": set(),
    "config": {"model"},
    "dataplane": set(),
    "_core": {"dataplane"},
    "plan": {"config", "model", "_core"},
    "health": {"config", "model"},
    "kernel": {"kernel.ebpf", "model", "_core"},
    "kernel.ebpf": {"model"},
    "workers": {"kernel", "kernel.ebpf", "config", "model", "_core", "version"},
    "observe": {"plan", "config", "model", "_core"},
    "control": {"observe", "plan", "config", "model", "version"},
    "daemon": {
        "model", "config", "_core", "plan", "health", "kernel", "kernel.ebpf", "workers", "observe", "control",
        "version",
    },
    "cli": {"daemon", "control", "observe", "config", "model", "version"},
    "embedding": {"config", "plan", "observe", "model", "_core"},
    "__init__": {"config", "plan", "observe", "model", "_core", "embedding", "version"},
    "__main__": {"cli"},
}  # fmt: skip

# A command imports the daemon only when it runs it: `fastlb status` loads neither netlink nor eBPF.
LATE = {("cli", "daemon")}

MAX_LINES = {".py": 450, ".pyi": 450, ".pyx": 450, ".pxd": 700, ".pxi": 700}
MAX_METHODS = 20  # inherited ones are counted, too
MAX_ATTRIBUTES = 15
MEDIAN_LINES = 10  # of a function, its docstring included
MOST_LINES = 22  # of nine functions in ten

# (rule, what breaks it): the work that is left.
NOT_YET: set[tuple[str, str]] = {
}  # fmt: skip


class Import(NamedTuple):
    """One import of a module of the package."""

    by: str  # the module that imports, "fastlb." left out: "plan.routes"; a package by its room, "plan"
    of: str
    late: bool  # inside a function, or for types only


def sources(*suffixes: str) -> list[Path]:
    """Return the package's source files with one of the suffixes."""
    return sorted(path for suffix in suffixes for path in PACKAGE.rglob(f"*{suffix}"))


def name_of(path: Path) -> str:
    """Return the module's name without "fastlb."; the package's own is "__init__". A .pxi is part of `_core`."""
    if path.suffix == ".pxi":
        return "_core"
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@cache
def modules() -> frozenset[str]:
    """Return the names of all modules, of the stages (.pxd) too."""
    return frozenset(name_of(path) for path in sources(".py", ".pxd", ".pyx"))


def room_of(module: str) -> str:
    """Return the room in which the module lies."""
    if module.startswith("kernel.ebpf"):
        return "kernel.ebpf"
    return module.partition(".")[0]


def imported(module: str, name: str) -> str:
    """Return the module from which `from module import name` takes the name: a submodule, or the module itself."""
    base = module.removeprefix("fastlb").lstrip(".")
    submodule = f"{base}.{name}".lstrip(".")
    return submodule if submodule in modules() else base or "__init__"


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the parsed file."""
    return ast.parse(path.read_text(), str(path))


def guarded(node: ast.AST) -> bool:
    """Return whether what is inside the node is not imported with the module."""
    types_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    return types_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def walk(node: ast.AST, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node, and whether it stands in a function or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        inside = late or guarded(child)
        yield child, inside
        yield from walk(child, inside)


def imports_of_python(path: Path) -> Iterator[Import]:
    """Yield the imports of a .py or .pyi file."""
    by = name_of(path)
    for node, late in walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "fastlb":
                    yield Import(by, alias.name.removeprefix("fastlb").lstrip(".") or "__init__", late)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").partition(".")[0] == "fastlb":
                yield from (Import(by, imported(node.module or "", alias.name), late) for alias in node.names)


CIMPORT = re.compile(r"^\s*(?:from\s+(fastlb[.\w]*)\s+c?import\s+\(?\s*(\w+)|c?import\s+(fastlb[.\w]*))", re.MULTILINE)


def imports_of_cython(path: Path) -> Iterator[Import]:
    """Yield the imports and cimports of a .pyx, .pxd or .pxi file."""
    for module, name, whole in CIMPORT.findall(path.read_text()):
        yield Import(name_of(path), imported(module, name) if module else imported(whole, ""), False)


@cache
def all_imports() -> tuple[Import, ...]:
    """Return every import inside the package."""
    python = [one for path in sources(".py", ".pyi") for one in imports_of_python(path)]
    return tuple(python + [one for path in sources(".pyx", ".pxd", ".pxi") for one in imports_of_cython(path)])


def allowed(one: Import) -> bool:
    """Return whether the table of rooms allows the import."""
    by, of = room_of(one.by), room_of(one.of)
    if by == of:
        return True
    if (by, of) in LATE and not one.late:
        return False
    return of in ROOMS.get(by, set()) or (of == "errors" and by != "version")


def against_the_table() -> set[str]:
    """Return the imports that the table of rooms does not allow."""
    return {f"{one.by} -> {one.of}" for one in all_imports() if not allowed(one)}


def reached(module: str, graph: dict[str, set[str]]) -> set[str]:
    """Return the modules that the module imports, directly or through others."""
    found: set[str] = set()
    left = [module]
    while left:
        new = graph.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def in_a_circle() -> set[str]:
    """Return the modules that import themselves through others, imports for types included."""
    graph: dict[str, set[str]] = {}
    for one in all_imports():
        if one.by != one.of:
            graph.setdefault(one.by, set()).add(one.of)
    return {module for module in graph if module in reached(module, graph)}


# What the text of a .pxi defines at its margin: a class, or a function of whatever type.
DEFINED = re.compile(r"^(?:cdef class |(?:cdef|cpdef|def)\s[^\n(=]*?\b)(?!enum:)(\w+)(?=[(:])", re.MULTILINE)


def code_of(path: Path) -> str:
    """Return the text of a Cython file without docstrings, comments and strings of one line."""
    text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"#.*", "", re.sub(r'"[^"\n]*"', '""', text))


def used_backwards() -> set[str]:
    """Return the names that a .pxi uses of one that `_core.pyx` includes after it."""
    included = re.findall(r'^include "(.*)"', (PACKAGE / "_core.pyx").read_text(), re.MULTILINE)
    codes = {path: code_of(PACKAGE / path) for path in included}
    return {
        f"{Path(path).name}: {name} of {Path(later).name}"
        for place, path in enumerate(included)
        for later in included[place + 1 :]
        for name in DEFINED.findall(codes[later])
        if re.search(rf"(?<![.\w]){name}\b(?!\s*=)", codes[path])
    }


def too_long() -> set[str]:
    """Return the files with more lines than their kind may have."""
    lengths = {path: path.read_text().count("\n") for path in sources(*MAX_LINES)}
    return {str(path.relative_to(PACKAGE)) for path, lines in lengths.items() if lines > MAX_LINES[path.suffix]}


def without_test() -> set[str]:
    """Return the modules with no test file of their name."""
    wanted = [name for name in map(name_of, sources(".py")) if name != "__main__"]
    packages = {name_of(path) for path in sources("__init__.py")}
    files = {name: Path(*name.split(".")) for name in wanted if name not in packages}
    tests = {name: ROOT / "tests/unit" / file.with_name(f"test_{file.name}.py") for name, file in files.items()}
    return {name for name, test in tests.items() if not test.exists()}


class Class(NamedTuple):
    """What a class statement says."""

    name: str
    bases: list[str]
    methods: set[str]
    attributes: set[str]  # of an instance: assigned to `self`, or the fields of a dataclass
    names: set[str]  # everything that `self.` finds in the class
    read: set[str]  # what its methods take from `self`
    is_data: bool


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DATA = {"NamedTuple", "TypedDict", "Enum", "IntEnum", "Flag", "IntFlag", "BaseModel", "Protocol", "Exception"}


def on_self(node: ast.ClassDef, context: type[ast.expr_context]) -> set[str]:
    """Return the attributes of `self` that the class's methods assign (ast.Store) or read (ast.Load)."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, context)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


def class_of(node: ast.ClassDef) -> Class:
    """Return what the class statement says."""
    methods = {inner.name for inner in node.body if isinstance(inner, FUNCTIONS)}
    fields = {ast.unparse(inner.target) for inner in node.body if isinstance(inner, ast.AnnAssign)}
    plain = {ast.unparse(to) for inner in node.body if isinstance(inner, ast.Assign) for to in inner.targets}
    stored = on_self(node, ast.Store)
    is_data = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return Class(
        name=node.name,
        bases=[ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases],
        methods=methods,
        attributes=stored | (fields if is_data else set()),
        names=methods | fields | plain | stored,
        read=on_self(node, ast.Load),
        is_data=is_data,
    )


@cache
def all_classes() -> dict[str, Class]:
    """Return the package's classes by "module.Class"."""
    return {
        f"{name_of(path)}.{node.name}": class_of(node)
        for path in sources(".py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }


def bases_of(one: Class) -> list[Class]:
    """Return the classes of the package from which this one inherits, directly."""
    return [base for base in all_classes().values() if base.name in one.bases and base is not one]


def line_of(one: Class) -> list[Class]:
    """Return the class and all of the package from which it inherits."""
    return [one, *(far for base in bases_of(one) for far in line_of(base))]


def is_data(one: Class) -> bool:
    """Return whether the class is data, an error, an enumeration or a protocol."""
    return any(part.is_data or DATA & set(part.bases) for part in line_of(one))


def too_many_methods() -> set[str]:
    """Return the classes with too many methods, with those that they inherit."""
    return {
        where
        for where, one in all_classes().items()
        if len(set().union(*(part.methods for part in line_of(one)))) > MAX_METHODS
    }


def too_many_attributes() -> set[str]:
    """Return the classes with too many attributes of an instance, with those that they inherit."""
    return {
        where
        for where, one in all_classes().items()
        if len(set().union(*(part.attributes for part in line_of(one)))) > MAX_ATTRIBUTES
    }


def mixins() -> set[str]:
    """Return the classes that are mixed from others: of two bases, or of one that does not stand by itself."""
    found = set()
    for where, one in all_classes().items():
        bases = [base for base in bases_of(one) if not is_data(base)]
        leaning = [base.name for base in bases if base.read - set().union(*(part.names for part in line_of(base)))]
        if len(bases) > 1 or leaning:
            found.add(where)
    return found


def long_functions() -> set[str]:
    """Return what is wrong with the lengths of all functions together, signature and docstring included."""
    nodes = [node for path in sources(".py") for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTIONS)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in nodes)
    wrong = {"median"} if statistics.median(lengths) > MEDIAN_LINES else set()
    return wrong | ({"nine in ten"} if lengths[len(lengths) * 9 // 10] > MOST_LINES else set())


def nameless_rooms() -> set[str]:
    """Return the rooms whose `__init__.py` does not say what they are for."""
    return {name_of(path) for path in sources("__init__.py") if not ast.get_docstring(tree_of(path))}


def rooms_without_row() -> set[str]:
    """Return the rooms that are not in the table."""
    return {room_of(name) for name in modules()} - set(ROOMS)


def loaded_with() -> set[str]:
    """Return the modules of the kernel that come with what embedders and the small commands import."""
    found = set()
    for module in ("fastlb", "fastlb.cli.main"):
        loaded = "print(*(name for name in sys.modules if name.startswith('fastlb.kernel.')))"
        code = f"import sys; from {module} import *; {loaded}"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        found |= {f"{module} loads {room_of(name.removeprefix('fastlb.'))}" for name in run.stdout.split()}
    return found


RULES = {
    "a room imports only what its row names": against_the_table,
    "no circle of imports": in_a_circle,
    "neither netlink nor eBPF is loaded early": loaded_with,
    "a .pxi uses only what is included before it": used_backwards,
    "a file is not too long": too_long,
    "a module has a test file": without_test,
    "a class has few methods": too_many_methods,
    "a class has few attributes": too_many_attributes,
    "no mixins": mixins,
    "functions are short": long_functions,
    "a room says what it is for": nameless_rooms,
    "a room has a row": rooms_without_row,
}


@pytest.mark.parametrize("rule", RULES)
def test_structure(rule: str) -> None:
    broken = RULES[rule]()
    left = {what for of, what in NOT_YET if of == rule}
    assert not broken - left, f"broken: {rule}\n" + "\n".join(sorted(broken - left))
    assert not left - broken, f"holds now, take it out of NOT_YET: {rule}\n" + "\n".join(sorted(left - broken))


def test_not_yet_names_rules() -> None:
    assert {rule for rule, _ in NOT_YET} <= set(RULES)
