"""The configuration: what may be written, what it means, and everything that is wrong with what was written.

A configuration comes as YAML (`load_config`) or as a dict of the same shape (`Config.from_dict`), and passes
three stages, each of which reports all it finds:

    document.py                  fields.py and the models      the rules below
    text ──► data with lines ──► each field by itself     ──► fields against each other ──► Config
             syntax,             types, ranges, unknown       names and VIPs given twice,
             keys given twice    and missing keys             what a forwarding mode cannot do

Every fault becomes a `Problem` with its line, its key path and what would be right.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv6Address, ip_network
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fastlb import fields
from fastlb.document import Document, Loc, Origin
from fastlb.errors import ConfigError, Problem
from fastlb.fields import Address as Address
from fastlb.fields import Network as Network
from fastlb.shapes import ANY_PORT, MAX_SHAPES, PORT_BITS, Block, Shape, blocks_of

Found = Iterator[tuple[Loc, str]]

MAX_BACKENDS = 65534  # of one service: a Maglev table holds 16-bit positions


TUNNELS = ("ipip", "gre", "gue")
ONE_WAY = ("dsr", *TUNNELS)
TWO_WAY = ("nat", "fullnat")
HASHES = ("maglev", "ketama", "source-hash")


SourcePrefixes = Annotated[tuple[fields.ClientNetwork, ...], AfterValidator(fields.all_different)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Backend(_Model):
    """One server behind a service."""

    address: fields.BackendAddress = Field(
        description="the server's IPv4 or IPv6 address; in nat, fullnat and dsr of the same family as the VIP"
    )
    port: fields.Port | None = Field(
        default=None, description="the port to send to (nat and fullnat only); the service's port when not given"
    )
    weight: fields.Weight = Field(
        default=1, description="share of new flows, relative to the other backends; 0 gives it no new flows"
    )
    max_flows: fields.MaxFlows | None = Field(
        default=None, description="flows that it may have; while it has them, new ones go to others"
    )


class Tunnel(_Model):
    """How packets are wrapped on their way to the backends, in ipip, gre and gue."""

    source: tuple[fields.Source, ...] = Field(
        default=(),
        description="prefixes of outer source addresses, at most one for each IP version; the bits behind the prefix "
        "differ from flow to flow, so that routers and receive queues spread them. None: this host's own address",
    )
    key: fields.GreKey | None = Field(default=None, description="the key of gre; none when not given")
    port: fields.Port = Field(default=6080, description="the UDP port on which backends receive gue")
    df: fields.DontFragment = Field(
        default="inner",
        description="the outer IPv4 header's don't fragment: inner, as the packet inside has it; always; or never",
    )
    udp_checksum: fields.UdpChecksum = Field(
        default="auto",
        description="of gue's outer UDP header: true, computed; false, zero (RFC 6935); auto, computed for IPv6 only",
    )


class Check(_Model):
    """How fastlb finds out whether a backend works."""

    type: fields.CheckType = Field(
        description="tcp: it takes a connection; http: it answers GET with a status from 200 to 399"
    )
    port: fields.Port | None = Field(
        default=None, description="the port to check; the one that flows are sent to when not given"
    )
    path: fields.HttpPath = Field(default="/", description="what http asks for")
    host: fields.HostName | None = Field(
        default=None, description="the Host that http names; the backend's address and port when not given"
    )
    interval: fields.CheckTime = Field(default=2.0, description="from the end of one check to the next")
    timeout: fields.CheckTime = Field(default=1.0, description="after which a check has failed")
    rise: fields.Times = Field(default=2, description="checks in a row that bring a backend up again")
    fall: fields.Times = Field(default=3, description="checks in a row that must fail to take it down")


class Affinity(_Model):
    """How the flows of a client stay together."""

    by: fields.AffinityBy = Field(default="client-ip", description="client-ip: by the client's address")
    timeout: fields.AffinityTimeout = Field(
        default=300.0, description="how long a client is remembered after its last new flow"
    )
    prefix: fields.ClientPrefix | None = Field(
        default=None, description="clients whose addresses share so many bits count as one; all bits when not given"
    )
    group: fields.Name | None = Field(
        default=None, description="services of one group share their clients: what one remembers holds for all"
    )


class SlowStart(_Model):
    """How a backend that is new, or works again, comes to its weight."""

    window: fields.Window = Field(description="how long it takes")
    aggression: fields.Aggression = Field(
        default=1.0,
        description="1: steadily; more: faster at first; the part of its weight is (t / window)^(1 / aggression)",
    )
    floor: fields.Floor = Field(default=0.1, description="the part of its weight that a backend begins with")


class ServiceTimeouts(_Model):
    """What a service has of its own; the rest is as for all services."""

    tcp_syn: fields.Timeout | None = Field(default=None, description="until a connection is established")
    tcp_established: fields.Timeout | None = Field(default=None, description="in an established connection")
    tcp_half_closed: fields.Timeout | None = Field(default=None, description="after one side's FIN")
    tcp_closing: fields.Timeout | None = Field(default=None, description="after both sides' FIN, or a RST")
    udp: fields.Timeout | None = Field(default=None, description="between two datagrams")


class SourceLimit(_Model):
    """How many flows the clients of one prefix may begin."""

    rate: fields.ClientRate = Field(description="new flows a second, in the long run")
    burst: fields.ClientBurst | None = Field(
        default=None, description="new flows at once, after a time without any; as many as rate when not given"
    )
    prefix: fields.ClientPrefix | None = Field(
        default=None, description="the bits of a client's address that count as one source; 32 (IPv4) or 64 (IPv6)"
    )


class Service(_Model):
    """One VIP, port and protocol, and the backends that share its traffic."""

    name: fields.Name = Field(description="a name for the command line and the logs, unique")
    vip: fields.Vip = Field(description="the address that clients connect to, IPv4 or IPv6, or a prefix of addresses")
    port: fields.Ports = Field(
        description="the port that clients connect to, a range of ports, or any for all those of the VIP"
    )
    protocol: fields.Protocol = Field(description="tcp or udp")
    forward: fields.Forward = Field(
        description="nat rewrites the destination, and replies come back through fastlb; fullnat rewrites the source "
        "too, to an address of snat, so that replies come back by themselves; dsr rewrites only "
        "the MAC address, and backends that hold the VIP answer clients directly; ipip, gre and gue wrap each packet "
        "for backends anywhere, which hold the VIP too"
    )
    scheduler: fields.Scheduler = Field(
        default="maglev",
        description="how a new flow's backend is chosen: by hash of the flow (maglev, ketama) or of the client's "
        "address (source-hash); in turn, equally (rr) or by weight (wrr); by lot (random); the fewest flows (lc), by "
        "weight (wlc), times response time (lrt), or that of two drawn by weight (p2c)",
    )
    affinity: Affinity | None = Field(
        default=None, description="new flows of a client go to the backend that its last one went to"
    )
    bounded_load: fields.BoundedLoad | None = Field(
        default=None,
        description="maglev, ketama and source-hash: no backend gets a new flow by which it would have more than so "
        "many times its share of the flows of all; they go on to the next by the hash",
    )
    no_backend: fields.NoBackend = Field(
        default="drop",
        description="what a client gets when no backend can take its flow: drop says nothing, reset answers "
        "with RST (tcp) or an ICMP error (udp)",
    )
    check: Check | None = Field(
        default=None, description="how backends are checked; without it all count as working"
    )
    slow_start: SlowStart | None = Field(
        default=None, description="a backend that is new or works again comes to its weight by and by"
    )
    on_leave: fields.OnLeave = Field(
        default="rehash",
        description="what becomes of the flows of a backend that was taken out of the configuration, or whose drain "
        "has ended: keep, they stay until they are over (after a drain: rehash); rehash, each goes to another backend "
        "with its next packet; reset, the client's next packet of each TCP connection gets a RST (udp: rehash)",
    )
    on_down: fields.OnDown = Field(
        default="auto",
        description="the same for a backend that is down; auto: keep for tcp, rehash for udp",
    )
    timeouts: ServiceTimeouts = Field(
        default=ServiceTimeouts(), description="where this service's flows are remembered for another time than others"
    )
    allow: SourcePrefixes = Field(
        default=(), description="clients that may use the service, as prefixes; when there are any, no others may"
    )
    deny: SourcePrefixes = Field(
        default=(), description="clients that may not; of the prefixes in both lists the longest one decides"
    )
    source_limit: SourceLimit | None = Field(
        default=None, description="how many new flows a second each source may begin"
    )
    tunnel: Tunnel = Field(default=Tunnel(), description="how packets are wrapped (ipip, gre and gue only)")
    mss_clamp: fields.MssClamp = Field(
        default=False,
        description="lower the maximum segment size that SYN and, in nat and fullnat, SYN-ACK announce: true, to what "
        "fits the way to the backend; or to a number of bytes. TCP segments that are too long all the same are cut",
    )
    nat_any_port: fields.Flag = Field(
        default=False,
        description="allows forward: nat with port: any. It cuts connections that backends open through this "
        "host, since all that a backend sends is then taken for replies",
    )
    backends: tuple[Backend, ...] = Field(default=(), description="the servers; may be empty")

    def key(self, backend: Backend) -> str:
        """The backend's name in this service, "10.0.0.11:8080" or "[fd00::11]:8080"; placements depend on it.

        A port that was not given is the service's; with port "any", or a range, it is 0.
        """
        port = backend.port or self.single_port
        host = f"[{backend.address}]" if isinstance(backend.address, IPv6Address) else backend.address
        return f"{host}:{port}"

    def policy(self, *, leaves: bool, down: bool) -> str:
        """What becomes of the flows of a backend that leaves, is down, or both: keep, rehash or reset."""
        on_down = self.on_down if self.on_down != "auto" else "keep" if self.protocol == "tcp" else "rehash"
        policies = [self.on_leave] * leaves + [on_down] * down
        policy = next((each for each in policies if each != "keep"), "keep")
        return "rehash" if self.protocol == "udp" and policy == "reset" else policy

    @property
    def single_port(self) -> int:
        """The service's port; 0 where it has several, and each packet keeps its own."""
        return self.port if isinstance(self.port, int) else 0

    @property
    def client_prefix(self) -> int:
        """The bits of a client's address by which it sticks to a backend."""
        given = self.affinity.prefix if self.affinity else None
        return self.network.max_prefixlen if given is None else given

    @property
    def network(self) -> Network:
        """The VIP as a prefix."""
        return ip_network(self.vip)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The service's ports, as tables hold them."""
        if isinstance(self.port, fields.PortRange):
            return tuple(blocks_of(*self.port))
        return (Block(self.port, PORT_BITS) if isinstance(self.port, int) else ANY_PORT,)


