"""The configuration: what may be written, what it means, and everything that is wrong with what was written.

A configuration comes as YAML (`load_config`) or as a dict of the same shape (`Config.from_dict`), and passes
three stages, each of which reports all it finds:

    document.py                  fields.py and the models      rules.py
    text ──► data with lines ──► each field by itself     ──► fields against each other ──► Config
             syntax,             types, ranges, unknown       names and VIPs given twice,
             keys given twice    and missing keys             what a forwarding mode cannot do

Every fault becomes a `Problem` with its line, its key path and what would be right.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_network
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fastlb.config import fields
from fastlb.config.rules import broken_rules
from fastlb.config.yaml import Document, Loc, Origin
from fastlb.errors import ConfigError, Problem
from fastlb.model.match import ANY_PORT, PORT_BITS, Block, blocks_of
from fastlb.model.net import Address, Network, PortRange, endpoint_text

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
        return endpoint_text(backend.address, port)

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
        if isinstance(self.port, PortRange):
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
        default=PortRange(1024, 32767),
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
    tunnel_offload: fields.Flag = Field(
        default=True,
        description="leave it to the kernel or the device to cut super-frames in tunnels, where they can",
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
        maglev_size: int | None = config.maglev_size
    except ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["loc"] not in origin.faults]
        faults += [(detail["loc"], _sentence(detail)) for detail in details]
        services = _salvage_services(data, {loc for loc, _ in faults})
        snat = _salvage_snat(data, [loc for loc, _ in faults])
        vip_address = data.get("vip_address") if isinstance(data, Mapping) else None
        maglev_size = None  # its rule waits until the rest is right
    faults += broken_rules(services, snat, vip_address, maglev_size)
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
