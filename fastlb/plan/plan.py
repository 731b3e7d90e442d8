"""Pure decisions: from a configuration to what the data path and the classifier hold, and from one to the next.

Nothing here opens a socket or knows a clock that was not handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from fastlb._core import KetamaRing, MaglevTable, Services, SmoothWrr
from fastlb.config.schema import Backend, Config, Service, Tunnel
from fastlb.errors import FastlbError
from fastlb.model.match import LATER, PORT_BITS, Block, Key, Keys
from fastlb.model.modes import TUNNELS
from fastlb.model.net import PROTOCOL_NUMBERS, Address, Network, PortRange
from fastlb.plan.affinity import Near, Place, PlaceNumbers, Stickiness, group_of, stickiness_of
from fastlb.plan.backends import Share, Standings
from fastlb.plan.ketama import build_ring
from fastlb.plan.maglev import build_table
from fastlb.plan.smooth_wrr import build_rotation

if TYPE_CHECKING:
    from typing_extensions import Self

Name = TypeVar("Name")

CLAMP_TO_PATH = 65535
MAX_FLOWS = 1 << 30
MAX_BACKEND_ID = (1 << 20) - 1
MAX_SERVICE_SLOT = (1 << 16) - 1
ID_QUARANTINE = 60.0  # seconds; the sweep forgets the flows of a backend that left within ten

NEEDS_RESTART = (
    *("interfaces", "workers", "flows", "ring", "transmit", "control", "vip_address"),
    *("snat", "snat_ports", "flow_log", "flow_file", "affinity_entries"),
)


@dataclass(frozen=True)
class Member:
    """A backend of one service, as the data path knows it."""

    id: int
    key: str
    address: Address
    port: int  # 0: the packet's own
    weight: int  # as it stands: health, the operator's word and slow start count
    even: int  # the same where weights do not count
    full: int  # what its weight is without slow start, or will be after it
    ramp: float  # the part of it that slow start gives it
    response: float = 0.0  # seconds that health checks take; 0: unknown
    flow_policy: str = "all"  # what becomes of its flows: all, except_syn, none or to_reset (types.pxd)
    removed: bool = False  # the configuration has it no more, and its flows are not over
    max_flows: int = 0  # that it may have; 0: any number
    place: int = 0  # its number in the service's affinity group
    near: tuple[Near, ...] = ()  # what else the group has at its address
    sticky: bool = False  # its clients of before still come to it


class Limit(NamedTuple):
    """A source limit without anything left open."""

    rate: int
    burst: int
    prefix: int


@dataclass(frozen=True)
class Plan:
    """A service, as the data path knows it; ``members`` are sorted by key, as the table's positions are."""

    name: str
    slot: int  # of its counters
    vip: Address | Network
    network: Network  # the same as a prefix
    ports: int | PortRange | str
    port: int  # 0: several
    blocks: tuple[Block, ...]  # the ports, as tables hold them
    protocol: str
    forward: str
    no_backend: str
    mss: int  # what TCP's MSS is lowered to; 0: nothing, 65535: what fits
    allow: tuple[Network, ...]
    deny: tuple[Network, ...]
    source_limit: Limit | None
    tunnel: Tunnel
    scheduler: str
    table: MaglevTable | None  # of every service: also for packets in mid-flow
    ring: KetamaRing | None  # ketama only
    rotation: SmoothWrr | None  # of those that take turns or draw
    timeouts: dict[str, float] | None  # seconds, where the service has its own
    bounded_load: float  # 0: not bounded
    affinity: Stickiness | None
    members: tuple[Member, ...]


@dataclass
class StableNumbers(Generic[Name]):
    """Numbers from 1 on that names keep as long as they are in use.

    A number that is no longer used rests for ID_QUARANTINE seconds, so that nothing of what it stood for is left when
    something new gets it. ``reused`` collects such numbers for `Pipeline.renew`.
    """

    MOST: ClassVar[int]  # the highest number that there is
    OF: ClassVar[str]  # what they are numbers of

    by_name: dict[Name, int] = field(default_factory=dict)
    resting: list[tuple[float, int]] = field(default_factory=list)  # (when it was freed, number), oldest first
    highest: int = 0
    reused: set[int] = field(default_factory=set)

    def copy(self) -> Self:
        """An independent copy, to try a configuration with."""
        return replace(self, by_name=dict(self.by_name), resting=list(self.resting), reused=set())

    def assign(self, wanted: Iterable[Name], now: float) -> dict[Name, int]:
        """The numbers of exactly these names; ``now`` in seconds. Raises FastlbError when none is left."""
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
        if self.highest == self.MOST:
            raise FastlbError(f"more than {self.MOST} {self.OF}, those that left within a minute included")
        self.highest += 1
        return self.highest


class ServiceSlots(StableNumbers[str]):
    """Of services by name, for what is counted by service."""

    MOST, OF = MAX_SERVICE_SLOT, "services"