class Timeouts(_Model):
    """How long an idle flow is remembered."""

    tcp_syn: fields.Timeout = Field(
        default=15.0,
        description="until a connection is established: in nat and fullnat both sides have answered, "
        "in the other modes the client has sent again",
    )
    tcp_established: fields.Timeout = Field(default=900.0, description="in an established connection")
    tcp_half_closed: fields.Timeout = Field(
        default=300.0, description="after one side's FIN, in nat and fullnat; the other modes see only the client's"
    )
    tcp_closing: fields.Timeout = Field(default=30.0, description="after both sides' FIN, or a RST")
    udp: fields.Timeout = Field(default=60.0, description="between two datagrams")


class Ring(_Model):
    """The receive ring of each worker on each interface; it takes block_size × blocks of locked memory."""

    block_size: fields.BlockSize = Field(
        default=256 << 10,
        description="bytes of one block; a frame, up to 64 KiB with offloads, fits in a block",
    )
    blocks: fields.Blocks = Field(default=64, description="number of blocks")
    timeout: fields.RingTimeout = Field(
        default="auto",
        description="after this time the kernel hands a block over though it is not full: auto, 1ms, or 20ms where "
        "open blocks are read",
    )
    open_blocks: fields.OpenBlocks = Field(
        default="auto",
        description="read frames before the kernel hands their block over: auto, where a test at the start shows "
        "that it works; true, which does not start without; or false",
    )
    spin: fields.Spin = Field(
        default=50e-6,
        description="how long a worker that has nothing to do looks for further frames before it sleeps",
    )


