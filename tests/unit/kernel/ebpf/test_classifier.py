"""classifier.py: what is loaded under which name, and what is refused; the frames are test_classification.py's."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import classifier
from fastlb.kernel.ebpf.bells import BELL_NAME
from fastlb.kernel.ebpf.classifier import FILTER_NAME, NOTHING_NAME, STEER_NAME, Classifier
from fastlb.kernel.ebpf.syscall import SCHED_CLS, SOCKET_FILTER
from fastlb.model.names import GUARD_NAME, SHARDS
from tests.ebpf_machine import BpfKernel

ONE = [(FILTER_NAME, SOCKET_FILTER), (GUARD_NAME, SCHED_CLS), (BELL_NAME, SOCKET_FILTER)]
SEVERAL = [*ONE, (BELL_NAME, SOCKET_FILTER), (STEER_NAME, SOCKET_FILTER), (NOTHING_NAME, SOCKET_FILTER)]


@pytest.mark.parametrize(("workers", "programs"), [(1, ONE), (2, SEVERAL)])
def test_programs(bpf_kernel: BpfKernel, workers: int, programs: list[tuple[str, int]]) -> None:
    with Classifier(workers) as made:
        loaded = sorted((each.name, each.kind) for each in bpf_kernel.programs.values())
        assert loaded == sorted(programs)
        assert (made.steer_fd == -1, made.nothing_fd == -1) == (workers == 1,) * 2
        assert made.no_bells is None


def test_closing_gives_every_descriptor_up(bpf_kernel: BpfKernel) -> None:
    Classifier(2).close()
    for fd in (*bpf_kernel.maps, *bpf_kernel.programs):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize("command", [0, 5])
def test_what_the_kernel_refuses_leaves_nothing_open(bpf_kernel: BpfKernel, command: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    bpf_kernel.refused[command] = errno.EPERM
    with pytest.raises(KernelError, match="this needs root, or CAP_BPF and CAP_NET_ADMIN"):
        Classifier()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("workers", [0, SHARDS + 1])
def test_numbers_of_workers(bpf_kernel: BpfKernel, workers: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 64 workers, not {workers}"):
        Classifier(workers)


def test_owners_of_shards(bpf_kernel: BpfKernel) -> None:
    owners = [shard % 3 for shard in range(SHARDS)]
    with Classifier(3) as made:
        made.set_workers(owners)
        (fd,) = (fd for fd, each in bpf_kernel.maps.items() if each.name == "fastlb_owners")
        assert list(struct.unpack(f"={SHARDS}I", os.pread(fd, 4 * SHARDS, 0))) == owners
        for wrong in (owners[1:], [3, *owners[1:]], [-1, *owners[1:]]):
            with pytest.raises(ValueError, match="64 numbers below 3 are wanted"):
                made.set_workers(wrong)


def test_names_fit_into_the_kernel_s_15_bytes() -> None:
    names = (getattr(classifier, name) for name in ("FILTER_NAME", "STEER_NAME", "NOTHING_NAME"))
    assert all(len(name) <= 15 for name in (*names, BELL_NAME, GUARD_NAME))
