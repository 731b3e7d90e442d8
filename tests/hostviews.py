"""Hosts for tests as the kernel would show them: interfaces up, down and narrow, routes and neighbours."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from fastlb.model.hostview import KernelView, Link, Route
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Plan, plan_services
from tests.balancers import config, service
from tests.frames import mac_bytes, mac_of

LINKS = {
    1: Link(1, "lo", b"", 65536, True),
    2: Link(2, "eth0", b"\x02\x00\x00\x00\x00\x02", 1500, True),
    3: Link(3, "eth1", b"\x02\x00\x00\x00\x00\x03", 1500, True),
    4: Link(4, "eth2", b"\x02\x00\x00\x00\x00\x04", 9000, False),
    5: Link(5, "tun0", b"", 1400, True),
}
ROUTES = [  # prefix, gateway, interface, MTU
    ("0.0.0.0/0", "10.2.0.1", 2, 0),
    ("10.2.0.0/24", None, 2, 0),
    ("10.3.0.0/24", None, 3, 0),
    ("10.4.0.0/24", None, 4, 0),
    ("10.5.0.0/24", None, 5, 0),
    ("10.6.0.0/24", "10.3.0.254", 3, 0),
    ("10.7.0.0/24", None, 0, 0),  # unreachable, says the kernel
    ("10.8.0.0/24", "10.3.0.253", 3, 1000),
    ("10.9.0.0/24", None, 3, 1000),
    ("::/0", "fe80::1", 2, 0),
    ("fd00:3::/64", None, 3, 0),
]
NEIGHBOURS = [
    *((2, address) for address in ("10.2.0.1", "fe80::1", "10.2.0.9")),
    *((3, address) for address in ("10.3.0.11", "10.3.0.253", "10.3.0.254", "10.9.0.1", "fd00:3::11")),
    (4, "10.4.0.1"),
]


def view(**changes: Any) -> KernelView:
    """Return the host, with some of what the kernel says of it replaced."""
    told: dict[str, Any] = {
        "links": LINKS,
        "routes": tuple(
            Route(ip_network(prefix), ip_address(gateway) if gateway else None, link, mtu)
            for prefix, gateway, link, mtu in ROUTES
        ),
        "neighbours": {(link, ip_address(address)): mac_bytes(mac_of(address)) for link, address in NEIGHBOURS},
        "addresses": frozenset(),
    }
    return KernelView(**told | changes)


def planned(*backends: str, forward: str) -> list[Plan]:
    """Return the plans of services s0, s1 … with one backend each."""
    services = [
        service(forward, ip_address(backend).version, "udp", name=f"s{n}", port=80 + n, backends=[{"address": backend}])
        for n, backend in enumerate(backends)
    ]
    return plan_services(config(*services), BackendIds(), 0.0)
