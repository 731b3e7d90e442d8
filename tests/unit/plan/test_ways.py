"""All that follows from the host for a set of plans."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from fastlb._core import Pipeline
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from fastlb.plan.ways import Ways, find_ways
from tests.balancers import CLIENT, KEY, VIP, config, service
from tests.frames import frame
from tests.hostviews import view

PLACED = frozenset({(3, 24, ip_address("10.3.0.2"))})


def ways(forward: str, backend: str, heard: int = 0, **settings: Any) -> Ways:
    conf = config(service(forward, protocol="udp", name="s0", backends=[{"address": backend}]), **settings)
    plans = plan_services(conf, BackendIds(), 0.0)
    return find_ways(conf, plans, view(placed=PLACED), {ip_address(backend): heard} if heard else {})


# mode, backend; gateways aside: its next hop, links of tunnels
FOUND: list[tuple[str, str, tuple[int, str] | None, set[int]]] = [
    ("nat", "10.3.0.11", (3, "10.3.0.11"), set()),
    ("gre", "10.3.0.11", (3, "10.3.0.11"), {3}),
    ("gre", "10.6.0.1", (3, "10.3.0.254"), {3}),
    ("gre", "10.7.0.1", None, set()),
    ("dsr", "10.3.0.11", (3, "10.3.0.11"), set()),
]
GATEWAYS = {(2, "10.2.0.1"), (2, "fe80::1"), (3, "10.3.0.253"), (3, "10.3.0.254")}


@pytest.mark.parametrize(("forward", "backend", "next_hop", "links"), FOUND)
def test_next_hops_and_links(forward: str, backend: str, next_hop: tuple[int, str] | None, links: set[int]) -> None:
    found = ways(forward, backend)
    assert {(link, str(address)) for link, address in found.next_hops} == GATEWAYS | ({next_hop} if next_hop else set())
    assert found.links_out == {2, 3}
    assert found.tunnel_links == links


def test_links_of_clients_are_links_out() -> None:
    """An interface with a ring is, if it is up; its clients need not be behind a gateway."""
    plain = view(routes=())
    plans = plan_services(config(), BackendIds(), 0.0)
    assert find_ways(config(interfaces=["eth0"]), plans, plain, {}).links_out == {2}
    assert find_ways(config(interfaces=["eth2"]), plans, plain, {}).links_out == set()  # it is down


def test_without_tunnel_offload_there_are_no_links_of_tunnels() -> None:
    """The kernel is to cut nothing there; what tunnels look like is known all the same."""
    found = ways("gre", "10.3.0.11", tunnel_offload=False)
    assert found.tunnel_links == set()
    assert found.tunnels == {ip_address("10.3.0.11"): {(ip_network("10.3.0.2/32"), 47, 0)}}
    assert ways("nat", "10.3.0.11").tunnels == {}


@pytest.mark.parametrize(("forward", "backend", "lines"), [
    ("dsr", "10.6.0.1", 1), ("dsr", "10.7.0.1", 1), ("dsr", "10.3.0.11", 0), ("nat", "10.6.0.1", 0),
])  # fmt: skip
def test_backends_that_cannot_be_reached(forward: str, backend: str, lines: int) -> None:
    assert len(ways(forward, backend).unreachable) == lines


@pytest.mark.parametrize(("heard", "limit"), [(0, 1500), (1400, 1400)])
def test_the_routes_are_those_of_the_data_path(heard: int, limit: int) -> None:
    """With the path MTU that routers have told of a tunnel."""
    settings = config(service("ipip", protocol="udp", name="s0", backends=[{"address": "10.3.0.11"}]))
    pipeline = Pipeline(64, KEY)
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline.publish(services_table(settings, plans), ways("ipip", "10.3.0.11", heard).routes)
    sizes = (limit - 48, limit - 47)
    made = [frame(CLIENT[4], 40000, VIP[4], 80, "udp", payload=bytes(size), df=True) for size in sizes]
    assert [result[1] for result in pipeline.process(made, 0, 2)] == ["scheduled", "too_big"]
