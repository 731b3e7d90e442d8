"""From what the kernel says to where frames go, seen through real packets."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from fastlb._core import Pipeline
from fastlb.model.hostview import KernelView
from fastlb.plan import routes
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import CLIENT, KEY, VIP, config, service
from tests.frames import frame, mac_bytes, mac_of
from tests.hostviews import LINKS, planned, view


def balancer(forward: str, backend: str, seen: KernelView) -> Pipeline:
    version = ip_address(backend).version
    settings = config(service(forward, version, "udp", backends=[{"address": backend}]))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(64, KEY)
    pipeline.publish(services_table(settings, plans), routes.routes_table(seen, plans))
    return pipeline


# backend; what happens with nat and with dsr; next hop and interface
TOWARDS_BACKENDS = [
    ("10.3.0.11", "scheduled", "scheduled", "10.3.0.11", 3),
    ("fd00:3::11", "scheduled", "scheduled", "fd00:3::11", 3),
    ("10.2.0.9", "scheduled", "scheduled", "10.2.0.9", 2),
    ("10.3.0.12", "no_neighbour", "no_neighbour", None, 0),
    ("10.6.0.1", "scheduled", "not_on_link", "10.3.0.254", 3),
    ("192.0.2.1", "scheduled", "not_on_link", "10.2.0.1", 2),
    ("2001:db8:9::1", "scheduled", "not_on_link", "fe80::1", 2),
    ("10.4.0.1", "no_route", "no_route", None, 0),  # the link is down
    ("10.5.0.1", "no_route", "no_route", None, 0),  # the link has no MAC addresses
    ("10.7.0.1", "no_route", "no_route", None, 0),
]


@pytest.mark.parametrize(("backend", "nat", "dsr", "next_hop", "link"), TOWARDS_BACKENDS)
def test_towards_a_backend(backend: str, nat: str, dsr: str, next_hop: str | None, link: int) -> None:
    version = ip_address(backend).version
    for forward, reason in (("nat", nat), ("dsr", dsr)):
        raw = frame(CLIENT[version], 40000, VIP[version], 80, "udp")
        _, found, sent, _, ifindex = balancer(forward, backend, view()).process([raw], 0, 2)[0]
        assert found == reason
        if sent:
            assert sent[0][:6] == mac_bytes(mac_of(next_hop or ""))
            assert (sent[0][6:12], ifindex) == (LINKS[link].mac, link)


TOWARDS_CLIENTS = [
    ("198.51.100.7", "conntrack", "10.2.0.1", 2),
    ("10.2.0.9", "conntrack", "10.2.0.9", 2),
    ("10.2.0.8", "no_neighbour", None, 0),
    ("10.3.0.11", "conntrack", "10.3.0.11", 3),
    ("10.6.0.77", "conntrack", "10.3.0.254", 3),
    ("10.4.0.1", "no_route", None, 0),
    ("10.7.0.1", "no_route", None, 0),  # not by the default route behind it
]


@pytest.mark.parametrize(("client", "reason", "next_hop", "link"), TOWARDS_CLIENTS)
def test_towards_a_client(client: str, reason: str, next_hop: str | None, link: int) -> None:
    pipeline = balancer("nat", "10.3.0.11", view())
    pipeline.process([frame(client, 40000, VIP[4], 80, "udp")], 0, 2)
    _, found, sent, _, ifindex = pipeline.process([frame("10.3.0.11", 80, client, 40000, "udp")], 0, 3)[0]
    assert found == reason
    if sent:
        assert sent[0][:6] == mac_bytes(mac_of(next_hop or ""))
        assert (sent[0][6:12], ifindex) == (LINKS[link].mac, link)


@pytest.mark.parametrize(("backend", "limit"), [
    ("10.3.0.11", 1500),  # the link's
    ("10.8.0.1", 1000),  # the route's, through a gateway
    ("10.9.0.1", 1000),  # the route's, on-link
])  # fmt: skip
def test_the_mtu_of_a_route(backend: str, limit: int) -> None:
    pipeline = balancer("nat", backend, view())
    sizes = (limit - 28, limit - 27)
    made = [frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=bytes(size), df=True) for size in sizes]
    assert [result[1] for result in pipeline.process(made, 0, 2)] == ["scheduled", "too_big"]


@pytest.mark.parametrize(("backend", "heard", "limit"), [
    ("10.3.0.11", 1400, 1400),
    ("10.3.0.11", 9000, 1500),  # the link's
    ("10.8.0.1", 1400, 1000),  # the route's
    ("10.8.0.1", 900, 900),
])  # fmt: skip
def test_the_mtu_that_routers_told_a_tunnel(backend: str, heard: int, limit: int) -> None:
    settings = config(service("ipip", 4, "udp", backends=[{"address": backend}], tunnel={"source": ["192.0.2.0/24"]}))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(64, KEY)
    table = routes.routes_table(view(), plans, {ip_address(backend): heard})
    pipeline.publish(services_table(settings, plans), table)
    sizes = (limit - 48, limit - 47)
    made = [frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=bytes(size), df=True) for size in sizes]
    assert [result[1] for result in pipeline.process(made, 0, 2)] == ["scheduled", "too_big"]


def test_the_mtu_of_a_route_towards_a_client() -> None:
    pipeline = balancer("nat", "10.3.0.11", view())
    pipeline.process([frame("10.8.0.1", 40000, VIP[4], 80, "udp")], 0, 2)
    made = [frame("10.3.0.11", 80, "10.8.0.1", 40000, "udp", payload=bytes(size), df=True) for size in (972, 973)]
    assert [result[1] for result in pipeline.process(made, 0, 3)] == ["conntrack", "too_big"]


def test_a_moved_mac_takes_effect() -> None:
    moved = dict(view().neighbours)
    moved[3, ip_address("10.3.0.11")] = b"\x02\xff\xff\xff\xff\xff"
    raw = frame(CLIENT[4], 40000, VIP[4], 80, "udp")
    sent = balancer("dsr", "10.3.0.11", view(neighbours=moved)).process([raw], 0, 2)[0][2][0]
    assert sent[:6] == b"\x02\xff\xff\xff\xff\xff"


def test_wanted_next_hops() -> None:
    """Every gateway, since any client may be behind it; a backend behind one wants only the gateway."""
    wanted = routes.wanted_next_hops(
        view(), planned("10.3.0.11", "10.6.0.1", "10.7.0.1", "fd00:3::11", forward="nat")
    )
    assert {(link, str(address)) for link, address in wanted} == {
        (2, "10.2.0.1"),
        (2, "fe80::1"),
        (3, "10.3.0.253"),
        (3, "10.3.0.254"),
        (3, "10.3.0.11"),
        (3, "fd00:3::11"),
    }


def test_links_of_tunnels() -> None:
    """Down or not, but with Ethernet: elsewhere a program at egress would read other bytes for the EtherType."""
    backends = ("10.3.0.11", "10.4.0.1", "10.5.0.1", "10.6.0.1", "10.7.0.1", "fd00:3::11")
    assert routes.tunnel_links(view(), planned(*backends, forward="gre")) == {3, 4}
    assert routes.tunnel_links(view(), planned("10.3.0.11", forward="nat")) == set()


def test_what_tunnels_look_like() -> None:
    """For who speaks about their packets: from where, by which protocol, to which port."""
    host = view(placed=frozenset({(3, 24, ip_address("10.3.0.2")), (3, 64, ip_address("fd00:3::2"))}))
    source = {"source": ["192.0.2.0/24"]}
    settings = config(
        service("ipip", 4, name="a", backends=[{"address": "10.3.0.11"}, {"address": "fd00:3::11"}]),
        service("ipip", 6, name="b", backends=[{"address": "10.3.0.11"}], tunnel=source),
        service("gre", 4, name="c", port=81, backends=[{"address": "10.3.0.11"}], tunnel={"key": 1}),
        service("gue", 6, name="d", port=81, backends=[{"address": "fd00:3::11"}], tunnel={"port": 5555}),
        service("dsr", 4, name="e", port=82, backends=[{"address": "10.3.0.12"}]),
    )
    four, six = ip_network("10.3.0.2"), ip_network("fd00:3::2")
    assert routes.tunnels(host, plan_services(settings, BackendIds(), 0.0)) == {
        ip_address("10.3.0.11"): {(four, 4, 0), (ip_network("192.0.2.0/24"), 41, 0), (four, 47, 0)},
        ip_address("fd00:3::11"): {(six, 4, 0), (six, 17, 5555)},
    }


def test_an_empty_host() -> None:
    nothing = KernelView(links={}, routes=(), neighbours={}, addresses=frozenset())
    raw = frame(CLIENT[4], 40000, VIP[4], 80, "udp")
    assert balancer("nat", "10.3.0.11", nothing).process([raw], 0, 2)[0][1] == "no_route"
    assert routes.wanted_next_hops(nothing, planned("10.3.0.11", forward="nat")) == set()
