"""What several files of lab tests share. A file brings its own `running`: a balancer for all of its tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.balancer import Balancer
from tests.netns.rig import Preload, build_preload

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "netns-lab"))

from topology import remove_abandoned


@pytest.fixture(scope="session", autouse=True)
def nothing_abandoned() -> None:
    """A run that was killed leaves its namespaces; they go before this one begins."""
    if os.geteuid() == 0:
        remove_abandoned()


@pytest.fixture
def balancer(running: Balancer) -> Iterator[Balancer]:
    """The file's balancer, which must outlive each test; its log is shown when one fails."""
    yield running
    running.show_log()
    assert running.running


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Preload:
    """Makes the environment of a fastlb that has faults: preload(REFUSE="bind"), see refuse.c."""
    return build_preload(tmp_path_factory.mktemp("preload"))
