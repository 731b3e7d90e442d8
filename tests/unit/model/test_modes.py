"""The rows of modes and schedulers hold for the data path: it knows their names, and does what the rows say."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb import Datapath, Verdict
from fastlb.config import Service, Tunnel
from fastlb.model.modes import HASHES, IP_HEADER, MODES, ONE_WAY, SCHEDULERS, TUNNEL_OPTIONS, TUNNELS, TWO_WAY
from tests.balancers import BACKENDS, CLIENT, VIP, datapath, reply_to, service
from tests.frames import SYN, frame

ETHERNET = 14  # bytes
SOURCES = ["10.2.0.1", "fd00:2::1"]


def balancer(forward: str, version: int = 4, **changes: Any) -> Datapath:
    return datapath(service(forward, version, **changes), snat=SOURCES if MODES[forward].sends_from_snat else [])


def sent_by(path: Datapath, version: int = 4) -> tuple[bytes, bytes]:
    """A client's SYN, and the frame that goes to the backend."""
    syn = frame(CLIENT[version], 40000, VIP[version], 80, "tcp", flags=SYN)
    result = path.process(syn)
    assert result.verdict == Verdict.FORWARD
    [sent] = result.frames
    return syn, sent


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("forward", MODES)
def test_a_mode_adds_the_bytes_of_its_row(forward: str, version: int) -> None:
    syn, sent = sent_by(balancer(forward, version), version)
    assert len(sent) - len(syn) == MODES[forward].outer_bytes(version, None)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("forward", TUNNELS)
def test_a_tunnel_has_the_outer_protocol_of_its_row(forward: str, version: int) -> None:
    outer_protocols = MODES[forward].outer_protocols
    assert outer_protocols is not None
    for outer in (4, 6):
        backends = [{"address": BACKENDS[outer][0]}]
        _, sent = sent_by(balancer(forward, version, backends=backends), version)
        header = sent[ETHERNET : ETHERNET + IP_HEADER[outer]]
        assert header[0] >> 4 == outer
        assert header[9 if outer == 4 else 6] == outer_protocols[version]


def test_the_key_of_gre_takes_room() -> None:
    syn, sent = sent_by(balancer("gre", tunnel={"key": 7}))
    assert len(sent) - len(syn) == MODES["gre"].outer_bytes(4, 7) == MODES["gre"].outer_bytes(4, None) + 4


@pytest.mark.parametrize("forward", MODES)
def test_replies_come_back_where_the_row_says(forward: str) -> None:
    path = balancer(forward)
    _, sent = sent_by(path)
    if forward in TWO_WAY:
        assert path.process(reply_to(sent)).verdict == Verdict.FORWARD
    else:
        answer = frame(VIP[4], 80, CLIENT[4], 40000, "tcp", flags=SYN)
        assert path.process(answer).verdict == Verdict.PASS


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_data_path_knows_every_scheduler(name: str) -> None:
    path = balancer("nat", scheduler=name, check={"type": "tcp"})
    sent_by(path)
    assert path.trace(CLIENT[4], 40001, VIP[4], 80, "tcp").why == name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_hashes_place_a_flow_the_same_way_everywhere(name: str) -> None:
    """One balancer places other flows first; where a hash decides, that makes no difference."""
    first, second = (balancer("nat", scheduler=name) for _ in range(2))
    for port in range(1, 8):
        second.process(frame(CLIENT[4], port, VIP[4], 80, "tcp", flags=SYN))
    placed = [
        [path.process(frame(CLIENT[4], port, VIP[4], 80, "tcp", flags=SYN)).backend for port in range(50000, 50040)]
        for path in (first, second)
    ]
    assert (placed[0] == placed[1]) == (name in HASHES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_count_where_the_row_says(name: str) -> None:
    light, heavy = ({"address": BACKENDS[4][number], "weight": 1 + 8 * number} for number in range(2))
    path = balancer("dsr", scheduler=name, backends=[light, heavy], check={"type": "tcp"})
    placed = [
        path.process(frame(f"10.1.0.{1 + port % 200}", 40000 + port, VIP[4], 80, "tcp", flags=SYN)).backend
        for port in range(400)
    ]
    share = placed.count(f"{BACKENDS[4][1]}:80") / len(placed)
    assert share == pytest.approx(0.9 if SCHEDULERS[name].weighted else 0.5, abs=0.1)


def test_groups_of_modes() -> None:
    assert set(TWO_WAY) | set(ONE_WAY) == set(MODES)
    assert not set(TWO_WAY) & set(ONE_WAY)
    assert set(TUNNELS) <= set(ONE_WAY)


def test_options_of_tunnels_are_keys_of_a_tunnel() -> None:
    assert TUNNEL_OPTIONS.keys() == Tunnel.model_fields.keys()
    assert all(set(modes) <= set(TUNNELS) for modes in TUNNEL_OPTIONS.values())


def test_what_is_said_of_modes_and_schedulers() -> None:
    for key, rows in (("forward", MODES), ("scheduler", SCHEDULERS)):
        description = Service.model_fields[key].description or ""
        assert all(name in description and row.help in description for name, row in rows.items())