class Config(_Model):
    """A whole configuration. Made by `load_config` or `Config.from_dict`, which alone check every rule."""

    interfaces: Annotated[
        tuple[fields.InterfaceName, ...], AfterValidator(fields.all_different), AfterValidator(fields.few_enough)
    ] = Field(
        default=(), description="where client packets and NAT replies arrive; fastlb run needs at least one"
    )
    vip_address: fields.VipAddress = Field(
        default="none",
        description="none when VIPs are routed to this host; interface when fastlb shall put them on the "
        "first interface, so that the host answers ARP and ND for them",
    )
    workers: fields.Workers = Field(
        default="auto",
        description="number of packet-path threads, each on a core of its own: auto, which is one fewer than there "
        "are cores and at least 1, or a number",
    )
    hash_seed: fields.Seed = Field(
        default=0, description="seed of the flow hash; the same on every balancer of a fleet"
    )
    snat: Annotated[tuple[fields.SourceAddress, ...], AfterValidator(fields.few_sources)] = Field(
        default=(),
        description="source addresses for forward: fullnat; backends must reach them through this host. Each carries "
        "one flow per port of snat_ports and protocol",
    )
    snat_ports: fields.SourcePorts = Field(
        default=fields.PortRange(1024, 32767),
        description="the source ports for forward: fullnat; on an address of this host they must not be among those "
        "that the kernel gives to the host's own sockets",
    )
    flow_log: fields.FilePath | None = Field(
        default=None,
        description="a file to which the beginning and the end of each flow of nat and fullnat are appended, a JSON "
        "object a line; none: no log",
    )
    flows: fields.FlowCapacity = Field(default=1_000_000, description="flows that the flow table can hold")
    flow_file: fields.FlowFile = Field(
        default="auto",
        description="the file that the flow table is in, so that it outlives a crash or a restart: a path on tmpfs or "
        "ramfs; auto, beside the control socket or in /dev/shm; or none",
    )
    new_flow_rate: fields.NewFlowRate = Field(
        default="auto",
        description="new flows a second that get an entry in the flow table; those beyond it go by their hash without "
        "one. auto: half of flows in the time that a flow of one packet is remembered",
    )
    affinity_entries: fields.AffinityEntries = Field(
        default=65536, description="clients that services with affinity can remember, all together"
    )
    maglev_size: fields.MaglevSize = Field(
        default=65537, description="slots in a Maglev table; the same on every balancer of a fleet"
    )
    ring_points: fields.RingPoints = Field(
        default=256,
        description="points of a service's heaviest backend on its ketama ring; the same on every balancer of a fleet",
    )
    transmit: fields.Transmit = Field(
        default="auto",
        description="how frames leave: xdp (AF_XDP from the ring's own memory), sendmmsg, "
        "or auto, which is xdp where it can be had",
    )
    control: fields.SocketPath = Field(
        default="/run/fastlb/fastlb.sock",
        description="the Unix socket on which a running fastlb takes commands",
    )
    icmp_echo: fields.Flag = Field(
        default=True, description="answer echo requests (ping) to a VIP while one of its services has a backend"
    )
    timeouts: Timeouts = Field(default=Timeouts(), description="how long an idle flow is remembered")
    ring: Ring = Field(default=Ring(), description="the receive rings")
    services: tuple[Service, ...] = Field(default=(), description="what is balanced")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The configuration in a dict of the YAML's shape; raises ConfigError with every Problem found."""
        return _validate(data, Origin())


