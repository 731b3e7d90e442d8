"""What several files of lab tests share. A file brings its own `running`: a balancer for all of its tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.balancer import Balancer


@pytest.fixture
def balancer(running: Balancer) -> Iterator[Balancer]:
    """The file's balancer, which must outlive each test; its log is shown when one fails."""
    yield running
    running.show_log()
    assert running.running
