"""The tables of forwarding modes and of schedulers: one row each, read by everything that tells them apart.

Configuration, its schema and its rules, planning, trace, status and the documentation read these rows. The data path
has its own numbers for the names (dataplane/snapshot.pxi), and a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from socket import IPPROTO_GRE, IPPROTO_IPIP, IPPROTO_IPV6, IPPROTO_UDP

IP_HEADER = {4: 20, 6: 40}  # bytes, without options or extension headers
GRE_KEY_BYTES = 4


@dataclass(frozen=True)
class Mode:
    """How packets reach a service's backends. A mode with ``outer_protocols`` is a tunnel."""

    name: str
    help: str
    sees_replies: bool = False  # replies come back through fastlb, which translates both legs
    takes_all_as_replies: bool = False  # whatever comes from a backend's address and port is taken for a reply
    sends_from_snat: bool = False  # packets to backends come from an address of snat
    on_link: bool = False  # a backend must be a neighbour: only the MAC address is rewritten
    outer_protocols: Mapping[int, int] | None = None  # of a tunnel: the outer IP protocol, by the inner IP version
    header_bytes: int = 0  # of a tunnel: between the outer IP header and the inner one, without a key
    options: frozenset[str] = frozenset()  # of a tunnel: the keys of `tunnel` that it has
    wiring: str = ""  # what is wrong, mostly, where a backend passes its checks and no client gets through to it

    @property
    def silence(self) -> str:
        """Return what there is to say of a backend that is sent flows, none of which is answered."""
        return "no replies through this host" if self.sees_replies else "no client gets past its SYN"

    @property
    def is_tunnel(self) -> bool:
        """True if a packet is wrapped into another one."""
        return self.outer_protocols is not None

    def outer_bytes(self, version: int, key: int | None) -> int:
        """Return the bytes that a tunnel adds towards a backend of this IP version; 0 in the other modes.

        ``key``: the GRE key (RFC 2890), or None without one.
        """
        if not self.is_tunnel:
            return 0
        return IP_HEADER[version] + self.header_bytes + (0 if key is None else GRE_KEY_BYTES)


_AT_THE_OTHER_END = (
    "the backend must unwrap the tunnel, hold the VIP (on lo), and have rp_filter off on the tunnel's device"
)
MODES = {
    mode.name: mode
    for mode in (
        Mode(
            "nat",
            "rewrites the destination, and replies come back through fastlb",
            sees_replies=True,
            takes_all_as_replies=True,
            wiring="this host must be the backend's default gateway, or its way to clients; where it cannot be, or "
            "clients are on the backend's own network, use forward: fullnat",
        ),
        Mode(
            "fullnat",
            "rewrites the source too, to an address of snat, so that replies come back by themselves",
            sees_replies=True,
            sends_from_snat=True,
            wiring="the backend's way to the addresses of snat must lead to this host, to one of interfaces",
        ),
        Mode(
            "dsr",
            "rewrites only the MAC address, and backends that hold the VIP answer clients directly",
            on_link=True,
            wiring="the backend must hold the VIP (ip address add VIP dev lo); its replies must not come by this host "
            "when this host holds the VIP (vip_address: interface)",
        ),
        Mode(
            "ipip",
            "wraps each packet into another IP packet for backends anywhere, which hold the VIP too",
            outer_protocols={4: IPPROTO_IPIP, 6: IPPROTO_IPV6},
            wiring=_AT_THE_OTHER_END,
            options=frozenset({"source", "df"}),
        ),
        Mode(
            "gre",
            "does the same with a GRE header between them",
            outer_protocols={4: IPPROTO_GRE, 6: IPPROTO_GRE},
            header_bytes=4,
            wiring=_AT_THE_OTHER_END,
            options=frozenset({"source", "df", "key"}),
        ),
        Mode(
            "gue",
            "does the same with UDP and GUE headers between them",
            outer_protocols={4: IPPROTO_UDP, 6: IPPROTO_UDP},
            header_bytes=12,
            wiring=_AT_THE_OTHER_END,
            options=frozenset({"source", "df", "port", "udp_checksum"}),
        ),
    )
}
TUNNELS = tuple(name for name, mode in MODES.items() if mode.is_tunnel)
TWO_WAY = tuple(name for name, mode in MODES.items() if mode.sees_replies)
ONE_WAY = tuple(name for name, mode in MODES.items() if not mode.sees_replies)
TUNNEL_OPTIONS = {
    option: tuple(name for name, mode in MODES.items() if option in mode.options)
    for option in sorted(frozenset().union(*(mode.options for mode in MODES.values())))
}
"""The keys of `tunnel`, and the names of the modes that have them."""


@dataclass(frozen=True)
class Scheduler:
    """How a new flow's backend is chosen. ``table``: what is built for it beside the Maglev table."""

    name: str
    help: str
    by_hash: bool = False  # of the flow or its client: any balancer with the configuration finds the same
    table: str = ""  # "ring", "rotation" or none
    weighted: bool = True  # False: every backend that takes flows counts as much
    by_response: bool = False  # the response times of health checks count
    needs_response: bool = False  # it cannot do without response times, those of flows or of checks


SCHEDULERS = {
    scheduler.name: scheduler
    for scheduler in (
        Scheduler("maglev", "by hash of the flow, in a Maglev table", by_hash=True),
        Scheduler("ketama", "by hash of the flow, on a ring", by_hash=True, table="ring"),
        Scheduler("source-hash", "by hash of the client's address", by_hash=True),
        Scheduler("rr", "in turn, equally", table="rotation", weighted=False),
        Scheduler("wrr", "in turn, by weight", table="rotation"),
        Scheduler("random", "by lot, by weight", table="rotation"),
        Scheduler("lc", "the fewest flows", weighted=False),
        Scheduler("wlc", "the fewest flows by weight"),
        Scheduler("lrt", "the fewest flows by weight, times response time", by_response=True, needs_response=True),
        Scheduler("p2c", "the better one, by flows and response time, of two drawn by weight", table="rotation",
                  by_response=True),
    )
}  # fmt: skip
HASHES = tuple(name for name, scheduler in SCHEDULERS.items() if scheduler.by_hash)
