"""The states of backends beside what the configuration says: health, the operator's word, slow start. Pure.

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

docs/backends.md has this table in full. A backend that was removed is kept only where its flows need it.

Slow start: a backend that is new in a service that runs, or comes up again, or is enabled again, or had no weight, gets
weight · max(floor, (t / window)^(1 / aggression)), t seconds later; of a new one that is checked, after its first check
has passed. Where none is through it, the one that is furthest counts as full.

A `BackendState` is immutable, so that a copy of all states costs no more than its dictionaries. Times are seconds on
the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fastlb.config import Backend, Config, Service, SlowStart
from fastlb.config.fields import MAX_BACKENDS
from fastlb.errors import FastlbError
from fastlb.model.names import BackendName

SCALE = 100  # of weights, while a backend of the service is in slow start
STEPS = 20  # of a slow start: so often its tables are built anew
KEEP = 0.7  # of the response time, when a check brings a shorter one
KEPT_BY = ("vip", "port", "protocol", "forward")  # a service that changes one of these has none of its flows any more


@dataclass(frozen=True)
class BackendState:
    """The state of one backend in one service."""

    state: str = "unchecked"
    response: float = 0.0  # seconds that checks take: peak-EWMA; 0: unknown
    reason: str = ""  # why the last check failed
    draining: bool = False
    deadline: float | None = None  # of draining
    weight: int | None = None  # the operator's; None: the configuration's
    streak: int = 0  # checks in a row that speak against the state
    slow_since: float | None = None  # when its slow start began
    left: float | None = None  # when the configuration gave it up, or when it was last seen to have flows since
    silent: bool = False  # it is sent flows and none is answered, though it works as far as checks can tell

    def works(self, unknown: bool = False) -> bool:
        """True as far as checks can tell; with ``unknown``, those that have not ended count as passed."""
        return self.state in ("up", "unchecked") or (unknown and self.state == "unknown")

    def takes_flows(self, configured: int) -> bool:
        """True if it takes new flows with the weight that the configuration gives it."""
        return self.works() and not self.draining and self.chosen_weight(configured) > 0

    def chosen_weight(self, configured: int) -> int:
        """Return the operator's weight, or else the configuration's: what holds before health and slow start."""
        return configured if self.weight is None else self.weight

    def remaining(self, now: float) -> float | None:
        """Return the seconds until its drain ends, 0 when it has; None without a deadline."""
        return max(0.0, self.deadline - now) if self.draining and self.deadline is not None else None

    def shown(self, now: float) -> str:
        """Return the state in a word."""
        if self.left is not None:
            return "removed"
        if self.draining:
            return "drained" if self.remaining(now) == 0 else "draining"
        return self.state

    def flow_policy(self, service: Service, now: float) -> str:
        """Return what becomes of the flows that it has: all, except_syn, none or to_reset of types.pxd.

        A backend that is down may be dead: there a client that uses its port again would wait in vain.
        """
        down = self.state == "down"
        if not down and self.left is None and not self.draining:
            return "all"
        shown = self.shown(now)
        policy = service.policy(leaves=shown in ("removed", "drained"), down=down)
        if policy == "keep" and shown == "drained":
            policy = "rehash"
        return {"keep": "except_syn" if down else "all", "rehash": "none", "reset": "to_reset"}[policy]

    def share(self, configured: int, unknown: bool = False, ramp: float | None = None) -> Share:
        """Return what it gets of new flows; ``unknown``: a backend that was not checked yet counts as working.

        ``ramp``: the part of its weight that slow start gives it, while some backend of the service is in slow start.
        """
        weight, sticky = self.chosen_weight(configured), self.works(unknown) and not self.draining
        if not sticky or weight == 0:
            return Share(0, 0, sticky)
        if ramp is None:
            return Share(weight, 1, sticky)
        return Share(max(1, round(weight * SCALE * ramp)), max(1, round(SCALE * ramp)), sticky, ramp)

    def after_check(self, service: Service, response: float | None, reason: str, now: float) -> BackendState:
        """Return the state after a check that took ``response`` seconds, or failed (None) for this reason.

        `rise` checks in a row bring a backend up, `fall` take it down; the first one decides by itself.
        """
        assert service.check is not None, "it was checked"
        passed, known = response is not None, self.response
        if response is not None:  # a slower answer counts at once, and is forgotten slowly
            known = max(response, KEEP * known + (1 - KEEP) * response)
        if passed == (self.state == "up") and self.state != "unknown":
            return replace(self, response=known, reason=reason, streak=0)
        needed = 1 if self.state == "unknown" else service.check.rise if passed else service.check.fall
        if self.streak + 1 < needed:
            return replace(self, response=known, reason=reason, streak=self.streak + 1)
        slow = now if self.state == "down" or self.slow_since is not None else None  # a new one starts with first flows
        return replace(
            self, response=known, reason=reason, state="up" if passed else "down", streak=0, slow_since=slow
        )

    def reweighed(self, before: int, after: int, weight: int | None, now: float) -> BackendState:
        """Return the state with the operator's ``weight``, when the configuration's goes from ``before`` to ``after``.

        A backend that had no weight and gets one starts slowly.
        """
        changed = replace(self, weight=weight)
        begins = self.chosen_weight(before) == 0 and changed.chosen_weight(after) > 0
        return replace(changed, slow_since=now) if begins else changed


@dataclass(frozen=True)
class Removed:
    """A backend that the configuration gave up, though its flows are not over: what it said of it, and its state."""

    backend: Backend
    state: BackendState


@dataclass(frozen=True)
class Share:
    """What a backend gets of new flows: ``weight`` by weight, ``unweighted`` where weights do not count.

    ``sticky``: its clients of before still come to it (affinity), whatever its weight. ``ramp``: the part of its weight
    that slow start gives it; where one has less than 1, weights are in units of 1 / SCALE.
    """

    weight: int
    unweighted: int
    sticky: bool = False
    ramp: float = 1.0


_FIRST = BackendState()
_NONE: Mapping[str, Removed] = {}


@dataclass
class BackendStates:
    """The states of all backends, by service and key, under one configuration."""

    by_backend: dict[BackendName, BackendState] = field(default_factory=dict)
    removed: dict[str, dict[str, Removed]] = field(default_factory=dict)  # the oldest first, of services that have any
    timed: set[BackendName] = field(default_factory=set)  # those with a deadline
    slow: dict[str, set[str]] = field(default_factory=dict)  # keys of those that may be in slow start, by service
    config: Config = field(default_factory=Config)  # the one that holds
    services: dict[str, Service] = field(default_factory=dict)  # its services
    configured: dict[BackendName, Backend] = field(default_factory=dict)  # its backends
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by service, those of its backends in their order

    def copy(self) -> BackendStates:
        """Return an independent copy, to try a configuration with."""
        removed = {service: dict(gone) for service, gone in self.removed.items()}
        slow = {service: set(keys) for service, keys in self.slow.items()}
        return replace(self, by_backend=dict(self.by_backend), removed=removed, timed=set(self.timed), slow=slow)

    def of(self, service: str, key: str) -> BackendState:
        """Return a backend's state; that of one that is not known is the first it would have."""
        if (state := self.by_backend.get((service, key))) is not None:
            return state
        gone = self.removed.get(service, _NONE).get(key)
        return gone.state if gone is not None else _FIRST

    def backend(self, service: str, key: str) -> Backend:
        """Return what the configuration says of a backend, or last said of one that it gave up; raises KeyError."""
        found = self.configured.get((service, key))
        return found if found is not None else self.removed[service][key].backend

    def keys_of(self, service: Service) -> tuple[str, ...]:
        """Return the keys of a service's backends in their order, which are known for services that hold."""
        if self.services.get(service.name) is service:
            return self.keys[service.name]
        return tuple(map(service.key, service.backends))

    def update(self, name: BackendName, state: BackendState) -> None:
        """Set the state of a backend that the configuration has."""
        self.by_backend[name] = state
        if state.slow_since is not None and state.state != "unknown":  # the first check that passes begins it
            self.slow.setdefault(name[0], set()).add(name[1])

    # --- another configuration -----------------------------------------------------------------------------------

    def apply_config(self, config: Config, now: float) -> None:
        """Start backends that came, and forget those that left, unless their service keeps their flows."""
        running = {service for service, _ in self.by_backend}
        before, self.by_backend, self.slow = self.by_backend, {}, {}
        weights, self.configured = self.configured, {}
        self.keys = {service.name: tuple(map(service.key, service.backends)) for service in config.services}
        for service in config.services:
            for key, backend in zip(self.keys[service.name], service.backends, strict=True):
                name = service.name, key
                self.configured[name] = backend
                state = before.get(name)
                if state is None:
                    state = BackendState(slow_since=now if service.name in running else None)
                self.update(name, _going_on(service, backend, state, weights.get(name), now))
        self.timed &= self.by_backend.keys()
        self._keep_removed(config, before, now)
        self.config, self.services = config, {service.name: service for service in config.services}

    def catch_up(
        self, others: BackendStates, earlier: Mapping[BackendName, BackendState], now: float
    ) -> set[BackendName]:
        """Take in what has changed in ``others`` since these states were copied from them, and went over to another
        configuration; ``earlier``: all states when they were copied. Return the names of the backends concerned."""
        changed = {
            name
            for name, state in others.by_backend.items()
            if state is not earlier.get(name) and name in self.by_backend
        }
        for name in changed:
            service, state, was = self.services[name[0]], others.by_backend[name], others.configured.get(name)
            self.update(name, _going_on(service, self.configured[name], state, was, now))
        self.timed = others.timed & self.by_backend.keys()
        return changed

    def _keep_removed(self, config: Config, before: Mapping[BackendName, BackendState], now: float) -> None:
        """Keep of each service the backends that it has no more, as many as there is room for beside those it has."""
        earlier, removed, self.removed = self.services, self.removed, {}
        for service in config.services:
            was = earlier.get(service.name)
            if was is None or not _keeps_flows(was, service):
                continue
            gone = list(removed.get(service.name, {}).items())
            for backend in was.backends if was.backends != service.backends else ():
                state = before[service.name, service.key(backend)]
                gone.append((service.key(backend), Removed(backend, replace(state, left=now, draining=False))))
            kept = [(key, each) for key, each in gone if (service.name, key) not in self.by_backend]
            if room := dict(kept[: MAX_BACKENDS - len(service.backends)]):
                self.removed[service.name] = room

    def drop_removed(self, flows: Callable[[BackendName], int], now: float) -> list[BackendName]:
        """Forget removed backends that have had no flow for as long as closed ones are remembered; return their names.

        ``flows`` counts those of a backend that are not over. The time, a second at least, is also what workers need to
        see that it takes none.
        """
        over = []
        for name in list(self.removed):
            service, gone = self.services[name], self.removed[name]
            closing = service.timeouts.tcp_closing or self.config.timeouts.tcp_closing
            for key, each in list(gone.items()):
                if flows((name, key)):
                    gone[key] = replace(each, state=replace(each.state, left=now))
                elif now - (each.state.left or 0.0) >= closing:
                    over.append((name, key))
                    del gone[key]
            if not gone:
                del self.removed[name]
        return over

    # --- shares of new flows ---------------------------------------------------------------------------------------

    def shares(self, service: Service, now: float) -> list[Share]:
        """Return what each of the service's backends gets of new flows, in the configuration's order."""
        keys = self.keys_of(service)
        listed = [(self.of(service.name, key), each.weight) for key, each in zip(keys, service.backends, strict=True)]
        takers = [state.takes_flows(weight) for state, weight in listed]
        unknown = not any(takers)
        if not self.has_slow_starts(service):
            return [state.share(weight, unknown) for state, weight in listed]
        ramps = [_ramp(service, state, now) if takes else 1.0
                 for (state, _), takes in zip(listed, takers, strict=True)]  # fmt: skip
        highest = max((each for each, takes in zip(ramps, takers, strict=True) if takes), default=1.0)
        ramps = [min(1.0, each / highest) for each in ramps]  # all new at once are all through
        rising = any(each < 1 for each in ramps)
        return [state.share(weight, unknown, each if rising else None)
                for each, (state, weight) in zip(ramps, listed, strict=True)]  # fmt: skip

    def any_takes_flows(self, service: Service) -> bool:
        """True if a backend of this service is known to take new flows; else those that are unknown take them."""
        keys = self.keys_of(service)
        return any(
            self.of(service.name, key).takes_flows(each.weight)
            for key, each in zip(keys, service.backends, strict=True)
        )

    def has_slow_starts(self, service: Service) -> bool:
        """True if a backend of this service may be in slow start."""
        return service.slow_start is not None and bool(self.slow.get(service.name))

    def rising(self, now: float) -> set[str]:
        """Return the services with a backend in slow start, once more when one is through; then its mark goes."""
        found = set()
        for name, keys in list(self.slow.items()):
            slow = self.services[name].slow_start
            for key in list(keys):
                since = self.by_backend[name, key].slow_since
                if since is not None and slow is not None:
                    found.add(name)
                if since is None or slow is None or now - since >= slow.window:
                    self.by_backend[name, key] = replace(self.by_backend[name, key], slow_since=None)
                    keys.discard(key)
            if not keys:
                del self.slow[name]
        return found

    def due(self, planned: float, now: float) -> set[str]:
        """Return the services for which a step of a slow start, or a drain, has ended since ``planned``."""
        windows = (slow.window for name in self.slow if (slow := self.services[name].slow_start))
        step = bool(self.slow) and now - planned >= min(windows, default=0.0) / STEPS
        return (self.rising(now) if step else set()) | {name for name, _ in self.drains_ended(planned, now)}

    # --- checks ----------------------------------------------------------------------------------------------------

    def checked(self, service: Service, key: str, response: float | None, reason: str, now: float) -> bool:
        """Take in a check that took ``response`` seconds, or failed (None) for this reason; True if that changed the
        state in a word."""
        before = self.by_backend.get((service.name, key))
        if before is None or service.check is None:
            return False
        after = before.after_check(service, response, reason, now)
        self.update((service.name, key), after)
        return after.state != before.state

    # --- the operator ------------------------------------------------------------------------------------------------

    def drain(self, name: BackendName, deadline: float | None = None) -> None:
        """Give it no new flows until `enable`; from the deadline on (None: never) the flows that it still has go."""
        self.update(name, replace(self.by_backend[name], draining=True, deadline=deadline))
        self.timed.add(name)

    def drains_ended(self, since: float, now: float) -> list[BackendName]:
        """Return the backends whose deadline passed after ``since``, and up to ``now``."""
        deadlines = ((name, self.by_backend[name].deadline) for name in sorted(self.timed))
        return [name for name, deadline in deadlines if deadline is not None and since < deadline <= now]

    def enable(self, name: BackendName, now: float) -> None:
        """Undo `drain` and `set_weight`."""
        state = self.by_backend[name]
        slow = now if state.draining else state.slow_since
        self.update(name, replace(state, draining=False, deadline=None, slow_since=slow))
        self.set_weight(name, None, now)
        self.timed.discard(name)

    def set_weight(self, name: BackendName, weight: int | None, now: float) -> None:
        """Set another weight than the configuration's, until `enable`; None: the configuration's again."""
        configured = self.configured[name].weight
        self.update(name, self.by_backend[name].reweighed(configured, configured, weight, now))

    def find(self, service: str, backend: str) -> BackendName:
        """Return the name of a backend, by its service's name and its key or address; raises FastlbError."""
        names = {name for name, _ in self.by_backend}
        if service not in names:
            raise FastlbError(f'there is no service "{service}" with backends; there are: {_listed(names)}')
        keys = [key for name, key in self.by_backend if name == service]
        found = [key for key in keys if backend in (key, key.rsplit(":", 1)[0], key.rsplit(":", 1)[0].strip("[]"))]
        if len(found) != 1:
            problem = "more than one backend" if found else "no backend"
            raise FastlbError(f'service {service} has {problem} "{backend}"; it has: {_listed(keys)}')
        return service, found[0]


