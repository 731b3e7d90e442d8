"""fragments.py: which datagrams are noted, and what each note says."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import ip_address
from socket import htons

import pytest

from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.fragments import KEY_SIZE, MAP_NAME, MAX_NOTED
from fastlb.model.match import Keys
from tests.ebpf_machine import BpfKernel
from tests.netns import test_classifier as table
from tests.netns.test_classifier import CLIENT, CLIENT6, ELSEWHERE, TCP, UDP, VIP, VIP6, part

NUMBER = struct.pack("=I", htons(5))  # of an IPv4 datagram: the 16 bits of the wire, loaded as a number


@pytest.fixture
def filled(bpf_kernel: BpfKernel) -> Iterator[Classifier]:
    with Classifier() as classifier:
        classifier.replace(Keys(table.keys(table.VIPS), table.keys(table.REPLIES)), map(ip_address, table.LOCALS))
        yield classifier


def notes(kernel: BpfKernel) -> set[bytes]:
    return set(kernel.map_named(MAP_NAME).entries)


def note(source: str, target: str, protocol: int, number: bytes) -> bytes:
    addresses = b"".join(ip_address(each).packed.rjust(16, b"\0") for each in (source, target))
    return addresses + struct.pack("!HBB", 0, protocol, 6 if ":" in target else 4) + number


def test_the_map_has_room_for_so_many(bpf_kernel: BpfKernel, filled: Classifier) -> None:
    made = bpf_kernel.map_named(MAP_NAME)
    assert (made.key_size, made.max_entries, filled.datagrams.max_entries) == (KEY_SIZE, MAX_NOTED, MAX_NOTED)


@pytest.mark.parametrize(
    ("way", "noted"),
    [
        ((CLIENT, 1, VIP, 81, TCP), note(CLIENT, VIP, TCP, NUMBER)),
        ((CLIENT, 1, VIP, 81, UDP), note(CLIENT, VIP, UDP, NUMBER)),
        ((CLIENT6, 1, VIP6, 81, TCP), note(CLIENT6, VIP6, TCP, b"\0\0\0\x05")),
        ((CLIENT, 1, VIP, 80, TCP), None),  # ours
        ((CLIENT, 1, ELSEWHERE, 80, TCP), None),  # whose later fragments nobody would take
    ],
)
def test_what_is_noted(
    bpf_kernel: BpfKernel, filled: Classifier, way: tuple[str, int, str, int, int], noted: bytes | None
) -> None:
    """A datagram of which only the later fragments would be ours."""
    for _ in range(2):
        bpf_kernel.run(filled.guard_fd, part(*way, "first", 5))
    assert notes(bpf_kernel) == ({noted} if noted else set())


def test_a_note_goes_with_the_next_datagram_of_its_number_that_is_ours(
    bpf_kernel: BpfKernel, filled: Classifier
) -> None:
    bpf_kernel.run(filled.guard_fd, part(CLIENT, 1, VIP, 81, TCP, "first", 5))
    assert len(notes(bpf_kernel)) == 1
    bpf_kernel.run(filled.filter_fd, part(CLIENT, 1, VIP, 80, TCP, "first", 6))
    assert len(notes(bpf_kernel)) == 1
    bpf_kernel.run(filled.filter_fd, part(CLIENT, 1, VIP, 80, TCP, "first", 5))
    assert notes(bpf_kernel) == set()


def test_later_fragments_only_read(bpf_kernel: BpfKernel, filled: Classifier) -> None:
    for way in ((CLIENT, 1, VIP, 81, TCP), (CLIENT, 1, VIP, 80, TCP)):
        bpf_kernel.run(filled.guard_fd, part(*way, "last", 5))
    assert notes(bpf_kernel) == set()
