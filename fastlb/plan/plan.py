"""What each service is in the data path: from the configuration and the states of its backends to a `Plan`. Pure.

A reload plans anew what it changes. A change of a backend's state plans its service again, and of that only what the
change concerns: the members that it names, unless their shares depend on one another (`Plan.settled`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from fastlb._core import KetamaRing, MaglevTable, SmoothWrr
from fastlb.config import Backend, Config, Service, Tunnel
from fastlb.model.match import Block
from fastlb.model.modes import SCHEDULERS
from fastlb.model.net import Address, Network, PortRange
from fastlb.plan.affinity import Place, SameAddress, Stickiness, group_of, stickiness_of
from fastlb.plan.backends import BackendState, BackendStates, Share
from fastlb.plan.ids import BackendIds, Numbers
from fastlb.plan.ketama import build_ring
from fastlb.plan.maglev import build_table
from fastlb.plan.smooth_wrr import build_rotation

CLAMP_TO_PATH = 65535
NO_SHARE = Share(0, 0)
SHARED_SETTINGS = ("maglev_size", "hash_seed", "ring_points", "timeouts")  # of all services: plans depend on them


class Member(NamedTuple):
    """A backend of one service, as the data path knows it."""

    id: int
    key: str
    address: Address
    port: int  # 0: the packet's own
    weight: int  # as it stands: health, the operator's word and slow start count
    unweighted: int  # the same where weights do not count
    target_weight: int  # what its weight is without slow start, or will be after it
    ramp: float  # the part of it that slow start gives it
    response: float = 0.0  # seconds that health checks take; 0: unknown
    flow_policy: str = "all"  # what becomes of its flows: all, except_syn, none or to_reset (types.pxd)
    removed: bool = False  # the configuration has it no more, and its flows are not over
    max_flows: int = 0  # that it may have; 0: any number
    place: int = 0  # its number in the service's affinity group
    same_address: tuple[SameAddress, ...] = ()  # what else the group has at its address
    sticky: bool = False  # its clients of before still come to it


class Limit(NamedTuple):
    """A source limit without anything left open."""

    rate: int
    burst: int
    prefix: int


@dataclass(frozen=True)
class Plan:
    """A service, as the data path knows it; ``members`` are sorted by key, as the table's positions are."""

    service: Service
    slot: int  # of its counters
    mss: int  # what TCP's MSS is lowered to; 0: nothing, 65535: what fits
    source_limit: Limit | None
    timeouts: dict[str, float] | None  # seconds, where the service has its own
    affinity: Stickiness | None
    members: tuple[Member, ...]
    keys: tuple[str, ...]  # of the members
    weights: tuple[int, ...] = ()  # of the members
    table: MaglevTable | None = None  # of every service: also for packets in mid-flow
    ring: KetamaRing | None = None  # where the scheduler has one
    rotation: SmoothWrr | None = None  # likewise
    takers: int = 0  # members that take new flows
    settled: bool = False  # one is known to take flows, none is in slow start: no share depends on another's state

    @property
    def name(self) -> str:
        """The service's name."""
        return self.service.name

    @property
    def vip(self) -> Address | Network:
        """The VIP as it is configured."""
        return self.service.vip

    @cached_property
    def network(self) -> Network:
        """The VIP as a prefix."""
        return self.service.network

    @property
    def ports(self) -> int | PortRange | str:
        """The ports as they are configured."""
        return self.service.port

    @cached_property
    def port(self) -> int:
        """The one port; 0 where there are several."""
        return self.service.single_port

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The ports, as tables hold them."""
        return self.service.blocks

    @property
    def protocol(self) -> str:
        """tcp or udp."""
        return self.service.protocol

    @cached_property
    def forward(self) -> str:
        """The forwarding mode."""
        return self.service.forward

    @property
    def scheduler(self) -> str:
        """The scheduler's name."""
        return self.service.scheduler

    @property
    def no_backend(self) -> str:
        """What a client gets when no backend can take its flow."""
        return self.service.no_backend

    @property
    def allow(self) -> tuple[Network, ...]:
        """Clients that may use the service."""
        return self.service.allow

    @property
    def deny(self) -> tuple[Network, ...]:
        """Clients that may not."""
        return self.service.deny

    @property
    def tunnel(self) -> Tunnel:
        """How packets are wrapped."""
        return self.service.tunnel

    @property
    def bounded_load(self) -> float:
        """How many times its share a backend may have of all flows; 0: not bounded."""
        return self.service.bounded_load or 0.0


