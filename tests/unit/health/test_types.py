"""The table of check types is what the configuration lets one write."""

from __future__ import annotations

from fastlb.config import Check
from fastlb.health.types import CHECK_TYPES


def test_every_type_of_the_configuration_has_its_row() -> None:
    assert list(CHECK_TYPES) == Check.model_json_schema()["properties"]["type"]["enum"]
