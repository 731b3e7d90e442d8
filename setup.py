"""Builds the one extension module, ``fastlb._core``; everything else about the package is in pyproject.toml.

The profile comes from the environment, ``FASTLB_PROFILE=release|quick|debug|coverage|asan``:

========  ============================================================================================
release   what users run (the default); assertions cost nothing
quick     built in a quarter of release's time, for the turn of edit, build and test; assertions (``must``) on
debug     no optimisation, assertions and Cython's bounds checks on
coverage  debug, and gcc counts every line that runs (``make coverage`` runs the tests under it)
asan      assertions, AddressSanitizer and UndefinedBehaviorSanitizer (``make asan`` runs the tests under it)
========  ============================================================================================

What a profile built stays in ``build/<profile>``, so that going back to it costs a copy. The C is generated beside the
source, but where the directives differ.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
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
            "-g0",
            "-DNDEBUG",
            "-fno-semantic-interposition",
            "-fno-plt",
            "--param=inline-unit-growth=200",
            "--param=builtin-expect-probability=98",
        ],
        [],
    ),
    "quick": ({}, ["-O0", "-g0", "-UNDEBUG"], []),
    "debug": ({"boundscheck": True}, ["-O0", "-g", "-UNDEBUG"], []),
    "coverage": ({"boundscheck": True}, ["-O0", "-g0", "-UNDEBUG", "--coverage"], ["--coverage"]),
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

# To ask whether generated C is indented as it reads takes gcc as long as to compile it.
WARNINGS = ["-Wall", "-Wno-unused-function", "-Wno-misleading-indentation"]

PROFILE_STAMP = Path("build/profile")  # the profile of what lies in place


def chosen_profile() -> str:
    """Return the profile's name. On a change what lies in place goes: what the profile built comes there."""
    name = os.environ.get("FASTLB_PROFILE") or "release"
    if name not in PROFILES:
        raise SystemExit(f"FASTLB_PROFILE={name}: unknown; use one of: {', '.join(PROFILES)}")
    if not PROFILE_STAMP.exists() or PROFILE_STAMP.read_text() != name:
        for placed in Path("fastlb").glob("_core.*.so"):
            placed.unlink()
        PROFILE_STAMP.parent.mkdir(exist_ok=True)
        PROFILE_STAMP.write_text(name)
    return name


def directory_of_c(profile: str) -> str | None:
    """Return where the C is generated: beside the source, but where the profile's directives differ."""
    return f"build/{profile}" if PROFILES[profile][0] else None


def generated_c_is_stale(directory: str | None) -> bool:
    """Return whether the directives may have changed since: Cython watches the sources alone."""
    generated = Path(directory or ".", "fastlb/_core.c")
    return not generated.exists() or Path("setup.py").stat().st_mtime > generated.stat().st_mtime


if shutil.which("ccache"):  # what was built before, on another branch or in another directory, comes out of its cache
    os.environ.setdefault("CC", f"ccache {sysconfig.get_config_var('CC')}")
profile = chosen_profile()
directives, cflags, ldflags = PROFILES[profile]
core = Extension(
    "fastlb._core",
    sources=["fastlb/_core.pyx"],
    depends=[
        "setup.py",
        "fastlb/_core.pyx",
        *sorted(map(str, Path("fastlb").glob("*.pxd"))),
        *sorted(str(p) for p in Path("fastlb/dataplane").glob("*") if p.suffix in {".pxd", ".pxi", ".h"}),
    ],
    include_dirs=["fastlb/dataplane"],
    extra_compile_args=[*cflags, *WARNINGS],
    extra_link_args=ldflags,
    libraries=["m"],
)

setup(
    ext_modules=cythonize(
        [core],
        compiler_directives={**DIRECTIVES, **directives},
        build_dir=directory_of_c(profile),
        force=generated_c_is_stale(directory_of_c(profile)),
    ),
    options={"build": {"build_base": f"build/{profile}"}},
)