@dataclass
class BackendIds(StableNumbers[tuple[str, str]]):
    """Of backends by (service name, backend key), which flow entries carry; and those of their services."""

    MOST, OF = MAX_BACKEND_ID, "backends"

    services: ServiceSlots = field(default_factory=ServiceSlots)
    places: PlaceNumbers = field(default_factory=PlaceNumbers)  # of affinity, which has other numbers

    def saved(self) -> dict[str, Any]:
        """What flow entries need of it, for JSON."""
        named = [[service, key, number] for (service, key), number in self.by_name.items()]
        return {"highest": self.highest, "named": named, "resting": [number for _, number in self.resting]}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], now: float) -> BackendIds:
        """What ``saved`` gave, perhaps in another process; what rests begins to do so ``now``."""
        named = {(service, key): number for service, key, number in saved["named"]}
        return cls(named, [(now, number) for number in saved["resting"]], saved["highest"])

    def copy(self) -> Self:
        """As above, of all of them."""
        return replace(super().copy(), services=self.services.copy(), places=self.places.copy())


def plan_services(config: Config, ids: BackendIds, now: float, standings: Standings | None = None) -> list[Plan]:
    """What each service of the configuration is in the data path, in the configuration's order.

    ``standings``: how its backends stand; none: as the configuration says. ``now`` in seconds.
    """
    standings = standings or Standings()
    configured = ((service.name, service.key(backend)) for service in config.services for backend in service.backends)
    removed = ((service.name, key) for service in config.services for key in standings.removed.get(service.name, ()))
    numbers = Numbers(
        ids.assign((*configured, *removed), now),
        ids.places.assign(config, now),
        ids.places.near(),
        ids.services.assign((service.name for service in config.services), now),
    )
    return [_plan_service(config, service, numbers, standings, now) for service in config.services]


class Numbers(NamedTuple):
    """What flow entries and the affinity table call a backend, and counters a service."""

    ids: Mapping[tuple[str, str], int]  # by service and key
    places: Mapping[Place, int]  # of affinity
    near: Mapping[Place, tuple[Near, ...]]
    slots: Mapping[str, int]  # of a service's counters, by its name


def _plan_service(
    config: Config, service: Service, numbers: Numbers, standings: Standings, now: float
) -> Plan:
    shared = list(zip(service.backends, standings.shares(service, now), strict=True))
    shared += [(gone.backend, Share(0, 0)) for gone in standings.removed.get(service.name, {}).values()]
    unsorted = (_member(service, backend, numbers, share, standings, now) for backend, share in shared)
    members = tuple(sorted(unsorted, key=lambda member: member.key))
    keys = [member.key for member in members]
    weights = [member.weight for member in members]
    return Plan(
        name=service.name,
        slot=numbers.slots[service.name],
        vip=service.vip,
        network=service.network,
        ports=service.port,
        port=service.single_port,
        blocks=service.blocks,
        protocol=service.protocol,
        forward=service.forward,
        no_backend=service.no_backend,
        mss=_clamp(service.mss_clamp),
        allow=service.allow,
        deny=service.deny,
        source_limit=_limit(service),
        tunnel=service.tunnel,
        scheduler=service.scheduler,
        table=build_table(keys, weights, config.maglev_size, config.hash_seed),
        ring=build_ring(keys, weights, config.ring_points, config.hash_seed) if service.scheduler == "ketama" else None,
        rotation=_rotation(service.scheduler, members),
        timeouts=_own_timeouts(config, service),
        bounded_load=service.bounded_load or 0.0,
        affinity=stickiness_of(service),
        members=members,
    )


def _own_timeouts(config: Config, service: Service) -> dict[str, float] | None:
    """All of them, where one differs from those of all services."""
    own = service.timeouts.model_dump(exclude_none=True)
    return config.timeouts.model_dump() | own if own else None


def _rotation(scheduler: str, members: tuple[Member, ...]) -> SmoothWrr | None:
    if scheduler == "rr":
        return build_rotation([member.even for member in members])
    return build_rotation([member.weight for member in members]) if scheduler in ("wrr", "random", "p2c") else None


def _member(
    service: Service, backend: Backend, numbers: Numbers, share: Share, standings: Standings, now: float
) -> Member:
    key = service.key(backend)
    standing = standings.of(service.name, key)
    place = Place(group_of(service), backend.address, service.name, key)
    return Member(
        id=numbers.ids[service.name, key],
        key=key,
        address=backend.address,
        port=backend.port or service.single_port,
        weight=share.weight,
        even=share.even if share.weight else 0,
        full=standing.chosen_weight(backend.weight),
        ramp=share.ramp,
        response=standing.response,
        max_flows=backend.max_flows or 0,
        place=numbers.places.get(place, 0),
        near=numbers.near.get(place, ()),
        sticky=share.sticky,
        flow_policy=standing.flow_policy(service, now),
        removed=standing.left is not None,
    )


