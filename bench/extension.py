"""Builds extensions that measure or test the packet path, as a profile of setup.py would, into build/."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from Cython.Build import cythonize
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent


def settings(profile: str) -> tuple[dict[str, Any], list[str]]:
    """setup.py's compiler directives and a profile's flags, read from its text: importing it would build."""
    constants: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id in ("DIRECTIVES", "PROFILES"):
            constants[target.id] = ast.literal_eval(node.value)
    return constants["DIRECTIVES"], constants["PROFILES"][profile][1]


def build(name: str, folder: str = "bench", profile: str = "release") -> ModuleType:
    """Compile FOLDER/NAME.pyx if it or the packet path changed, and import it."""
    os.chdir(ROOT)  # Cython and setuptools mirror the paths that they are given
    output = str(Path("build", Path(folder).name))
    directives, flags = settings(profile)
    dataplane = Path("fastlb/dataplane")
    extension = Extension(
        name,
        [f"{folder}/{name}.pyx"],
        include_dirs=[str(dataplane)],
        depends=["setup.py", "fastlb/_core.pxd", *map(str, dataplane.glob("*.pxd")), *map(str, dataplane.glob("*.h"))],
        extra_compile_args=flags,
    )
    modules = cythonize(  # type: ignore[no-untyped-call]
        [extension], compiler_directives=directives, build_dir=output, quiet=True
    )
    command = build_ext(Distribution({"ext_modules": modules}))
    command.build_lib = command.build_temp = output
    command.ensure_finalized()
    command.run()
    return load(name, ROOT / command.get_ext_fullpath(name))


def load(name: str, path: Path) -> ModuleType:
    """Import an extension module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
