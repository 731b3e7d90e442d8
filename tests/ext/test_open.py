"""ring.pxd's open blocks: frames are taken while the kernel still fills their block, once, and when they are whole.

The worker's own loop runs over ordinary memory, and this test is the kernel (held.pyx).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.ext.case import BLOCKS, NEAR_THE_END, PLAIN, Case, number_of, numbered

BLOCK_SIZE = 1 << 13  # so small that the kernel comes to a block's end
HEADER, IN_FRONT = 48, 158  # bytes: of a block, and of a frame in its slot
LENGTH = 64  # of most frames
TAG = (0x8100, 5)
USER = 1
FIELDS = {"tp_status": USER, "tp_len": LENGTH, "tp_snaplen": LENGTH, "tp_mac": IN_FRONT, "sll_ifindex": 1}

NewCase = Callable[..., Case]


def slot_size(length: int) -> int:
    return (IN_FRONT + length + 7) // 8 * 8


class Kernel:
    """The kernel's side of one ring. Frames have numbers in the order of their slots.

    As af_packet.c does it: a block is opened when a frame comes, and closed by time or when the next one does not fit.
    """

    def __init__(self, case: Case, ring: int = 0, first_number: int = 0) -> None:
        self._worker, self._first_block = case.worker, ring * BLOCKS
        self._numbers = itertools.count(first_number)
        self.block, self.is_open = self._first_block, False
        self._room = 0
        self.unfinished: list[tuple[int, int, int]] = []  # address, number and length
        self.whole: set[int] = set()
        self.holes = self.clamped = 0

    def play(self, events: str) -> None:
        """f: a frame. c: one that is clamped. h: a slot that is never filled, t: of a tagged frame. r: a slot is
        reserved, w: and the first such one finished. ]: the block's time is over."""
        for event in events:
            if event == "]":
                self.close()
            elif event == "w":
                self.finish(*self.unfinished.pop(0))
            else:
                self.fill(event)

    def fill(self, event: str, length: int = LENGTH) -> bool:
        """False when the ring is full."""
        if self.is_open and self._room < slot_size(length):
            self.close()
        if not self.is_open and not self.open():
            return False
        number = next(self._numbers)
        tag = TAG if event == "t" else None
        address = self._worker.reserve(self.block, length, tag)
        self._room -= slot_size(length)
        if event == "f":
            self.finish(address, number, length)
        elif event == "r":
            self.unfinished.append((address, number, length))
        elif event == "c":
            self._worker.finish(address, PLAIN, numbered(number, length), length + 1)
            self.clamped += 1
        else:
            self.holes += 1
        return True

    def finish(self, address: int, number: int, length: int) -> None:
        self._worker.finish(address, PLAIN, numbered(number, length))
        self.whole.add(number)

    def open(self) -> bool:
        if self.block in self._worker.mine():
            return False
        self._worker.open_block(self.block)
        self.is_open, self._room = True, BLOCK_SIZE - HEADER
        return True

    def close(self) -> None:
        """It waits for those that are about to fill a slot."""
        while self.unfinished:
            self.finish(*self.unfinished.pop(0))
        self._worker.close_block(self.block)
        self.is_open = False
        self.block = self._first_block + (self.block + 1 - self._first_block) % BLOCKS


