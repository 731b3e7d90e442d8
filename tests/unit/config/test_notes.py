"""notes.py: what is allowed, and mostly is not meant."""

from __future__ import annotations

import pytest

from fastlb.config.notes import config_notes
from tests.balancers import config, service

WEIGHTS = [([0, 0], True), ([0, 1], False), ([], False)]


@pytest.mark.parametrize(("weights", "told"), WEIGHTS)
def test_a_service_of_which_no_backend_takes_flows(weights: list[int], told: bool) -> None:
    backends = [{"address": f"10.3.0.{at}", "weight": weight} for at, weight in enumerate(weights, 11)]
    notes = list(config_notes(config(service("nat", name="web", backends=backends))))
    assert notes == (["service web: every backend has weight 0, so that no one takes new flows"] if told else [])
