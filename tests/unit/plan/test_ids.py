"""Numbers of backends, of services' counters and of places in affinity groups: kept, at rest, given again."""

from __future__ import annotations

import json

import pytest

from fastlb.config import Config
from fastlb.errors import FastlbError
from fastlb.plan.ids import ID_QUARANTINE, MAX_BACKEND_ID, MAX_SERVICE_SLOT, BackendIds, ServiceSlots
from tests.balancers import config, service

A, B, C, D = (("web", f"10.3.0.{n}:80") for n in (1, 2, 3, 4))

# Calls in their order: (wanted, seconds, the numbers they get)
ASSIGNED = {
    "counted from 1": [([A, B], 0, [1, 2])],
    "kept": [([A, B], 0, [1, 2]), ([B, A], 1, [2, 1])],
    "one added": [([A, B], 0, [1, 2]), ([A, C, B], 1, [1, 3, 2])],
    "a free number rests": [([A, B], 0, [1, 2]), ([A], 1, [1]), ([A, C], 60.9, [1, 3])],
    "and is used again": [([A, B], 0, [1, 2]), ([A], 1, [1]), ([A, C], 61, [1, 2])],
    "at the very moment of its leaving too": [([A], 0, [1]), ([B], 100, [2])],
    "oldest first": [([A, B, C], 0, [1, 2, 3]), ([A, C], 1, [1, 3]), ([A], 2, [1]), ([A, D], 62, [1, 2])],
    "only those that rested": [
        ([A, B, C], 0, [1, 2, 3]),
        ([A, C], 1, [1, 3]),
        ([A], 50, [1]),
        ([A, B, D], 62, [1, 2, 4]),
    ],
    "one that comes back is new": [([A], 0, [1]), ([], 1, []), ([A], 2, [2])],
    "by service": [([A, ("api", A[1])], 0, [1, 2])],
}


@pytest.mark.parametrize("calls", ASSIGNED.values(), ids=ASSIGNED.keys())
def test_backend_numbers(calls: list[tuple[list[tuple[str, str]], float, list[int]]]) -> None:
    ids = BackendIds()
    for wanted, now, expected in calls:
        numbers = ids.assign(wanted, now)
        assert [numbers[backend] for backend in wanted] == expected
        assert set(numbers) == set(wanted)


def test_numbers_rest_longer_than_a_sweep() -> None:
    assert ID_QUARANTINE > 2 * 10


def test_numbers_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackendIds, "MAX", 2)
    ids = BackendIds()
    before = dict(ids.assign([A, B], 0))
    with pytest.raises(FastlbError, match="more than 2 backends, those that left within a minute included"):
        ids.copy().assign([B, C], 1)
    assert ids.assign([A, B], 2) == before  # tried with a copy, it changed nothing


def test_a_copy_goes_its_own_way() -> None:
    ids = BackendIds()
    ids.assign([A, B], 0)
    ids.assign([A], 1)
    copy = ids.copy()
    assert copy.assign([A, C], 70)[C] == 2
    assert ids.assign([A, D], 70)[D] == 2
    assert B not in ids.assign([A], 71)


def test_only_what_something_new_has_got_was_reused() -> None:
    """Since the last time; a number that rested and is given again is named once."""
    ids = BackendIds()
    seen = []
    for wanted, now in (([A, B], 0.0), ([A], 1.0), ([A, C], 61.0), ([A, C, D], 62.0)):
        ids.assign(wanted, now)
        seen.append(set(ids.reused))
    assert seen == [set(), set(), {2}, set()]
    ids.assign([A], 100.0)
    ids.assign([A, B], 200.0)
    assert (ids.reused, ids.copy().reused) == ({2}, set())


def test_services_have_numbers_of_their_own() -> None:
    slots = ServiceSlots()
    assert slots.assign(["web", "dns"], 0.0) == {"web": 1, "dns": 2}
    assert slots.assign(["dns", "api"], 59.0) == {"dns": 2, "api": 3}
    assert slots.assign(["dns", "api", "mail"], 59.0 + ID_QUARANTINE) == {"dns": 2, "api": 3, "mail": 1}
    assert slots.reused == {1}


