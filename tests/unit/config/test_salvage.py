"""Rules are checked on what is right in a file with faults."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from fastlb.config import Service
from fastlb.config.salvage import salvage_services, salvage_snat
from fastlb.config.yaml import Loc
from tests.unit.config.written import problems_in, service


def test_everything_at_once(tmp_path: Path) -> None:
    """Faults of YAML, of fields and between fields, in one file, in the order of its lines."""
    text = """\
interfaces: [eth0]
workers: -1
workers: 2
servcies: []
services:
  - name: one
    vip: 203.0.113.10
    port: 0123
    protocol: sctp
    forward: dsr
    backends:
      - {address: 10.0.0.1, port: 8080, weight: heavy}
      - {address: fd00::1}
  - name: one
    vip: 203.0.113.10
    protocol: tcp
    forward: fullnat
    backends:
      - {address: 203.0.113.10}
"""
    assert [(line, path) for line, path, _ in problems_in(text, tmp_path)] == [
        (3, "workers"),
        (4, "servcies"),
        (8, "services[0].port"),
        (9, "services[0].protocol"),
        (12, "services[0].backends[0].weight"),
        (12, "services[0].backends[0].port"),
        (13, "services[0].backends[1].address"),
        (14, "services[1].port"),
        (14, "services[1].name"),
        (17, "services[1].forward"),
        (19, "services[1].backends[0].address"),
    ]


def salvaged(faulty: set[Loc], **changes: Any) -> Service:
    [found] = salvage_services({"services": [service(**changes)]}, faulty)
    return found


def test_what_is_valid_is_parsed_and_what_is_not_is_none() -> None:
    backends = [{"address": "10.0.0.1", "weight": "heavy"}, "10.0.0.2"]
    found = salvaged({("services", 0, "port"), ("services", 0, "backends", 0, "weight")}, port=0, backends=backends)
    assert (found.name, found.vip, found.port, found.scheduler) == ("web", IPv4Address("203.0.113.10"), None, "maglev")
    assert [(each.address, each.port, each.weight) for each in found.backends] == [
        (IPv4Address("10.0.0.1"), None, None),
        (None, None, 1),
    ]


def test_a_check_that_is_faulty_is_still_a_check() -> None:
    at = ("services", 0, "check")
    assert salvaged({at}, check=5).check == salvaged({at}, check={}).check
    assert salvaged({(*at, "type")}, check={"type": "icmp", "rise": 7}).check.rise == 7  # type: ignore[union-attr]
    assert salvaged(set()).check is None


def test_mappings_whose_rules_wait() -> None:
    assert salvaged(set(), affinity={"prefix": 24}, deny=["10.0.0.0/8"]).affinity is None
    assert salvaged(set(), affinity={"prefix": 24}, deny=["10.0.0.0/8"]).deny is None


@pytest.mark.parametrize(
    ("data", "faulty", "sources"),
    [
        ({"snat": ["10.0.0.5"]}, set(), (IPv4Address("10.0.0.5"),)),
        ({}, set(), ()),
        ({"snat": ["10.0.0.5", "x"]}, {("snat", 1)}, None),
        ([], set(), None),
    ],
)
def test_source_addresses(data: object, faulty: set[Loc], sources: object) -> None:
    assert salvage_snat(data, faulty) == sources


@pytest.mark.parametrize("data", [None, [], {"services": {}}, {"services": None}, {}])
def test_data_without_services(data: object) -> None:
    assert salvage_services(data, set()) == ()
