"""Requests on the control socket: what is no request, arguments of the wrong kind, and whatever else may be sent."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fastlb.control.commands import Commands
from fastlb.control.requests import ARGUMENTS, check_arguments, parse_request
from fastlb.errors import ControlError
from tests.balancers import BACKENDS, service
from tests.control_sockets import serving
from tests.unit.control.test_commands import Balancer

COMMANDS = ("status", "conns", "trace", "drain", "enable", "weight", "reload", "stop")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[" * 60_000, "unreadable request: it is nested too deeply"),
        (b'{"a":' * 10_000, "unreadable request: it is nested too deeply"),
        (b"null", "unreadable request: found nothing; it must be an object with a command"),
        (b'"status"', 'unreadable request: found "status"; it must be an object with a command'),
        (b"7", "unreadable request: found 7; it must be an object with a command"),
        (b'["status"]', "unreadable request: found a list; it must be an object with a command"),
        (b'{"command": "status", "command": "stop"}', 'unreadable request: "command" is given twice; keep one'),
        (b'{"x": {"\\ud800": 1, "\\ud800": 1}}', 'unreadable request: "\\ud800" is given twice; keep one'),
        (b'{"deadline": NaN}', "unreadable request, which must be a line of JSON: NaN is no JSON"),
        (b'{"deadline": -Infinity}', "unreadable request, which must be a line of JSON: -Infinity is no JSON"),
        (b"status", "unreadable request, which must be a line of JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_what_is_no_request(line: bytes, says: str) -> None:
    with pytest.raises(ControlError) as refused:
        parse_request(line)
    assert str(refused.value) == says


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_other_encodings_than_utf_8(encoding: str) -> None:
    with pytest.raises(ControlError, match="which must be a line of JSON"):
        parse_request('{"command": "stäts"}'.encode(encoding))


WRONG = {
    "text": (7, True, 1.5, [], {}, ["web"], "\ud800"),
    "true or false": (0, 1, "true", [], {}),
    "a whole number": (1.5, True, "1", [], {}),
    'a number of seconds, or text such as "5m"': (True, [], {}, ["5m"], math.inf, -math.inf, "\udfff"),
}
RIGHT = {
    "text": ("", "web", "Größe", None),
    "true or false": (True, False, None),
    "a whole number": (0, -1, 1 << 70, None),
    'a number of seconds, or text such as "5m"': ("5m", 0, 1.5, 10**400, None),
}


@pytest.mark.parametrize("command", ARGUMENTS)
def test_the_kinds_of_arguments(command: str) -> None:
    for name, kind in ARGUMENTS[command].items():
        for value in WRONG[kind.words]:
            with pytest.raises(ControlError) as refused:
                check_arguments(command, {"command": command, name: value})
            assert str(refused.value).startswith(f"{name} must be {kind.words}, not ")
        for value in RIGHT[kind.words]:
            check_arguments(command, {"command": command, name: value})


def test_a_vast_number_is_not_repeated() -> None:
    with pytest.raises(ControlError, match="service must be text, not a number of more than 64 bits"):
        check_arguments("drain", {"service": -(10**4000)})


def test_arguments_that_no_command_has_are_left_alone() -> None:
    check_arguments("status", {"command": "status", "service": []})
    check_arguments("enable", {"command": "enable", "deadline": []})


# --- whatever may be sent --------------------------------------------------------------------------------------------

LIKELY = st.sampled_from(["web", f"{BACKENDS[4][0]}:8080", "5m", "established", "203.0.113.10:80/tcp", "10.0.0.0/8"])
NUMBERS = st.integers() | st.sampled_from([10**400, -(10**4000), 1 << 63]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | LIKELY | st.text(st.characters(exclude_categories=()), max_size=20)
VALUES = st.recursive(SCALARS, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(), one, max_size=3))
NAMES = sorted({name for arguments in ARGUMENTS.values() for name in arguments})
REQUESTS = st.builds(
    lambda command, arguments: {"command": command, **arguments},
    st.sampled_from(COMMANDS) | VALUES,
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
)
LINES = (
    (REQUESTS | VALUES).map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
    | st.integers(1, 60_000).map(lambda depth: b"[" * depth)
    | st.integers(1, 9_000).map(lambda depth: b'{"command": "drain", "service": ' + b"[" * depth + b"]" * depth + b"}")
)


Ask = Callable[[bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What sends a line to a server of all commands, and returns its answer; all on one connection."""
    path = tmp_path_factory.mktemp("control") / "fastlb.sock"
    commands = Commands(Balancer(service("nat", name="web"), service("dsr", name="dns", protocol="udp", port=53)))
    with serving(path, commands.by_name()), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        answers = client.makefile("rb")

        def send(line: bytes) -> dict[str, Any]:
            client.sendall(line.replace(b"\n", b"") + b"\n")
            answer: dict[str, Any] = json.loads(answers.readline())
            return answer

        yield send
        answers.close()


@given(line=LINES)
def test_whatever_is_sent_is_answered_and_none_of_it_is_a_fault(ask: Ask, line: bytes) -> None:
    with capture_logs() as logged:
        answer = ask(line)
    assert [each for each in logged if each["log_level"] == "error"] == []
    assert answer["ok"] or not answer["error"].startswith("fastlb failed at this"), answer