class Sent:
    """What the worker has posted and the test has not completed."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.numbers: list[int] = []  # of all
        self.in_flight: list[tuple[int, bytes]] = []

    def look(self) -> list[int]:
        """The numbers of the frames that the worker takes in one turn."""
        self._case.worker.turn(0)
        fresh = [
            (address, self._case.worker.bytes_at(address, length))
            for address, length, _ in self._case.worker.posted()
        ]
        self.in_flight += fresh
        found = [number_of(raw) for _, raw in fresh]
        self.numbers += found
        return found

    def complete(self, count: int | None = None) -> None:
        """The first ``count``, or all; until then, they lay there untouched."""
        done, self.in_flight = self.in_flight[:count], self.in_flight[len(self.in_flight[:count]) :]
        for address, raw in done:
            assert self._case.worker.bytes_at(address, len(raw)) == raw
        self._case.worker.complete([address for address, _ in done])
        self._case.worker.take_back(0)


def is_zero(case: Case, block: int) -> bool:
    memory = case.worker.bytes_at(block * BLOCK_SIZE + HEADER, BLOCK_SIZE - HEADER)
    return bool(memory == bytes(len(memory)))


@pytest.fixture
def case(new_case: NewCase) -> Case:
    """One ring, whose open blocks are read."""
    return new_case(open_blocks=True, block_size=BLOCK_SIZE)


# ---- a frame is whole, or not there


@pytest.mark.parametrize("tag", [None, TAG])
@pytest.mark.parametrize("missing", FIELDS)
def test_not_before_its_last_field(case: Case, missing: str, tag: tuple[int, int] | None) -> None:
    """Nor is it a hole meanwhile: there is nothing yet."""
    sent, worker = Sent(case), case.worker
    worker.open_block(0)
    slot = worker.reserve(0, LENGTH, tag)
    assert sent.look() == []
    worker.copy(slot, PLAIN, numbered(7))
    for field in FIELDS.keys() - {missing}:
        worker.write(slot, field, FIELDS[field])
        assert sent.look() == []
    assert (worker.reads(), case.pipeline.counters()["packets"], case.drops()) == ((0, 0), 0, {})
    worker.write(slot, missing, FIELDS[missing])
    assert (sent.look(), sent.look()) == ([7], [])
    assert (worker.reads(), case.drops()) == ((1, 0), {})


def test_the_order_of_the_fields_does_not_matter(case: Case) -> None:
    kernel, sent = Kernel(case), Sent(case)
    for number, order in enumerate(itertools.permutations(FIELDS)):
        if not kernel.is_open:
            kernel.open()
        slot = case.worker.reserve(kernel.block, LENGTH)
        case.worker.copy(slot, PLAIN, numbered(number))
        for field in order:
            assert sent.look() == []
            case.worker.write(slot, field, FIELDS[field])
        assert sent.look() == [number]
        if number % 10 == 9:
            kernel.close()
            assert sent.look() == []
            sent.complete()
    assert case.worker.reads() == (120, 12)


def test_a_former_frame_does_not_show_through(case: Case) -> None:
    """One of the same place and length lay there in the round before."""
    kernel, sent = Kernel(case), Sent(case)
    for _ in range(BLOCKS):
        kernel.play("ff]")
        assert len(sent.look()) == 2
        sent.complete()
    kernel.play("r")
    assert sent.look() == []
    kernel.play("w")
    assert len(sent.look()) == 1


# ---- what the kernel does, and how many frames each look finds


class Totals(NamedTuple):
    early: int
    blocks: int
    holes: int = 0
    clamped: int = 0


Story = list[tuple[str, int]]

STORIES: dict[str, tuple[Story, Totals]] = {
    "frame by frame": ([("f", 1), ("f", 1), ("f", 1), ("]", 0)], Totals(3, 1)),
    "nothing twice": ([("ff", 2), ("", 0), ("", 0), ("]", 0), ("", 0)], Totals(2, 1)),
    "closed at once": ([("ff]", 2)], Totals(0, 1)),
    "closed between two looks": ([("fff", 3), ("]", 0)], Totals(3, 1)),
    "closed while frames remain": ([("ff", 2), ("fff]", 3)], Totals(2, 1)),
    "closed, and the next is open": ([("f", 1), ("f]ff", 1), ("", 2), ("]", 0)], Totals(3, 2)),
    "closed without a new one, and the next is open": ([("f", 1), ("]ff", 0), ("", 2), ("]", 0)], Totals(3, 2)),
    "two blocks": ([("f]f]", 1), ("", 1), ("", 0)], Totals(0, 2)),
    "tagged": ([("f", 1), ("f", 1), ("]", 0)], Totals(2, 1)),
    "slots are filled out of order": ([("frff", 1), ("", 0), ("w", 3), ("]", 0)], Totals(4, 1)),
    "two processors": ([("rrf", 0), ("w", 1), ("w", 2), ("]", 0)], Totals(3, 1)),
    "filled as the block closes": ([("frf", 1), ("]", 2)], Totals(1, 1)),
    "a hole": ([("fhf", 1), ("f", 0), ("", 0), ("]", 2)], Totals(1, 1, holes=1)),
    "a hole at the beginning": ([("hff", 0), ("]", 2)], Totals(0, 1, holes=1)),
    "a hole at the end": ([("ffh", 2), ("]", 0)], Totals(2, 1, holes=1)),
    "a hole, seen when closed": ([("fhf]", 2)], Totals(0, 1, holes=1)),
    "two holes": ([("fhfhf", 1), ("]", 2)], Totals(1, 1, holes=2)),
    "two holes side by side": ([("fhhf", 1), ("]", 1)], Totals(1, 1, holes=2)),
    "a hole at both ends": ([("hffh", 0), ("]", 2)], Totals(0, 1, holes=2)),
    "a block of one hole": ([("h", 0), ("]", 0)], Totals(0, 1, holes=1)),
    "a block of holes": ([("hhh", 0), ("]", 0), ("f", 1), ("]", 0)], Totals(1, 2, holes=3)),
    "blocks of holes, seen when closed": ([("hh]hh]f", 0), ("", 0), ("", 1), ("]", 0)], Totals(1, 3, holes=4)),
    "a tagged hole": ([("ftf", 1), ("]", 1)], Totals(1, 1, holes=1)),
    "a hole, and the next block is open": ([("fhf]ff", 2), ("", 2), ("]", 0)], Totals(2, 2, holes=1)),
    "a hole where a slot is late": ([("rhf", 0), ("w", 1), ("]", 1)], Totals(1, 1, holes=1)),
    "clamped": ([("fcf", 2), ("]", 0)], Totals(3, 1, clamped=1)),
    "clamped at the beginning": ([("cf", 1), ("]", 0)], Totals(2, 1, clamped=1)),
    "clamped at the end": ([("fc", 1), ("]", 0)], Totals(2, 1, clamped=1)),
    "clamped alone": ([("c", 0), ("]", 0)], Totals(1, 1, clamped=1)),
    "clamped, seen when closed": ([("cfcfc]", 2)], Totals(0, 1, clamped=3)),
    "clamped behind a hole": ([("fhcf", 1), ("]", 1)], Totals(1, 1, holes=1, clamped=1)),
}


@pytest.mark.parametrize("held_back", [False, True])
@pytest.mark.parametrize(("story", "totals"), STORIES.values(), ids=STORIES.keys())
def test_a_story(new_case: NewCase, story: Story, totals: Totals, held_back: bool) -> None:
    """Again and again, so that it begins in each block, and all counters wrap."""
    case = new_case(open_blocks=True, block_size=BLOCK_SIZE, counts=NEAR_THE_END)
    kernel, sent = Kernel(case), Sent(case)
    rounds = 3 * BLOCKS
    for _ in range(rounds):
        for events, taken in story:
            kernel.play(events)
            assert len(sent.look()) == taken
            if not held_back:
                sent.complete()
        sent.complete()
        assert case.worker.mine() == []
        assert all(is_zero(case, block) for block in range(BLOCKS))
    assert sent.numbers == sorted(kernel.whole)
    assert case.worker.reads() == (rounds * totals.early, rounds * totals.blocks)
    counted = {"ring_hole": rounds * totals.holes, "ring_clamped": rounds * totals.clamped}
    assert case.drops() == {name: count for name, count in counted.items() if count}


@pytest.mark.parametrize(("story", "totals"), STORIES.values(), ids=STORIES.keys())
def test_without_open_blocks_nothing_is_taken_early(new_case: NewCase, story: Story, totals: Totals) -> None:
    """The same stories; slots keep what they held before, as they may."""
    case = new_case(block_size=BLOCK_SIZE)
    kernel, sent = Kernel(case), Sent(case)
    rounds = 3 * BLOCKS
    for _ in range(rounds):
        for events, _ in story:
            kernel.play(events)
            sent.look()
            open_block = kernel.block if kernel.is_open else None
            assert open_block not in {address // BLOCK_SIZE for address, _ in sent.in_flight}
        for _ in story:
            sent.look()
        sent.complete()
        assert case.worker.mine() == []
    assert sent.numbers == sorted(kernel.whole)
    assert case.worker.reads() == (0, rounds * totals.blocks)
    counted = {"ring_hole": rounds * totals.holes, "ring_clamped": rounds * totals.clamped}
    assert case.drops() == {name: count for name, count in counted.items() if count}
    assert not kernel.whole or not any(is_zero(case, block) for block in range(BLOCKS)), "that would cost time"


# ---- the block closes while it is read


def test_the_last_link_is_cut_while_it_is_read(case: Case) -> None:
    kernel = Kernel(case)
    kernel.play("fff")
    closed = case.worker.looks_closed(0)
    assert not closed
    assert number_of_step(case, closed) == 0
    assert number_of_step(case, closed) == 1
    kernel.play("]")
    assert number_of_step(case, closed) == 2
    assert case.worker.step(0, closed) is None, "the zeros behind the last frame"
    assert case.worker.looks_closed(0)
    assert case.worker.step(0, True) is None
    sent = Sent(case)
    assert sent.look() == []
    assert (case.worker.mine(), case.worker.reads()) == ([], (0, 1))


def test_the_last_link_is_cut_after_its_frame_was_taken(case: Case) -> None:
    """Where reading goes on must not come from that link: not now, and not for the next one."""
    kernel = Kernel(case)
    kernel.play("f")
    assert number_of_step(case, closed=False) == 0
    kernel.play("]")
    assert case.worker.step(0, False) is None
    assert case.worker.step(0, True) is None
    case.worker.turn(0)
    kernel.play("ff")
    assert [number_of_step(case, closed=False) for _ in range(2)] == [1, 2]


def test_it_closes_while_a_hole_stops_the_reading(case: Case) -> None:
    kernel = Kernel(case)
    kernel.play("fhfh")
    assert number_of_step(case, closed=False) == 0
    assert case.worker.step(0, False) is None
    kernel.play("]")
    assert case.worker.step(0, False) is None, "a turn keeps to what it has seen"
    assert case.worker.step(0, True) == "ring_hole"
    assert number_of_step(case, closed=True) == 2
    assert case.worker.step(0, True) == "ring_hole"
    assert case.worker.step(0, True) is None


def number_of_step(case: Case, closed: bool) -> int:
    raw = case.worker.step(0, closed)
    assert isinstance(raw, bytes), raw
    return int.from_bytes(raw[42:46], "big")


# ---- when a block goes back


def test_used_bytes_are_zero_when_a_block_goes_back_and_not_before(case: Case) -> None:
    kernel, sent = Kernel(case), Sent(case)
    kernel.play("ff")
    assert sent.look() == [0, 1]
    sent.complete(1)
    assert not is_zero(case, 0)
    kernel.play("]")
    assert sent.look() == []
    assert (case.worker.mine(), is_zero(case, 0)) == ([0], False), "all read, and one on its way"
    kernel.play("f]")
    assert sent.look() == [2]
    case.worker.complete([sent.in_flight.pop()[0]])
    case.worker.take_back(0)
    assert (case.worker.mine(), is_zero(case, 0), is_zero(case, 1)) == ([0, 1], False, False), "in order"
    sent.complete()
    assert (case.worker.mine(), is_zero(case, 0), is_zero(case, 1)) == ([], True, True)


def test_a_block_that_was_all_read_while_open_waits_for_its_frames(case: Case) -> None:
    """Its frames lie there until the last has left, whatever the kernel does with other blocks meanwhile."""
    kernel, sent = Kernel(case), Sent(case)
    kernel.play("f" * 8)
    assert sent.look() == list(range(8))
    kernel.play("]")
    for _ in range(3):
        assert sent.look() == []
    for left in range(8, 0, -1):
        assert (case.worker.mine(), case.worker.socket()[3]) == ([0], [left, 0, 0, 0])
        sent.complete(1)
    assert case.worker.mine() == []
    assert is_zero(case, 0)


def test_frames_that_leave_before_their_block_closes(case: Case) -> None:
    """A block with nothing on its way is still the kernel's to fill."""
    kernel, sent = Kernel(case), Sent(case)
    for number in range(5):
        kernel.play("f")
        assert sent.look() == [number]
        sent.complete()
        assert case.worker.socket()[3] == [0] * BLOCKS
        assert not is_zero(case, 0)
    kernel.play("]")
    assert sent.look() == []
    assert is_zero(case, 0)


