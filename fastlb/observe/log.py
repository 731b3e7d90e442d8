"""Logging: readable lines on a terminal, one JSON object a line otherwise. Always to standard error.

Whoever logs, or prints to standard error in any other way, waits for nobody and meets no error: a thread writes
(lines.py). Lines that a full disk, or a reader that is gone or asleep, does not take are lost, counted, and told of.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TextIO, cast

import structlog

from fastlb.observe.lines import LineFile, LineWriter, Words

STDERR = 2
MAX_PENDING = 256 << 10  # bytes that wait for the reader of the log
END_TIME = 0.5  # seconds that the process waits at its end for the reader of the log
LOST = "log lines are missing; the log could not be written, or its reader was too slow"


class Stream(io.TextIOBase):
    """Standard error, as those see it who print."""

    def __init__(self, writer: LineWriter, encoding: str) -> None:
        self.writer = writer
        self._encoding = encoding
        self._begun = ""  # a line that has not ended
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Have the lines written that are complete now."""
        with self._lock:
            lines, newline, self._begun = (self._begun + text).rpartition("\n")
            if newline:
                self.writer.put((lines + newline).encode(self._encoding, "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: nobody waits for the log."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether somebody may look at it."""
        return os.isatty(STDERR)

    def fileno(self) -> int:
        """Return standard error's descriptor."""
        return STDERR


def configure(level: str = "info") -> None:
    """Set logging up for this process, and standard error with it; ``level`` is a name of the logging module."""
    terminal = os.isatty(STDERR)
    processors = _processors(terminal)
    if not isinstance(sys.stderr, Stream):
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        words = Words(lambda _: None, lambda lost: _render(processors, LOST, lost).encode(encoding), retries=True)
        sys.stderr = Stream(LineWriter(LineFile(STDERR, owned=False), "fastlb-log", MAX_PENDING, words), encoding)
        atexit.register(finish)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", sys.stderr)),
        cache_logger_on_first_use=False,  # a test may look at what is logged
    )


def lost() -> int:
    """Return how many lines of this process' log are lost."""
    return sys.stderr.writer.lost if isinstance(sys.stderr, Stream) else 0


def finish() -> None:
    """Wait a little for what was logged to be written; what ends the process without atexit calls this first."""
    if isinstance(sys.stderr, Stream):
        sys.stderr.writer.wait_until_written(END_TIME)


def _processors(terminal: bool) -> list[structlog.typing.Processor]:
    """Return what makes a line of an event."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
        *([] if terminal else [structlog.processors.format_exc_info]),
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
    ]


def _render(processors: Sequence[Callable[..., object]], event: str, lost: int) -> str:
    """Return the line about lost lines, which does not go through the logger: it is for after them."""
    made: object = {"event": event, "lost": lost}
    for processor in processors:
        made = processor(None, "warning", made)
    return f"{made}\n"