def _limit(service: Service) -> Limit | None:
    limit = service.source_limit
    if limit is None:
        return None
    return Limit(limit.rate, limit.burst or limit.rate, limit.prefix or (32 if service.vip.version == 4 else 64))


def _clamp(mss: int | bool) -> int:
    return CLAMP_TO_PATH if mss is True else int(mss)


def services_table(config: Config, plans: Iterable[Plan]) -> Services:
    """The plans as one immutable table of the data path."""
    timeouts = config.timeouts.model_dump()
    return Services(
        plans, hash_seed=config.hash_seed, timeouts=timeouts, echo=config.icmp_echo, new_flows=new_flows(config)
    )


def new_flows(config: Config) -> tuple[int, int]:
    """How many entries the workers may make a second, and at once after a time without any.

    A flow of one packet is remembered for tcp_syn, or for udp where there is no TCP: the longest that any service has.
    So by ``auto`` a flood of such flows fills half of the table at once, and half of it in the long run.
    """
    remembered = _longest(config, "tcp", "tcp_syn") or _longest(config, "udp", "udp") or config.timeouts.tcp_syn
    if config.new_flow_rate == "auto":
        rate = max(1, int(config.flows / 2 / remembered))
        return rate, max(rate, config.flows // 2)
    return config.new_flow_rate, min(int(config.new_flow_rate * remembered), MAX_FLOWS)


def _longest(config: Config, protocol: str, key: str) -> float:
    """Of the services of this protocol the longest of these timeouts, in seconds; 0 without such a service."""
    general: float = getattr(config.timeouts, key)
    own = (getattr(service.timeouts, key) for service in config.services if service.protocol == protocol)
    return max((general if each is None else each for each in own), default=0.0)


def tunnel_sources(plans: Iterable[Plan], own: Callable[[Address], Network | None]) -> dict[int, Network]:
    """By backend id, where its tunnel comes from: its service's prefix, or ``own`` for the backend's address.

    A backend that has neither is left out.
    """
    sources = {}
    for plan in plans:
        for member in plan.members if plan.forward in TUNNELS else ():
            configured = (prefix for prefix in plan.tunnel.source if prefix.version == member.address.version)
            source = next(configured, None) or own(member.address)
            if source is not None:
                sources[member.id] = source
    return sources


def classifier_keys(plans: Iterable[Plan], echo: bool) -> Keys:
    """What the receive filter and the guard take; with ``echo`` also pings to VIPs."""
    vips: set[Key] = set()
    replies: dict[str, set[Key]] = {"nat": set(), "fullnat": set()}
    for plan in plans:
        protocol = PROTOCOL_NUMBERS[plan.protocol]
        network, length = plan.network.network_address, plan.network.prefixlen
        for block in plan.blocks:
            vips.add(_key(network, block, protocol, length))
        vips.add(portless_key(plan, LATER | protocol))
        if echo:
            vips.add(portless_key(plan, 0))
        for member in plan.members if plan.forward in replies else ():
            blocks = (Block(member.port, PORT_BITS),) if member.port else plan.blocks
            replies[plan.forward].update(
                _key(member.address, block, protocol, member.address.max_prefixlen) for block in blocks
            )
            replies[plan.forward].add(Key(member.address, 0, LATER | protocol))
    return Keys(vips, replies["nat"], replies["fullnat"])


def _key(address: Address, block: Block, protocol: int, prefix: int) -> Key:
    """As short as it can be written."""
    length = None if prefix == address.max_prefixlen else prefix
    bits = None if block.bits == (PORT_BITS if block.port else 0) else block.bits
    return Key(address, block.port, protocol, length, bits)


def portless_key(plan: Plan, protocol: int) -> Key:
    """Under which echo requests or later fragments to the VIP are found, by a mask that the service has anyway."""
    if plan.network.num_addresses == 1:
        return Key(plan.network.network_address, 0, protocol)
    return Key(plan.network.network_address, 0, protocol, plan.network.prefixlen, plan.blocks[0].bits)


def vips_of_this_host(plans: Iterable[Plan], own: Iterable[Address]) -> list[str]:
    """Prefixes that hold an address of this host, whose own traffic would be taken; ``own``: its addresses."""
    addresses = list(own)
    return [
        f"service {plan.name}: VIP {plan.vip} holds {address}, an address of this host; use prefixes without it"
        for plan in plans
        if plan.network.num_addresses > 1
        for address in addresses
        if address in plan.network
    ]


def restart_reasons(old: Config, new: Config) -> Iterator[str]:
    """Every change that a reload cannot make, as ``key: old -> new``."""
    for key in NEEDS_RESTART:
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            yield f"{key}: {_shown(before)} -> {_shown(after)}"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def held_vips(config: Config) -> set[Address]:
    """The VIPs that fastlb puts on an interface: all with vip_address: interface, else none."""
    vips = (service.network.network_address for service in config.services)
    return set(vips) if config.vip_address == "interface" else set()
