"""Affinity's groups and how clients stick to them, and the numbers of a group's places."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from fastlb import Config
from fastlb.errors import FastlbError
from fastlb.plan.affinity import (
    MAX_PLACE,
    RESTS,
    Place,
    PlaceNumbers,
    SameAddress,
    Stickiness,
    group_of,
    stickiness_of,
)
from tests.balancers import BACKENDS, config, service

A, B, C = (IPv4Address(address) for address in BACKENDS[4])
STICKY = {"by": "client-ip", "timeout": "300s"}
GROUP = STICKY | {"group": "site"}

# ---- groups


def stickiness(version: int = 4, name: str = "web", **affinity: Any) -> Stickiness | None:
    [made] = config(service("dsr", version, name=name, affinity=STICKY | affinity)).services
    return stickiness_of(made)


def test_without_affinity_there_is_neither_a_group_nor_stickiness() -> None:
    [plain] = config(service("dsr")).services
    assert (group_of(plain), stickiness_of(plain)) == ("", None)


@pytest.mark.parametrize(("version", "prefix", "counted"), [(4, None, 32), (4, 24, 24), (6, None, 128), (6, 56, 56)])
def test_how_clients_stick(version: int, prefix: int | None, counted: int) -> None:
    found = stickiness(version, timeout="90s", **({"prefix": prefix} if prefix else {}))
    assert found is not None
    assert (found.prefix, found.timeout) == (counted, 90.0)
    assert 0 <= found.group < 1 << 64


# two services, and whether clients of one are clients of the other
ALIKE: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({"group": "site"}, {"group": "site", "name": "other"}, True),
    ({"group": "site"}, {"group": "site", "name": "other", "timeout": "20s"}, True),
    ({"group": "site"}, {"group": "shop"}, False),
    ({"group": "site"}, {"group": "site", "prefix": 24}, False),  # a client is another thing there
    ({"group": "site"}, {"group": "site", "version": 6}, False),
    ({}, {}, True),
    ({}, {"name": "other"}, False),
    ({"group": "web"}, {}, False),  # a group of the name of a service is not that service's own
]


@pytest.mark.parametrize(("one", "other", "alike"), ALIKE)
def test_whose_clients_are_the_same(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    first, second = stickiness(**one), stickiness(**other)
    assert first is not None
    assert second is not None
    assert (first.group == second.group) is alike


def test_a_group_s_number_is_the_same_in_every_process() -> None:
    """What `printf 'group site, IPv4/32' | b2sum -l 64` prints, its bytes as a little-endian number."""
    found = stickiness(group="site")
    assert found is not None
    assert found.group.to_bytes(8, "little").hex() == "5a4dde56c8dcedb6"


# ---- numbers of places


def site(**changes: Any) -> dict[str, Any]:
    return service("dsr") | changes


def at(*ports: int, address: IPv4Address = A) -> list[dict[str, Any]]:
    return [{"address": str(address), "port": port} for port in ports]


def of(*addresses: IPv4Address, affinity: dict[str, Any] = GROUP) -> Config:
    return config(site(name="web", affinity=affinity, backends=[{"address": str(each)} for each in addresses]))


def place(address: IPv4Address, port: int = 80, name: str = "web", group: str = "group site") -> Place:
    return Place(group, address, name, f"{address}:{port}")


def numbers(given: PlaceNumbers, settings: Config, now: float) -> dict[tuple[str, IPv4Address], int]:
    return {(each.service, each.address): number for each, number in given.assign(settings, now).items()}  # type: ignore[misc]


@pytest.mark.parametrize("steps", [
    [((A, B), 0, [1, 2]), ((A, B), 1, [1, 2]), ((B, A), 2, [2, 1])],
    [((A, B), 0, [1, 2]), ((B, C), 1, [2, 3]), ((B, A), 2, [2, 1])],  # one that comes back
    [((A, B), 0, [1, 2]), ((B,), 0, [2]), ((B, C), RESTS - 1, [2, 3])],
    [((A, B), 0, [1, 2]), ((B,), 0, [2]), ((B, C), RESTS, [2, 1])],
    [((A, B), 0, [1, 2]), ((), 0, []), ((C,), RESTS - 1, [3])],
    [((A, B), 0, [1, 2]), ((), 0, []), ((), RESTS, []), ((C,), RESTS, [1])],
])  # fmt: skip
def test_numbers_stay_and_rest(steps: list[tuple[tuple[IPv4Address, ...], float, list[int]]]) -> None:
    given = PlaceNumbers()
    for addresses, now, expected in steps:
        got = numbers(given, of(*addresses), now)
        assert [got["web", address] for address in addresses] == expected


def test_a_service_of_the_group_more_changes_no_number() -> None:
    given = PlaceNumbers()
    assert numbers(given, of(A, B), 0) == {("web", A): 1, ("web", B): 2}
    both = config(*(site(name=name, port=port, affinity=GROUP, backends=[{"address": str(each)} for each in listed])
                    for name, port, listed in (("other", 443, (C, B)), ("web", 80, (A, B)))))  # fmt: skip
    assert numbers(given, both, 1) == {("web", A): 1, ("web", B): 2, ("other", C): 3, ("other", B): 4}


def test_groups_count_by_themselves_and_are_forgotten() -> None:
    given = PlaceNumbers()
    other = site(name="other", port=443, affinity=STICKY, backends=[{"address": str(C)}, {"address": str(A)}])
    settings = config(*[site(name="web", affinity=GROUP), other])
    names = [group_of(each) for each in settings.services]
    assert names == ["group site", "service other"]
    assert given.assign(settings, 0) == {
        place(A): 1, place(B): 2, place(C): 3, place(C, 443, "other", names[1]): 1, place(A, 443, "other", names[1]): 2,
    }  # fmt: skip
    given.assign(config(), 1)
    given.assign(config(), 1 + RESTS)
    assert given == PlaceNumbers()


def test_what_is_near_a_place() -> None:
    """At its address, of other services of its group, or gone; held: where only the slot tells whose a client is."""
    given = PlaceNumbers()
    web = {"name": "web", "affinity": GROUP, "forward": "nat"}
    other = {"name": "other", "port": 443, "affinity": GROUP, "forward": "nat", "backends": at(90)}
    alone = {"name": "alone", "port": 1, "affinity": STICKY, "forward": "nat", "backends": at(80)}
    given.assign(config(*(site(**each) for each in (web | {"backends": at(80, 81)}, other, alone))), 0)
    assert given.same_address() == {
        place(A): (SameAddress(3, pinned=False),), place(A, 81): (SameAddress(3, pinned=False),),
        place(A, 90, "other"): (SameAddress(1, pinned=True), SameAddress(2, pinned=True)),
        place(A, 80, "alone", "service alone"): (),
    }  # fmt: skip
    given.assign(config(*(site(**each) for each in (web | {"backends": at(81) + at(81, address=B)}, other))), 1)
    assert given.same_address() == {
        place(A, 81): (SameAddress(3, pinned=False), SameAddress(1, pinned=False)), place(B, 81): (),
        place(A, 90, "other"): (SameAddress(2, pinned=False), SameAddress(1, pinned=False)),
    }  # fmt: skip


def test_a_copy_goes_its_own_way() -> None:
    given = PlaceNumbers()
    given.assign(of(A), 0)
    copy = given.copy()
    assert numbers(copy, of(A, B), 1)["web", B] == 2
    assert numbers(given, of(A, C), 1)["web", C] == 2


def test_no_number_is_left() -> None:
    given = PlaceNumbers(highest={"group site": MAX_PLACE - 1}, by_place={place(A): 1})
    assert numbers(given, of(A, B), 0) == {("web", A): 1, ("web", B): MAX_PLACE}
    with pytest.raises(FastlbError, match="affinity, group site: more than 262143 backends"):
        given.assign(of(A, B, C), 0)
