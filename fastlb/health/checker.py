"""Checks backends again and again, within the event loop and beside the packets' path.

    Checker(report, on_trouble)
    apply_config(config, changed)    services ─► targets, each of which is one `Probe` however many services use it
    report([CheckResult, ...])       called every BATCH seconds at most, with a result for each backend of each service
    on_trouble(error, count)         called every TROUBLE_EVERY seconds at most: this host could not ask, count times
    close()

What a result means for a backend's state (rise, fall) is decided by whoever gets the report, service by service.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Collection, Iterator, Mapping

from fastlb.config import Config, Service
from fastlb.health.probe import Probe
from fastlb.health.results import OnTrouble, Report, Results, Troubles
from fastlb.health.runner import Runner
from fastlb.health.target import Target, targets_of
from fastlb.model.names import BackendName


class Checker:
    """Runs the checks of a configuration, within the running event loop, and reports their results."""

    def __init__(self, report: Report, on_trouble: OnTrouble) -> None:
        self._results, self._troubles = Results(report), Troubles(on_trouble)
        self._services: Mapping[str, Service] = {}
        self._targets: dict[str, dict[BackendName, Target]] = {}  # of services with a check
        self._probes: dict[Target, Probe] = {}
        self._runner: Runner | None = None

    def apply_config(self, config: Config, changed: Collection[str] | None = None) -> None:
        """Check exactly what a configuration asks for; what was checked the same way before goes on undisturbed.

        ``changed``: the names of all services that are new, gone or different since the last call, where the caller
        knows them; no other service is looked at then. Called within the event loop.
        """
        if self._runner is None:
            self._runner = Runner(asyncio.get_running_loop(), self._results.add, self._troubles.add, max_running())
        services = {service.name: service for service in config.services}
        touched: dict[Target, Probe] = {}
        for name in differing(self._services, services) if changed is None else changed:
            touched.update(self._apply_service(name, services.get(name), self._runner))
        self._services = services
        for probe in touched.values():
            self._settle(probe, self._runner)

    def close(self) -> None:
        """End all checks; nothing is reported any more."""
        for probe in self._probes.values():
            probe.members.clear()
        if self._runner is not None:
            self._runner.close()
        self._runner, self._services, self._targets, self._probes = None, {}, {}, {}

    def _apply_service(self, name: str, service: Service | None, runner: Runner) -> dict[Target, Probe]:
        """Make a service's backends members of their targets' probes, and no others; return the probes it changed."""
        before, after = self._targets.pop(name, {}), {}
        touched = {}
        if service is not None and service.check is not None:
            after = self._targets[name] = dict(targets_of(service))
            touched = dict(self._join(after, service.check.interval, runner))
        for backend, target in before.items():
            if after.get(backend) != target:
                del self._probes[target].members[backend]
                touched[target] = self._probes[target]
        return touched

    def _join(
        self, wanted: Mapping[BackendName, Target], interval: float, runner: Runner
    ) -> Iterator[tuple[Target, Probe]]:
        """Have backends hear of their targets at this interval; yield the probes for which that is news."""
        for backend, target in wanted.items():
            probe = self._probes.get(target)
            if probe is None:
                probe = self._probes[target] = Probe(target)
            known, probe.members[backend] = probe.members.get(backend), interval
            if known is None:
                runner.add(probe)
            if known != interval:
                yield target, probe

    def _settle(self, probe: Probe, runner: Runner) -> None:
        """Give a probe the interval that its members ask for now, or end it when there are none."""
        if probe.members:
            probe.interval = min(probe.members.values())
            runner.hasten(probe)
        else:
            del self._probes[probe.target]
            runner.remove(probe)


def differing(before: Mapping[str, Service], after: Mapping[str, Service]) -> list[str]:
    """Return the names of the services that are new, gone, or checked otherwise."""
    gone = [name for name in before if name not in after]
    return gone + [name for name, service in after.items() if not is_checked_alike(before.get(name), service)]


def is_checked_alike(before: Service | None, after: Service) -> bool:
    """True if two services of one name have the same check, of the same backends."""
    if before is None or before is after:
        return before is after
    return (before.check, before.port) == (after.check, after.port) and before.backends == after.backends


def max_running() -> int:
    """Return how many checks may run at once: a quarter of the file descriptors is for other things."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft * 3 // 4)
