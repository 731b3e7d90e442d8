"""route.pxd: towards clients by longest prefix, towards backends by their fixed hops, through real packets."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from fastlb._core import Pipeline, Routes
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, CLIENT, KEY, VIP, config, service
from tests.frames import frame, mac_bytes, mac_of, take_apart

Prefix = tuple[str, int, int | None]  # network, interface, hop position or None when on-link

GATEWAYS = {name: bytes([2, 0xAA, 0, 0, 0, number]) for number, name in enumerate("abcdef")}
MACS = {number: bytes([2, 0xBB, 0, 0, 0, number]) for number in range(10)}  # the balancer's, by interface


def hop(
    name: str, ifindex: int, mtu: int = 1500, fault: str | None = None
) -> tuple[bytes, bytes, int, int, str | None]:
    return GATEWAYS[name], MACS[ifindex], ifindex, mtu, fault


def replies(
    hops: list[Any], prefixes: list[Prefix], neighbours: dict[tuple[int, str], int], clients: list[str]
) -> list[tuple[str, bytes | None, int]]:
    """What becomes of a backend's replies: (reason, destination MAC, outgoing interface) for each client."""
    made = []
    for client in clients:
        version = ip_address(client).version
        settings = config(service("nat", version, backends=[{"address": BACKENDS[version][0], "port": 8080}]))
        plans = plan_services(settings, BackendIds(), 0.0)
        routes = Routes(
            [*hops, hop("f", 3)],
            [(ip_network(network), ifindex, position) for network, ifindex, position in prefixes],
            {(ifindex, ip_address(address)): position for (ifindex, address), position in neighbours.items()},
            {1: len(hops)},
        )
        pipeline = Pipeline(64, KEY)
        pipeline.publish(services_table(settings, plans), routes)
        pipeline.process([frame(client, 40000, VIP[version], 80)], 0, 1)
        raw = frame(BACKENDS[version][0], 8080, client, 40000, flags=0x12)
        _, reason, frames, _, ifindex = pipeline.process([raw], 0, 3)[0]
        for sent in frames:
            assert sent[6:12] == MACS[ifindex]
            assert take_apart(sent).src == VIP[version]
        made.append((reason, frames[0][:6] if frames else None, ifindex if frames else 0))
    return made


LONGEST = [
    # networks with the gateway behind each; client; the gateway that its replies take
    ([("0.0.0.0/0", "a")], "198.51.100.7", "a"),
    ([("0.0.0.0/0", "a"), ("198.51.100.0/24", "b")], "198.51.100.7", "b"),
    ([("198.51.100.0/24", "b"), ("0.0.0.0/0", "a")], "198.51.101.7", "a"),
    ([("198.51.0.0/16", "a"), ("198.51.100.0/24", "b"), ("198.51.100.7/32", "c")], "198.51.100.7", "c"),
    ([("198.51.0.0/16", "a"), ("198.51.100.0/24", "b"), ("198.51.100.7/32", "c")], "198.51.100.8", "b"),
    ([("198.51.0.0/16", "a"), ("198.51.100.0/24", "b"), ("198.51.100.7/32", "c")], "198.51.255.255", "a"),
    ([("198.51.100.0/25", "a"), ("198.51.100.128/25", "b")], "198.51.100.127", "a"),
    ([("198.51.100.0/25", "a"), ("198.51.100.128/25", "b")], "198.51.100.128", "b"),
    ([("128.0.0.0/1", "a"), ("0.0.0.0/1", "b")], "198.51.100.128", "a"),
    ([("198.51.100.6/31", "a")], "198.51.100.8", None),
    ([("0.0.0.0/0", "a")], "2001:db8:1::1", None),  # one version's default says nothing to the other
    ([("::/0", "a")], "198.51.100.7", None),
    ([("::/0", "a"), ("2001:db8::/32", "b"), ("2001:db8:1::/48", "c")], "2001:db8:1::1", "c"),
    ([("::/0", "a"), ("2001:db8::/32", "b"), ("2001:db8:1::/48", "c")], "2001:db8:2::1", "b"),
    ([("::/0", "a"), ("2001:db8:1::/64", "b")], "2001:db8:1:1::1", "a"),
    ([("::/0", "a"), ("2001:db8:1::/65", "b")], "2001:db8:1::1", "b"),
    ([("::/0", "a"), ("2001:db8:1::/65", "b")], "2001:db8:1:0:8000::1", "a"),
    ([("2001:db8:1::/64", "a"), ("2001:db8:1::1/128", "b"), ("2001:db8:1::/127", "c")], "2001:db8:1::1", "b"),
    ([("2001:db8:1::/64", "a"), ("2001:db8:1::/127", "c")], "2001:db8:1::1", "c"),
    ([("2001:db8:1::/64", "a"), ("2001:db8:1::/127", "c")], "2001:db8:1::2", "a"),
]