def load_config(path: str | os.PathLike[str]) -> Config:
    """Reads and checks a YAML file; raises ConfigError with every Problem found."""
    document = Document.read(os.fspath(path))
    return _validate(document.data, document)


def control_path(path: str | os.PathLike[str]) -> str:
    """The control socket that a file names, whatever else is wrong with it; raises ConfigError without a file.

    A running fastlb can thus be asked while its file is being edited.
    """
    data = Document.read(os.fspath(path)).data
    named = data.get("control") if isinstance(data, Mapping) else None
    return named if isinstance(named, str) else str(Config.model_fields["control"].default)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the configuration, for editors and other tools.

    It states types, ranges and keys. The rules between fields are checked only by fastlb.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


# ---- Rules between fields ----------------------------------------------------


def _rules(services: tuple[Service, ...], snat: tuple[Address, ...] | None, vip_address: str | None) -> Found:
    """Whatever breaks a rule that involves more than one field. None is an unknown field."""
    yield from _named_twice(services)
    yield from _listening_twice(services)
    yield from _overlapping(services)
    yield from _shapes(services)
    yield from _groups(services)
    vips = _Vips(services)
    for number, service in enumerate(services):
        loc: Loc = ("services", number)
        own = (
            *_any_port(service), *_check(service), *_too_many(service), *_tunnel(service), *_prefix(service),
            *_bounded_load(service), *_source_ports(service, snat), *_held(service, vip_address), *_timeouts(service),
            *_clients(service), *_source_limit(service),
        )  # fmt: skip
        for path, message in (*own, *_backends(service, vips)):
            yield (*loc, *path), message
    yield from _sources(services, snat or (), vips)


