"""`fastlb conns`: what a walk in slices shows of the flow table, and what its filters leave."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from fastlb._core import FlowMemory, FlowWalk, Pipeline, flow_states
from fastlb.errors import FastlbError
from fastlb.observe import flows
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, reply_to, service
from tests.frames import frame

OTHER = "10.1.0.3"
BOTH = config(
    service("nat", name="web"),
    service("dsr", name="dns", protocol="udp", port=53),
    service("dsr", version=6, name="six"),
    timeouts={"tcp_syn": 5, "tcp_established": 60, "tcp_closing": 5, "udp": 20},
)


def filled() -> Balancer:
    """At second 10: an established flow and a SYN of web, from two clients; a datagram of dns; one of IPv6."""
    balancer = Balancer(BOTH, hosts=(*CLIENT.values(), OTHER, *BACKENDS[4], *BACKENDS[6]))
    _, sent, _ = balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("S")), 7.0)
    assert sent is not None
    balancer.send(reply_to(sent), 7.5)
    balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("A")), 8.0)
    balancer.send(frame(OTHER, 40001, VIP[4], 80, flags=flags("S")), 9.0)
    balancer.send(frame(CLIENT[4], 5000, VIP[4], 53, "udp"), 9.5)
    balancer.send(frame(CLIENT[6], 40000, VIP[6], 80, flags=flags("S")), 9.5)
    return balancer


def ask_of(balancer: Balancer, now: float = 10.0) -> flows.Ask:
    def ask(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return flows.answer(balancer.pipeline, balancer.plans, request, round(now * 1000))

    return ask


def shown(balancer: Balancer, now: float = 10.0, **filters: Any) -> list[str]:
    found, more = flows.collect(ask_of(balancer, now), filters, 100)
    assert not more
    return sorted(f"{flow['service']} {flow['client']} {flow['state']}" for flow in found)


WEB, SYN = "web 10.1.0.2:40000 established", "web 10.1.0.3:40001 syn"
DNS, SIX = "dns 10.1.0.2:5000 udp-new", "six [fd00:1::2]:40000 syn"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [DNS, SIX, WEB, SYN]),
        ({"service": "web"}, [WEB, SYN]),
        ({"client": CLIENT[4]}, [DNS, WEB]),
        ({"client": "10.1.0.2/31"}, [DNS, WEB, SYN]),
        ({"client": "0.0.0.0/0"}, [DNS, WEB, SYN]),
        ({"client": "fd00::/16"}, [SIX]),
        ({"client": "10.9.0.0/16"}, []),
        ({"state": "syn"}, [SIX, SYN]),
        ({"state": "closing"}, []),
        ({"service": "dns", "state": "syn"}, []),
        ({"service": "web", "client": OTHER, "state": "syn"}, [SYN]),
    ],
)
def test_filters(filters: dict[str, Any], expected: list[str]) -> None:
    balancer = filled()
    assert shown(balancer, **filters) == expected
    assert sum(row["flows"] for row in flows.count(ask_of(balancer), filters)) == len(expected)


def test_a_backend_by_key_or_address() -> None:
    balancer = filled()
    for line in (WEB, SYN, DNS, SIX):
        key = flow_of(balancer, line)["backend"]
        address = key.rsplit(":", 1)[0]
        for name in (key, address, address.strip("[]")):
            there = shown(balancer, backend=name)
            assert line in there
            assert {address} == {flow_of(balancer, other)["backend"].rsplit(":", 1)[0] for other in there}


def flow_of(balancer: Balancer, line: str) -> dict[str, Any]:
    found, _ = flows.collect(ask_of(balancer), {}, 100)
    return next(flow for flow in found if f"{flow['service']} {flow['client']} {flow['state']}" == line)


def test_what_is_told_of_a_flow() -> None:
    flow = flow_of(filled(), WEB)
    assert flow.pop("backend") in {f"{address}:8080" for address in BACKENDS[4]}
    assert flow == {
        "service": "web", "protocol": "tcp", "client": "10.1.0.2:40000", "vip": "203.0.113.10:80", "source": None,
        "state": "established", "age": 3.0, "idle": 2.0,
    }  # fmt: skip


def test_the_source_of_full_nat() -> None:
    settings = config(service("fullnat", name="full"), snat=["192.0.2.77"], snat_ports="2000-2127")
    balancer = Balancer(settings)
    balancer.pipeline = Pipeline(FlowMemory(64, sources=settings.snat, ports=settings.snat_ports))
    balancer.reload(settings)
    _, sent, _ = balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("S")))
    assert sent is not None
    (flow,), _ = flows.collect(ask_of(balancer, 0.0), {}, 10)
    assert flow["source"] == f"192.0.2.77:{int.from_bytes(sent[34:36], 'big')}"


def test_expired_flows_are_not_shown() -> None:
    balancer = filled()
    assert shown(balancer, 20.0) == [DNS, WEB]
    assert shown(balancer, 69.0) == []
    assert balancer.pipeline.flow_count() == 4  # the sweep has not met them yet


def test_a_backend_that_left_takes_its_flows_along_unless_they_stay() -> None:
    balancer = filled()
    before = [flow for flow in shown(balancer) if flow.startswith("web")]
    balancer.reload(config(service("nat", name="web", backends=[])))
    assert shown(balancer) == before != []
    balancer.reload(config(service("nat", name="web", backends=[], on_leave="rehash")))
    assert shown(balancer) == []


def test_more_than_the_limit() -> None:
    balancer = Balancer(config(service("dsr", name="web")))
    for port in range(1000, 1025):
        balancer.send(frame(CLIENT[4], port, VIP[4], 80, flags=flags("S")))
    for limit, more in ((0, True), (1, True), (24, True), (25, False), (26, False)):
        found, rest = flows.collect(ask_of(balancer, 1.0), {}, limit)
        assert (len(found), rest) == (min(limit, 25), more)
        assert len({flow["client"] for flow in found}) == len(found)


def test_slices_make_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    balancer = Balancer(config(service("dsr", name="web")))
    ports = range(1000, 1300)
    for port in ports:
        balancer.send(frame(CLIENT[4], port, VIP[4], 80, flags=flags("S")))
    monkeypatch.setattr(flows, "SLICE", 97)
    found, _ = flows.collect(ask_of(balancer, 1.0), {}, 10_000)
    assert sorted(flow["client"] for flow in found) == [f"10.1.0.2:{port}" for port in ports]
    rows = flows.count(ask_of(balancer, 1.0), {})
    assert [(row["service"], row["backend"]) for row in rows] == [("web", f"{host}:80") for host in BACKENDS[4]]
    assert sum(row["flows"] for row in rows) == len(ports)
    assert all(row["states"] == {"syn": row["flows"]} for row in rows)
    for row in rows:
        number = next(id for id, key in balancer.keys.items() if key == row["backend"])
        assert row["flows"] == balancer.pipeline.backend_stats(number)["active_flows"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"service": "api"}, 'there is no service "api"; there are: web, dns, six'),
        ({"backend": "10.3.0.99"}, 'there is no backend "10.3.0.99" in any service; there are: 10.3.0.11:8080'),
        ({"service": "dns", "backend": "x"}, 'there is no backend "x" in service dns; there are: 10.3.0.11:53'),
        ({"client": "10.0.0.1/8"}, "client: 10.0.0.1/8 has host bits set; it is an address, or a prefix like"),
        ({"client": "web"}, "client: 'web' does not appear to be an IPv4 or IPv6 network"),
        ({"state": "open"}, 'there is no state "open"; there are: syn, syn-ack, picked-up, udp-new, established'),
        ({"start": -1}, "start is a whole number from 0 to"),
        ({"room": 1001}, "room is a whole number from 0 to 1000, not 1001"),
        ({"room": "all"}, "room is a whole number from 0 to 1000, not 'all'"),
    ],
)
def test_what_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(FastlbError) as caught:
        ask_of(filled())(request_)
    assert str(caught.value).startswith(message)


def test_a_walk_by_itself() -> None:
    balancer = filled()
    walk = FlowWalk(balancer.pipeline, states=["syn"])
    rows, after = walk.rows(0, 1 << 40, 100, 10_000)
    assert after is None
    assert {row[1] for row in rows} == {ip_address(OTHER), ip_address(CLIENT[6])}
    assert walk.rows(balancer.pipeline.flow_capacity, 10, 10, 10_000) == ([], None)
    assert walk.rows(1 << 40, 10, 10, 10_000) == ([], None)
    assert walk.counts(1 << 40, 10, 10_000) == ({}, None)
    assert FlowWalk(balancer.pipeline, client=ip_network("::/0")).rows(0, 1 << 40, 100, 10_000)[0][0][1].version == 6
    with pytest.raises(ValueError, match="not in tuple"):
        FlowWalk(balancer.pipeline, states=["open"])
    with pytest.raises(RuntimeError, match="publish services"):
        FlowWalk(Pipeline(64))
    assert flow_states()[0] == "syn"
