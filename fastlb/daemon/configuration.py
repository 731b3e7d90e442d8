"""A configuration, and all that follows from it and from the states of its backends. A reload makes another one."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fastlb._core import Services
from fastlb.config.load import Config, load_config
from fastlb.daemon.memory import check_plans
from fastlb.model.match import Keys
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.keys import classifier_keys
from fastlb.plan.plan import Plan, plan_services, unchanged_plans, update_plan
from fastlb.plan.tables import services_table

Changed = Mapping[str, Collection[str] | None]
"""Names, by service, the keys of the backends whose states have changed; None: perhaps all of them."""


@dataclass(frozen=True)
class Configuration:
    """A configuration with its plans and the table of the data path; replaced as a whole by the next one."""

    config: Config
    ids: BackendIds
    plans: tuple[Plan, ...]
    services: Services
    keys: Keys  # what the filter and the guard take of it

    @classmethod
    def load(cls, path: str, ids: BackendIds, states: BackendStates) -> Configuration:
        """Read a file, let ``states`` go over to it, and plan it.

        Raises ConfigError, and KernelError when there is no memory for it.
        """
        config, now = load_config(path), time.monotonic()
        check_plans(config)
        states.apply_config(config, now)
        return cls.of(config, ids, states, now)

    @classmethod
    def of(
        cls,
        config: Config,
        ids: BackendIds,
        states: BackendStates,
        now: float | None = None,
        before: Configuration | None = None,
        differing: Collection[str] = (),
    ) -> Configuration:
        """Plan a configuration. ``ids`` are those of the one before, and are not changed.

        ``before``: plans of its services that stay as they were are taken from there, but not of those in
        ``differing``. ``now`` in seconds of the monotonic clock, the present one if not given. Raises FastlbError.
        """
        ids = ids.copy()
        known = unchanged_plans(before.config, config, before.plans, differing) if before is not None else {}
        plans = tuple(plan_services(config, ids, time.monotonic() if now is None else now, states, known))
        return cls(config, ids, plans, services_table(config, plans), classifier_keys(plans, config.icmp_echo))

    def updated(self, states: BackendStates, changed: Changed, now: float) -> Configuration:
        """Return the configuration with the plans of services whose backends' states have changed.

        Nothing is done for other services. ``changed`` may name services that it does not have.
        """
        plans, changes = list(self.plans), []
        for name in changed.keys() & self.positions.keys():
            at = self.positions[name]
            plans[at], differing = update_plan(self.config, plans[at], states, now, changed[name])
            if differing:
                changes.append((at, plans[at], differing))
        if not changes:
            return self
        return replace(self, plans=tuple(plans), services=self.services.with_changes(changes))

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where each service is among the plans, by name."""
        return {plan.name: at for at, plan in enumerate(self.plans)}

    def summary(self) -> dict[str, int]:
        """Return how much it is, for the log and for who asked for a reload."""
        backends = sum(len(service.backends) for service in self.config.services)
        return {"services": len(self.config.services), "backends": backends}