def _named_twice(services: tuple[Service, ...]) -> Found:
    first: dict[str, int] = {}
    for number, service in enumerate(services):
        if service.name and first.setdefault(service.name, number) != number:
            yield (
                ("services", number, "name"),
                f'"{service.name}" is already the name of services[{first[service.name]}]; give each its own',
            )


def _listening_twice(services: tuple[Service, ...]) -> Found:
    first: dict[tuple[object, object, str], int] = {}
    for number, service in enumerate(services):
        listens = (service.vip, service.port, service.protocol)
        if all(listens) and first.setdefault(listens, number) != number:
            yield (
                ("services", number),
                f"services[{first[listens]}] already has VIP {service.vip}, port {service.port}, "
                f"{service.protocol}; change one of the three, or put the backends into one service",
            )


def _overlapping(services: tuple[Service, ...]) -> Found:
    """Ranges of which neither lies within the other: for the ports of both, neither is the more specific."""
    ranges: dict[tuple[object, str], list[tuple[int, fields.PortRange]]] = {}
    for number, service in enumerate(services):
        if service.vip and service.protocol and isinstance(service.port, fields.PortRange):
            ranges.setdefault((service.vip, service.protocol), []).append((number, service.port))
    for listed in ranges.values():
        for at, (number, ports) in enumerate(listed):
            for other, others in listed[:at]:
                (first, last), (low, high) = ports, others
                if first < low <= last < high or low < first <= high < last:
                    yield (
                        ("services", number, "port"),
                        f"{ports} overlaps {others} of services[{other}], which has the same VIP and protocol; "
                        "one must lie within the other, or they must have no port in common",
                    )


def _shapes(services: tuple[Service, ...]) -> Found:
    shapes = {
        Shape(service.network.version, service.network.prefixlen, block.bits)
        for service in services
        if service.vip and service.port
        for block in service.blocks
    }
    uncommon = [shape for shape in shapes if not shape.is_whole]
    if len(uncommon) > MAX_SHAPES:
        yield (
            ("services",),
            f"the prefixes and port ranges of VIPs take {len(uncommon)} look-ups of different kinds, and at most "
            f"{MAX_SHAPES} are made; use fewer lengths of prefixes, or ranges that begin and end at multiples of a "
            "power of two (8000-8063, 32768-49151), or any",
        )


def _held(service: Service, vip_address: str | None) -> Found:
    if vip_address == "interface" and service.vip and service.network.num_addresses > 1:
        yield (
            ("vip",),
            f"vip_address: interface puts single addresses on the interface, and {service.vip} is a prefix; "
            "route it to this host, with vip_address: none",
        )


class _Vips:
    """Who has an address as a VIP."""

    def __init__(self, services: tuple[Service, ...]) -> None:
        named = [
            (service.vip, f'service "{service.name}"' if service.name else f"services[{number}]")
            for number, service in reversed(list(enumerate(services)))
            if service.vip
        ]
        self._addresses = {vip: owner for vip, owner in named if isinstance(vip, Address)}
        self._prefixes = [(vip, owner) for vip, owner in reversed(named) if isinstance(vip, Network)]

    def owner(self, address: Address) -> str | None:
        """Whose VIP it is, or lies within; None: nobody's."""
        within = (f"in {prefix}, the VIP of {owner}" for prefix, owner in self._prefixes if address in prefix)
        exactly = self._addresses.get(address)
        return f"the VIP of {exactly}" if exactly else next(within, None)


