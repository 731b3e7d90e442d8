"""The client of the control socket: what it makes of silence, nonsense, and an end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastlb.control import client
from fastlb.control.client import call, is_answered, wait_for_end
from fastlb.errors import ControlError
from tests.control_sockets import beside_a_server


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """One conversation on the socket, and the requests that came."""
    requests = []

    def converse() -> None:
        connection, _ = listener.accept()
        with connection:
            requests.append(connection.makefile("rb").readline())
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=converse)
        thread.start()
        yield requests
        thread.join()


def test_a_request_is_one_line_with_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    with answering(path, b'{"ok": true, "result": [1, 2]}\n') as requests:
        assert call(str(path), "drain", service="web", deadline=None) == [1, 2]
    assert [json.loads(line) for line in requests] == [{"command": "drain", "service": "web", "deadline": None}]


@pytest.mark.parametrize("answer", [b"", b'{"ok": true, "result": {}'])
def test_no_answer_or_half_of_one(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "fastlb.sock"
    with answering(path, answer), pytest.raises(ControlError, match="closed the connection without an answer"):
        call(str(path), "status")


def test_a_refusal_without_an_exit_code_counts_as_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    with answering(path, b'{"ok": false, "error": "no"}\n'), pytest.raises(ControlError) as refused:
        call(str(path), "status")
    assert (str(refused.value), refused.value.exit_code) == ("no", 1)


def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    expected = f"no fastlb is running on {path}; is it the right --socket or -c?"
    with pytest.raises(ControlError) as missing:
        call(str(path), "status")
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    with pytest.raises(ControlError) as left:
        call(str(path), "status")
    assert (str(missing.value), str(left.value)) == (expected, expected)


def test_a_path_that_cannot_be_a_socket(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="cannot talk to fastlb on"):
        call(str(tmp_path / ("long" * 40)), "status")


def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.05)
    path = tmp_path / "fastlb.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlError, match="timed out"):
            call(str(path), "status")


def test_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    assert not is_answered(path)

    async def ask() -> bool:
        return is_answered(path)

    assert beside_a_server(path, {}, ask)
    assert not is_answered(path)


# --- the end of a fastlb ---------------------------------------------------------------------------------------------


def test_an_end_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> asyncio.Task[None]:
        waiting = asyncio.create_task(asyncio.to_thread(wait_for_end, str(path)))
        while not waiting.done():
            path.unlink(missing_ok=True)  # what the server does when it closes
            await asyncio.sleep(0)
        return waiting

    assert beside_a_server(path, {}, ask).exception() is None
    wait_for_end(str(path))


def test_a_process_that_was_killed_leaves_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ASK_EVERY", 0.0)
    path = tmp_path / "fastlb.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    wait_for_end(str(path))
    assert path.is_socket()


def test_one_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "END_TIMEOUT", 0.05)
    path = tmp_path / "fastlb.sock"

    async def ask() -> None:
        with pytest.raises(ControlError, match="has not ended after 0 s; its log may say why"):
            await asyncio.to_thread(wait_for_end, str(path))

    beside_a_server(path, {}, ask)
