"""The models of what may be written: one class for each mapping of the file, but the whole, which is `Config`.

Each field's description is what the JSON Schema says of it, and what a message says of a key that is missing. The rows
of `fastlb.model.modes` and `fastlb.model.checks` tell modes, schedulers and types of checks apart.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastlb.config import fields
from fastlb.config.addresses import all_different
from fastlb.model.checks import CHECKS
from fastlb.model.match import ANY_PORT, PORT_BITS, Block, blocks_of
from fastlb.model.modes import HASHES, MODES, SCHEDULERS, TUNNELS, TWO_WAY
from fastlb.model.names import listed
from fastlb.model.net import Network, PortRange, host_text

SourcePrefixes = Annotated[tuple[fields.ClientNetwork, ...], AfterValidator(all_different)]

_TWO_WAY = listed(TWO_WAY)
_TUNNELS = listed(TUNNELS)
_ONE_FAMILY = listed(name for name, mode in MODES.items() if not mode.is_tunnel)

_host_text = lru_cache(maxsize=1 << 17)(host_text)  # a backend's name is asked for again and again


class Model(BaseModel):
    """A mapping of the file: immutable, with no other keys than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Backend(Model):
    """One server behind a service."""

    address: fields.BackendAddress = Field(
        description=f"the server's IPv4 or IPv6 address; in {_ONE_FAMILY} of the same family as the VIP"
    )
    port: fields.Port | None = Field(
        default=None, description=f"the port to send to ({_TWO_WAY} only); the service's port when not given"
    )
    weight: fields.Weight = Field(
        default=1, description="share of new flows, relative to the other backends; 0 gives it no new flows"
    )
    max_flows: fields.MaxFlows | None = Field(
        default=None, description="flows that it may have; while it has them, new ones go to others"
    )


class Tunnel(Model):
    """How packets are wrapped on their way to the backends, in the modes that are tunnels."""

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


class Check(Model):
    """How fastlb finds out whether a backend works."""

    type: fields.CheckType = Field(description="; ".join(f"{name}: {check.help}" for name, check in CHECKS.items()))
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


class Affinity(Model):
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


class SlowStart(Model):
    """How a backend that is new, or works again, comes to its weight."""

    window: fields.Window = Field(description="how long it takes")
    aggression: fields.Aggression = Field(
        default=1.0,
        description="1: steadily; more: faster at first; the part of its weight is (t / window)^(1 / aggression)",
    )
    floor: fields.Floor = Field(default=0.1, description="the part of its weight that a backend begins with")


class ServiceTimeouts(Model):
    """What a service has of its own; the rest is as for all services."""

    tcp_syn: fields.Timeout | None = Field(default=None, description="until a connection is established")
    tcp_established: fields.Timeout | None = Field(default=None, description="in an established connection")
    tcp_half_closed: fields.Timeout | None = Field(default=None, description="after one side's FIN")
    tcp_closing: fields.Timeout | None = Field(default=None, description="after both sides' FIN, or a RST")
    udp: fields.Timeout | None = Field(default=None, description="between two datagrams")


class SourceLimit(Model):
    """How many flows the clients of one prefix may begin."""

    rate: fields.ClientRate = Field(description="new flows a second, in the long run")
    burst: fields.ClientBurst | None = Field(
        default=None, description="new flows at once, after a time without any; as many as rate when not given"
    )
    prefix: fields.ClientPrefix | None = Field(
        default=None, description="the bits of a client's address that count as one source; 32 (IPv4) or 64 (IPv6)"
    )


