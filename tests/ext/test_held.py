"""transmit.pxd, xsk.pxd and ring.pxd with a completion ring that is held back: who owns a block, and until when.

The worker's own loop runs over ordinary memory, and this test is the kernel (held.pyx). On veth a frame is complete
before the kick returns; on a card that sends the ring's own pages it is not, and that is what is played here.
"""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable

import pytest

from tests.balancers import BACKENDS, CLIENT
from tests.ext.case import BLOCK_SIZE, BLOCKS, NEAR_THE_END, PLAIN, Case, is_closed, numbered
from tests.frames import frame, mac_of, take_apart

RING = 2048  # descriptors
READY, FAILED = 1, 2
SILENCE = 10  # milliseconds
KICKS = 256
TX_METADATA = 2


# ---- a block and its completions


def test_a_block_stays_until_its_last_completion(case: Case) -> None:
    posted = case.read(0, 40)
    assert len(set(posted)) == 40
    for sent, address in enumerate(posted):
        assert case.worker.take_back(now=0)
        assert (case.worker.mine(), case.worker.socket()[2:4]) == ([0], (40 - sent, [40 - sent, 0, 0, 0]))
        case.worker.complete([address])
    assert not case.worker.take_back(now=0)
    assert case.worker.mine() == []
    assert case.worker.socket()[0] == READY


def test_what_is_posted_is_the_rewritten_frame_where_it_lay(case: Case) -> None:
    case.worker.fill(0, [(PLAIN, numbered(at, size)) for at, size in enumerate((64, 700, 4072))])
    case.worker.turn(0)
    for (address, length, options), at, size in zip(case.worker.posted(), range(3), (64, 700, 4072), strict=True):
        seen = take_apart(case.worker.bytes_at(address, length))
        assert (length, options, seen.segment[8:12]) == (size, 0, at.to_bytes(4, "big"))
        assert seen.eth_dst in {mac_of(host) for host in BACKENDS[4]}