def test_a_ring_whose_blocks_are_all_held_is_not_read_again(case: Case) -> None:
    """The current block is then the oldest: closed, and full of frames that were taken long ago."""
    kernel, sent = Kernel(case), Sent(case)
    for block in range(BLOCKS):
        kernel.play("ff]")
        assert sent.look() == [2 * block, 2 * block + 1]
    assert not kernel.fill("f"), "there is no block to open"
    for _ in range(3):
        assert sent.look() == []
    sent.complete(2)
    assert case.worker.mine() == [1, 2, 3]
    kernel.play("f")
    assert len(sent.look()) == 1
    assert case.worker.mine() == [1, 2, 3]


# ---- a block's end


@pytest.mark.parametrize("left", [0, 8, 16, 56, 64, 72, 80])
@pytest.mark.parametrize("block", range(BLOCKS))
def test_what_is_left_of_a_block_holds_no_slot(case: Case, block: int, left: int) -> None:
    """Fewer than the 68 bytes of a slot's headers, or more, but zero. What lies behind looks like a frame."""
    kernel, sent = Kernel(case), Sent(case)
    for _ in range(block):
        kernel.play("f]")
        sent.look()
        sent.complete()
    following = (block + 1) % BLOCKS
    case.worker.fill(following, [(PLAIN, numbered(4000))] * 3)  # where a reader might go on
    first = 4000
    second = BLOCK_SIZE - HEADER - slot_size(first) - IN_FRONT - left
    for length in (first, second):
        kernel.fill("f", length)
        assert len(sent.look()) == 1
        for _ in range(3):
            assert sent.look() == []
    kernel.close()
    assert sent.look() == []
    sent.complete()
    assert is_zero(case, block)
    assert case.drops() == {}
    assert sent.look() == [4000] * 3, "and then the next one, in its turn"


