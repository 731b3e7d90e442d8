"""What holds for all tests: which of them stay together, and that none fails because the machine is busy.

pytest may run in several processes (``-n 2 --dist loadgroup``, as `make test` does). A file's tests stay in one, since
they share fixtures. The tests in namespaces and those over a compiled extension are each one group: the first take a
machine's cores for themselves, the others share what is built once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A second program on the machine makes an example take longer than hypothesis thinks right; nothing is wrong then.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

TESTS = Path(__file__).parent
ONE_PROCESS = {"netns", "ext"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its group."""
    for item in items:
        path = item.path.relative_to(TESTS)
        group = path.parts[0] if path.parts[0] in ONE_PROCESS else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