def _any_port(service: Service) -> Found:
    nat_any = service.forward == "nat" and service.port == "any"
    if nat_any and service.nat_any_port is False:
        yield (
            ("port",),
            "forward: nat with port: any cuts every connection that a backend opens through this host; "
            "give a port, or accept that with nat_any_port: true",
        )
    if not nat_any and service.nat_any_port and service.forward and service.port:
        yield ("nat_any_port",), "it is only for forward: nat with port: any; leave it out"


def _check(service: Service) -> Found:
    """What cannot be checked, and what a scheduler cannot do without."""
    check = service.check
    if check is not None and check.port is None and service.port and not service.single_port:
        yield ("check",), f"a service with port: {service.port} has no one port to check; give the check one"
    if check is not None and check.type == "tcp":
        for key in sorted({"path", "host"} & check.model_fields_set):
            yield ("check", key), "it is only for type: http; leave it out"
    if check is None and service.scheduler == "lrt" and service.forward in ONE_WAY:
        yield (
            ("scheduler",),
            f"forward: {service.forward} does not see backends answer, so lrt needs response times of a check; "
            "give the service a check, or use wlc",
        )


def _prefix(service: Service) -> Found:
    for key, given in (("affinity", service.affinity), ("source_limit", service.source_limit)):
        prefix = given.prefix if given is not None else None
        if prefix is not None and service.vip is not None and prefix > service.network.max_prefixlen:
            yield (
                (key, "prefix"),
                f"found {prefix}; clients of VIP {service.vip} are IPv{service.vip.version}, so it must "
                f"be a whole number from 1 to {service.network.max_prefixlen}",
            )


def _groups(services: tuple[Service, ...]) -> Found:
    """One client must be the same to all services of a group, and be forgotten by all at once."""
    first: dict[str, int] = {}
    for number, service in enumerate(services):
        if service.affinity is None or service.affinity.group is None or service.vip is None:
            continue
        group = service.affinity.group
        other = services[first.setdefault(group, number)]
        differs = {
            "IP version": (service.vip.version, other.vip.version),
            "prefix": (service.client_prefix, other.client_prefix),
            "timeout": (service.affinity.timeout, other.affinity.timeout if other.affinity else None),
        }
        for what, (own, others) in differs.items():
            if own != others:
                yield (
                    ("services", number, "affinity", "group"),
                    f"{what} {own} differs from {others} of services[{first[group]}], which is of group "
                    f'"{group}" too; services of a group must have the same, or choose another group',
                )
                break


def _bounded_load(service: Service) -> Found:
    if service.bounded_load is not None and service.scheduler is not None and service.scheduler not in HASHES:
        yield (
            ("bounded_load",),
            f"scheduler: {service.scheduler} goes by no hash; leave it out, or use one of: {', '.join(HASHES)}",
        )


def _source_ports(service: Service, snat: tuple[Address, ...] | None) -> Found:
    if service.forward != "fullnat" or service.vip is None or snat is None:
        return
    if service.vip.version not in {address.version for address in snat}:
        yield (
            ("forward",),
            f"fullnat needs an IPv{service.vip.version} address to send from; add one of this host's to snat, "
            "which stands beside services",
        )


def _clients(service: Service) -> Found:
    """Prefixes that no client of the VIP has, or of which nobody could say what they mean."""
    if service.allow is None or service.deny is None:
        return
    for key, prefixes in (("allow", service.allow), ("deny", service.deny)):
        for number, prefix in enumerate(prefixes):
            if service.vip and prefix.version != service.vip.version:
                yield (
                    (key, number),
                    f"{prefix} is IPv{prefix.version} and the VIP {service.vip} is IPv{service.vip.version}; "
                    "no client of this service is in it; leave it out",
                )
    allowed = {prefix: number for number, prefix in enumerate(service.allow)}
    for number, prefix in enumerate(service.deny):
        if prefix in allowed:
            yield ("deny", number), f"{prefix} is allow[{allowed[prefix]}] as well; keep one of the two"


def _source_limit(service: Service) -> Found:
    limit = service.source_limit
    if limit is not None and limit.burst is not None and limit.burst > limit.rate * fields.MOST_BURST:
        yield (
            ("source_limit", "burst"),
            f"found {limit.burst}; at {limit.rate} a second it must be at most {limit.rate * fields.MOST_BURST}, "
            "an hour's worth",
        )


