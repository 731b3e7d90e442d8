"""What holds for all tests: which of them stay together, and that none fails because the machine is busy.

pytest may run in several processes (``-n 2 --dist loadscope``, as `make test` does). A file's tests stay in one, since
they share fixtures; so do those over a compiled extension, which share what is built once. What takes longest begins
first, so that no process works on alone at the end.
"""

from __future__ import annotations

import sys
from collections import Counter
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
ONE_PROCESS = dict.fromkeys(("ext/test_claims.py", "ext/test_held.py", "ext/test_open.py"), "ext")
SECONDS = {  # what groups take, roughly, where it is more than the number of their tests lets think
    "netns/test_lifecycle.py": 160,
    "netns/test_workers.py": 110,
    "netns/test_transmit.py": 105,
    "netns/test_fragments.py": 100,
    "netns/test_takeover.py": 75,
    "netns/test_scheduling.py": 65,
    "netns/test_fullnat.py": 60,
    "netns/test_conns.py": 45,
    "netns/test_tunneloffload.py": 40,
    "netns/test_leaving.py": 35,
    "netns/test_load.py": 35,
    "netns/test_nexthop.py": 25,
    "netns/test_first_steps.py": 20,
    "ext/test_embed.py": 50,
    "unit/dataplane/test_reserve.py": 40,
    "unit/dataplane/test_schedule.py": 30,
    "ext/test_recipes.py": 25,
    "ext": 20,
}
SECONDS_A_TEST = 0.02


def group_of(nodeid: str) -> str:
    """Return the group of a test, by its id."""
    path = str(Path(nodeid.partition("::")[0]).relative_to(TESTS.name))
    return ONE_PROCESS.get(path, path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes take groups of tests, those that take longest come first."""
    if hasattr(config, "workerinput"):
        sizes = Counter(group_of(item.nodeid) for item in items)
        seconds = {group: SECONDS.get(group, SECONDS_A_TEST * size) for group, size in sizes.items()}
        items.sort(key=lambda item: -seconds[group_of(item.nodeid)])


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
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Groups:
    """Give pytest-xdist the scheduler. (Its own groups, ``loadgroup``, do nothing with pytest 9.2.)"""
    config.option.loadscopereorder = False  # the order is ours
    return Groups(config, log)


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> Iterator[None]:
    """A test that sets up logging, as a command does, leaves nothing of it to the next one in its process."""
    stderr = sys.stderr
    yield
    structlog.reset_defaults()
    sys.stderr = stderr
