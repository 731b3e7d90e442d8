"""One version: the module's, the package's, the metadata's and the command's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastlb
from fastlb.cli.main import main
from fastlb.version import __version__


def test_the_package_has_it_too() -> None:
    assert fastlb.__version__ == __version__


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastlb {__version__}\n"


def test_the_module_imports_nothing() -> None:
    tree = ast.parse((Path(fastlb.__file__).parent / "version.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
