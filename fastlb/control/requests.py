"""What may be asked over the control socket: one JSON object, each key once, and arguments of the kinds of a table.

Whoever may open the socket may send anything. What a command gets has passed `parse_request` and `check_arguments`, so
that it looks only at what values mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastlb.config.refusal import show
from fastlb.errors import ControlError


class Kind(NamedTuple):
    """A kind of argument: what it is in words, and whether a value that JSON made is one."""

    words: str
    fits: Callable[[Any], bool]


def is_text(value: object) -> bool:
    """True for text that can be encoded: JSON may hold half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def is_number(value: object) -> bool:
    """True for an int or a float that is one: JSON's 1e999 is infinite in Python."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


TEXT = Kind("text", is_text)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
TIME = Kind('a number of seconds, or text such as "5m"', lambda value: is_text(value) or is_number(value))

BACKEND: Mapping[str, Kind] = {"service": TEXT, "backend": TEXT}

ARGUMENTS: Mapping[str, Mapping[str, Kind]] = {
    "conns": {**BACKEND, "client": TEXT, "state": TEXT, "count": SWITCH, "start": WHOLE, "room": WHOLE},
    "trace": {"source": TEXT, "destination": TEXT},
    "drain": {**BACKEND, "deadline": TIME},
    "enable": BACKEND,
    "weight": {**BACKEND, "weight": WHOLE},
    "stop": {"handover": SWITCH},
}
"""The arguments of each command that has some. One that is null counts as not given."""


def parse_request(line: bytes) -> Mapping[str, Any]:
    """Return the object in a line; raises ControlError, which says what is wrong with it."""
    try:
        request = json.loads(line.decode(), object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except RecursionError:
        raise ControlError("unreadable request: it is nested too deeply") from None
    except ValueError as error:  # no UTF-8, no JSON, or an integer of thousands of digits
        raise ControlError(f"unreadable request, which must be a line of JSON: {error}") from None
    if not isinstance(request, dict):
        raise ControlError(f"unreadable request: found {show(request)}; it must be an object with a command")
    return request


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Of a key given twice parsers take the first or the last, and neither may be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ControlError(f"unreadable request: {show(twice)} is given twice; keep one")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_arguments(command: str, request: Mapping[str, Any]) -> None:
    """Raise ControlError where an argument of a command is of another kind than it must be."""
    for name, kind in ARGUMENTS.get(command, {}).items():
        value = request.get(name)
        if value is not None and not kind.fits(value):
            raise ControlError(f"{name} must be {kind.words}, not {_shown(value)}")


def _shown(value: object) -> str:
    """Return a value as a message shows it; a vast number is cut short."""
    if isinstance(value, int) and abs(value) >> 64:
        return "a number of more than 64 bits"
    return show(value)
