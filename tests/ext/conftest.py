"""The extension over which these tests run, and cases that are closed after each test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.ext.case import Case

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from extension import build


@pytest.fixture(scope="session")
def held() -> ModuleType:
    return build("held", "tests/ext", "quick")


@pytest.fixture
def new_case(held: ModuleType) -> Iterator[Callable[..., Case]]:
    with ExitStack() as undo:

        def make(**options: Any) -> Case:
            case = Case(held, **options)
            undo.callback(case.close)
            return case

        yield make


@pytest.fixture
def case(new_case: Callable[..., Case]) -> Case:
    return new_case()