def test_services_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceSlots, "MAX", 1)
    with pytest.raises(FastlbError, match="more than 1 services, those that left within a minute included"):
        ServiceSlots().assign(["web", "dns"], 0.0)


def test_as_many_as_the_data_path_has_room_for() -> None:
    assert (BackendIds.MAX, ServiceSlots.MAX) == (MAX_BACKEND_ID, MAX_SERVICE_SLOT) == ((1 << 20) - 1, (1 << 16) - 1)


# --- over the end of a process ----------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_restored() -> None:
    """Through JSON; what rests begins to do so anew, for its time is another clock's."""
    ids = BackendIds()
    ids.assign([A, B, C], 0.0)
    ids.assign([C, A], 10.0)
    again = BackendIds.restored(json.loads(json.dumps(ids.saved())), 1000.0)
    assert again.assign([A, C, D], 1000.0 + ID_QUARANTINE - 1) == {A: 1, C: 3, D: 4}
    assert again.assign([A, C, D, B], 1000.0 + ID_QUARANTINE) == {A: 1, C: 3, D: 4, B: 2}
    assert BackendIds.restored(BackendIds().saved(), 5.0) == BackendIds()


# --- all numbers of a configuration -----------------------------------------------------------------------------------


def two_services(*names: str, affinity: bool = True) -> Config:
    sticky = {"by": "client-ip", "timeout": 60} if affinity else None
    backends = [{"address": "10.3.0.1"}, {"address": "10.3.0.2"}]
    return config(*(
        service("nat", name=name, port=port, affinity=sticky, backends=backends) for port, name in enumerate(names, 80)
    ))  # fmt: skip


def test_a_configuration_s_numbers() -> None:
    ids = BackendIds()
    numbers = ids.number(two_services("web", "dns"), [], 0.0)
    web, dns = [("web", f"10.3.0.{host}:80") for host in (1, 2)], [("dns", f"10.3.0.{host}:81") for host in (1, 2)]
    assert numbers.ids == dict(zip([*web, *dns], (1, 2, 3, 4), strict=True))
    assert numbers.slots == {"web": 1, "dns": 2}
    assert {(place.service, place.key): number for place, number in numbers.places.items()} == {
        web[0]: 1, web[1]: 2, dns[0]: 1, dns[1]: 2}  # fmt: skip
    assert set(numbers.same_address) == set(numbers.places)
    assert not ids.number(two_services("web", affinity=False), [], 1.0).places


def test_a_removed_backend_keeps_its_number_as_long_as_it_is_named() -> None:
    ids = BackendIds()
    before = dict(ids.number(two_services("web", "dns"), [], 0.0).ids)
    gone = ("dns", "10.3.0.2:81")
    assert ids.number(two_services("web"), [gone], 1000.0).ids == {name: before[name] for name in (A, B, gone)}
    after = ids.number(two_services("web", "api"), [gone], 1000.0 + ID_QUARANTINE)
    assert after.ids["api", "10.3.0.1:81"] == before["dns", "10.3.0.1:81"]
    assert after.ids[gone] == before[gone]
    assert gone not in ids.number(two_services("web", "api"), [], 1000.0 + ID_QUARANTINE).ids


def test_a_copy_s_services_and_places_are_its_own() -> None:
    """A reload that is refused after it was tried leaves all three kinds of numbers as they were."""
    ids = BackendIds()
    ids.number(two_services("web"), [], 0.0)
    ids.copy().number(two_services("api", "dns"), [], 1.0)
    assert ids.services.by_name == {"web": 1}
    assert {place.service for place in ids.places.by_place} == {"web"}
    assert ids == BackendIds(ids.by_name, [], 2, set(), ids.services, ids.places)