def plan_services(
    config: Config, ids: BackendIds, now: float, states: BackendStates | None = None, known: Mapping[str, Plan] = {}
) -> list[Plan]:
    """Return what each service of the configuration is in the data path, in the configuration's order.

    ``ids`` gives the numbers, and is changed. ``now`` in seconds. ``states``: of its backends; without them all are as
    the configuration says. ``known``: plans, by name, of services that have not changed and whose backends have not;
    they are taken as they are where their numbers are the same. Raises FastlbError when there are too many backends.
    """
    states = states or BackendStates()
    removed = [(service.name, key) for service in config.services for key in states.removed.get(service.name, ())]
    numbers = ids.number(config, removed, now)
    return [
        known[service.name] if service.name in known and service.affinity is None
        else _plan_service(config, service, numbers, states, now)
        for service in config.services
    ]  # fmt: skip


def _plan_service(config: Config, service: Service, numbers: Numbers, states: BackendStates, now: float) -> Plan:
    shares = states.shares(service, now)
    known = list(zip(states.keys_of(service), service.backends, shares, strict=True))
    known += [(key, gone.backend, NO_SHARE) for key, gone in states.removed.get(service.name, {}).items()]
    known.sort(key=lambda each: each[0])
    members = tuple(_member(service, key, backend, numbers, share, states, now) for key, backend, share in known)
    plan = Plan(
        service=service,
        slot=numbers.slots[service.name],
        mss=_clamp(service.mss_clamp),
        source_limit=_limit(service),
        timeouts=_own_timeouts(config, service),
        affinity=stickiness_of(service),
        members=(),
        keys=tuple(key for key, _, _ in known),
    )
    settled = states.any_takes_flows(service) and all(member.ramp == 1 for member in members)
    return _with_members(config, plan, members, tuple(member.weight for member in members), settled)


def _member(
    service: Service, key: str, backend: Backend, numbers: Numbers, share: Share, states: BackendStates, now: float
) -> Member:
    state = states.of(service.name, key)
    place = same_address = None
    if service.affinity is not None:
        at = Place(group_of(service), backend.address, service.name, key)
        place, same_address = numbers.places.get(at), numbers.same_address.get(at)
    return Member(
        id=numbers.ids[service.name, key],
        key=key,
        address=backend.address,
        port=backend.port or service.single_port,
        weight=share.weight,
        unweighted=share.unweighted if share.weight else 0,
        target_weight=state.chosen_weight(backend.weight),
        ramp=share.ramp,
        response=state.response,
        flow_policy=state.flow_policy(service, now),
        removed=state.left is not None,
        max_flows=backend.max_flows or 0,
        place=place or 0,
        same_address=same_address or (),
        sticky=share.sticky,
    )


def update_plan(
    config: Config, plan: Plan, states: BackendStates, now: float, changed: Collection[str] | None = None
) -> tuple[Plan, list[int]]:
    """Return the plan of a service whose backends' states have changed, and the positions of members that differ.

    ``changed``: the keys of those backends; None: perhaps all. ``now`` in seconds.
    """
    alone = _only_changed(plan, states, changed) if changed is not None else None
    renewed = _renew_some(plan, alone, now) if alone is not None else _renew_all(plan, states, now)
    differing = {at: member for at, member in renewed if member is not plan.members[at]}
    if not differing:
        return plan, []
    members, weights = list(plan.members), list(plan.weights)
    for at, member in differing.items():
        members[at], weights[at] = member, member.weight
    settled = alone is not None or (
        states.any_takes_flows(plan.service) and all(member.ramp == 1 for member in members)
    )
    return _with_members(config, plan, tuple(members), tuple(weights), settled), list(differing)


