"""What client-IP affinity needs to know of groups: their names as 64 bits, and a number for each backend address. Pure.

The affinity table remembers an address by its number, not a backend by its id, so that all services of a group follow
it: each has its own backend there, or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastlb.config import Config, Service
from fastlb.errors import FastlbError
from fastlb.fields import LONGEST_AFFINITY, Address

MAX_HOST = (1 << 18) - 1
RESTS = LONGEST_AFFINITY + 60.0  # seconds that a number is not given again: by then no slot names its former address

Host = tuple[str, Address]  # group, address


@dataclass(frozen=True)
class Stickiness:
    """A service's affinity, as the data path knows it."""

    group: int  # 64 bits that the services of a group, and they alone, have in common
    prefix: int
    timeout: float  # seconds


def group_of(service: Service) -> str:
    """The name of a service's group; one without a group is its own. "" without affinity."""
    if service.affinity is None:
        return ""
    return f"group {service.affinity.group}" if service.affinity.group else f"service {service.name}"


def stickiness_of(service: Service) -> Stickiness | None:
    """None without affinity."""
    if service.affinity is None:
        return None
    told_apart = f"{group_of(service)}, IPv{service.network.version}/{service.client_prefix}"
    digest = hashlib.blake2b(told_apart.encode(), digest_size=8).digest()
    return Stickiness(int.from_bytes(digest, "little"), service.client_prefix, service.affinity.timeout)


@dataclass
class HostNumbers:
    """Stable numbers for (group, address). One that is no longer used rests until no slot can name it any more."""

    by_host: dict[Host, int] = field(default_factory=dict)
    resting: dict[Host, tuple[float, int]] = field(default_factory=dict)  # since when, and the number
    highest: dict[str, int] = field(default_factory=dict)  # by group

    def copy(self) -> HostNumbers:
        """An independent copy, to try a configuration with."""
        return HostNumbers(dict(self.by_host), dict(self.resting), dict(self.highest))

    def assign(self, config: Config, now: float) -> Mapping[Host, int]:
        """The numbers of exactly the backends of this configuration; ``now`` in seconds.

        An address that comes back finds its number, and its clients find it. Raises FastlbError when none is left.
        """
        wanted = {
            (group_of(service), backend.address): None
            for service in config.services
            if service.affinity is not None
            for backend in service.backends
        }
        for gone in self.by_host.keys() - wanted.keys():
            self.resting[gone] = now, self.by_host.pop(gone)
        self._forget_groups(now)
        for host in wanted:
            if host not in self.by_host:
                self.by_host[host] = self._take(host, now)
        return self.by_host

    def _forget_groups(self, now: float) -> None:
        """Those whose last address has rested."""
        known = {group for group, _ in self.by_host}
        known.update(group for (group, _), (since, _) in self.resting.items() if now - since < RESTS)
        self.resting = {host: rests for host, rests in self.resting.items() if host[0] in known}
        self.highest = {group: number for group, number in self.highest.items() if group in known}

    def _take(self, host: Host, now: float) -> int:
        if host in self.resting:
            return self.resting.pop(host)[1]
        group = host[0]
        rested = (each for each, (since, _) in self.resting.items() if each[0] == group and now - since >= RESTS)
        former = next(rested, None)
        if former is not None:
            return self.resting.pop(former)[1]
        if self.highest.get(group, 0) == MAX_HOST:
            raise FastlbError(f"affinity, {group}: more than {MAX_HOST} backends, those of the last day included")
        self.highest[group] = self.highest.get(group, 0) + 1
        return self.highest[group]
