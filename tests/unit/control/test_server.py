"""The control server over a real Unix socket: who may ask, what is answered, and who need not wait for whom."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastlb.control.client import RefusedError, call
from fastlb.control.server import LINE_LIMIT, ControlServer, check_path
from fastlb.errors import ConfigError, ControlError, FastlbError
from tests.control_sockets import beside_a_server


def echo(request: Mapping[str, Any]) -> dict[str, Any]:
    return dict(request)


async def echo_later(request: Mapping[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return dict(request)


def refuse(request: Mapping[str, Any]) -> None:
    raise ConfigError.at("fastlb.yaml:1", "flows", "is too much")


async def refuse_later(request: Mapping[str, Any]) -> None:
    await asyncio.sleep(0)
    raise FastlbError("not now")


def fail(request: Mapping[str, Any]) -> None:
    raise KeyError("nobody thought of it")


COMMANDS = {"echo": echo, "later": echo_later, "refuse": refuse, "refuse later": refuse_later, "fail": fail}
UNKNOWN = "unknown request; commands are: echo, fail, later, refuse, refuse later"


def refused(says: str) -> dict[str, Any]:
    return {"ok": False, "error": says, "exit_code": 1}


async def answers(path: Path, *lines: bytes) -> list[Any]:
    """What is answered to these lines on one connection."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 24)
    found = []
    for line in lines:
        writer.write(line)
        found.append(json.loads(await reader.readline()))
    writer.close()
    return found


@pytest.mark.parametrize(
    ("request_line", "answer"),
    [
        (b'{"command": "echo", "word": "a"}', {"ok": True, "result": {"command": "echo", "word": "a"}}),
        (b'{"command": "later"}', {"ok": True, "result": {"command": "later"}}),
        (
            b'{"command": "refuse"}',
            {"ok": False, "error": "fastlb.yaml:1: flows: is too much", "exit_code": 2},
        ),
        (b'{"command": "refuse later"}', {"ok": False, "error": "not now", "exit_code": 1}),
        (
            b'{"command": "fail"}',
            {"ok": False, "error": "fastlb failed at this: KeyError: 'nobody thought of it'", "exit_code": 1},
        ),
        (b'{"command": "dance"}', refused(UNKNOWN)),
        (b"{}", refused(UNKNOWN)),
        (b'{"command": []}', refused(UNKNOWN)),
        (b"[]", refused("unreadable request: found a list; it must be an object with a command")),
        (b"[" * (LINE_LIMIT - 1), refused("unreadable request: it is nested too deeply")),
        (b'{"command": "echo", "word": ' + b"[" * 30_000, refused("unreadable request: it is nested too deeply")),
    ],
)
def test_answers(tmp_path: Path, request_line: bytes, answer: dict[str, Any]) -> None:
    path = tmp_path / "fastlb.sock"
    found = beside_a_server(path, COMMANDS, lambda: answers(path, request_line + b"\n", request_line + b"\n"))
    assert found == [answer, answer]


def test_nonsense_is_answered_and_the_conversation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    lines = (b"status\n", b"\xff\xfe\n", b"\n", b"NaN\n", b'{"command": "later"}\n')
    *nonsense, last = beside_a_server(path, COMMANDS, lambda: answers(path, *lines))
    for answer in nonsense:
        assert not answer["ok"]
        assert answer["error"].startswith("unreadable request, which must be a line of JSON: ")
    assert last["ok"]


def test_a_line_that_is_too_long_ends_the_conversation_only(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> tuple[bytes, list[Any]]:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"x" * (LINE_LIMIT * 3))
        answer = await reader.read()
        writer.close()
        return answer, await answers(path, b'{"command": "later"}\n')

    assert beside_a_server(path, COMMANDS, ask) == (b"", [{"ok": True, "result": {"command": "later"}}])


def test_others_are_served_while_a_command_waits(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> tuple[Any, bool, Any]:
        released = asyncio.Event()

        async def wait(request: Mapping[str, Any]) -> str:
            await released.wait()
            return "released"

        commands["wait"] = wait
        waiting = asyncio.create_task(answers(path, b'{"command": "wait"}\n'))
        other = await answers(path, b'{"command": "echo"}\n')
        before = waiting.done()
        released.set()
        return other, before, await waiting

    commands = dict(COMMANDS)
    other, before, (late,) = beside_a_server(path, commands, ask)
    assert other == [{"ok": True, "result": {"command": "echo"}}]
    assert not before
    assert late == {"ok": True, "result": "released"}


def test_a_large_answer_arrives_whole(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    large = {"services": [{"name": "web", "backends": [{"backend": str(each)} for each in range(20_000)]}]}
    commands = {"large": lambda request: large}
    assert beside_a_server(path, commands, lambda: asyncio.to_thread(call, str(path), "large")) == large


def test_a_client_that_goes_away_harms_nobody(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> list[Any]:
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'{"command": "echo"}\n{"command"')
        writer.transport.abort()
        return await answers(path, b'{"command": "echo"}\n')

    assert beside_a_server(path, COMMANDS, ask) == [{"ok": True, "result": {"command": "echo"}}]


# --- the place of the socket -----------------------------------------------------------------------------------------


def test_only_the_owner_may_ask_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run" / "deeper" / "fastlb.sock"

    async def ask() -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert beside_a_server(path, COMMANDS, ask) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_directories_that_others_use_stay(tmp_path: Path) -> None:
    path = tmp_path / "run" / "fastlb.sock"
    server = ControlServer(str(path), COMMANDS)
    server.bind()
    (path.parent / "another.pid").write_text("1")
    server.close()
    assert [each.name for each in path.parent.iterdir()] == ["another.pid"]


def test_a_socket_of_a_crash_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    assert path.is_socket()

    async def ask() -> Any:
        return await asyncio.to_thread(call, str(path), "echo")

    assert beside_a_server(path, COMMANDS, ask) == {"command": "echo"}
    assert not path.exists()


def test_a_second_one_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> Any:
        with pytest.raises(ControlError, match="another fastlb is running: it answers on"):
            ControlServer(str(path), COMMANDS).bind()
        return await asyncio.to_thread(call, str(path), "echo")

    assert beside_a_server(path, COMMANDS, ask) == {"command": "echo"}


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("mine")])
def test_what_is_no_socket_is_not_touched(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "fastlb.sock"
    make(path)
    for attempt in (lambda: check_path(path), ControlServer(str(path), COMMANDS).bind):
        with pytest.raises(ControlError, match="is there, and is no socket; give another path"):
            attempt()
    assert path.exists()
    check_path(tmp_path / "nothing there")


def test_a_place_where_no_socket_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "fastlb.sock", tmp_path / ("long" * 40)):
        server = ControlServer(str(path), COMMANDS)
        with pytest.raises(ControlError, match="cannot open the control socket"):
            server.bind()
        server.close()


def test_refusals_reach_the_client_with_their_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "fastlb.sock"

    async def ask() -> RefusedError:
        with pytest.raises(RefusedError) as refused:
            await asyncio.to_thread(call, str(path), "refuse")
        return refused.value

    error = beside_a_server(path, COMMANDS, ask)
    assert (str(error), error.exit_code) == ("fastlb.yaml:1: flows: is too much", 2)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_nothing_that_is_made_can_be_written_by_others(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "outer" / "inner" / "fastlb.sock"
    server = ControlServer(str(path), COMMANDS)
    before = os.umask(umask)
    try:
        server.bind()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(made.stat().st_mode) for made in (path.parent.parent, path.parent, path)]
    server.close()
    assert modes == [0o755 & ~umask, 0o755 & ~umask, 0o600]
