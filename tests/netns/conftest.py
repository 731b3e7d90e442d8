"""What several files of lab tests share. A file brings its own `running`: a balancer for all of its tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.balancer import Balancer
from tests.netns.rig import Preload, build_preload


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
