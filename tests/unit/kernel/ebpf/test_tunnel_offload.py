"""tunnel_offload.py: which interfaces have the program, and when they are asked again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
import structlog

from fastlb.kernel.ebpf import tunnel_offload
from fastlb.kernel.ebpf.tunnel_offload import ASK_AGAIN, PROGRAM_NAME, TunnelOffload
from fastlb.model.names import OFFLOAD_LINKS
from tests.ebpf_machine import BpfKernel

LINK_CREATE = 28


@pytest.fixture
def offload(bpf_kernel: BpfKernel) -> Iterator[TunnelOffload]:
    made = TunnelOffload()
    yield made
    made.close()


class Clock:
    """Stands for the monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(tunnel_offload.time, "monotonic", lambda: self.now)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_one_program_on_all_that_are_wanted(bpf_kernel: BpfKernel, offload: TunnelOffload) -> None:
    assert offload.apply([3, 2]) == offload.interfaces() == [2, 3]
    assert offload.apply([3, 2, 4]) == [2, 3, 4]
    assert [each.name for each in bpf_kernel.programs.values()] == [PROGRAM_NAME]
    assert sorted(interface for interface, _ in bpf_kernel.links.values()) == [2, 3, 4]


def test_nothing_is_loaded_before_it_is_wanted(bpf_kernel: BpfKernel, offload: TunnelOffload) -> None:
    assert offload.apply([]) == []
    assert bpf_kernel.programs == {}


def test_no_more_than_workers_can_go_by(offload: TunnelOffload) -> None:
    assert offload.apply(range(1, OFFLOAD_LINKS + 5)) == list(range(1, OFFLOAD_LINKS + 1))


def test_a_link_ends_when_workers_know(bpf_kernel: BpfKernel, offload: TunnelOffload) -> None:
    offload.apply([2])
    (link,) = bpf_kernel.links
    assert offload.apply([]) == []
    assert is_open(link)
    offload.apply([])
    assert not is_open(link)


def test_a_program_in_front_takes_the_place(
    bpf_kernel: BpfKernel, offload: TunnelOffload, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    offload.apply([2])
    bpf_kernel.egress[2].insert(0, 999)
    with structlog.testing.capture_logs() as logs:
        assert [offload.apply([2]) for _ in range(2)] == [[], []]
        bpf_kernel.egress[2].clear()
        clock.now += ASK_AGAIN
        assert offload.apply([2]) == [2]
    assert [line["reason"] for line in logs] == ["its program was removed, or another one put in front of it"]


def test_who_refuses_is_asked_once_a_minute(
    bpf_kernel: BpfKernel, offload: TunnelOffload, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    bpf_kernel.refused[LINK_CREATE] = errno.EINVAL
    with structlog.testing.capture_logs() as logs:
        assert offload.apply([2, 3]) == []
        del bpf_kernel.refused[LINK_CREATE]
        clock.now += ASK_AGAIN - 1
        assert offload.apply([2, 3, 4]) == [4]
        clock.now += 1
        assert offload.apply([2, 3, 4]) == [2, 3, 4]
    reason = "this kernel refuses the program, which needs Linux 6.6: Invalid argument"
    assert [line["reason"] for line in logs] == [reason] * 2


def test_an_interface_that_was_not_wanted_meanwhile_is_asked_at_once(
    bpf_kernel: BpfKernel, offload: TunnelOffload
) -> None:
    bpf_kernel.refused[LINK_CREATE] = errno.EINVAL
    offload.apply([2])
    offload.apply([])
    del bpf_kernel.refused[LINK_CREATE]
    assert offload.apply([2]) == [2]


def test_an_interface_that_has_just_gone_is_no_news(bpf_kernel: BpfKernel, offload: TunnelOffload) -> None:
    bpf_kernel.refused[LINK_CREATE] = errno.ENODEV
    with structlog.testing.capture_logs() as logs:
        assert offload.apply([2]) == []
    assert logs == []


def test_the_end_leaves_nothing_open(bpf_kernel: BpfKernel) -> None:
    offload = TunnelOffload()
    offload.apply([2, 3])
    offload.apply([3])
    offload.close()
    offload.close()
    assert not any(map(is_open, (*bpf_kernel.links, *bpf_kernel.programs)))
