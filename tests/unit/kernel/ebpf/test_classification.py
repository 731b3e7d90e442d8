"""classification.py: the rows of tests/netns/test_classifier.py, run by a machine that needs no root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from fastlb._core import shard_of_client
from fastlb.kernel.ebpf.classification import constant_program
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.frame import ACT_SHOT, NOTHING, WHOLE_FRAME
from fastlb.kernel.ebpf.tables import Sources
from fastlb.model.match import Keys
from tests.ebpf_machine import BpfKernel
from tests.netns import test_classifier as table

Open = Callable[..., Classifier]


@pytest.fixture
def opened(bpf_kernel: BpfKernel) -> Iterator[Open]:
    """Opens classifiers of three workers."""
    held: list[Classifier] = []

    def open_one(keys: Keys, sources: Sources | None = None) -> Classifier:
        held.append(Classifier(table.WORKERS, sources))
        held[-1].replace(keys, map(ip_address, table.LOCALS))
        held[-1].set_workers(table.OWNERS)
        return held[-1]

    yield open_one
    for classifier in held:
        classifier.close()


def verdicts(kernel: BpfKernel, classifier: Classifier, frame: bytes) -> tuple[bool, bool, bool]:
    """Whether the guard, the filter and the steering take a frame."""
    return (
        kernel.run(classifier.guard_fd, frame) == ACT_SHOT,
        kernel.run(classifier.filter_fd, frame) == WHOLE_FRAME,
        kernel.run(classifier.steer_fd, frame, network=True) > 0,
    )


def wrong(kernel: BpfKernel, classifier: Classifier, rows: list[tuple[str, bytes, bool]]) -> list[str]:
    """The names of rows in which a program says otherwise."""
    return [name for name, frame, ours in rows if verdicts(kernel, classifier, frame) != (ours,) * 3]


PLAIN = Keys(table.keys(table.VIPS), table.keys(table.REPLIES))
MASKED = Keys(PLAIN.vips | table.SHAPED, PLAIN.replies | table.SHAPED_REPLIES)
FULL = Keys(PLAIN.vips, PLAIN.replies, table.keys(table.FULL_REPLIES))
EVERYTHING = Keys(MASKED.vips | table.LATER_SHAPED, MASKED.replies, FULL.full_replies)


def test_frames(bpf_kernel: BpfKernel, opened: Open) -> None:
    assert wrong(bpf_kernel, opened(PLAIN), table.FRAMES + table.SHORT_FRAMES) == []


def test_frames_with_masks(bpf_kernel: BpfKernel, opened: Open) -> None:
    assert wrong(bpf_kernel, opened(MASKED), table.SHAPED_FRAMES + table.FRAMES) == []


def test_frames_in_full_nat(bpf_kernel: BpfKernel, opened: Open) -> None:
    assert wrong(bpf_kernel, opened(FULL, table.SOURCES), table.FULL_FRAMES + table.FRAMES) == []


def test_a_frame_that_is_cut_is_ours_only_with_its_ports(bpf_kernel: BpfKernel, opened: Open) -> None:
    classifier = opened(PLAIN)
    for name, frame, enough in table.WHOLE:
        taken = [verdicts(bpf_kernel, classifier, frame[:length]) for length in range(14, len(frame) + 1)]
        assert taken == [(length >= enough,) * 3 for length in range(14, len(frame) + 1)], name


@pytest.mark.parametrize(("way", "ours"), [row[1:] for row in table.DATAGRAMS], ids=[row[0] for row in table.DATAGRAMS])
def test_a_first_fragment_decides_for_all(
    bpf_kernel: BpfKernel, opened: Open, way: tuple[str, int, str, int, int], ours: bool
) -> None:
    """The notes are shared: what one program has met, the others know."""
    classifier = opened(EVERYTHING, table.SOURCES)
    for number, which in enumerate(("first", "middle", "last", "first", "last")):
        assert verdicts(bpf_kernel, classifier, table.part(*way, which, 7)) == (ours,) * 3, number


def test_steering_names_the_worker_of_the_client(bpf_kernel: BpfKernel, opened: Open) -> None:
    """Of both legs, and of an answer in full NAT by its port."""
    classifier = opened(EVERYTHING, table.SOURCES)
    for port in range(1024, 32768, 997):
        worker = 1 + table.OWNERS[table.shard_of(table.CLIENT, port)]
        for frame in (
            table.ipv4(table.CLIENT, port, table.VIP, 80),
            table.ipv4(table.BACKEND, 8080, table.CLIENT, port),
        ):
            assert bpf_kernel.run(classifier.steer_fd, frame, network=True) == worker
        answer = table.ipv4(table.FULL, 8080, table.SNAT, port)
        assert bpf_kernel.run(classifier.steer_fd, answer, network=True) == 1 + table.OWNERS[port % 64]


@pytest.mark.parametrize("result", [NOTHING, WHOLE_FRAME])
def test_a_constant_program(bpf_kernel: BpfKernel, result: int) -> None:
    assert bpf_kernel.run(constant_program(result), table.ipv4(table.CLIENT, 1, table.VIP, 80)) == result


def test_shards_are_those_of_the_core(bpf_kernel: BpfKernel, opened: Open) -> None:
    """What the program computes of a client, of either version and on either leg."""
    classifier = opened(PLAIN)
    for port in range(1, 65536, 4111):
        for client, vip, backend, frame in (
            (table.CLIENT, table.VIP, table.BACKEND, table.ipv4),
            (table.CLIENT6, table.VIP6, table.BACKEND6, table.ipv6),
        ):
            worker = 1 + table.OWNERS[shard_of_client(ip_address(client), port)]
            for packet in (frame(client, port, vip, 80), frame(backend, 8080, client, port)):
                assert bpf_kernel.run(classifier.steer_fd, packet, network=True) == worker
