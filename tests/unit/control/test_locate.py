"""locate.py: the control socket of a process, by what the kernel says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastlb.control.locate import socket_of_process
from fastlb.errors import ControlError

LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
accepted, _ = listener.accept()  # it has the same path in /proc/net/unix
print(flush=True)
sys.stdin.read()
"""


def test_a_process_that_listens(tmp_path: Path) -> None:
    path = tmp_path / "a path with spaces"
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert socket_of_process(process.pid) == str(path)
        process.stdin.close()


@pytest.mark.parametrize("listens", [False, True])
def test_a_process_without_one(tmp_path: Path, listens: bool) -> None:
    """A socket that nobody listens on is none, and neither is one without a path."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("\0fastlb test of locate" if listens else str(tmp_path / "bound"))
        if listens:
            other.listen()
        with pytest.raises(ControlError, match=f"^process {os.getpid()} has no control socket; is it a fastlb"):
            socket_of_process(os.getpid())


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"^cannot look into process 77: No such file or directory$"):
        socket_of_process(77, tmp_path)
