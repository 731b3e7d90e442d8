"""Lines for a file that may not take them: a thread writes them, so that nobody waits for it and nothing is raised.

    put ──► queue of so many bytes ──► thread ──► LineFile ──► descriptor
     '──► full: lost, and counted                    '──► refused: lost, and counted

A disk may be full, a reader gone or asleep, a file system may hang: what it is about goes on. That lines were lost is
told once the file takes lines again.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

RETRY = 1.0  # seconds until a file is tried again that is owed the news of lost lines
TELL_EVERY = 10.0  # seconds between two tellings, so that a disk that is full now and then does not fill the log

Write = Callable[[int, memoryview], int]
"""Writes some of the bytes to a descriptor and returns how many, as `os.write` does; raises OSError."""


class LineFile:
    """Writes whole lines to a descriptor. One that was cut short is finished later, if the file is as it was left."""

    def __init__(self, fd: int, write: Write = os.write, owned: bool = True) -> None:
        """``owned``: `close` closes the descriptor."""
        self.lost = 0  # lines that are not in the file
        self._fd, self._write, self._owned = fd, write, owned
        self._rest = b""  # of the line that was cut short
        self._size: int | None = None  # of the file then; None: it has no size, as a pipe

    def write(self, lines: bytes, counted: bool = True) -> None:
        """Write lines; raises OSError, and those that are not in the file are lost then, and ``counted``."""
        rest = self._take_rest()
        data, done = rest + lines, 0
        try:
            while done < len(data):
                done += self._write_some(memoryview(data)[done:])
        except OSError:
            self._rest, lost = cut(data, done, was_cut=bool(rest))
            self._size = self._current_size()
            self.lost += lost if counted else 0
            raise

    def close(self) -> None:
        """Give up the rest of a line, and close the descriptor if it is ours."""
        self.lost += bool(self._rest)
        self._rest = b""
        if self._owned:
            os.close(self._fd)

    def _take_rest(self) -> bytes:
        """Return what is missing of the last line; nothing when the file was cut or added to meanwhile."""
        rest, self._rest = self._rest, b""
        if rest and self._size != self._current_size():
            self.lost += 1
            return b""
        return rest

    def _current_size(self) -> int | None:
        found = os.fstat(self._fd)
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _write_some(self, data: memoryview) -> int:
        """Write some of it, and wait for that, whether the descriptor blocks or not."""
        while True:
            try:
                return self._write(self._fd, data)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()


def cut(data: bytes, done: int, was_cut: bool) -> tuple[bytes, int]:
    """Return the rest of the line that ``done`` bytes end in, and how many lines are lost after it.

    ``was_cut``: the data begin within a line.
    """
    begin = data.rfind(b"\n", 0, done) + 1
    within = begin < done or (was_cut and begin == 0)
    end = data.index(b"\n", done) + 1 if within else done
    return data[done:end], data.count(b"\n", end)


class Words(NamedTuple):
    """What a writer says, and calls for that in its thread."""

    on_failure: Callable[[OSError], object]  # the file takes no lines
    on_lost: Callable[[int], bytes]  # it takes lines again, so many are missing; returns what to write about that
    retries: bool = False  # what ``on_lost`` returns is news enough to try the file with it alone


SILENT = Words(lambda _: None, lambda _: b"")


class LineWriter:
    """Hands lines to a thread that writes them. No method raises, and none waits unless its name says so."""

    def __init__(self, file: LineFile, name: str, max_pending: int, words: Words = SILENT) -> None:
        """``max_pending``: bytes that may wait before what is new is lost; ``name``: the thread's."""
        self._file, self._max_pending, self._words = file, max_pending, words
        self._changed = threading.Condition()
        self._queue: deque[bytes | LineFile] = deque()
        self._pending = 0  # bytes in the queue, and on their way to the file
        self._lost = 0  # lines, besides those that the file lost
        self._told, self._tell_at = 0, 0.0  # lines that were told of as lost, and when more may be
        self._busy = self._ends = False
        self._told_of_failure = False  # and not yet that it is over
        self.fails = False  # True if the file did not take what came last
        self._start(threading.Thread(target=self._run, name=name, daemon=True))

    @property
    def lost(self) -> int:
        """Lines that are lost."""
        return self._lost + self._file.lost

    @property
    def has_room(self) -> bool:
        """True if `put` takes lines."""
        return self._pending < self._max_pending

    def put(self, lines: bytes) -> None:
        """Have lines written, each of which ends in a newline; they are lost when too many wait."""
        with self._changed:
            if self.has_room and not self._ends:
                self._queue.append(lines)
                self._pending += len(lines)
                self._changed.notify_all()
            else:
                self._lost += lines.count(b"\n")

    def change_file(self, file: LineFile) -> None:
        """Write what comes from now on to another file; the one before is closed after what came until now."""
        with self._changed:
            self._queue.append(file)
            self._changed.notify_all()

    def wait_for_room(self, seconds: float) -> bool:
        """Wait until `put` takes lines, so long at most; True if it does."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, seconds)

    def wait_until_written(self, seconds: float) -> bool:
        """Wait until nothing is left to be written, so long at most; True if nothing is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, seconds)

    def close_and_wait(self, seconds: float) -> bool:
        """Take no lines any more, and wait for what came until now, so long at most; True if that was written.

        The thread closes the file when it is through, or ends with the process.
        """
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        return self.wait_until_written(seconds)

    # --- the thread ----------------------------------------------------------------------------------------------

    def _start(self, thread: threading.Thread) -> None:
        """Start it with all signals blocked: they are for the main thread."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            if isinstance(taken, LineFile):
                self._go_over(taken)
            else:
                self._write(taken)
                self._wrote(len(taken))
        self._file.close()

    def _take(self) -> bytes | LineFile | None:
        """Wait for lines and return them, up to a change of the file; no bytes when it is time to try the file again,
        None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            owed = self._words.retries and self.lost > self._told
            self._changed.wait_for(lambda: self._queue or self._ends, RETRY if owed else None)
            if not self._queue:
                return None if self._ends else b""
            self._busy = True
            if isinstance(file := self._queue[0], LineFile):
                self._queue.popleft()
                return file
            lines = []
            while self._queue and isinstance(self._queue[0], bytes):
                lines.append(self._queue.popleft())
            return b"".join(each for each in lines if isinstance(each, bytes))

    def _wrote(self, size: int) -> None:
        with self._changed:
            self._pending -= size
            self._changed.notify_all()

    def _go_over(self, file: LineFile) -> None:
        before, self._file = self._file, file
        before.close()
        self._lost += before.lost

    def _write(self, lines: bytes) -> None:
        try:
            if lines:
                self._file.write(lines)
            self._tell_of_losses(time.monotonic())
            self.fails = False
        except OSError as error:
            self.fails = True
            if not self._told_of_failure:
                self._told_of_failure = True
                self._words.on_failure(error)

    def _tell_of_losses(self, now: float) -> None:
        """Say how many lines are missing; raises OSError when the file does not take that either."""
        lost = self.lost
        if lost > self._told and now >= self._tell_at:
            if notice := self._words.on_lost(lost):
                self._file.write(notice, counted=False)
            self._told, self._tell_at, self._told_of_failure = lost, now + TELL_EVERY, False
