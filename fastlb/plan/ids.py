"""Numbers that names keep as long as they are in use: of backends in flow entries, of services in counters. Pure.

A number that is no longer used rests before another name gets it, so that nothing is left of what it stood for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from fastlb.config import Config
from fastlb.errors import FastlbError
from fastlb.model.names import MAX_BACKEND_ID, MAX_SERVICE_SLOT, BackendName
from fastlb.plan.affinity import Place, PlaceNumbers, SameAddress

if TYPE_CHECKING:
    from typing_extensions import Self

NamedT = TypeVar("NamedT")

ID_QUARANTINE = 60.0  # seconds; the sweep forgets the flows of a backend that left within ten


@dataclass
class StableNumbers(Generic[NamedT]):
    """Gives numbers from 1 on to names, which keep them as long as they are in use.

    A number that is no longer used rests for ID_QUARANTINE seconds. ``reused`` collects those that something new has
    got since the last `assign`, for `Pipeline.renew`.
    """

    MAX: ClassVar[int]  # the highest number that there is
    OF: ClassVar[str]  # what they are numbers of

    by_name: dict[NamedT, int] = field(default_factory=dict)
    resting: list[tuple[float, int]] = field(default_factory=list)  # (when it was freed, number), oldest first
    highest: int = 0
    reused: set[int] = field(default_factory=set)

    def copy(self) -> Self:
        """Return an independent copy, to try a configuration with."""
        return replace(self, by_name=dict(self.by_name), resting=list(self.resting), reused=set())

    def assign(self, wanted: Iterable[NamedT], now: float) -> dict[NamedT, int]:
        """Return the numbers of exactly these names; ``now`` in seconds. Raises FastlbError when none is left."""
        self.reused = set()
        wanted = list(wanted)
        keep = set(wanted)
        for gone in [name for name in self.by_name if name not in keep]:
            self.resting.append((now, self.by_name.pop(gone)))
        for name in wanted:
            if name not in self.by_name:
                self.by_name[name] = self._take(now)
        return self.by_name

    def _take(self, now: float) -> int:
        if self.resting and now - self.resting[0][0] >= ID_QUARANTINE:
            number = self.resting.pop(0)[1]
            self.reused.add(number)
            return number
        if self.highest == self.MAX:
            raise FastlbError(f"more than {self.MAX} {self.OF}, those that left within a minute included")
        self.highest += 1
        return self.highest


class ServiceSlots(StableNumbers[str]):
    """Numbers of services by name, for what is counted by service."""

    MAX, OF = MAX_SERVICE_SLOT, "services"


@dataclass
class BackendIds(StableNumbers[BackendName]):
    """Numbers of backends by (service name, backend key), which flow entries carry; and those of their services."""

    MAX, OF = MAX_BACKEND_ID, "backends"

    services: ServiceSlots = field(default_factory=ServiceSlots)
    places: PlaceNumbers = field(default_factory=PlaceNumbers)  # of affinity, which has other numbers

    def saved(self) -> dict[str, Any]:
        """Return what flow entries need of it, for JSON."""
        named = [[service, key, number] for (service, key), number in self.by_name.items()]
        return {"highest": self.highest, "named": named, "resting": [number for _, number in self.resting]}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], now: float) -> BackendIds:
        """Return what ``saved`` gave, perhaps in another process; what rests begins to do so ``now``."""
        named = {(service, key): number for service, key, number in saved["named"]}
        return cls(named, [(now, number) for number in saved["resting"]], saved["highest"])

    def copy(self) -> Self:
        """Return an independent copy, to try a configuration with."""
        return replace(super().copy(), services=self.services.copy(), places=self.places.copy())

    def number(self, config: Config, removed: Iterable[BackendName], now: float) -> Numbers:
        """Give numbers to all that the configuration has, and to backends that it gave up and whose flows are not over.

        ``now`` in seconds. Raises FastlbError when there are not enough.
        """
        configured = (
            (service.name, service.key(backend)) for service in config.services for backend in service.backends
        )
        return Numbers(
            self.assign((*configured, *removed), now),
            self.places.assign(config, now),
            self.places.same_address(),
            self.services.assign((service.name for service in config.services), now),
        )


class Numbers(NamedTuple):
    """What flow entries and the affinity table call a backend, and counters a service."""

    ids: Mapping[BackendName, int]
    places: Mapping[Place, int]  # of affinity
    same_address: Mapping[Place, tuple[SameAddress, ...]]
    slots: Mapping[str, int]  # of a service's counters, by its name
