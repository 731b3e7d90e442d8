"""What holds for all tests: which of them stay together, and that none fails because the machine is busy.

pytest may run in several processes (``-n 2 --dist loadscope``, as `make test` does). A file's tests stay in one, since
they share fixtures. The tests in namespaces and those over a compiled extension are each one group: the first take a
machine's cores for themselves, the others share what is built once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# A second program on the machine makes an example take longer than hypothesis thinks right; nothing is wrong then.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

TESTS = Path(__file__).parent
ONE_PROCESS = {"ext"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Give pytest --long, with which tests marked `long` run for minutes."""
    parser.addoption("--long", action="store_true", help="run the tests that are marked long for minutes")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Tell a test that is marked long whether it has minutes."""
    return bool(request.config.getoption("--long"))


class Groups(LoadScopeScheduling):
    """Hands tests out to processes group by group."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the group of a test, by its id; what pytest-xdist documents for a scheduler of one's own."""
        path = Path(nodeid.partition("::")[0]).relative_to(TESTS.name)
        return path.parts[0] if path.parts[0] in ONE_PROCESS else str(path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Groups:
    """Give pytest-xdist the scheduler. (Its own groups, ``loadgroup``, do nothing with pytest 9.2.)"""
    return Groups(config, log)


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> Iterator[None]:
    """A test that sets up logging, as a command does, leaves nothing of it to the next one in its process."""
    yield
    structlog.reset_defaults()