@pytest.mark.parametrize("is_open", [False, True])
def test_a_clamped_frame_fills_its_block(case: Case, is_open: bool) -> None:
    """To the last byte: the only slot that Linux places so. The block before is closed though it may be empty."""
    kernel, sent = Kernel(case), Sent(case)
    whole = BLOCK_SIZE - HEADER - IN_FRONT
    for _ in range(2 * BLOCKS):
        kernel.open()
        kernel.close()
        kernel.fill("c", whole)
        if not is_open:
            kernel.close()
        assert (sent.look(), sent.look(), sent.look()) == ([], [], [])
        if is_open:
            kernel.close()
            assert sent.look() == []
        assert case.worker.mine() == []
    assert case.drops() == {"ring_clamped": 2 * BLOCKS}
    assert all(is_zero(case, block) for block in range(BLOCKS))
    kernel.play("f")
    assert len(sent.look()) == 1


# ---- several rings


def test_one_open_and_one_closed(new_case: NewCase) -> None:
    case = new_case(rings=2, open_blocks=True, block_size=BLOCK_SIZE)
    first, second, sent = Kernel(case, 0), Kernel(case, 1, 1000), Sent(case)
    first.play("ff")
    second.play("ff]f")
    assert sent.look() == [0, 1, 1000, 1001]
    first.play("f]f")
    assert sent.look() == [2, 1002]
    second.play("h]")
    assert sent.look() == [3]
    assert case.worker.mine() == [0, BLOCKS, BLOCKS + 1]
    sent.complete()
    assert case.worker.mine() == []
    assert case.drops() == {"ring_hole": 1}


