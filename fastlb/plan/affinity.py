"""What client-IP affinity needs to know of groups: their names as 64 bits, and the numbers of their places. Pure.

A place is a backend of one of the group's services. The affinity table remembers its number. To the other services of
the group it stands for its address, so that all of them follow it: each has its own backends there, or none.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastlb.config import Config, Service
from fastlb.config.quantities import MAX_AFFINITY_TIME
from fastlb.errors import FastlbError
from fastlb.model.net import Address

MAX_PLACE = (1 << 18) - 1
RESTS = MAX_AFFINITY_TIME + 60.0  # seconds that a number is not given again: by then no slot names its former place


class Place(NamedTuple):
    """A backend of a service, as its group knows it."""

    group: str
    address: Address
    service: str
    key: str  # of the backend within the service


class SameAddress(NamedTuple):
    """Another place at a backend's address: its number, and whether slots must go on naming it (``pinned``).

    They must when its service has several backends there, since only the slot tells which of them a client has.
    """

    number: int
    pinned: bool


@dataclass(frozen=True)
class Stickiness:
    """A service's affinity, as the data path knows it."""

    group: int  # 64 bits that the services of a group, and they alone, have in common
    prefix: int
    timeout: float  # seconds


def group_of(service: Service) -> str:
    """Return the name of a service's group; one without a group is its own. "" without affinity."""
    if service.affinity is None:
        return ""
    return f"group {service.affinity.group}" if service.affinity.group else f"service {service.name}"


def stickiness_of(service: Service) -> Stickiness | None:
    """Return how a service's clients stick to backends; None without affinity."""
    if service.affinity is None:
        return None
    told_apart = f"{group_of(service)}, IPv{service.network.version}/{service.client_prefix}"
    digest = hashlib.blake2b(told_apart.encode(), digest_size=8).digest()
    return Stickiness(int.from_bytes(digest, "little"), service.client_prefix, service.affinity.timeout)


@dataclass
class PlaceNumbers:
    """Stable numbers for places. One that is no longer used rests until no slot can name it any more."""

    by_place: dict[Place, int] = field(default_factory=dict)
    resting: dict[Place, tuple[float, int]] = field(default_factory=dict)  # since when, and the number
    highest: dict[str, int] = field(default_factory=dict)  # by group

    def copy(self) -> PlaceNumbers:
        """Return an independent copy, to try a configuration with."""
        return PlaceNumbers(dict(self.by_place), dict(self.resting), dict(self.highest))

    def assign(self, config: Config, now: float) -> Mapping[Place, int]:
        """Return the numbers of exactly the backends of this configuration; ``now`` in seconds.

        A backend that comes back finds its number, and its clients find it. Raises FastlbError when none is left.
        """
        wanted = {
            Place(group_of(service), backend.address, service.name, service.key(backend)): None
            for service in config.services
            if service.affinity is not None
            for backend in service.backends
        }
        for gone in self.by_place.keys() - wanted.keys():
            self.resting[gone] = now, self.by_place.pop(gone)
        self._forget_groups(now)
        for place in wanted:
            if place not in self.by_place:
                self.by_place[place] = self._take(place, now)
        return self.by_place

    def same_address(self) -> dict[Place, tuple[SameAddress, ...]]:
        """Return what else there is at the address of each place, those that rest included: slots may still name them.

        The backends that the place's own service has there are not: their clients are theirs.
        """
        there: defaultdict[tuple[str, Address], list[Place]] = defaultdict(list)
        for place in (*self.by_place, *self.resting):
            there[place.group, place.address].append(place)
        of_service = Counter((place.service, place.address) for place in self.by_place)
        return {
            place: tuple(
                self._same_address(other, of_service)
                for other in there[place.group, place.address]
                if other not in self.by_place or other.service != place.service
            )
            for place in self.by_place
        }

    def _same_address(self, place: Place, of_service: Counter[tuple[str, Address]]) -> SameAddress:
        if place in self.resting:
            return SameAddress(self.resting[place][1], pinned=False)
        return SameAddress(self.by_place[place], pinned=of_service[place.service, place.address] > 1)

    def _forget_groups(self, now: float) -> None:
        """Drop the groups whose last place has rested."""
        known = {place.group for place in self.by_place}
        known.update(place.group for place, (since, _) in self.resting.items() if now - since < RESTS)
        self.resting = {place: rests for place, rests in self.resting.items() if place.group in known}
        self.highest = {group: number for group, number in self.highest.items() if group in known}

    def _take(self, place: Place, now: float) -> int:
        if place in self.resting:
            return self.resting.pop(place)[1]
        group = place.group
        rested = (each for each, (since, _) in self.resting.items() if each.group == group and now - since >= RESTS)
        former = next(rested, None)
        if former is not None:
            return self.resting.pop(former)[1]
        if self.highest.get(group, 0) == MAX_PLACE:
            raise FastlbError(f"affinity, {group}: more than {MAX_PLACE} backends, those of the last day included")
        self.highest[group] = self.highest.get(group, 0) + 1
        return self.highest[group]
