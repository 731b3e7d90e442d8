"""A configuration, and everything that follows from it and from how its backends stand. A reload makes another one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastlb._core import Services
from fastlb.config import Config, load_config
from fastlb.model.match import Keys
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.keys import classifier_keys
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.tables import services_table


@dataclass(frozen=True)
class Generation:
    """Replaced as a whole by the next one."""

    config: Config
    ids: BackendIds
    plans: list[Plan]
    services: Services

    @classmethod
    def load(cls, path: str, ids: BackendIds, standings: BackendStates) -> Generation:
        """Read the file, and let ``standings`` follow it; ``ids`` are those of the generation before and are not
        changed. Raises ConfigError."""
        config, now = load_config(path), time.monotonic()
        standings.apply_config(config, now)
        return cls.of(config, ids, standings, now)

    @classmethod
    def of(cls, config: Config, ids: BackendIds, standings: BackendStates, now: float) -> Generation:
        """The same of a configuration that has been read, as its backends stand."""
        ids = ids.copy()
        plans = plan_services(config, ids, now, standings)
        return cls(config, ids, plans, services_table(config, plans))

    def classifier_keys(self) -> Keys:
        """What the filter and the guard take of it."""
        return classifier_keys(self.plans, self.config.icmp_echo)

    def summary(self) -> dict[str, int]:
        """How much it is, for the log and for who asked for a reload."""
        backends = sum(len(service.backends) for service in self.config.services)
        return {"services": len(self.config.services), "backends": backends}
