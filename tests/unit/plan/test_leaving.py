"""leaving.py: what becomes of the flows of backends that a reload takes out."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Config
from fastlb.plan.backends import BackendStates
from fastlb.plan.leaving import Leaving, leaving, summary, totals
from tests.balancers import BACKENDS, config, service


def one_less(version: int, **changes: Any) -> dict[str, Any]:
    return service("nat", version, name="web", **changes) | {
        "backends": [{"address": address, "port": 8080} for address in BACKENDS[version][1:]]
    }


FATES: list[tuple[dict[str, Any], str]] = [  # of web, as the reload has it; the fate of its first backend's flows
    ({}, "stay"), ({"on_leave": "keep"}, "stay"), ({"on_leave": "rehash"}, "move"), ({"on_leave": "reset"}, "end"),
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [{"port": 81}, {"vip": "203.0.113.99"}, {"forward": "fullnat"}, {"name": "shop"}]


def gone(before: Config, after: Config) -> list[Leaving]:
    """What a reload says of backends, each of which has two flows."""
    states = BackendStates()
    states.apply_config(before, 0.0)
    later = states.copy()
    later.apply_config(after, 1.0)
    return leaving(states, later, lambda name: 2, 1.0)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("changes", "fate"), FATES)
def test_a_backend_less(changes: dict[str, Any], fate: str, version: int) -> None:
    before = config(service("nat", version, name="web"), snat=["192.0.2.77"])
    [left] = gone(before, config(one_less(version, **changes)))
    assert (left.service, left.flows, left.fate) == ("web", 2, fate)
    assert BACKENDS[version][0] in left.backend


@pytest.mark.parametrize("changes", OTHERS)
def test_a_service_that_is_another_one(changes: dict[str, Any]) -> None:
    """All of its flows end, those of backends that it still has, too."""
    before = config(service("nat", name="web"), service("nat", name="api", port=82))
    after = config(service("nat", name="web") | changes, service("nat", name="api", port=82), snat=["192.0.2.77"])
    assert [(each.service, each.fate) for each in gone(before, after)] == [("web", "end")] * 3


def test_what_is_not_told() -> None:
    before = config(service("nat", name="web"))
    assert gone(before, before) == []
    states, later = BackendStates(), BackendStates()
    states.apply_config(before, 0.0)
    later.apply_config(config(), 1.0)
    assert leaving(states, later, lambda name: 0, 1.0) == []  # backends without flows


def test_sums() -> None:
    left = [Leaving("web", f"b{n}", n, fate) for n, fate in enumerate(("stay", "move", "end", "stay"), 1)]
    assert totals(left) == {"stay": 5, "move": 2, "end": 3}
    assert summary(left) == totals(left) | {"count": 4, "backends": ["web b1", "web b2", "web b3"]}
