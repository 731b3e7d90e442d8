"""The kernel's netlink messages as bytes, as they come in dumps and events."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_network
from typing import Any

from pyroute2.netlink import nlmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from fastlb.kernel import netlink
from fastlb.kernel.host_tables import Change, HostTables

UP, DOWN = 0x1 | 0x10000, 0x1
REACHABLE, STALE, FAILED = 0x02, 0x04, 0x20
MAC, OTHER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
REPLACE, APPEND = 0x100, 0x800  # NLM_F_*


def encoded(message: nlmsg, kind: int, fields: dict[str, Any], attrs: list[tuple[str, Any]]) -> bytes:
    message.update(fields)
    message["header"]["type"] = kind
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data)


def link(
    index: int, name: str, mac: str | None = MAC, flags: int = UP, kind: int = netlink.NEWLINK, **more: Any
) -> bytes:
    attrs: list[tuple[str, Any]] = [("IFLA_IFNAME", name), ("IFLA_MTU", 1500)]
    attrs += [("IFLA_ADDRESS", mac)] if mac else []
    return encoded(ifinfmsg(), kind, {"index": index, "flags": flags, "family": 0} | more, attrs)


def address(index: int, text: str, length: int, kind: int = netlink.NEWADDR) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return encoded(ifaddrmsg(), kind, {"index": index, "prefixlen": length, "family": family}, [("IFA_ADDRESS", text)])


def neighbour(
    index: int, text: str, state: int, mac: str | None = MAC, kind: int = netlink.NEWNEIGH, **more: Any
) -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    attrs = [("NDA_DST", text)] + ([("NDA_LLADDR", mac)] if mac else [])
    return encoded(ndmsg(), kind, {"ifindex": index, "state": state, "family": family, "flags": 0} | more, attrs)


def apply(tables: HostTables, *messages: bytes) -> list[Change]:
    return [
        tables.apply(kind, data, offset)
        for message in messages
        for kind, _flags, data, offset in netlink.messages(message)
    ]


def route(
    target: str, *, kind: int = 1, metric: int = 0, gateway: str | None = None, out: int = 2, how: int = 0,
    event: int = netlink.NEWROUTE, hops: list[dict[str, Any]] | None = None, **more: Any,
) -> bytes:  # fmt: skip
    """A route; ``how``: the message's flags; ``hops``: those of a route of several."""
    network = ip_network(target)
    family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
    attrs: list[tuple[str, Any]] = [("RTA_PRIORITY", metric)]
    attrs += [("RTA_MULTIPATH", hops)] if hops else [("RTA_OIF", out)]
    attrs += [("RTA_DST", str(network.network_address))] if network.prefixlen else []
    attrs += [("RTA_GATEWAY", gateway)] if gateway else []
    fields = {"family": family, "dst_len": network.prefixlen, "src_len": 0, "tos": 0, "type": kind, "flags": 0}
    made = bytearray(encoded(rtmsg(), event, fields | {"table": 254} | more, attrs))
    struct.pack_into("=H", made, 6, how)
    return bytes(made)


def with_nexthop(message: bytes, number: int) -> bytes:
    """A route that names a nexthop object."""
    made = message + struct.pack("=HHI", 8, 30, number)
    return struct.pack("=I", len(made)) + made[4:]


def nexthop(number: int, kind: int = netlink.NEWNEXTHOP) -> bytes:
    """A nexthop object."""
    body = struct.pack("=4BI HHI", socket.AF_INET, 0, 0, 0, 0, 8, 1, number)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body