def _renew_some(
    plan: Plan, changed: Iterable[tuple[int, Backend, BackendState]], now: float
) -> Iterator[tuple[int, Member]]:
    for at, backend, state in changed:
        yield at, _renewed(plan.service, plan.members[at], backend, state, state.share(backend.weight), now)


def _renew_all(plan: Plan, states: BackendStates, now: float) -> Iterator[tuple[int, Member]]:
    service = plan.service
    shares = dict(zip(states.keys_of(service), states.shares(service, now), strict=True))
    for at, member in enumerate(plan.members):
        backend, state = states.backend(plan.name, member.key), states.of(plan.name, member.key)
        yield at, _renewed(service, member, backend, state, shares.get(member.key, NO_SHARE), now)


def _only_changed(
    plan: Plan, states: BackendStates, changed: Collection[str]
) -> list[tuple[int, Backend, BackendState]] | None:
    """Return the positions of the changed members with what they are; None when the shares of others change, too."""
    if not plan.settled or states.has_slow_starts(plan.service):
        return None
    takers, found = plan.takers, []
    for key in changed:
        at = bisect_left(plan.keys, key)
        if at == len(plan.keys) or plan.keys[at] != key or plan.members[at].removed:
            continue  # it was removed meanwhile
        backend, state = states.backend(plan.name, key), states.of(plan.name, key)
        takers += state.takes_flows(backend.weight) - (plan.members[at].weight > 0)
        found.append((at, backend, state))
    return found if takers > 0 else None


def _renewed(
    service: Service, member: Member, backend: Backend, state: BackendState, share: Share, now: float
) -> Member:
    """Return the member with the share and state that it has now; the same object when nothing is different."""
    renewed = member._replace(
        weight=share.weight,
        unweighted=share.unweighted if share.weight else 0,
        target_weight=state.chosen_weight(backend.weight),
        ramp=share.ramp,
        response=state.response,
        flow_policy=state.flow_policy(service, now),
        sticky=share.sticky,
    )
    return member if renewed == member else renewed


def _with_members(
    config: Config, plan: Plan, members: tuple[Member, ...], weights: tuple[int, ...], settled: bool
) -> Plan:
    """Return the plan with these members, and the tables that follow from their weights.

    ``settled``: one is known to take flows, and none is in slow start.
    """
    scheduler, seed = SCHEDULERS[plan.scheduler], config.hash_seed
    rotation = ring = None
    if scheduler.table == "rotation":
        rotation = build_rotation(weights if scheduler.weighted else tuple(member.unweighted for member in members))
    if scheduler.table == "ring":
        ring = build_ring(plan.keys, weights, config.ring_points, seed)
    takers = len(weights) - weights.count(0)
    return replace(
        plan,
        members=members,
        weights=weights,
        table=build_table(plan.keys, weights, config.maglev_size, seed),
        ring=ring,
        rotation=rotation,
        takers=takers,
        settled=settled and takers > 0,
    )


def _own_timeouts(config: Config, service: Service) -> dict[str, float] | None:
    """Return all timeouts of a service that has some of its own; else None."""
    own = service.timeouts.model_dump(exclude_none=True)
    return config.timeouts.model_dump() | own if own else None


def _limit(service: Service) -> Limit | None:
    limit = service.source_limit
    if limit is None:
        return None
    return Limit(limit.rate, limit.burst or limit.rate, limit.prefix or (32 if service.vip.version == 4 else 64))


def _clamp(mss: int | bool) -> int:
    return CLAMP_TO_PATH if mss is True else int(mss)


def unchanged_plans(
    before: Config, after: Config, plans: Iterable[Plan], differing: Collection[str]
) -> dict[str, Plan]:
    """Return the plans, by name, of services that a reload leaves as they were.

    ``differing``: services some backend of which has another state than when it was planned, or came or left.
    """
    if any(getattr(before, key) != getattr(after, key) for key in SHARED_SETTINGS):
        return {}
    known = {plan.name: plan for plan in plans}
    earlier = {service.name: service for service in before.services}
    return {
        service.name: known[service.name]
        for service in after.services
        if service.name not in differing and service.name in known and earlier[service.name] == service
    }
