"""flow_records.py: heads, records and identities, as bytes and as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from fastlb.workers.flow_records import (
    HEAD_BYTES,
    MAGIC,
    Head,
    difference,
    lists_fit,
    pack_head,
    parse_head,
    seal,
    unseal,
)

END = 10_000  # of a table, where lists may begin
PLACES: list[tuple[list[tuple[int, int]], bool]] = [
    ([(0, 0), (END, 5000)], True),
    ([(END, 5000), (0, 0)], True),
    ([(END, 5000), (END + 5000, 5000)], True),
    ([(END + 5000, 5000), (END, 5000)], True),
    ([(END - 1, 5000), (0, 0)], False),  # in the table
    ([(0, 5000), (END, 5000)], False),  # over the head
    ([(END, 5001), (END + 5000, 5000)], False),  # one in the other
    ([(END, 5000), (END, 5000)], False),
    ([(END + 5000, 5001), (END, 5000)], False),  # beyond the end
    ([(END, 2**64 - END), (0, 0)], False),
    ([(END, 0), (END + 5000, 5000)], False),  # no room for anything
]


@pytest.mark.parametrize(("lists", "fit"), PLACES)
def test_where_lists_may_be(lists: list[tuple[int, int]], fit: bool) -> None:
    assert lists_fit(lists, END, END + 10_000) == fit


def test_a_head_says_what_was_packed() -> None:
    lists = ((4096, 100), (8192, 200))
    head = pack_head(7, lists)
    assert len(head) == HEAD_BYTES
    assert parse_head(head) == Head(7, lists)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is no flow file"),
        (pack_head(7, ((0, 0), (0, 0)))[:-1], "it is no flow file"),
        (b"another\n" + pack_head(7, ((0, 0), (0, 0)))[8:], "it is no flow file"),
        (MAGIC + b"\2\0\0\0" + pack_head(7, ((0, 0), (0, 0)))[12:], "it has version 2 of the format, not 3"),
        (pack_head(7, ((0, 0), (0, 0)))[:16] + b"\1" + pack_head(7, ((0, 0), (0, 0)))[17:], "its head is damaged"),
    ],
)
def test_why_a_head_is_refused(data: bytes, reason: str) -> None:
    assert parse_head(data) == reason


@pytest.fixture
def fd() -> Iterator[int]:
    opened = os.memfd_create("records")
    yield opened
    os.close(opened)


def test_a_record_is_whole_or_nothing(fd: int) -> None:
    data: dict[str, Any] = {"ids": [1, 2], "names": {"web": "10.0.0.1:80"}}
    record = seal(9, data)
    os.pwrite(fd, bytes(64) + record, 0)
    assert unseal(fd, 64, len(record)) == (9, data)
    assert unseal(fd, 63, len(record)) is None
    assert unseal(fd, 64 + len(record), len(record)) is None
    for at in range(len(record)):
        os.pwrite(fd, bytes([record[at] ^ 1]), 64 + at)
        assert unseal(fd, 64, len(record)) is None, at
        os.pwrite(fd, record[at : at + 1], 64 + at)
    for length in range(len(record)):
        os.truncate(fd, 64 + length)
        assert unseal(fd, 64, len(record)) is None, length


def test_a_record_that_claims_more_than_its_room(fd: int) -> None:
    record = seal(9, {"ids": list(range(100))})
    os.pwrite(fd, record, 0)
    assert unseal(fd, 0, 50) is None


def test_what_is_no_dict_is_no_record(fd: int) -> None:
    os.pwrite(fd, seal(1, [1, 2]), 0)  # type: ignore[arg-type]
    assert unseal(fd, 0, 1000) is None


IDENTITY = {"boot": "b", "flows": 4096, "snat": ["10.3.0.5"], "snat_ports": "1-2", "layout": {"states": []}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"fastlb": "0.1", "namespace": 5}, None),
        ({"boot": "c"}, "it is of another boot"),
        ({"flows": 1}, "it is of another configuration: flows: 1 -> 4096"),
        ({"snat": []}, "it is of another configuration: snat:  -> 10.3.0.5"),
        ({"snat_ports": "1-3"}, "it is of another configuration: snat_ports: 1-3 -> 1-2"),
        ({"layout": {}, "fastlb": "0.1"}, "fastlb 0.1 has laid its flow table out otherwise"),
        ({"boot": "c", "flows": 1}, "it is of another boot"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], reason: str | None) -> None:
    assert difference(IDENTITY | change, IDENTITY) == reason
