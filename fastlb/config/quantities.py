"""Times and sizes: text with a unit ("5m", "256KiB"), or a plain number of seconds or bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import BeforeValidator, WithJsonSchema

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
FINE_SECONDS = {"us": 0.000001, "ms": 0.001}
BYTES = {"KiB": 1 << 10, "MiB": 1 << 20}
MAX_TIME = 7 * 24 * 3600  # seconds
MAX_AFFINITY_TIME = 24 * 3600  # seconds; the ends of slots are told apart over six days, affinity.pxd


def quantity(units: Mapping[str, float]) -> BeforeValidator:
    """Read "5m" or a plain number; the number is in the unit whose factor is 1."""
    pattern = re.compile(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})")

    def parse(value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if not isinstance(value, str) or not (parts := pattern.fullmatch(value)):
            raise ValueError("not a quantity")
        return round(float(parts[1]) * units[parts[2]], 9)  # "50us" is 50e-6, not the float beside it

    return BeforeValidator(parse)


def quantity_schema(units: Mapping[str, float], number: dict[str, object]) -> WithJsonSchema:
    """Return the JSON Schema of a quantity: a number that this schema describes, or text with a unit."""
    text = {"type": "string", "pattern": rf"^[0-9]+(\.[0-9]+)?({'|'.join(units)})$"}
    return WithJsonSchema({"anyOf": [number, text]})


def power_of_two(value: int) -> int:
    """Return the value if it is a power of two; ValueError for anything else."""
    if value & (value - 1):
        raise ValueError("not a power of two")
    return value


def hundredths(value: float) -> float:
    """Return the value if it has at most two decimal places; ValueError for anything else."""
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise ValueError("not in hundredths")
    return value
