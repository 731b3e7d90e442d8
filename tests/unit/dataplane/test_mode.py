"""mode.pxd: what tells the forwarding modes apart, in the data path as in model/modes.py."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from fastlb._core import explain_tuple
from fastlb.model.modes import MODES, TUNNELS, TWO_WAY
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, service
from tests.frames import frame

CASES = [(mode, version, None) for mode in MODES for version in (4, 6)] + [("gre", 4, 7), ("gre", 6, 7)]


def balancer_of(mode: str, version: int, key: int | None = None) -> Balancer:
    backends = [{"address": address} for address in BACKENDS[version]]
    extra: dict[str, Any] = {"tunnel": {"key": key}} if key is not None else {}
    snat = {"snat": ["10.3.0.1", "fd00:3::1"]} if mode == "fullnat" else {}
    return Balancer(config(service(mode, version, backends=backends, **extra), **snat))


@pytest.mark.parametrize(("mode", "version", "key"), CASES)
def test_headers_are_as_long_as_the_model_says(mode: str, version: int, key: int | None) -> None:
    balancer = balancer_of(mode, version, key)
    found = explain_tuple(
        balancer.pipeline, ip_address(CLIENT[version]), 1000, ip_address(VIP[version]), 80, 6, balancer.pipeline.now_ms
    )
    hop = found["hop"]
    assert hop is not None
    assert hop["outer"] == MODES[mode].outer_bytes(version, key)


@pytest.mark.parametrize("mode", MODES)
def test_only_modes_that_see_replies_wait_for_them(mode: str) -> None:
    """Where they do not, a client's second packet is all that can be seen of an established flow."""
    balancer = balancer_of(mode, 4)
    for letters in "SA":
        balancer.send(frame(CLIENT[4], 1000, VIP[4], 80, flags=flags(letters)), 1)
    assert [flow[6] for flow in balancer.flows()] == ["syn" if mode in TWO_WAY else "established"]


def test_tunnels_are_known_by_their_outer_headers() -> None:
    assert {mode for mode, version, key in CASES if MODES[mode].outer_bytes(version, key)} == set(TUNNELS)