@pytest.mark.parametrize(("table", "client", "gateway"), LONGEST)
def test_longest_prefix(table: list[tuple[str, str]], client: str, gateway: str | None) -> None:
    hops = [hop(name, 1) for _, name in table]
    prefixes: list[Prefix] = [(network, 1, position) for position, (network, _) in enumerate(table)]
    reason, mac, ifindex = replies(hops, prefixes, {}, [client])[0]
    if gateway is None:
        assert (reason, mac) == ("no_route", None)
    else:
        assert (reason, mac, ifindex) == ("conntrack", GATEWAYS[gateway], 1)


def test_on_link_prefixes_ask_the_neighbours_of_their_interface() -> None:
    hops = [hop("a", 1), hop("b", 2)]
    prefixes: list[Prefix] = [("198.51.100.0/24", 1, None), ("192.0.2.0/24", 2, None), ("fd00:9::/64", 2, None)]
    neighbours = {
        (1, "198.51.100.7"): 0,
        (2, "198.51.100.8"): 1,  # known, but on another link
        (2, "192.0.2.7"): 1,
        (2, "fd00:9::7"): 1,
        (1, "fd00:9::8"): 0,
    }
    clients = ["198.51.100.7", "198.51.100.8", "192.0.2.7", "192.0.2.8", "fd00:9::7", "fd00:9::8"]
    assert replies(hops, prefixes, neighbours, clients) == [
        ("conntrack", GATEWAYS["a"], 1),
        ("no_neighbour", None, 0),
        ("conntrack", GATEWAYS["b"], 2),
        ("no_neighbour", None, 0),
        ("conntrack", GATEWAYS["b"], 2),
        ("no_neighbour", None, 0),
    ]


@pytest.mark.parametrize("fault", ["no_route", "no_neighbour", "not_on_link"])
def test_a_hop_s_fault_is_the_reason(fault: str) -> None:
    hops = [hop("a", 1, fault=fault), hop("b", 1)]
    prefixes: list[Prefix] = [("0.0.0.0/0", 1, 1), ("198.51.100.0/24", 1, 0)]
    assert [reason for reason, _, _ in replies(hops, prefixes, {}, ["198.51.100.7", "192.0.2.1"])] == [
        fault,
        "conntrack",
    ]


@pytest.mark.parametrize(("mtu", "reason"), [(39, "over_mtu"), (40, "conntrack")])
def test_the_mtu_of_the_way_back(mtu: int, reason: str) -> None:
    """An empty TCP segment over IPv4 has 40 bytes."""
    assert replies([hop("a", 1, mtu)], [("0.0.0.0/0", 1, 0)], {}, ["198.51.100.7"])[0][0] == reason


def test_without_any_route() -> None:
    assert [reason for reason, _, _ in replies([], [], {}, ["198.51.100.7", "2001:db8::1"])] == ["no_route"] * 2


BACKEND_HOPS = [
    (None, 1500, "scheduled"),
    ("no_route", 0, "no_route"),
    ("no_neighbour", 0, "no_neighbour"),
    ("not_on_link", 0, "not_on_link"),
    (None, 39, "over_mtu"),
]