class Service(Model):
    """One VIP, port and protocol, and the backends that share its traffic."""

    name: fields.Name = Field(description="a name for the command line and the logs, unique")
    vip: fields.Vip = Field(description="the address that clients connect to, IPv4 or IPv6, or a prefix of addresses")
    port: fields.Ports = Field(
        description="the port that clients connect to, a range of ports, or any for all those of the VIP"
    )
    protocol: fields.Protocol = Field(description="tcp or udp")
    forward: fields.Forward = Field(
        description="; ".join(f"{name} {mode.help}" for name, mode in MODES.items())
    )
    scheduler: fields.Scheduler = Field(
        default="maglev",
        description="how a new flow's backend is chosen. "
        + "; ".join(f"{name}: {scheduler.help}" for name, scheduler in SCHEDULERS.items()),
    )
    affinity: Affinity | None = Field(
        default=None, description="new flows of a client go to the backend that its last one went to"
    )
    bounded_load: fields.BoundedLoad | None = Field(
        default=None,
        description=f"{listed(HASHES)}: no backend gets a new flow by which it would have more than so "
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
        default="keep",
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
    tunnel: Tunnel = Field(default=Tunnel(), description=f"how packets are wrapped ({_TUNNELS} only)")
    mss_clamp: fields.MssClamp = Field(
        default=False,
        description=f"lower the maximum segment size that SYN and, in {_TWO_WAY}, SYN-ACK announce: true, to what "
        "fits the way to the backend; or to a number of bytes. TCP segments that are too long all the same are cut",
    )
    nat_any_port: fields.Flag = Field(
        default=False,
        description="allows forward: nat with port: any. It cuts connections that backends open through this "
        "host, since all that a backend sends is then taken for replies",
    )
    backends: tuple[Backend, ...] = Field(default=(), description="the servers; may be empty")

    def key(self, backend: Backend) -> str:
        """Return the backend's name in this service, "10.0.0.11:8080" or "[fd00::11]:8080"; placements depend on it.

        A port that was not given is the service's; with port "any", or a range, it is 0.
        """
        return f"{_host_text(backend.address)}:{backend.port or self.single_port}"

    def policy(self, *, leaves: bool, down: bool) -> str:
        """Return what becomes of the flows of a backend that leaves, is down, or both: keep, rehash or reset."""
        on_down = self.on_down if self.on_down != "auto" else "keep" if self.protocol == "tcp" else "rehash"
        policies = [self.on_leave] * leaves + [on_down] * down
        policy = next((each for each in policies if each != "keep"), "keep")
        return "rehash" if self.protocol == "udp" and policy == "reset" else policy

    @property
    def single_port(self) -> int:
        """Return the service's port; 0 where it has several, and each packet keeps its own."""
        return self.port if isinstance(self.port, int) else 0

    @property
    def client_prefix(self) -> int:
        """Return the bits of a client's address by which it sticks to a backend."""
        given = self.affinity.prefix if self.affinity else None
        return self.network.max_prefixlen if given is None else given

    @property
    def network(self) -> Network:
        """Return the VIP as a prefix."""
        if isinstance(self.vip, IPv4Network | IPv6Network):
            return self.vip
        number, bits = int(self.vip), self.vip.max_prefixlen  # ip_network would parse the address' text
        return IPv4Network((number, bits)) if isinstance(self.vip, IPv4Address) else IPv6Network((number, bits))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return the service's ports, as tables hold them."""
        if isinstance(self.port, PortRange):
            return tuple(blocks_of(*self.port))
        return (Block(self.port, PORT_BITS) if isinstance(self.port, int) else ANY_PORT,)


class Timeouts(Model):
    """How long an idle flow is remembered."""

    tcp_syn: fields.Timeout = Field(
        default=15.0,
        description=f"until a connection is established: in {_TWO_WAY} both sides have answered, "
        "in the other modes the client has sent again",
    )
    tcp_established: fields.Timeout = Field(default=900.0, description="in an established connection")
    tcp_half_closed: fields.Timeout = Field(
        default=300.0, description=f"after one side's FIN, in {_TWO_WAY}; the other modes see only the client's"
    )
    tcp_closing: fields.Timeout = Field(default=30.0, description="after both sides' FIN, or a RST")
    udp: fields.Timeout = Field(default=60.0, description="between two datagrams")


class Ring(Model):
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