def test_a_hole_in_one_ring_does_not_stop_another(new_case: NewCase) -> None:
    case = new_case(rings=2, open_blocks=True, block_size=BLOCK_SIZE)
    first, second, sent = Kernel(case, 0), Kernel(case, 1, 1000), Sent(case)
    first.play("hf")
    for number in range(5):
        second.play("f")
        assert sent.look() == [1000 + number]
    first.play("]")
    assert sent.look() == [1]


# ---- whatever comes


@pytest.mark.parametrize("open_blocks", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_kernel_does(new_case: NewCase, seed: int, open_blocks: bool) -> None:
    """Two rings, frames of all lengths, blocks that fill up, looks and completions whenever they come."""
    case = new_case(rings=2, open_blocks=open_blocks, block_size=BLOCK_SIZE, counts=NEAR_THE_END - seed)
    drawn, sent = random.Random(seed), Sent(case)
    kernels = [Kernel(case, 0), Kernel(case, 1, 1_000_000)]
    for _ in range(3000):
        kernel = drawn.choice(kernels)
        event = drawn.choices("frhtcw]!d", (40, 8, 3, 1, 2, 8, 4, 20, 10))[0]
        if event == "!":
            sent.look()
        elif event == "d":
            sent.complete(drawn.randrange(len(sent.in_flight) + 1))
        elif event == "]":
            if kernel.is_open:
                kernel.close()
        elif event == "w":
            kernel.play("w" if kernel.unfinished else "")
        else:
            kernel.fill(event, drawn.choice((60, 64, 300, 1514, 4071, 4072)))
        if open_blocks:
            theirs = set(range(2 * BLOCKS)) - set(case.worker.mine()) - {each.block for each in kernels}
            assert all(is_zero(case, block) for block in theirs)
    for kernel in kernels:
        if kernel.is_open:
            kernel.close()
    for _ in range(2 * BLOCKS):
        sent.look()
        sent.complete()
    for number, kernel in enumerate(kernels):
        mine = [each for each in sent.numbers if each // 1_000_000 == number]
        assert mine == sorted(kernel.whole)
        assert len(mine) > 500
    assert case.worker.mine() == []
    assert case.drops() == {
        "ring_hole": sum(kernel.holes for kernel in kernels),
        "ring_clamped": sum(kernel.clamped for kernel in kernels),
    }
    assert (case.worker.reads()[0] > 0) == open_blocks
