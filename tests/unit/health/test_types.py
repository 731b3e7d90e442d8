"""The table of conversations has a row for every type of check that may be configured."""

from __future__ import annotations

from fastlb.health.types import CONVERSATIONS
from fastlb.model.checks import CHECKS


def test_every_type_of_the_configuration_has_its_row() -> None:
    assert list(CONVERSATIONS) == list(CHECKS)
