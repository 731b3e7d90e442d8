"""fanout.py: in which order a group's first socket is made, and what is said when it cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from fastlb.errors import KernelError
from fastlb.workers import fanout
from fastlb.workers.fanout import PACKET_FANOUT, PACKET_FANOUT_DATA, SOL_PACKET, Group

NOTHING, STEER = 5, 6  # descriptors of programs
ARGUMENT = 0x7 << 16 | 0x4000 << 16 | 77  # the kernel's answer: type, flags and id


class FakeSocket:
    """A packet socket that writes down what is done to it. ``refused``: errno by what is done."""

    def __init__(self, refused: dict[str, int]) -> None:
        self.done: list[tuple[Any, ...]] = []
        self._refused = refused
        self.is_open = True

    def _do(self, what: str, *how: Any) -> None:
        if what in self._refused:
            raise OSError(self._refused[what], os.strerror(self._refused[what]))
        self.done.append((what, *how))

    def setsockopt(self, level: int, option: int, value: int) -> None:
        names = {(1, 50): "attach", (SOL_PACKET, PACKET_FANOUT): "join", (SOL_PACKET, PACKET_FANOUT_DATA): "program"}
        self._do(names[level, option], value)

    def bind(self, address: tuple[str, int]) -> None:
        self._do("bind", *address)

    def getsockopt(self, level: int, option: int) -> int:
        assert (level, option) == (SOL_PACKET, PACKET_FANOUT)
        return ARGUMENT

    def close(self) -> None:
        self.is_open = False


Refuse = Callable[[dict[str, int]], FakeSocket]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """The socket that the next group opens."""

    def make(refused: dict[str, int]) -> FakeSocket:
        fake = FakeSocket(refused)
        monkeypatch.setattr(fanout.socket, "socket", lambda *_: fake)
        return fake

    return make


def test_the_bin_keeps_nothing_before_it_sees_anything(made: Refuse) -> None:
    """Filter, interface, group: of type eBPF, with a number of the kernel's choice, without outgoing frames."""
    fake = made({})
    with Group("eth0", NOTHING) as group:
        join = (7 | 0x2000 | 0x4000) << 16
        assert fake.done == [("attach", NOTHING), ("bind", "eth0", 3), ("join", join)]
        assert (group.join_argument, group.id) == (ARGUMENT, 77)
    assert not fake.is_open


def test_it_starts_and_stops_in_one_step(made: Refuse) -> None:
    fake = made({})
    with Group("eth0", NOTHING) as group:
        fake.done.clear()
        group.start(STEER)
        group.stop()
        assert fake.done == [("program", STEER), ("program", NOTHING)]


REFUSALS = [
    ("attach", errno.EPERM, "Operation not permitted .this needs root or CAP_NET_RAW"),
    ("bind", errno.ENODEV, "No such device .there is no such interface here"),
    ("join", errno.EINVAL, "Invalid argument .the interface must be up, and the kernel Linux 4"),
    ("join", errno.ENOMEM, "Cannot allocate memory .every number for a fanout group"),
    ("join", errno.EIO, "Input/output error$"),
]


@pytest.mark.parametrize(("step", "code", "message"), REFUSALS)
def test_a_group_that_cannot_be(made: Refuse, step: str, code: int, message: str) -> None:
    fake = made({step: code})
    with pytest.raises(KernelError, match=f"eth0: cannot make a fanout group: {message}"):
        Group("eth0", NOTHING)
    assert not fake.is_open


def test_a_program_that_is_refused(made: Refuse) -> None:
    made({"program": errno.EINVAL})
    with Group("eth0", NOTHING) as group, pytest.raises(KernelError, match="eth0: cannot set the program of the"):
        group.start(STEER)
