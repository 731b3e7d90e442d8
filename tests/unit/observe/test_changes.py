"""The log's lines when backends change state: few changes, many, and both at once."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.observe.changes import MAX_LINES, Change, summarize_changes

TIMEOUT, REFUSED = "no answer within 1 s", "connection refused"


def several(count: int, state: str, reason: str = "", service: str = "web") -> list[Change]:
    return [Change(service, f"10.0.0.{number}:80", state, reason) for number in range(1, count + 1)]


def many(count: int, services: int = 1, **more: Any) -> dict[str, Any]:
    named = [f"web 10.0.0.{number}:80" for number in (1, 2, 3)]
    return {"count": count, "services": services, "backends": named, **more}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], []),
        ([Change("web", "a:80", "up")], [("info", "backend up", {"service": "web", "backend": "a:80"})]),
        (
            [Change("web", "a:80", "down", TIMEOUT)],
            [("warning", "backend down", {"service": "web", "backend": "a:80", "reason": TIMEOUT})],
        ),
        (
            several(MAX_LINES + 1, "down", TIMEOUT),
            [("warning", "backends down", many(6, reason=TIMEOUT, with_this_reason=6))],
        ),
        (several(10_000, "up"), [("info", "backends up", many(10_000))]),
        (
            [*several(4, "down", REFUSED), *several(5, "down", TIMEOUT, "dns"), Change("web", "x:80", "down")],
            [("warning", "backends down", many(10, services=2, reason=TIMEOUT, with_this_reason=5))],
        ),
        (
            [Change("web", "x:80", "up"), *several(7, "down", REFUSED), Change("web", "y:80", "up")],
            [
                ("info", "backend up", {"service": "web", "backend": "x:80"}),
                ("info", "backend up", {"service": "web", "backend": "y:80"}),
                ("warning", "backends down", many(7, reason=REFUSED, with_this_reason=7)),
            ],
        ),
    ],
    ids=["none", "one up", "one down", "one more than lines", "all up", "the commonest reason", "both"],
)
def test_lines(changes: list[Change], expected: list[Any]) -> None:
    assert list(summarize_changes(changes)) == expected


def test_as_many_lines_as_are_allowed() -> None:
    events = list(summarize_changes(several(MAX_LINES, "down", REFUSED)))
    assert [event for _, event, _ in events] == ["backend down"] * MAX_LINES