def test_completions_in_any_order(case: Case) -> None:
    posted = [address for block in range(3) for address in case.read(block, 30)]
    random.Random(1).shuffle(posted)
    left = [30, 30, 30, 0]
    for address in posted:
        case.worker.complete([address])
        case.worker.take_back(now=0)
        left[address // BLOCK_SIZE] -= 1
        first = next((block for block, count in enumerate(left) if count), 3)
        assert case.worker.socket()[3] == left
        assert case.worker.mine() == list(range(first, 3)), "in the order in which they were read"


def test_blocks_go_back_in_order(case: Case) -> None:
    posted = [case.read(block, 10) for block in range(3)]
    for block, mine in ((2, [0, 1, 2]), (1, [0, 1, 2]), (0, [])):
        case.worker.complete(posted[block])
        case.worker.take_back(now=0)
        assert case.worker.mine() == mine


def test_a_block_without_forwarded_frames_goes_back_at_once(case: Case) -> None:
    stranger = frame(CLIENT[4], 1, "203.0.113.99", 80, "udp")
    case.worker.fill(0, [(PLAIN, stranger)] * 5)
    assert case.worker.turn(0)
    assert (case.worker.posted(), case.worker.mine()) == ([], [])


def test_a_ring_whose_blocks_are_all_held_is_not_read_again(case: Case) -> None:
    posted = [case.read(block, 3) for block in range(BLOCKS)]
    for _ in range(3):
        assert not case.worker.turn(now=1)
    assert (case.worker.posted(), case.worker.mine()) == ([], [0, 1, 2, 3])
    case.worker.complete(posted[0])
    assert not case.worker.turn(now=1), "the freed block is the kernel's to fill"
    assert case.worker.mine() == [1, 2, 3]
    assert len(case.read(0, 3, now=1)) == 3
    assert case.worker.mine() == [0, 1, 2, 3]


def test_rings_side_by_side(new_case: Callable[..., Case]) -> None:
    """Completions of one ring's frames free that ring's blocks."""
    case = new_case(rings=2)
    case.worker.fill(1 * BLOCKS, [(PLAIN, numbered(1))] * 7)
    case.worker.fill(0, [(PLAIN, numbered(2))] * 5)
    assert case.worker.turn(0)
    posted = [address for address, _, _ in case.worker.posted()]
    assert case.worker.socket()[3] == [5, 0, 0, 0, 7, 0, 0, 0]
    case.worker.complete(address for address in posted if address >= BLOCKS * BLOCK_SIZE)
    case.worker.take_back(0)
    assert case.worker.mine() == [0]
    case.worker.complete(address for address in posted if address < BLOCKS * BLOCK_SIZE)
    case.worker.take_back(0)
    assert case.worker.mine() == []


# ---- counters that wrap, rings that fill


def test_counts_wrap(new_case: Callable[..., Case]) -> None:
    case = new_case(counts=NEAR_THE_END)
    for turn in range(6):
        posted = case.read(turn % BLOCKS, 4)
        assert len(posted) == 4
        case.worker.complete(posted[:-1])
        case.worker.take_back(0)
        assert case.worker.mine() == [turn % BLOCKS]
        case.worker.complete(posted[-1:])
        case.worker.take_back(0)
        assert (case.worker.mine(), case.worker.socket()[2]) == ([], 0)
    assert case.drops() == {}


def test_a_full_ring_overflows_to_sendmmsg(new_case: Callable[..., Case]) -> None:
    """With as much in flight as the completion ring holds, nothing more is posted: a completion would be lost."""
    case = new_case(counts=NEAR_THE_END)
    count = 900
    posted = case.read(0, count) + case.read(1, count) + case.read(2, count)
    assert (len(posted), case.worker.socket()[2]) == (RING, RING)
    assert case.drops() == {"tx_error": 3 * count - RING}, "there is no socket for sendmmsg here"
    case.worker.complete(posted)
    case.worker.take_back(0)
    assert (case.worker.mine(), case.worker.socket()[2]) == ([], 0)


def test_a_queue_that_is_full_is_kicked_again(case: Case) -> None:
    case.worker.stall()
    case.worker.fill(0, [(PLAIN, numbered(at)) for at in range(5)])
    case.worker.turn(0)
    assert 0 < case.kicks.count() <= KICKS, "bounded, though nothing was taken"
    assert case.worker.take_back(1)
    assert case.kicks.count() > 0, "without a new frame"
    case.worker.resume()
    posted = [address for address, _, _ in case.worker.posted()]
    case.worker.complete(posted)
    assert not case.worker.take_back(2)
    assert (len(posted), case.kicks.count(), case.worker.mine(), case.drops()) == (5, 0, [], {})


# ---- the end of a socket


def test_silence_ends_it(case: Case) -> None:
    posted = case.read(0, 6, now=1000) + case.read(1, 6, now=1000)
    case.worker.complete(posted[:2])
    case.worker.take_back(now=1000 + SILENCE)
    case.worker.take_back(now=1000 + 2 * SILENCE)
    assert (case.worker.socket()[0], case.worker.mine()) == (READY, [0, 1]), "the last completion was 10 ms ago"
    assert not case.worker.take_back(now=1000 + 2 * SILENCE + 1)
    assert case.worker.socket() == (FAILED, 0, 0, [0] * 4, 2)
    assert (case.worker.mine(), case.drops()) == ([], {"tx_link_down": 10})
    assert is_closed(case.fd)


def test_an_idle_socket_may_be_silent(case: Case) -> None:
    case.worker.complete(case.read(0, 1, now=0))
    case.worker.take_back(now=1)
    case.worker.take_back(now=100_000)
    case.read(1, 1, now=100_000)
    case.worker.take_back(now=100_000 + SILENCE)
    assert case.worker.socket()[0] == READY


def test_silence_over_the_clocks_wrap(case: Case) -> None:
    case.read(0, 1, now=2**32 - 3)
    assert case.worker.take_back(now=SILENCE - 3)
    assert case.worker.socket()[0] == READY
    assert not case.worker.take_back(now=SILENCE - 2)
    assert case.worker.socket()[0] == FAILED


def test_an_error_ends_it(new_case: Callable[..., Case]) -> None:
    fd, other = os.pipe()
    case = new_case(fd=fd)
    first = case.read(0, 3)
    assert (len(first), case.worker.mine()) == (3, [0])
    case.worker.stall()
    case.worker.fill(1, [(PLAIN, numbered(at)) for at in range(4)])
    case.worker.turn(0)
    assert case.worker.socket() == (FAILED, errno.ENOTSOCK, 0, [0] * 4, 0)
    assert (case.worker.mine(), is_closed(fd)) == ([], True)
    os.close(other)
    assert case.drops() == {"tx_link_down": 7}, "also those that were on their way"
    case.worker.posted()
    assert case.read(2, 5) == []
    assert case.drops() == {"tx_link_down": 7, "tx_error": 5}, "and from then on by sendmmsg"


def test_an_unwanted_socket_is_closed(case: Case) -> None:
    case.read(0, 3)
    case.worker.unwant()
    case.worker.take_back(0)
    assert (case.worker.socket(), is_closed(case.fd)) == ((FAILED, errno.ENODEV, 0, [0] * 4, 0), True)
    assert (case.worker.mine(), case.drops()) == ([], {"tx_link_down": 3})


# ---- which way

CSUM_AT = (34, 6)  # where the checksum of numbered() starts, and its field from there


def offload(flags: int = 0, gso: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHH", flags, gso, 0, 1000 if gso else 0, start, offset)


WAYS = [
    ("plain", PLAIN, 64, 0),
    ("longest", PLAIN, 4072, 0),
    ("too long", PLAIN, 4073, None),
    ("open checksum", offload(1, 0, *CSUM_AT), 200, TX_METADATA),
    ("longest with an open checksum", offload(1, 0, *CSUM_AT), 4072, TX_METADATA),
    ("too long with an open checksum", offload(1, 0, *CSUM_AT), 4073, None),
    ("a checksum at the very end", offload(1, 0, 60, 2), 64, TX_METADATA),
    ("a checksum beyond the end", offload(1, 0, 60, 3), 64, None),
    ("a checksum far beyond the end", offload(1, 0, 65535, 65535), 64, None),
    ("GSO packet", offload(1, 5, *CSUM_AT), 3000, None),
]


@pytest.mark.parametrize(("vnet", "size", "options"), [row[1:] for row in WAYS], ids=[row[0] for row in WAYS])
def test_what_leaves_by_af_xdp(case: Case, vnet: bytes, size: int, options: int | None) -> None:
    case.worker.fill(0, [(vnet, numbered(1, size))])
    case.worker.turn(0)
    posted = case.worker.posted()
    if options is None:
        assert (posted, case.drops()) == ([], {"tx_error": 1})
        return
    [(address, length, chosen)] = posted
    assert (length, chosen, case.drops()) == (size, options, {})
    if options:
        _, _, _, _, start, field = struct.unpack("<BBHHHH", vnet)
        assert case.worker.bytes_at(address - 24, 24) == struct.pack("<QHH12x", 2, start, field)
