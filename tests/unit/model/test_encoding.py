"""JSON in steps is what json.dumps makes of the same value."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastlb.model.encoding import ITEMS, encode
from fastlb.model.steps import finish

SMALL = {"backend": "10.0.0.1:80", "response": None, "weight": 1, "share": 0.5, "ok": True}
VALUES: list[Any] = [
    None, 1, "ä\n\"", [], {}, [1], {"a": []}, {"a": {}}, (1, 2),
    list(range(ITEMS)), list(range(ITEMS + 1)), list(range(3 * ITEMS)),
    {"ok": True, "result": {"services": [{"name": "web", "backends": [SMALL] * 300}], "counters": {"drops": {"x": 1}}}},
    [{"name": str(number), "backends": [SMALL] * number} for number in range(60)],
    [[1, [2, {"a": [3] * 100}]], {}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[f"value {at}" for at in range(len(VALUES))])
def test_json(value: Any) -> None:
    assert finish(encode(value)) == json.dumps(value).encode()


def test_a_long_list_is_encoded_in_many_steps() -> None:
    services = {"services": [{"backends": [SMALL] * 10_000}]}
    assert sum(1 for _ in encode(services)) > 10_000 / ITEMS
