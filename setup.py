"""Builds the one extension module, ``fastlb._core``; everything else about the package is in pyproject.toml.

The profile comes from the environment, ``FASTLB_PROFILE=release|debug|coverage|asan``:

========  ============================================================================================
release   what users run (the default); assertions cost nothing
debug     no optimisation, assertions (``must``) and Cython's bounds checks on
coverage  debug, and gcc counts every line that runs (``make coverage`` runs the tests under it)
asan      assertions, AddressSanitizer and UndefinedBehaviorSanitizer (``make asan`` runs the tests under it)
========  ============================================================================================
"""

from __future__ import annotations

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": False,
    "auto_pickle": False,
    "autotestdict": False,
}

# profile: (directives that differ, compiler flags, linker flags); literals, which bench/extension.py reads as text.
# The stages are meant to be inlined into one another, but by default gcc lets a file grow by 40 % only. Beyond it, it
# calls the small functions with the most callers, which are the checksums' and the look-ups'. And it takes `likely` for
# nine times in ten, and inlines also what hardly ever happens: 2 to 6 ns a packet in bench/core.py.
PROFILES: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "release": (
        {},
        [
            "-O3",
            "-DNDEBUG",
            "-fno-semantic-interposition",
            "-fno-plt",
            "--param=inline-unit-growth=200",
            "--param=builtin-expect-probability=98",
        ],
        [],
    ),
    "debug": ({"boundscheck": True}, ["-O0", "-g", "-UNDEBUG"], []),
    "coverage": ({"boundscheck": True}, ["-O0", "-g", "-UNDEBUG", "--coverage"], ["--coverage"]),
    "asan": (
        {},
        [
            "-O1",
            "-g",
            "-UNDEBUG",
            "-fno-omit-frame-pointer",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
        ],
        ["-fsanitize=address,undefined"],
    ),
}

PROFILE_STAMP = Path("build/profile")  # the profile of the last build; newer than the outputs when it changed


def chosen_profile() -> str:
    """The profile's name; its stamp is rewritten only on a change, so that a change alone rebuilds."""
    name = os.environ.get("FASTLB_PROFILE") or "release"
    if name not in PROFILES:
        raise SystemExit(f"FASTLB_PROFILE={name}: unknown; use one of: {', '.join(PROFILES)}")
    if not PROFILE_STAMP.exists() or PROFILE_STAMP.read_text() != name:
        PROFILE_STAMP.parent.mkdir(exist_ok=True)
        PROFILE_STAMP.write_text(name)
    return name


def generated_c_is_stale() -> bool:
    """Cython watches the sources by itself, but not the directives and the profile that come from here."""
    generated = Path("fastlb/_core.c")
    if not generated.exists():
        return True
    return any(Path(p).stat().st_mtime > generated.stat().st_mtime for p in ("setup.py", PROFILE_STAMP))


directives, cflags, ldflags = PROFILES[chosen_profile()]
core = Extension(
    "fastlb._core",
    sources=["fastlb/_core.pyx"],
    depends=[
        "setup.py",
        str(PROFILE_STAMP),
        "fastlb/_core.pyx",
        *sorted(map(str, Path("fastlb").glob("*.pxd"))),
        *sorted(str(p) for p in Path("fastlb/dataplane").glob("*") if p.suffix in {".pxd", ".pxi", ".h"}),
    ],
    include_dirs=["fastlb/dataplane"],
    extra_compile_args=[*cflags, "-Wall", "-Wno-unused-function"],
    extra_link_args=ldflags,
    libraries=["m"],
)

setup(
    ext_modules=cythonize(
        [core],
        compiler_directives={**DIRECTIVES, **directives},
        force=generated_c_is_stale(),
    ),
)