def _sources(services: tuple[Service, ...], snat: tuple[Address, ...], vips: _Vips) -> Found:
    backends = {backend.address for service in services for backend in service.backends}
    for number, address in enumerate(snat):
        if owner := vips.owner(address):
            yield ("snat", number), f"{address} is {owner}; it must be an address of its own"
        if address in backends:
            yield ("snat", number), f"{address} is a backend; it must be an address of this host"


def _tunnel(service: Service) -> Found:
    """Keys that the mode does not have."""
    if service.tunnel is None or service.forward is None:
        return
    given = service.tunnel.model_fields_set
    modes = {"source": TUNNELS, "df": TUNNELS, "key": ("gre",), "port": ("gue",), "udp_checksum": ("gue",)}
    for key in sorted(given):
        if service.forward not in modes[key]:
            yield ("tunnel", key), f"it is only for forward: {', '.join(modes[key])}; leave it out"
    versions = [prefix.version for prefix in service.tunnel.source]
    if len(set(versions)) < len(versions):
        yield ("tunnel", "source"), "more than one prefix of an IP version; keep one of IPv4, one of IPv6"


def _timeouts(service: Service) -> Found:
    """Those of the other protocol."""
    for key in sorted(service.timeouts.model_fields_set) if service.timeouts and service.protocol else ():
        protocol = key.split("_")[0]
        if protocol != service.protocol:
            yield ("timeouts", key), f"it is only for protocol: {protocol}; leave it out"


def _too_many(service: Service) -> Found:
    if len(service.backends) > MAX_BACKENDS:
        yield ("backends",), f"{len(service.backends)} backends; a Maglev table takes at most {MAX_BACKENDS}"


def _backends(service: Service, vips: _Vips) -> Found:
    first: dict[str, int] = {}
    for number, backend in enumerate(service.backends):
        loc: Loc = ("backends", number)
        for path, message in (
            *_backend_port(service, backend),
            *_backend_address_fits(service, backend, vips),
        ):
            yield (*loc, *path), message
        if backend.address and service.port:
            key = service.key(backend)
            if first.setdefault(key, number) != number:
                shown = key.removesuffix(":0")
                yield loc, f"{shown} is already backends[{first[key]}]; keep one, with the sum of the weights"


def _backend_port(service: Service, backend: Backend) -> Found:
    if backend.port is None:
        return
    if service.forward in ONE_WAY:
        yield (
            ("port",),
            f"forward: {service.forward} cannot change the port; leave it out (backends listen on the service's port), "
            "or use forward: nat",
        )
    elif service.port and not service.single_port:
        yield ("port",), f"a service with port: {service.port} keeps each packet's port; leave it out"


def _backend_address_fits(service: Service, backend: Backend, vips: _Vips) -> Found:
    if not backend.address:
        return
    tunnelled = service.forward in TUNNELS
    if service.vip and service.vip.version != backend.address.version and not tunnelled:
        yield (
            ("address",),
            f"{backend.address} is IPv{backend.address.version} and the VIP {service.vip} is "
            f"IPv{service.vip.version}; both must be of one family (tunnels may mix them)",
        )
    if owner := vips.owner(backend.address):
        yield ("address",), f"{backend.address} is {owner}; it must be the server's own address"


# ---- From data to Config -----------------------------------------------------


def _validate(data: object, origin: Origin) -> Config:
    """Config, or ConfigError with everything that is wrong, in the order of the text."""
    faults = list(origin.faults.items())
    config = None
    try:
        config = Config.model_validate(data)
        services = config.services
        snat: tuple[Address, ...] | None = config.snat
        vip_address: str | None = config.vip_address
    except ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["loc"] not in origin.faults]
        faults += [(detail["loc"], _sentence(detail)) for detail in details]
        services = _salvage_services(data, {loc for loc, _ in faults})
        snat = _salvage_snat(data, [loc for loc, _ in faults])
        vip_address = data.get("vip_address") if isinstance(data, Mapping) else None
    faults += _rules(services, snat, vip_address)
    if faults or config is None:
        problems = [(origin.line(loc), loc, message) for loc, message in faults]
        problems.sort(key=lambda problem: problem[0])
        raise ConfigError([Problem(origin.where(line), _dotted(loc), text) for line, loc, text in problems])
    return config


