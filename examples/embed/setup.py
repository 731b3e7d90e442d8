"""Builds the example against the fastlb that is installed: ``pip install --no-build-isolation examples/embed``."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import fastlb

setup(
    ext_modules=cythonize(
        [
            Extension(
                "packetloop",
                ["packetloop.pyx"],
                include_dirs=[fastlb.get_include()],
                extra_compile_args=["-O3", "-DNDEBUG"],
            )
        ],
        # The packet path is compiled into this extension, and must divide as C does: Python's way asks for the GIL.
        compiler_directives={"language_level": 3, "cdivision": True},
    )
)
