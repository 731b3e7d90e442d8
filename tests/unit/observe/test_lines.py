"""Lines for a file that may not take them: what is in it afterwards, what is lost, and that nobody waits."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastlb.observe import lines
from fastlb.observe.lines import LineFile, LineWriter, Words, cut

PATIENCE = 20.0  # seconds that no test waits
MORE = 1 << 20


class Disk:
    """Room for so many bytes, which cuts what does not fit as file systems do."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, data[: self.room])
        self.room -= written
        return written


class Told:
    """What a writer says."""

    def __init__(self, notice: bytes = b"", retries: bool = False) -> None:
        self.failures: list[int | None] = []
        self.lost: list[int] = []
        self.words = Words(lambda error: self.failures.append(error.errno), self.tell, retries)
        self._notice = notice

    def tell(self, lost: int) -> bytes:
        self.lost.append(lost)
        return self._notice % lost if self._notice else b""


def opened(path: Path, room: int = MORE) -> tuple[LineFile, Disk]:
    disk = Disk(room)
    return LineFile(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), disk.write), disk


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def read_some(reader: int) -> bytes:
    """All that is there now."""
    try:
        return os.read(reader, 1 << 20)
    except BlockingIOError:
        return b""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A reader and a writer."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


# --- a file that refuses ---------------------------------------------------------------------------------------------

CUTS = [
    # data, bytes written, was the first line begun before: rest of a line, lines lost
    (b"one\ntwo\n", 0, False, b"", 2),
    (b"one\ntwo\n", 4, False, b"", 1),
    (b"one\ntwo\n", 2, False, b"e\n", 1),
    (b"one\ntwo\n", 6, False, b"o\n", 0),
    (b"one\ntwo\n", 0, True, b"one\n", 1),
    (b"one\ntwo\n", 2, True, b"e\n", 1),
    (b"one\ntwo\n", 4, True, b"", 1),
    (b"one\n", 3, False, b"\n", 0),
]


@pytest.mark.parametrize(("data", "done", "was_cut", "rest", "lost"), CUTS)
def test_cut(data: bytes, done: int, was_cut: bool, rest: bytes, lost: int) -> None:
    assert cut(data, done, was_cut) == (rest, lost)


@pytest.mark.parametrize("room", range(13))
def test_every_line_is_whole_or_counted(path: Path, room: int) -> None:
    """Wherever the disk becomes full, and whenever it has room again."""
    file, disk = opened(path, room)
    for again in (0, 2, 5):
        disk.room += again
        try:
            file.write(b"first\nsecond\n")
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
    disk.room = MORE
    file.write(b"last\n")
    file.close()
    found = path.read_bytes().splitlines()
    assert set(found) <= {b"first", b"second", b"last"}
    assert (found[-1], len(found) + file.lost) == (b"last", 7)


@pytest.mark.parametrize("meanwhile", [b"", b"of another program\n"])
def test_a_file_that_was_changed_meanwhile_gets_no_rest_of_a_line(path: Path, meanwhile: bytes) -> None:
    """logrotate's copytruncate, above all."""
    file, disk = opened(path, room=8)
    with pytest.raises(OSError, match="No space"):
        file.write(b"first\nsecond\n")
    path.write_bytes(meanwhile)
    disk.room = MORE
    file.write(b"third\n")
    assert path.read_bytes() == meanwhile + b"third\n"
    assert file.lost == 1


def test_a_descriptor_that_does_not_block_is_waited_for(pipe: tuple[int, int]) -> None:
    """As whoever started the process may have left it."""
    os.set_blocking(pipe[1], False)
    size = 0
    file = LineFile(pipe[1], owned=False)
    thread = threading.Thread(target=file.write, args=(b"line\n" * 100_000,))
    thread.start()
    while size < 500_000:
        size += len(os.read(pipe[0], 1 << 16))
    thread.join(PATIENCE)
    assert (thread.is_alive(), file.lost) == (False, 0)


# --- a writer --------------------------------------------------------------------------------------------------------