def _dotted(loc: Loc) -> str:
    """("services", 0, "port") as services[0].port."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _model_at(loc: Loc) -> type[_Model]:
    """The model whose fields are the keys of the mapping at ``loc``."""
    below: dict[str, type[_Model]] = {
        "timeouts": Timeouts,
        "ring": Ring,
        "tunnel": Tunnel,
        "affinity": Affinity,
        "check": Check,
        "slow_start": SlowStart,
        "source_limit": SourceLimit,
        "services": Service,
        "backends": Backend,
    }
    names = [part for part in loc if isinstance(part, str)]
    return below[names[-1]] if names else Config


def _sentence(detail: ErrorDetails) -> str:
    """What pydantic found, in words that say what would be right."""
    kind, loc, value = detail["type"], detail["loc"], detail["input"]
    if kind == "missing":
        description = _model_at(loc[:-1]).model_fields[str(loc[-1])].description
        return f"it is missing; add it: {description}"
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), list(_model_at(loc[:-1]).model_fields))
    if kind == "invalid_key":
        return "a key must be text; write it in quotes"
    if kind in ("model_type", "dict_type"):
        keys = ", ".join(_model_at(loc).model_fields)
        return f"found {fields.show(value)}; it must be a mapping with keys among: {keys}"
    if kind == "tuple_type":
        return f"found {fields.show(value)}; it must be a list ([] when there are none)"
    return detail["msg"]


def _unknown_key(key: str, valid: list[str]) -> str:
    if near := difflib.get_close_matches(key.lower().replace("-", "_"), valid, n=1):
        return f'there is no such key; did you mean "{near[0]}"?'
    return f"there is no such key; use one of: {', '.join(valid)}"


def _salvage_services(data: object, bad: set[Loc]) -> tuple[Service, ...]:
    """The services of data that has faults, with None for each field that is faulty or missing."""
    services = []
    for loc, raw in _items(data, "services", ()):
        backends = tuple(_salvage(Backend, item, at, bad) for at, item in _items(raw, "backends", loc))
        services.append(_salvage(Service, raw, loc, bad).model_copy(update={"backends": backends}))
    return tuple(services)


def _salvage_snat(data: object, bad: list[Loc]) -> tuple[Address, ...] | None:
    """The addresses of snat; None when something is wrong with it, so that nothing more can be said."""
    if not isinstance(data, Mapping) or any(loc[:1] == ("snat",) for loc in bad):
        return None
    return tuple(map(fields.parse_address, data.get("snat", ())))


def _items(data: object, key: str, loc: Loc) -> Iterator[tuple[Loc, Mapping[str, object]]]:
    """The mappings in the list at ``data[key]`` with their locations."""
    listed = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(listed, list | tuple):
        for number, item in enumerate(listed):
            yield (*loc, key, number), item if isinstance(item, Mapping) else {}


_M = TypeVar("_M", bound=_Model)


def _salvage(model: type[_M], raw: Mapping[str, object], loc: Loc, bad: set[Loc]) -> _M:
    """What is valid in ``raw``, as a model that was not validated as a whole."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if (*loc, name) in bad and name != "check":
            values[name] = None
        elif name not in raw:
            values[name] = None if field.is_required() else field.default
        elif name in ("tunnel", "timeouts", "affinity", "allow", "deny", "source_limit"):
            values[name] = None  # their own rules wait until the rest is right
        elif name == "check":
            inner = raw[name]
            values[name] = _salvage(Check, inner if isinstance(inner, Mapping) else {}, (*loc, name), bad)
        else:
            parse = _PARSERS.get((model, name))
            values[name] = parse(raw[name]) if parse else raw[name]
    return model.model_construct(_fields_set=set(raw), **values)


_PARSERS: dict[tuple[type[_Model], str], Callable[[object], object]] = {
    (Service, "vip"): fields.parse_vip,
    (Service, "port"): fields.parse_ports,
    (Backend, "address"): fields.parse_address,
}
