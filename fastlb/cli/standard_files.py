"""Standard input, output and error as a command needs them: open, and no text that they do not take.

Cron, old init scripts and `ssh host 'fastlb ... >&-'` close some of them. The next file that the process opens would
take their place then, and get what is meant for them.
"""

from __future__ import annotations

import io
import os
import sys

CONTRARY = (os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)
"""How a closed one is opened: so that its use is an error, as it was."""


class LossyFile(io.FileIO):
    """A file of which nobody hears that it cannot be written: there is nowhere left to say it."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write some of the data, or say so."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def secure() -> None:
    """Open those that are closed, and have them take any text: what their encoding lacks is written as \\x or \\u.

    Standard error loses what cannot be written. What a test has put in their place stays.
    """
    for descriptor, flags in enumerate(CONTRARY):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number
    if sys.stdout is None:
        sys.stdout = _text(io.FileIO(1, "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _text(LossyFile(2, "w", closefd=False))


def _text(file: io.FileIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(file), errors="backslashreplace", line_buffering=True)
