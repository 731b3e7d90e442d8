"""Tables and counts, as people read them."""

from __future__ import annotations

import json

import pytest

from fastlb.cli.text import count_of, nonzero, print_json, table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("A", "NUMBER", "C"), [("long", 7, ""), ("", 1234567, "x")]) == (
        "A     NUMBER   C\n"
        "long  7\n"
        "      1234567  x"
    )  # fmt: skip


def test_a_table_without_rows() -> None:
    assert table(("A", "B"), []) == "A  B"


@pytest.mark.parametrize(("number", "expected"), [(0, "0 flows"), (1, "1 flow"), (2, "2 flows")])
def test_counts(number: int, expected: str) -> None:
    assert count_of(number, "flow") == expected


@pytest.mark.parametrize(
    ("counts", "expected"), [({}, "none"), ({"a": 0}, "none"), ({"a": 1, "b": 0, "c": 3}, "a 1, c 3")]
)
def test_nonzero(counts: dict[str, int], expected: str) -> None:
    assert nonzero(counts) == expected


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": [1, None]}
    assert '\n  "a": [' in printed
