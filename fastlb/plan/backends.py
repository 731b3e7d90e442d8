"""How each backend stands beside what the configuration says: its health, the operator's word, its slow start. Pure.

    state       new flows       flows that it has       why
    unchecked   by weight       stay                    its service has no check
    unknown     while no other  stay                    not checked yet
                is up
    up          by weight       stay
    down        none            on_down                 checks fail
    draining    none            stay                    `fastlb drain`
    drained     none            on_leave                and its deadline is over
    removed     none            on_leave                the configuration has it no more
    weight 0    none            stay                    the configuration, or `fastlb weight`

docs/backends.md has this table in full. A backend that was removed is known on only where its flows need it.

Slow start: a backend that is new in a service that runs, or comes up again, or is enabled again, or had no weight, gets
weight · max(floor, (t / window)^(1 / aggression)), t seconds later; of a new one that is checked, after its first check
has passed. Where none is through it, the one that is furthest counts as full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from fastlb.config.fields import MAX_BACKENDS
from fastlb.config.schema import Backend, Config, Service, SlowStart
from fastlb.errors import FastlbError
from fastlb.model.names import BackendName

SCALE = 100  # of weights, while a backend of the service is in slow start
STEPS = 20  # of a slow start: so often its tables are built anew
KEEP = 0.7  # of the response time, when a check brings a shorter one
SAVED = ("state", "draining", "deadline", "weight", "slow_since", "left")  # of a standing, for the next process
KEPT_BY = ("vip", "port", "protocol", "forward")  # a service that changes one of these has none of its flows any more


@dataclass
class Standing:
    """Of one backend in one service."""

    state: str = "unchecked"
    response: float = 0.0  # seconds that checks take: peak-EWMA; 0: unknown
    reason: str = ""  # why the last check failed
    draining: bool = False
    deadline: float | None = None  # of draining, on the clock of ``now``
    weight: int | None = None  # the operator's; None: the configuration's
    streak: int = 0  # checks in a row that speak against the state
    slow_since: float | None = None  # when its slow start began
    left: float | None = None  # when the configuration gave it up, or when it was last seen to have flows since

    def works(self, unknown: bool = False) -> bool:
        """As far as checks can tell; ``unknown``: those that have not ended count as passed."""
        return self.state in ("up", "unchecked") or (unknown and self.state == "unknown")

    def saved(self) -> dict[str, Any]:
        """What differs from the first that it would have, for JSON."""
        return {name: getattr(self, name) for name in SAVED if getattr(self, name) != getattr(_FIRST, name)}

    def takes_flows(self, configured: int) -> bool:
        """Whether it could, with the weight that the configuration gives it."""
        return self.works() and not self.draining and self.chosen_weight(configured) > 0

    def chosen_weight(self, configured: int) -> int:
        """Before health and slow start."""
        return configured if self.weight is None else self.weight

    def rise(self, before: int, after: int, now: float) -> None:
        """The configuration gave it the weight ``before``, and gives it ``after``: from none on, it starts slowly."""
        if self.chosen_weight(before) == 0 and self.chosen_weight(after) > 0:
            self.slow_since = now

    def remaining(self, now: float) -> float | None:
        """Seconds until its drain ends, 0 when it has; None without a deadline."""
        return max(0.0, self.deadline - now) if self.draining and self.deadline is not None else None

    def shown(self, now: float) -> str:
        """The state in a word."""
        if self.left is not None:
            return "removed"
        if self.draining:
            return "drained" if self.remaining(now) == 0 else "draining"
        return self.state

    def flow_policy(self, service: Service, now: float) -> str:
        """What becomes of the flows that it has: all, except_syn, none or to_reset of types.pxd.

        A backend that is down may be dead: there a client that uses its port again would wait in vain.
        """
        down, shown = self.state == "down", self.shown(now)
        policy = service.policy(leaves=shown in ("removed", "drained"), down=down)
        if policy == "keep" and shown == "drained":
            policy = "rehash"
        return {"keep": "except_syn" if down else "all", "rehash": "none", "reset": "to_reset"}[policy]


_FIRST = Standing()


@dataclass(frozen=True)
class Removed:
    """A backend that the configuration gave up, though its flows are not over: what it said of it, how it stands."""

    backend: Backend
    standing: Standing


@dataclass(frozen=True)
class Share:
    """What a backend gets of new flows: ``weight`` by weight, ``even`` where weights do not count.

    ``sticky``: its clients of before still come to it (affinity), whatever its weight. ``ramp``: the part of its weight
    that slow start gives it; where one has less than 1, weights are in units of 1 / SCALE.
    """

    weight: int
    even: int
    sticky: bool = False
    ramp: float = 1.0


@dataclass
class Standings:
    """Of all backends, by service and key."""

    by_backend: dict[BackendName, Standing] = field(default_factory=dict)
    removed: dict[str, dict[str, Removed]] = field(default_factory=dict)  # the oldest first, of services that have any
    timed: set[BackendName] = field(default_factory=set)  # those with a deadline
    config: Config = field(default_factory=Config)  # the one that holds

    def copy(self) -> Standings:
        """An independent copy, to try a configuration with."""
        by_backend = {name: replace(standing) for name, standing in self.by_backend.items()}
        removed = {
            service: {key: Removed(each.backend, replace(each.standing)) for key, each in gone.items()}
            for service, gone in self.removed.items()
        }
        return Standings(by_backend, removed, set(self.timed), self.config)

    def saved(self) -> dict[str, Any]:
        """What the next process must know to go on as after a reload; for JSON. Times are of the monotonic clock."""
        kept = {"name", *KEPT_BY, "backends"}
        services = [service.model_dump(mode="json", include=kept) for service in self.config.services]
        stand = [[*name, mark] for name, standing in self.by_backend.items() if (mark := standing.saved())]
        removed = [
            [service, key, each.backend.model_dump(mode="json"), each.standing.saved()]
            for service, gone in self.removed.items()
            for key, each in gone.items()
        ]
        return {"services": services, "stand": stand, "removed": removed}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], now: float) -> Standings:
        """What ``saved`` gave, perhaps in another process; that of a fastlb which configured services otherwise gives
        none."""
        standings = cls()
        try:
            services = tuple(map(Service.model_validate, saved["services"]))
            standings.follow(Config.model_construct(services=services), now)
            standings.by_backend.update({(service, key): Standing(**mark) for service, key, mark in saved["stand"]})
            for service, key, backend, mark in saved["removed"]:
                gone = Removed(Backend.model_validate(backend), Standing(**mark))
                standings.removed.setdefault(service, {})[key] = gone
        except (KeyError, TypeError, ValidationError):
            return cls()
        standings.timed = {name for name, standing in standings.by_backend.items() if standing.deadline is not None}
        return standings

    def of(self, service: str, key: str) -> Standing:
        """That of a backend that is not known is the first it would have."""
        if (standing := self.by_backend.get((service, key))) is not None:
            return standing
        gone = self.removed.get(service, {}).get(key)
        return gone.standing if gone is not None else Standing()

    def follow(self, config: Config, now: float) -> None:
        """Another configuration holds: start backends that came, and forget those that left, unless their service
        says otherwise of their flows. ``now`` in seconds."""
        running = {service for service, _ in self.by_backend}
        weights = self._configured()
        before, self.by_backend = self.by_backend, {}
        for service in config.services:
            for backend in service.backends:
                name = service.name, service.key(backend)
                standing = before.get(name)
                if standing is None:
                    standing = Standing(slow_since=now if service.name in running else None)
                else:
                    standing.rise(weights.get(name, backend.weight), backend.weight, now)
                if service.check is None:
                    standing.state = "unchecked"
                elif standing.state == "unchecked":
                    standing.state = "unknown"
                self.by_backend[name] = standing
        self.timed &= self.by_backend.keys()
        self._keep_removed(config, before, now)
        self.config = config

    def _keep_removed(self, config: Config, before: Mapping[BackendName, Standing], now: float) -> None:
        """Of each service those that it has no more, as many as there is room for beside those it has."""
        earlier = {service.name: service for service in self.config.services}
        removed, self.removed = self.removed, {}
        for service in config.services:
            was = earlier.get(service.name)
            if was is None or not _keeps_flows(was, service):
                continue
            gone = [(service.key(each.backend), each) for each in removed.get(service.name, {}).values()]
            for backend in was.backends if was.backends != service.backends else ():
                standing = before[service.name, service.key(backend)]
                gone.append((service.key(backend), Removed(backend, replace(standing, left=now, draining=False))))
            kept = [(key, each) for key, each in gone if (service.name, key) not in self.by_backend]
            if room := dict(kept[: MAX_BACKENDS - len(service.backends)]):
                self.removed[service.name] = room

    def let_go(self, flows: Callable[[BackendName], int], now: float) -> list[BackendName]:
        """Forget removed backends that have had no flow for as long as closed ones are remembered; which those are.

        ``flows`` counts those of a backend that are not over. The time, a second at least, is also what workers need to
        see that it takes none.
        """
        over = []
        for service in self.config.services if self.removed else ():
            closing = service.timeouts.tcp_closing or self.config.timeouts.tcp_closing
            for key, gone in self.removed.get(service.name, {}).items():
                if flows((service.name, key)):
                    gone.standing.left = now
                elif now - (gone.standing.left or 0.0) >= closing:
                    over.append((service.name, key))
        for name, key in over:
            del self.removed[name][key]
        self.removed = {service: gone for service, gone in self.removed.items() if gone}
        return over

    def shares(self, service: Service, now: float) -> list[Share]:
        """Of the service's backends, in the configuration's order."""
        listed = [(backend, self.of(service.name, service.key(backend))) for backend in service.backends]
        some_take = any(standing.takes_flows(backend.weight) for backend, standing in listed)
        ramps = [self._ramp(service, standing, backend.weight, now) for backend, standing in listed]
        highest = max((each for each, (backend, standing) in zip(ramps, listed, strict=True)
                       if standing.takes_flows(backend.weight)), default=1.0)  # fmt: skip
        ramps = [min(1.0, each / highest) for each in ramps]  # all new at once are all through
        rising = any(each < 1 for each in ramps)
        shares = []
        for ramp, (backend, standing) in zip(ramps, listed, strict=True):
            weight = standing.chosen_weight(backend.weight)
            sticky = standing.works(unknown=not some_take) and not standing.draining
            if not sticky or weight == 0:
                shares.append(Share(0, 0, sticky))
            elif rising:
                shares.append(Share(max(1, round(weight * SCALE * ramp)), max(1, round(SCALE * ramp)), sticky, ramp))
            else:
                shares.append(Share(weight, 1, sticky))
        return shares

    def _ramp(self, service: Service, standing: Standing, configured: int, now: float) -> float:
        """1 outside of a slow start."""
        slow = service.slow_start
        if slow is None or standing.slow_since is None or not standing.takes_flows(configured):
            return 1.0
        return ramp(slow, now - standing.slow_since)

    def rising(self, config: Config, now: float) -> bool:
        """Is a backend in slow start? Those that are through are marked so."""
        found = False
        for service in config.services if any(each.slow_since is not None for each in self.by_backend.values()) else ():
            for backend in service.backends:
                standing = self.of(service.name, service.key(backend))
                if standing.slow_since is None:
                    continue
                found = True
                if service.slow_start is None or now - standing.slow_since >= service.slow_start.window:
                    standing.slow_since = None
        return found

    def due(self, planned: float, now: float) -> bool:
        """Has a step of a slow start, or a drain, ended since backends were last planned for?"""
        windows = (service.slow_start.window for service in self.config.services if service.slow_start)
        step = now - planned >= min(windows, default=STEPS) / STEPS and self.rising(self.config, now)
        return step or bool(self.drains_ended(planned, now))

    # --- checks ------------------------------------------------------------------------------------------------

    def checked(self, service: Service, key: str, response: float | None, reason: str, now: float) -> bool:
        """A check took ``response`` seconds, or failed (None) for this reason; True when the state changed.

        `rise` checks in a row bring a backend up, `fall` take it down; the first one decides by itself.
        """
        standing = self.by_backend.get((service.name, key))
        if standing is None or service.check is None:
            return False
        passed = response is not None
        if response is not None:  # a slower answer counts at once, and is forgotten slowly
            standing.response = max(response, KEEP * standing.response + (1 - KEEP) * response)
        standing.reason = reason
        if passed == (standing.state == "up") and standing.state != "unknown":
            standing.streak = 0
            return False
        standing.streak += 1
        needed = 1 if standing.state == "unknown" else service.check.rise if passed else service.check.fall
        if standing.streak < needed:
            return False
        if standing.state == "down" or standing.slow_since is not None:  # a new one starts with its first flows
            standing.slow_since = now
        standing.state = "up" if passed else "down"
        standing.streak = 0
        return True

    # --- the operator ------------------------------------------------------------------------------------------

    def drain(self, name: BackendName, deadline: float | None = None) -> None:
        """No new flows, until `enable`; from the deadline on (None: never) flows that it still has go, too."""
        self.by_backend[name].draining = True
        self.by_backend[name].deadline = deadline
        self.timed.add(name)

    def drains_ended(self, since: float, now: float) -> list[BackendName]:
        """The backends whose deadline passed after ``since``, and up to ``now``."""
        deadlines = ((name, self.by_backend[name].deadline) for name in sorted(self.timed))
        return [name for name, deadline in deadlines if deadline is not None and since < deadline <= now]

    def enable(self, name: BackendName, now: float) -> None:
        """Take back `drain` and `set_weight`."""
        standing = self.by_backend[name]
        if standing.draining:
            standing.slow_since = now
        standing.draining, standing.deadline = False, None
        self._weigh(name, None, now)
        self.timed.discard(name)

    def set_weight(self, name: BackendName, weight: int, now: float) -> None:
        """Another weight than the configuration's, until `enable`."""
        self._weigh(name, weight, now)

    def _weigh(self, name: BackendName, weight: int | None, now: float) -> None:
        standing, configured = self.by_backend[name], self._configured()[name]
        before, standing.weight = standing.chosen_weight(configured), weight
        if before == 0 and standing.chosen_weight(configured) > 0:
            standing.slow_since = now

    def _configured(self) -> dict[BackendName, int]:
        """The weights that the configuration gives."""
        return {
            (service.name, service.key(backend)): backend.weight
            for service in self.config.services
            for backend in service.backends
        }

    def find(self, service: str, backend: str) -> BackendName:
        """By the service's name, and the backend's key or address; raises FastlbError when that is not one."""
        services = {name for name, _ in self.by_backend}
        if service not in services:
            raise FastlbError(f'there is no service "{service}" with backends; there are: {_listed(services)}')
        keys = [key for name, key in self.by_backend if name == service]
        found = [key for key in keys if backend in (key, key.rsplit(":", 1)[0], key.rsplit(":", 1)[0].strip("[]"))]
        if len(found) != 1:
            problem = "more than one backend" if found else "no backend"
            raise FastlbError(f'service {service} has {problem} "{backend}"; it has: {_listed(keys)}')
        return service, found[0]


def ramp(slow: SlowStart, age: float) -> float:
    """The part of its weight that a backend has ``age`` seconds after it began, in STEPS steps."""
    if age >= slow.window:
        return 1.0
    step = max(0.0, age) // (slow.window / STEPS) / STEPS
    return max(slow.floor, step ** (1 / slow.aggression)) if step > 0 else slow.floor


def _keeps_flows(earlier: Service, service: Service) -> bool:
    """Do removed backends of a service matter, whose configuration was ``earlier`` before?"""
    return service.on_leave != "rehash" and all(getattr(earlier, key) == getattr(service, key) for key in KEPT_BY)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
