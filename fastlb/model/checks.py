"""The table of check types: one row each, read by the schema, its rules and the documentation.

How a check of a type asks a backend is the business of the room `health`; what can be written about it stands here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckType:
    """How fastlb finds out whether a backend works."""

    name: str
    help: str
    options: frozenset[str] = frozenset()  # keys of `check` that only this type has


CHECKS = {
    check.name: check
    for check in (
        CheckType("tcp", "it takes a connection"),
        CheckType("http", "it answers GET with a status from 200 to 399", options=frozenset({"path", "host"})),
    )
}
OPTIONS = {
    option: tuple(name for name, check in CHECKS.items() if option in check.options)
    for option in sorted(frozenset().union(*(check.options for check in CHECKS.values())))
}
"""The keys that not every type has, and the names of the types that have them."""
