"""bells.py: a sleeping worker's bell rings once, for a frame of its own."""

from __future__ import annotations

import errno
from ipaddress import ip_address

import pytest

from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.match import Key, Keys
from tests.ebpf_machine import BpfKernel
from tests.netns import test_classifier as table

ASLEEP, AWAKE = b"\1\0\0\0", bytes(4)
TO_VIP = table.ipv4(table.CLIENT, 40000, table.VIP, 80)
KEYS = Keys({Key(ip_address(table.VIP), 80, table.TCP)})


def ring(kernel: BpfKernel, classifier: Classifier, worker: int, frame: bytes) -> tuple[int, bytes]:
    """How many bytes the bell keeps, and what the word is then."""
    fd, word = classifier.bell_fd(worker), classifier.asleep(worker)
    assert fd is not None
    assert word is not None
    return kernel.run(fd, frame), bytes(word)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bell_rings_once_for_its_worker_alone(bpf_kernel: BpfKernel, workers: int) -> None:
    with Classifier(workers) as classifier:
        classifier.replace(KEYS)
        owners = [shard % workers for shard in range(64)]
        classifier.set_workers(owners)
        owner = owners[table.shard_of(table.CLIENT, 40000)] if workers > 1 else 0
        for worker in range(workers):
            assert ring(bpf_kernel, classifier, worker, TO_VIP) == (0, AWAKE), "nobody sleeps"
        for worker in range(workers):
            word = classifier.asleep(worker)
            assert word is not None
            word[:] = ASLEEP
            not_ours = table.ipv4(table.CLIENT, 40000, table.VIP, 81)
            assert ring(bpf_kernel, classifier, worker, not_ours) == (0, ASLEEP)
            expected = (1, AWAKE) if worker == owner else (0, ASLEEP)
            assert ring(bpf_kernel, classifier, worker, TO_VIP) == expected
            assert ring(bpf_kernel, classifier, worker, TO_VIP) == (0, expected[1])
            del word


def test_words_of_workers_are_apart(bpf_kernel: BpfKernel) -> None:
    with Classifier(2) as classifier:
        first, second = classifier.asleep(0), classifier.asleep(1)
        assert first is not None
        assert second is not None
        first[:] = ASLEEP
        assert bytes(second) == AWAKE
        del first, second


def test_a_kernel_without_shared_maps_has_no_bells(bpf_kernel: BpfKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    call = BpfKernel.__call__

    def old(kernel: BpfKernel, command: int, attr: bytes | bytearray) -> int:
        if command == 0 and bytes(attr[28:41]) == b"fastlb_asleep":
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(kernel, command, attr)

    monkeypatch.setattr(BpfKernel, "__call__", old)
    with Classifier() as classifier:
        assert classifier.no_bells == "cannot create the map fastlb_asleep: Invalid argument"
        assert (classifier.bell_fd(0), classifier.asleep(0)) == (None, None)
        assert len(bpf_kernel.programs) == 2
