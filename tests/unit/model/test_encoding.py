"""JSON in steps says what json.dumps says of the same value, in one line."""

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
    {"n": float("inf"), "text": "\u2028\x00"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[f"value {at}" for at in range(len(VALUES))])
def test_json(value: Any) -> None:
    text = finish(encode(value))
    assert json.loads(text) == json.loads(json.dumps(value))
    assert b"\n" not in text


def test_a_name_that_is_no_text_is_escaped() -> None:
    """As Python names a file whose bytes are not UTF-8."""
    assert json.loads(finish(encode({"file": ["\udcff", "ä"], "\udcfe": 1}))) == {"file": ["\udcff", "ä"], "\udcfe": 1}


def test_a_long_list_is_encoded_in_many_steps() -> None:
    services = {"services": [{"backends": [SMALL] * 10_000}]}
    assert sum(1 for _ in encode(services)) > 10_000 / ITEMS
