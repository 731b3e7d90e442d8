"""What pydantic finds, in words."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config.faults import dotted
from tests.unit.config.written import messages_of, service


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (
            {"intefaces": ["eth0"]},
            "intefaces",
            'there is no such key; did you mean "interfaces"?',
        ),
        ({"hash-seed": 1}, "hash-seed", 'there is no such key; did you mean "hash_seed"?'),
        (
            {"ring": {"colour": 1}},
            "ring.colour",
            "there is no such key; use one of: block_size, blocks, timeout, open_blocks, spin",
        ),
        (
            {"services": [service(backends=[{"address": "10.0.0.1", "weigth": 2}])]},
            "services[0].backends[0].weigth",
            'there is no such key; did you mean "weight"?',
        ),
        (
            {"services": [service(shceduler="maglev")]},
            "services[0].shceduler",
            'there is no such key; did you mean "scheduler"?',
        ),
        ({1: 2}, "[1]", "a key must be text; write it in quotes"),
    ],
)
def test_unknown_keys(data: dict[str, Any], path: str, message: str) -> None:
    assert messages_of(data) == [(path, message)]


def test_a_message_is_one_line_whatever_the_value() -> None:
    assert messages_of({"vip_address": "a\nb\ud800" + "c" * 100}) == [
        ("vip_address", 'found "a\\nb\\ud800' + "c" * 56 + '…"; use one of: none, interface')
    ]


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"check": "tcp"}, "check", 'write {type: "tcp"}'),
        ({"check": "icmp"}, "check", "rise, fall"),
        ({"backends": ["10.0.0.1"]}, "backends[0]", 'write {address: "10.0.0.1"}'),
        ({"slow_start": "30s"}, "slow_start", 'write {window: "30s"}'),
        ({"backends": {"address": "10.0.0.1"}}, "backends", 'write "- " in front of the first key of each item'),
        ({"backends": {}}, "backends", "it must be a list ([] when there are none)"),
        ({"allow": "10.0.0.0/8"}, "allow", 'it must be a list: write ["10.0.0.0/8"]'),
        ({"backends": [{"address": "10.0.0.1", "ip": "x"}]}, "backends[0].ip", 'did you mean "address"?'),
        ({"ip": "203.0.113.10"}, "ip", 'did you mean "vip"?'),
        ({"healthcheck": {"type": "tcp"}}, "healthcheck", 'did you mean "check"?'),
        (
            {"weight": 3},
            "weight",
            "there is no such key here, only in services[].backends[]; check the indentation",
        ),
        (
            {"workers": 2},
            "workers",
            "there is no such key here, only in the top level; check the indentation",
        ),
        (
            {"tunnel": {"forward": "gre"}},
            "tunnel.forward",
            "there is no such key here, only in services[]; check the indentation",
        ),
    ],
)
def test_what_newcomers_write(data: dict[str, Any], path: str, message: str) -> None:
    [(found, text)] = messages_of({"services": [service(**data)]})
    assert found == f"services[0].{path}"
    assert text.endswith(message)


@pytest.mark.parametrize(
    ("loc", "text"),
    [((), ""), (("services", 0, "port"), "services[0].port"), ((1,), "[1]"), (("a", 1, 2, "b"), "a[1][2].b")],
)
def test_key_paths(loc: tuple[int | str, ...], text: str) -> None:
    assert dotted(loc) == text