def ramp(slow: SlowStart, age: float) -> float:
    """Return the part of its weight that a backend has ``age`` seconds after it began, in STEPS steps."""
    if age >= slow.window:
        return 1.0
    step = max(0.0, age) // (slow.window / STEPS) / STEPS
    return max(slow.floor, step ** (1 / slow.aggression)) if step > 0 else slow.floor


def _ramp(service: Service, state: BackendState, now: float) -> float:
    """Return the part of its weight that a backend which takes flows has; 1 outside of a slow start."""
    if service.slow_start is None or state.slow_since is None:
        return 1.0
    return ramp(service.slow_start, now - state.slow_since)


def _going_on(
    service: Service, backend: Backend, state: BackendState, was: Backend | None, now: float
) -> BackendState:
    """Return the state under a new configuration; ``was``: what the one before said of the backend."""
    if was is not None and was.weight != backend.weight:
        state = state.reweighed(was.weight, backend.weight, state.weight, now)
    return _checked_or_not(service, state)


def _checked_or_not(service: Service, state: BackendState) -> BackendState:
    """Return the state as it fits a service with or without a check."""
    if service.check is None and state.state != "unchecked":
        return replace(state, state="unchecked")
    if service.check is not None and state.state == "unchecked":
        return replace(state, state="unknown")
    return state


def _keeps_flows(earlier: Service, service: Service) -> bool:
    """True if removed backends of a service matter, whose configuration was ``earlier`` before."""
    return service.on_leave != "rehash" and all(getattr(earlier, key) == getattr(service, key) for key in KEPT_BY)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
