"""Results and troubles are told together."""

from __future__ import annotations

import asyncio

from fastlb.health.connection import Outcome
from fastlb.health.probe import Probe
from fastlb.health.results import TROUBLE_EVERY, CheckResult, Results, Troubles
from fastlb.health.target import Target

ONE, OTHER = ("web", "10.0.0.1:80"), ("api", "10.0.0.1:80")


def probe(*members: tuple[str, str]) -> Probe:
    made = Probe(Target("tcp", "10.0.0.1", 80, 1.0, b""))
    made.members.update(dict.fromkeys(members, 2.0))
    return made


def test_what_ends_together_is_reported_together() -> None:
    async def run() -> list[list[CheckResult]]:
        told: list[list[CheckResult]] = []
        heard = asyncio.Event()

        def report(found: object) -> None:
            told.append(list(found))  # type: ignore[call-overload]
            heard.set()

        results = Results(report)
        for _ in range(2):
            results.add(probe(ONE, OTHER), Outcome(0.25))
            results.add(probe(ONE), Outcome(None, "status 503"))
            assert len(told) < 2
            heard.clear()
            await asyncio.wait_for(heard.wait(), 10)
        return told

    batch = [CheckResult(ONE, 0.25, ""), CheckResult(OTHER, 0.25, ""), CheckResult(ONE, None, "status 503")]
    assert asyncio.run(run()) == [batch, batch]


def test_who_was_taken_out_hears_nothing() -> None:
    async def run() -> list[CheckResult]:
        told: list[CheckResult] = []
        heard = asyncio.Event()

        def report(found: object) -> None:
            told.extend(found)  # type: ignore[arg-type]
            heard.set()

        results = Results(report)
        left, stays = probe(ONE), probe(ONE, OTHER)
        results.add(left, Outcome(0.1))
        results.add(stays, Outcome(0.2))
        left.members.clear()
        del stays.members[ONE]
        await asyncio.wait_for(heard.wait(), 10)
        return told

    assert asyncio.run(run()) == [CheckResult(OTHER, 0.2, "")]


def test_troubles_are_told_at_once_and_then_counted() -> None:
    told: list[tuple[str, int]] = []
    troubles = Troubles(lambda error, count: told.append((str(error), count)))
    for now, why in ((100.0, "a"), (100.1, "b"), (101.0, "c"), (99.9 + TROUBLE_EVERY, "d")):
        troubles.add(OSError(why), now)
    assert told == [("a", 1)]
    troubles.add(OSError("e"), 100.0 + TROUBLE_EVERY)
    assert told == [("a", 1), ("e", 4)]