@pytest.mark.parametrize("forward", ["nat", "dsr"])
@pytest.mark.parametrize(("fault", "mtu", "reason"), BACKEND_HOPS)
def test_towards_a_backend(forward: str, fault: str | None, mtu: int, reason: str) -> None:
    settings = config(service(forward, backends=[{"address": BACKENDS[4][0]}]))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(64, KEY)
    routes = Routes([hop("a", 2, mtu, fault)], [], {}, {1: 0})
    pipeline.publish(services_table(settings, plans), routes)
    out = pipeline.process([frame(CLIENT[4], 40000, VIP[4], 80)], 0, 1)[0]
    assert out[1] == reason
    assert out[3] == 1  # the backend is named, whatever kept the packet from it
    assert pipeline.counters()[reason] == 1
    assert pipeline.backend_stats(1)["packets"] == (reason == "scheduled")


def test_a_backend_without_a_hop_has_no_route() -> None:
    settings = config(service("dsr"))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(64, KEY)
    pipeline.publish(services_table(settings, plans), Routes([], [], {}, {}))
    assert pipeline.process([frame(CLIENT[4], 40000, VIP[4], 80)], 0)[0][1] == "no_route"


@pytest.mark.parametrize(("out_link", "tags"), [(1, True), (2, False)])
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_tags_stay_on_their_link(forward: str, out_link: int, tags: bool) -> None:
    settings = config(service(forward, backends=[{"address": BACKENDS[4][0]}]))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(64, KEY)
    here = (mac_bytes(mac_of(BACKENDS[4][0])), MACS[out_link], out_link, 1500, None)
    pipeline.publish(services_table(settings, plans), Routes([here], [], {}, {1: 0}))
    raw = frame(CLIENT[4], 40000, VIP[4], 80, tags=((0x88A8, 100), (0x8100, 5)), payload=b"abc")
    _, _, (sent,), _, ifindex = pipeline.process([raw], 0, 1)[0]
    assert ifindex == out_link
    seen = take_apart(sent)
    assert seen.tags == (((0x88A8, 100), (0x8100, 5)) if tags else ())
    assert len(sent) == len(raw) - (0 if tags else 8)
    assert seen.eth_dst == mac_of(BACKENDS[4][0])


def test_a_gateway_s_other_version_will_do() -> None:
    """RFC 8950: an IPv4 prefix behind an IPv6 next hop is only a hop here."""
    assert replies([hop("a", 1)], [("198.51.100.0/24", 1, 0)], {}, ["198.51.100.7"])[0][1] == GATEWAYS["a"]


def test_clients_on_a_link_without_a_mac_are_noted() -> None:
    """fastlb's own packets do not make the kernel resolve them, so it must be asked; those behind a gateway are not."""
    settings = config(service("nat", backends=[{"address": BACKENDS[4][0], "port": 8080}]))
    plans = plan_services(settings, BackendIds(), 0.0)
    pipeline = Pipeline(1024, KEY)
    prefixes = [
        (ip_network("198.51.100.0/24"), 2, None),
        (ip_network("192.0.2.0/24"), 3, None),
        (ip_network("0.0.0.0/0"), 1, 0),
    ]
    routes = Routes([hop("a", 1, fault="no_neighbour"), hop("b", 1)], prefixes, {}, {1: 1})
    pipeline.publish(services_table(settings, plans), routes)
    for client in ("198.51.100.7", "198.51.100.7", "192.0.2.9", "203.0.113.200"):
        pipeline.process([frame(client, 40000, VIP[4], 80)], 0, 1)
        back = frame(BACKENDS[4][0], 8080, client, 40000, flags=0x12)
        assert pipeline.process([back], 0, 1)[0][1] == "no_neighbour"
    assert pipeline.take_unresolved() == {(2, ip_address("198.51.100.7")), (3, ip_address("192.0.2.9"))}
    assert pipeline.take_unresolved() == set()
    for number in range(1, 200):
        client = f"198.51.100.{number}"
        pipeline.process([frame(client, 40000, VIP[4], 80)], 0, 1)
        pipeline.process([frame(BACKENDS[4][0], 8080, client, 40000, flags=0x12)], 0, 1)
    assert len(pipeline.take_unresolved()) == 64  # bounded; the others are noted by their next packet
