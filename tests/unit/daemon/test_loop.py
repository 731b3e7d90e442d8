"""loop.py: functions are handed over from any thread, rests end when something is due."""

from __future__ import annotations

import asyncio
import threading
import time

from fastlb.daemon.loop import Loop
from fastlb.errors import FastlbError

LONG = 60.0  # seconds that no test waits


def test_without_a_loop_functions_run_at_once() -> None:
    loop, done = Loop(), list[str]()
    loop.hand_over(lambda: done.append("before"))

    async def run() -> None:
        loop.begin()
        loop.hand_over(lambda: done.append("within"))
        assert done == ["before"]
        await asyncio.sleep(0)
        assert done == ["before", "within"]
        loop.end()

    asyncio.run(run())
    loop.hand_over(lambda: done.append("after"))
    assert done == ["before", "within", "after"]


def test_a_function_of_another_thread_runs_in_the_loop_s() -> None:
    async def run() -> int:
        loop, found = Loop(), asyncio.get_running_loop().create_future()
        assert loop.begin() is asyncio.get_running_loop()
        threading.Thread(target=lambda: loop.hand_over(lambda: found.set_result(threading.get_ident()))).start()
        return int(await asyncio.wait_for(found, LONG))

    assert asyncio.run(run()) == threading.get_ident()


def test_what_comes_after_the_loop_is_closed_is_ignored() -> None:
    loop, done = Loop(), list[str]()

    async def run() -> None:
        loop.begin()

    asyncio.run(run())
    loop.hand_over(lambda: done.append("too late"))
    assert done == []


def test_a_rest_ends_by_waking() -> None:
    """One that was asked for before it, too; the next one is a full rest again."""

    async def run() -> list[float]:
        loop, seconds = Loop(), []
        for wake, rest in ((True, LONG), (False, 0.01)):
            began = time.monotonic()
            if wake:
                loop.wake()
            await loop.rest(rest)
            seconds.append(time.monotonic() - began)
        resting = asyncio.create_task(loop.rest(LONG))
        await asyncio.sleep(0)
        loop.wake()
        await asyncio.wait_for(resting, LONG / 2)
        return seconds

    woken, full = asyncio.run(run())
    assert woken < LONG / 2
    assert full >= 0.005


def test_tasks() -> None:
    """An error of the balancer's own was logged where it came up, and ends nothing."""

    async def run() -> list[str]:
        loop, done = Loop(), []
        ended = asyncio.Event()

        async def refused() -> None:
            done.append("refused")
            raise FastlbError("no")

        async def last() -> None:
            done.append("last")
            ended.set()

        loop.begin_task(refused)
        loop.begin_task(last)
        await asyncio.wait_for(ended.wait(), LONG)
        return done

    assert asyncio.run(run()) == ["refused", "last"]