def test_a_failure_and_its_end_are_told_of_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "RETRY", 0.001)
    told = Told(b"%d are missing\n", retries=True)
    file, disk = opened(path, room=0)
    writer = LineWriter(file, "test", MORE, told.words)
    for count in (1, 2, 3):
        writer.put(b"a line\n")
        until(lambda count=count: writer.lost == count)  # type: ignore[misc]
    assert writer.fails
    disk.room = MORE
    until(lambda: path.read_bytes())  # by itself
    assert writer.close_and_wait(PATIENCE)
    assert path.read_bytes() == b"3 are missing\n"
    assert (told.failures, told.lost[-1], writer.lost, writer.fails) == ([errno.ENOSPC], 3, 3, False)


def test_what_is_lost_again_and_again_is_told_of_now_and_then(path: Path) -> None:
    told = Told()
    file, disk = opened(path)
    writer = LineWriter(file, "test", MORE, told.words)
    for _ in range(5):
        for disk.room in (0, MORE):
            writer.put(b"a line\n")
            assert writer.wait_until_written(PATIENCE)
    assert (told.failures, told.lost, writer.lost) == ([errno.ENOSPC] * 2, [1], 5)


def test_without_a_notice_of_its_own_the_file_is_tried_with_lines_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "RETRY", 0.001)
    told = Told()
    file, disk = opened(path, room=0)
    writer = LineWriter(file, "test", MORE, told.words)
    writer.put(b"a line\n")
    until(lambda: told.failures)
    assert told.lost == []
    disk.room = MORE
    writer.put(b"another\n")
    until(lambda: told.lost)
    assert (told.lost, path.read_bytes()) == ([1], b"another\n")


def test_a_reader_that_is_gone(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    told = Told()
    writer = LineWriter(LineFile(pipe[1], owned=False), "test", MORE, told.words)
    writer.put(b"one\ntwo\n")
    until(lambda: writer.lost == 2)
    assert told.failures == [errno.EPIPE]


def test_a_reader_that_sleeps_holds_nobody_up(pipe: tuple[int, int]) -> None:
    """What does not fit is lost, and told of when the reader has read what came before."""
    told = Told(b"%d are missing\n")
    writer = LineWriter(LineFile(pipe[1], owned=False), "test", 10_000, told.words)
    for _ in range(50_000):
        writer.put(b"a line\n")
    assert not writer.has_room
    assert not writer.wait_for_room(0.001)
    assert not writer.wait_until_written(0.001)
    lost = writer.lost
    assert lost > 30_000
    os.set_blocking(pipe[0], False)
    pieces: list[bytes] = []
    until(lambda: [pieces.append(read_some(pipe[0])), writer.wait_until_written(0)][1])  # type: ignore[func-returns-value]
    read = b"".join([*pieces, read_some(pipe[0])])
    assert read.count(b"a line\n") + lost == 50_000
    assert read.count(b" are missing\n") == len(told.lost) >= 1


def test_a_writer_ends_after_what_came_until_then(path: Path) -> None:
    file, _ = opened(path)
    writer = LineWriter(file, "test-end", MORE)
    writer.put(b"one\n")
    assert writer.close_and_wait(PATIENCE)
    writer.put(b"two\n")
    until(lambda: all(thread.name != "test-end" for thread in threading.enumerate()))
    assert (path.read_bytes(), writer.lost) == (b"one\n", 1)


def test_another_file_gets_what_comes_after_it(path: Path) -> None:
    """A line that was cut short in the one before is lost."""
    before, _ = opened(path, room=6)
    writer = LineWriter(before, "test", MORE)
    writer.put(b"one\ntwo\n")
    until(lambda: writer.fails)
    path.rename(path.with_suffix(".1"))
    writer.change_file(opened(path)[0])
    writer.put(b"three\n")
    assert writer.wait_until_written(PATIENCE)
    assert path.read_bytes() == b"three\n"
    assert path.with_suffix(".1").read_bytes() == b"one\ntw"
    assert writer.lost == 1


def test_signals_are_not_for_the_thread(path: Path) -> None:
    """Whoever waits for one in the main thread, having blocked it, must get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    LineWriter(opened(path)[0], "test-signals", MORE)
    (number,) = (thread.native_id for thread in threading.enumerate() if thread.name == "test-signals")
    status = Path(f"/proc/self/task/{number}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert blocked & 1 << signal.SIGTERM - 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
