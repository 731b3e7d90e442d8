"""How a value is shown, and what a refusal says."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from fastlb.config.refusal import expects, one_of, show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        (True, "true"),
        (1.5, "1.5"),
        ("a", '"a"'),
        ("é\n", '"é\\n"'),
        ("x" * 61, '"' + "x" * 60 + '…"'),
        ({"a": 1}, "a mapping"),
        ([1], "a list"),
        ((1,), "a list"),
        (b"a", "a bytes"),
    ],
)
def test_show(value: object, shown: str) -> None:
    assert show(value) == shown


def message_of(kind: object, value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value)
    [detail] = caught.value.errors(include_url=False)
    return detail["msg"]


Small = Annotated[StrictInt, Field(ge=1, le=9), expects("a number from 1 to 9")]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Small, 10, "found 10; it must be a number from 1 to 9"),
        (Small, "9", 'found "9"; it must be a number from 1 to 9; remove the quotes'),
        (Small, "10", 'found "10"; it must be a number from 1 to 9'),
        (Small, "09", 'found "09"; it must be a number from 1 to 9'),
        (Small, "true", 'found "true"; it must be a number from 1 to 9'),
        (
            Annotated[StrictBool, expects("true or false")],
            "true",
            'found "true"; it must be true or false; remove the quotes',
        ),
        (Annotated[StrictStr, one_of("tcp", "udp")], "TCP", 'found "TCP"; use one of: tcp, udp'),
        (Annotated[Annotated[StrictStr, one_of("a")], expects("unseen")], "b", 'found "b"; use one of: a'),
    ],
)
def test_what_a_refusal_says(kind: object, value: object, message: str) -> None:
    assert message_of(kind, value) == message


def test_what_is_right_passes() -> None:
    assert TypeAdapter(Small).validate_python(9) == 9
