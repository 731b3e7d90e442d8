"""How a value is refused: a message that names what was found and says what would be right.

The types of `fastlb.config.fields` are built from these parts. A message is one line, whatever the value holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import BeforeValidator, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

MAX_SHOWN = 60  # characters of a text that a message repeats
_IN_QUOTES = re.compile(r"true|false|(?:0|[1-9][0-9]{0,20})(?:\.[0-9]{1,10})?")


def refusal(message: str) -> PydanticCustomError:
    """Return the error with which a validator refuses a value; the message reaches the user as it is."""
    return PydanticCustomError("fastlb", "{message}", {"message": message})


def show(value: object, most: int = MAX_SHOWN) -> str:
    """Return a value as a message shows it, up to ``most`` characters of text; never the contents of a container."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        short = value if len(value) <= most else f"{value[:most]}…"
        return json.dumps(short, ensure_ascii=False).encode(errors="backslashreplace").decode()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def expects(right: str) -> WrapValidator:
    """Replace pydantic's message about a value by one that says what would be right."""

    def validate(value: object, inner: ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(value)
        except ValidationError as error:
            if any(detail["type"] == "fastlb" for detail in error.errors(include_url=False)):
                raise
        quotes = "; remove the quotes" if _is_right_without_quotes(value, inner) else ""
        raise refusal(f"found {show(value)}; it must be {right}{quotes}")

    return WrapValidator(validate)


def _is_right_without_quotes(value: object, inner: ValidatorFunctionWrapHandler) -> bool:
    """True for text such as "80" or "true" where the number or the switch would be accepted."""
    if not isinstance(value, str) or not _IN_QUOTES.fullmatch(value):
        return False
    try:
        inner(json.loads(value))
    except ValidationError:
        return False
    return True


def one_of(*choices: str) -> BeforeValidator:
    """Accept one of these words."""

    def validate(value: object) -> object:
        if value in choices:
            return value
        raise refusal(f"found {show(value)}; use one of: {', '.join(choices)}")

    return BeforeValidator(validate)
