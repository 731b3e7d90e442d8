"""Where files are, by what a configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlb.model.files import flow_file_places, set_aside

DIGEST = "81e49d06eac0"


@pytest.mark.parametrize(
    ("flow_file", "places"),
    [
        ("none", []),
        ("/run/flows", ["/run/flows"]),
        ("auto", ["/run/lb/one.sock.flows", f"/memory/fastlb-one-{DIGEST}.flows"]),
    ],
)
def test_places_of_the_flow_table(flow_file: str, places: list[str]) -> None:
    assert list(map(str, flow_file_places(flow_file, "/run/lb/one.sock", Path("/memory")))) == places


def test_two_fastlbs_have_places_of_their_own() -> None:
    assert not set(flow_file_places("auto", "/run/one/lb.sock")) & set(flow_file_places("auto", "/run/two/lb.sock"))


def test_the_name_of_a_file_that_is_set_aside() -> None:
    assert set_aside(Path("/run/lb.sock.flows")) == Path("/run/lb.sock.flows.rejected")
