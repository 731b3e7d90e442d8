"""Times and sizes as text and as numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fastlb.config.quantities import (
    BYTES,
    FINE_SECONDS,
    SECONDS,
    hundredths,
    power_of_two,
    quantity,
    quantity_schema,
)


@pytest.mark.parametrize(
    ("units", "written", "number"),
    [
        (SECONDS, "1500ms", 1.5),
        (SECONDS, "2h", 7200.0),
        (SECONDS, 3, 3.0),
        (FINE_SECONDS, "7us", 7e-6),
        (BYTES, "256KiB", 262144.0),
        (BYTES, "1.5MiB", 1572864.0),
    ],
)
def test_quantities(units: Mapping[str, float], written: object, number: float) -> None:
    assert TypeAdapter(Annotated[float, quantity(units)]).validate_python(written) == number


@pytest.mark.parametrize(
    ("units", "written"),
    [
        *((SECONDS, each) for each in ("5", "5 s", "-5s", "1us")),
        *((BYTES, each) for each in ("1GiB", True, None)),
    ],
)
def test_what_is_no_quantity(units: Mapping[str, float], written: object) -> None:
    with pytest.raises(ValidationError, match="not a quantity"):
        TypeAdapter(Annotated[float, quantity(units)]).validate_python(written)


def test_the_schema_of_a_quantity() -> None:
    kind: Any = Annotated[float, quantity(SECONDS), quantity_schema(SECONDS, {"type": "number", "minimum": 1})]
    number, text = TypeAdapter(kind).json_schema()["anyOf"]
    assert number == {"type": "number", "minimum": 1}
    assert [bool(re.search(text["pattern"], each)) for each in ("5m", "1.5s", "5", "m5", "5ms ")] == [
        *(True, True),
        *(False, False, False),
    ]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [(power_of_two, (1, 2, 4096), (3, 6, 4095)), (hundredths, (1.01, 1.25, 10), (1.255, 1.001))],
)
def test_what_a_number_must_be(
    check: Callable[[Any], Any], right: tuple[float, ...], wrong: tuple[float, ...]
) -> None:
    assert tuple(map(check, right)) == right
    for value in wrong:
        with pytest.raises(ValueError, match="not "):
            check(value)
