"""transmit.py: which AF_XDP sockets are opened, when they are asked for again, and what is said of it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from fastlb.errors import KernelError
from fastlb.model.hostview import KernelView, Link
from fastlb.workers import transmit
from fastlb.workers.transmit import ASK_LATE, ASK_SOON, START_PATIENCE, TransmitPaths

VIEW = KernelView({index: Link(index, f"eth{index}", b"", 1500, True) for index in (2, 3)}, (), {}, frozenset())
GONE = KernelView({3: VIEW.links[3]}, (), {}, frozenset())


class FakeWorker:
    """Opens sockets, but for those whose next refusals stand in ``refused``; None: it is open, else why it ended."""

    def __init__(self) -> None:
        self.refused: dict[int, list[int]] = {}
        self.sockets: dict[int, int | None] = {}
        self.asked: list[tuple[int, int]] = []

    def open_xsk(self, index: int, queue: int) -> None:
        self.asked.append((index, queue))
        if refusals := self.refused.get(index):
            code = refusals.pop(0) if len(refusals) > 1 else refusals[0]
            if code:
                raise OSError(code, os.strerror(code))
        self.sockets[index] = None

    def close_xsk(self, index: int) -> None:
        self.sockets.pop(index, None)

    def xsks(self) -> dict[int, int | None]:
        return dict(self.sockets)


class Clock:
    """The monotonic clock, which sleeping moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(transmit.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(transmit.time, "sleep", made.sleep)
    return made


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def paths(worker: FakeWorker, mode: str = "auto", number: int = 0) -> TransmitPaths:
    return TransmitPaths(worker, mode, number, 2)  # type: ignore[arg-type]


def test_sockets_on_every_link(worker: FakeWorker, clock: Clock) -> None:
    made = paths(worker, number=1)
    made.open(VIEW, {3, 2})
    assert worker.asked == [(2, 1), (3, 1)]
    assert made.describe(VIEW, {2, 3}) == {"eth2": "xdp", "eth3": "xdp"}
    clock.now += 1
    made.poll(VIEW, {2, 3})
    assert len(worker.asked) == 2


def test_never_af_xdp(worker: FakeWorker, clock: Clock) -> None:
    made = paths(worker, "sendmmsg")
    made.open(VIEW, {2})
    made.poll(VIEW, {2})
    assert (worker.asked, made.describe(VIEW, {2})) == ([], {"eth2": "sendmmsg"})


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL])
def test_what_is_refused_for_good_is_asked_for_once(
    worker: FakeWorker, clock: Clock, logs: list[Any], code: int
) -> None:
    worker.refused[2] = [code]
    made = paths(worker)
    made.open(VIEW, {2})
    for _ in range(100):
        clock.now += ASK_LATE
        made.poll(VIEW, {2})
    assert len(worker.asked) == 1
    assert [(line["event"], line["interface"]) for line in logs] == [("AF_XDP refused; sending by sendmmsg", "eth2")]


WORDS = [
    (0, errno.EBUSY, "its queue is in use by another AF_XDP socket"),
    (1, errno.EINVAL, "it has no queue 1: each worker sends by a queue of its own"),
    (0, errno.EINVAL, "Invalid argument (Invalid argument)"),
]


@pytest.mark.parametrize(("number", "code", "words"), WORDS)
def test_who_insists_is_told_why_not(worker: FakeWorker, clock: Clock, number: int, code: int, words: str) -> None:
    worker.refused[2] = [code]
    with pytest.raises(KernelError) as raised:
        paths(worker, "xdp", number).open(VIEW, {2})
    assert str(raised.value) == f"transmit: xdp cannot be had on eth2: {words}"


@pytest.mark.parametrize("code", [errno.ENETDOWN, errno.ENODEV])
def test_a_link_that_has_just_gone_is_no_refusal(worker: FakeWorker, clock: Clock, logs: list[Any], code: int) -> None:
    worker.refused[2] = [code]
    paths(worker, "xdp").open(VIEW, {2})
    assert logs == []


def test_a_queue_that_is_about_to_be_free(worker: FakeWorker, clock: Clock, logs: list[Any]) -> None:
    """The kernel frees it some time after its last socket was closed: the start waits for that."""
    worker.refused[2] = [errno.EBUSY] * 5 + [0]
    began = clock.now
    paths(worker).open(VIEW, {2})
    assert (len(worker.asked), logs) == (6, [])
    assert clock.now - began < START_PATIENCE


def test_a_queue_that_stays_in_use_is_asked_for_ever_more_rarely(
    worker: FakeWorker, clock: Clock, logs: list[Any]
) -> None:
    worker.refused[2] = [errno.EBUSY]
    made = paths(worker)
    made.open(VIEW, {2})
    worker.asked.clear()
    times = []
    began = clock.now
    while clock.now - began < 200:
        clock.now += 0.05
        before = len(worker.asked)
        made.poll(VIEW, {2})
        if len(worker.asked) > before:
            times.append(clock.now - began)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] < 2 * ASK_SOON
    assert all(earlier <= later + 0.1 for earlier, later in itertools.pairwise(waits))
    assert ASK_LATE - 0.1 <= waits[-1] <= ASK_LATE + 0.1
    assert [line["event"] for line in logs] == ["AF_XDP refused; sending by sendmmsg"]
    worker.refused[2] = [0]
    clock.now += ASK_LATE
    made.poll(VIEW, {2})
    assert logs[-1]["event"] == "AF_XDP socket open"


@pytest.mark.parametrize(("ended", "reason"), [(errno.ENETDOWN, "Network is down"), (0, "the link stopped sending")])
def test_a_socket_that_ended_is_opened_again(
    worker: FakeWorker, clock: Clock, logs: list[Any], ended: int, reason: str
) -> None:
    made = paths(worker)
    made.open(VIEW, {2})
    clock.now += 100
    worker.sockets[2] = ended
    made.poll(VIEW, {2})
    assert made.describe(VIEW, {2}) == {"eth2": "sendmmsg"}
    clock.now += ASK_SOON
    made.poll(VIEW, {2})
    assert made.describe(VIEW, {2}) == {"eth2": "xdp"}
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("AF_XDP socket lost; sending by sendmmsg", reason), ("AF_XDP socket open", None),
    ]  # fmt: skip


def test_an_interface_that_comes_back_is_another_one(worker: FakeWorker, clock: Clock) -> None:
    worker.refused[2] = [errno.EOPNOTSUPP]
    made = paths(worker)
    made.open(VIEW, {2, 3})
    made.poll(GONE, {3})
    worker.refused.clear()
    made.poll(VIEW, {2, 3})
    assert worker.asked == [(2, 0), (3, 0), (2, 0)]
