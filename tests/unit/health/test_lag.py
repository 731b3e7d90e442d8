"""How late the event loop is."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastlb.health.lag import PERIOD, WINDOW, Delays, LoopLag


def test_nothing_yet() -> None:
    assert Delays().summary() == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_percentiles() -> None:
    delays = Delays()
    for number in range(101):
        delays.add(number / 10_000)
    assert delays.summary() == pytest.approx({"p50": 0.005, "p99": 0.0099, "max": 0.01})


def test_a_long_delay_counts_as_the_looks_that_it_prevented() -> None:
    """Half of a window in which nothing went on is half of all looks."""
    delays = Delays()
    looks = round(WINDOW / PERIOD)
    for _ in range(looks):
        delays.add(0.0)
    assert delays.summary()["p99"] == 0
    delays.add(WINDOW / 2)
    summary = delays.summary()
    assert summary["max"] == pytest.approx(WINDOW / 2)
    assert summary["p50"] == pytest.approx(0, abs=2 * PERIOD)
    assert summary["p99"] > WINDOW / 2 * 0.9


def test_what_is_old_is_forgotten() -> None:
    delays = Delays()
    delays.add(5.0)
    for _ in range(round(WINDOW / PERIOD)):
        delays.add(0.001)
    assert delays.summary()["max"] == 0.001


def test_a_loop_that_is_held_up() -> None:
    async def run() -> float:
        lag = LoopLag()
        lag.open()
        await asyncio.sleep(0)
        time.sleep(PERIOD + 0.2)  # nothing else can run meanwhile
        while not (longest := lag.summary()["max"]):
            await asyncio.sleep(0)
        lag.close()
        return longest

    assert asyncio.run(run()) >= 0.2


def test_closing_ends_it() -> None:
    async def run() -> float:
        lag = LoopLag()
        lag.close()
        lag.open()
        lag.close()
        time.sleep(PERIOD + 0.1)
        for _ in range(3):
            await asyncio.sleep(0)
        return lag.summary()["max"]

    assert asyncio.run(run()) == 0
