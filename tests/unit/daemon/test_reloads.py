"""reloads.py: who asks at once shares a turn, and everybody sees the file as it was when he asked, or later."""

from __future__ import annotations

import asyncio

import pytest

from fastlb.daemon.reloads import Reloads
from fastlb.errors import FastlbError


class File:
    """A file that is read in turns; each turn ends when it is told to."""

    def __init__(self) -> None:
        self.text, self.read = 0, list[int]()
        self.may_end = asyncio.Semaphore(0)

    async def once(self) -> None:
        self.read.append(self.text)
        await self.may_end.acquire()


async def begun(*askers: asyncio.Task[None]) -> None:
    """Let the tasks go as far as they come."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(each.done() for each in askers)


def test_turns_are_shared() -> None:
    async def run() -> None:
        file = File()
        reloads = Reloads(file.once)
        first = asyncio.create_task(reloads.ask())
        await begun(first)
        assert file.read == [0]
        late = []
        for text in range(1, 1000):
            file.text = text
            late.append(asyncio.create_task(reloads.ask()))
        await begun(first, *late)
        file.may_end.release()
        await first
        await begun(*late)
        assert file.read == [0, 999]  # what the last one wrote, and everybody asked before it was read
        file.may_end.release()
        await asyncio.gather(*late)
        assert file.read == [0, 999]

    asyncio.run(run())


def test_who_asks_while_it_is_read_waits_for_the_next_reading() -> None:
    async def run() -> None:
        file = File()
        reloads = Reloads(file.once)
        asked = []
        for text in range(3):
            file.text = text
            asked.append(asyncio.create_task(reloads.ask()))
            await begun(*asked[-1:])
            if text:
                file.may_end.release()
                await asked[-2]
                await begun(asked[-1])
        assert file.read == [0, 1, 2]
        file.may_end.release()
        await asked[-1]

    asyncio.run(run())


def test_a_refusal_is_for_those_who_shared_it() -> None:
    async def run() -> list[object]:
        answers: list[Exception | None] = [FastlbError("refused"), None]

        async def once() -> None:
            if error := answers.pop(0):
                raise error

        reloads = Reloads(once)
        both = await asyncio.gather(reloads.ask(), reloads.ask(), return_exceptions=True)
        return [*both, await reloads.ask()]

    first, second, last = asyncio.run(run())
    assert str(first) == str(second) == "refused"
    assert last is None


def test_an_answer_is_for_those_who_shared_it() -> None:
    async def run() -> list[object]:
        answers = iter("ab")

        async def once() -> str:
            return next(answers)

        reloads = Reloads(once)
        return [*await asyncio.gather(reloads.ask(), reloads.ask()), await reloads.ask()]

    assert asyncio.run(run()) == ["a", "a", "b"]


def test_who_gives_up_waiting_does_not_end_the_reload() -> None:
    async def run() -> None:
        file = File()
        reloads = Reloads(file.once)
        impatient, patient = (asyncio.create_task(reloads.ask()) for _ in range(2))
        await begun(impatient, patient)
        impatient.cancel()
        file.may_end.release()
        await patient
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert file.read == [0]

    asyncio.run(run())
