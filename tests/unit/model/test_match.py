"""VIP prefixes and ranges of ports: the most specific service wins, on both legs."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb import Datapath
from fastlb.model.match import Block, Mask, blocks_of
from tests.balancers import BACKENDS, CLIENT, datapath, flags, reply_to, service
from tests.frames import ACK, frame, mac_of, take_apart
from tests.unit.dataplane.test_icmperror import ROUTER, error, icmp_frame, quoted_of

ports = st.integers(1, 65535)
PREFIX = {4: "203.0.113.0/28", 6: "2001:db8:cafe::/64"}
WITHIN = {4: ("203.0.113.0", "203.0.113.7", "203.0.113.15"), 6: ("2001:db8:cafe::", "2001:db8:cafe::ffff:ffff")}
BESIDE = {4: "203.0.113.16", 6: "2001:db8:cafe:1::"}
every_version = pytest.mark.parametrize("version", [4, 6])
two_way = pytest.mark.parametrize("forward", ["nat", "fullnat"])


def covers(block: Block, port: int) -> bool:
    return port >> 16 - block.bits == block.port >> 16 - block.bits


@given(ports, ports, st.lists(ports, max_size=50))
def test_blocks_make_up_their_range(one: int, other: int, tried: list[int]) -> None:
    first, last = sorted((one, other))
    blocks = list(blocks_of(first, last))
    assert len(blocks) <= 30
    assert all(block.port & (1 << 16 - block.bits) - 1 == 0 for block in blocks)
    for port in {*tried, first, last, first - 1, last + 1}:
        assert sum(covers(block, port) for block in blocks) == (first <= port <= last)


@pytest.mark.parametrize(("first", "last", "blocks"), [
    (80, 80, [(80, 16)]), (8000, 8063, [(8000, 10)]), (32768, 65535, [(32768, 1)]), (1, 3, [(1, 16), (2, 15)]),
    (8000, 8099, [(8000, 10), (8064, 11), (8096, 14)]),
])  # fmt: skip
def test_blocks(first: int, last: int, blocks: list[tuple[int, int]]) -> None:
    assert list(blocks_of(first, last)) == blocks


def test_what_is_whole() -> None:
    assert [mask.is_whole for mask in (Mask(4, 32, 16), Mask(6, 128, 16), Mask(6, 32, 16), Mask(4, 32, 15))] == [
        True, True, False, False,
    ]  # fmt: skip


def services(*wanted: tuple[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """One dsr service each for (vip, port), named after them."""
    return [
        service("dsr", 6 if ":" in vip else 4, vip=vip, port=port, name=f"s{number}", **changes)
        for number, (vip, port) in enumerate(wanted)
    ]


def chosen(balancer: Datapath, vip: str, port: int) -> str | None:
    client = CLIENT[6 if ":" in vip else 4]
    return balancer.trace(client, 40000, vip, port, "tcp").service


SPECIFIC = [
    ("203.0.113.0/24", "any"), ("203.0.113.0/24", 80), ("203.0.113.0/28", "any"), ("203.0.113.7", "any"),
    ("203.0.113.7", "8000-8099"), ("203.0.113.7", "8050-8060"), ("203.0.113.7", 8055), ("203.0.113.0/24", "8000-9000"),
]  # fmt: skip


@pytest.mark.parametrize(("vip", "port", "index"), [
    ("203.0.113.200", 1, 0), ("203.0.113.200", 80, 1), ("203.0.113.200", 8500, 7), ("203.0.113.200", 9001, 0),
    ("203.0.113.8", 80, 2), ("203.0.113.8", 8500, 2), ("203.0.113.7", 80, 3), ("203.0.113.7", 8000, 4),
    ("203.0.113.7", 8049, 4), ("203.0.113.7", 8050, 5), ("203.0.113.7", 8055, 6), ("203.0.113.7", 8060, 5),
    ("203.0.113.7", 8061, 4), ("203.0.113.7", 8099, 4), ("203.0.113.7", 8100, 3), ("203.0.114.1", 80, None),
])  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_the_most_specific_wins(vip: str, port: int, index: int | None, turned: bool) -> None:
    """A longer prefix before a shorter one; then a port before a range, and a range before one around it."""
    wanted = services(*SPECIFIC)
    balancer = datapath(*(reversed(wanted) if turned else wanted))
    assert chosen(balancer, vip, port) == (None if index is None else f"s{index}")


nibbles = st.integers(1, 15)


@given(st.dictionaries(st.integers(8, 32), st.tuples(nibbles, nibbles), min_size=1, max_size=6), st.data())
def test_lookups_agree_with_a_search_through_all(wanted: dict[int, tuple[int, int]], data: st.DataObject) -> None:
    """Services of nested prefixes, each with a range of ports; few kinds of ranges, for the sake of the limit."""
    listed: list[tuple[Any, tuple[int, int]]] = [
        (ip_network(f"198.51.100.7/{length}", strict=False), (min(ends) << 12, (max(ends) << 12) + 4095))
        for length, ends in wanted.items()
    ]
    balancer = datapath(*services(*((str(vip), f"{first}-{last}") for vip, (first, last) in listed)))
    bit = data.draw(st.integers(0, 31))
    address = ip_network("198.51.100.7/32").network_address
    near = type(address)(int(address) ^ (1 << bit))
    for vip in (address, near):
        port = data.draw(st.sampled_from([end for _, ends in listed for end in ends]))
        fits = [at for at, (net, (first, last)) in enumerate(listed) if vip in net and first <= port <= last]
        best = max(fits, key=lambda at: listed[at][0].prefixlen, default=None)
        assert chosen(balancer, str(vip), port) == (None if best is None else f"s{best}")


@every_version
@two_way
def test_every_address_of_a_prefix_answers_by_itself(forward: str, version: int) -> None:
    snat = ["10.3.0.5", "fd00:3::5"]
    balancer = datapath(service(forward, version, vip=PREFIX[version]), snat=snat)
    for vip in WITHIN[version]:
        out = balancer.process(frame(CLIENT[version], 40000, vip, 80))
        assert out.reason == "scheduled"
        answer = balancer.process(reply_to(out.frames[0]))
        assert answer.reason == "conntrack"
        seen = take_apart(answer.frames[0])
        assert (seen.src, seen.sport, seen.dst, seen.dport) == (vip, 80, CLIENT[version], 40000)
    assert balancer.process(frame(CLIENT[version], 40000, BESIDE[version], 80)).reason == "no_service"
    assert balancer.stats()["flows"]["active"] == len(WITHIN[version])


@every_version
@two_way
def test_a_range_of_ports_keeps_the_port(forward: str, version: int) -> None:
    plain = [{"address": address} for address in BACKENDS[version]]
    ranged = service(forward, version, port="8000-8099", backends=plain)
    balancer = datapath(ranged, snat=["10.3.0.5", "fd00:3::5"])
    for port in (8000, 8042, 8099):
        out = balancer.process(frame(CLIENT[version], 40000, ranged["vip"], port))
        assert take_apart(out.frames[0]).dport == port
        back = balancer.process(reply_to(out.frames[0]))
        assert (back.reason, take_apart(back.frames[0]).sport) == ("conntrack", port)
    for port in (7999, 8100):
        assert balancer.process(frame(CLIENT[version], 40000, ranged["vip"], port)).reason == "no_service"
        stray = frame(BACKENDS[version][0], port, CLIENT[version], 40000, flags=flags("SA"))
        assert balancer.process(stray).reason == "no_service"


def test_after_a_restart() -> None:
    """A reply of a range is explained by Maglev; that of a prefix waits for its client, who alone knows the VIP."""
    plain = [{"address": address} for address in BACKENDS[4]]
    ranged = [service("nat", port="8000-8099", backends=plain)]
    prefixed = [service("nat", vip=PREFIX[4])]
    for wanted, vip, port, reason in (
        (ranged, "203.0.113.10", 8042, "maglev"), (prefixed, "203.0.113.7", 80, "reply_unknown")
    ):  # fmt: skip
        sent = datapath(*wanted).process(frame(CLIENT[4], 40000, vip, port)).frames[0]
        fresh = datapath(*wanted)
        assert fresh.process(reply_to(sent, "A", b"x")).reason == reason
        assert fresh.process(frame(CLIENT[4], 40000, vip, port, flags=ACK)).frames[0][:34] == sent[:34]
        assert fresh.process(reply_to(sent, "A", b"x")).reason == "conntrack"


@every_version
def test_errors_find_the_address_of_the_prefix(version: int) -> None:
    balancer = datapath(service("nat", version, vip=PREFIX[version]))
    vip = WITHIN[version][1]
    sent = balancer.process(frame(CLIENT[version], 40000, vip, 80)).frames[0]
    backend = next(host for host in BACKENDS[version] if mac_of(host) == take_apart(sent).eth_dst)
    out = balancer.process(error(sent[14:], "port", backend))
    assert out.reason == "icmp"
    seen = take_apart(out.frames[0])
    assert (seen.src, quoted_of(seen)[:4]) == (vip, (CLIENT[version], 40000, vip, 80))
    reply = frame(vip, 80, CLIENT[version], 40000)
    about = balancer.process(error(reply[14:], "too big", ROUTER[version]))
    assert (about.reason, take_apart(about.frames[0]).dst) == ("icmp", backend)


@every_version
def test_pings_to_a_prefix(version: int) -> None:
    request = b"\x08\0\0\0\0\1\0\1ping" if version == 4 else b"\x80\0\0\0\0\1\0\1ping"
    for ports_of_it in (80, "any", "8000-8099"):
        balancer = datapath(service("dsr", version, vip=PREFIX[version], port=ports_of_it))
        for vip, reason in ((WITHIN[version][1], "echo"), (BESIDE[version], "no_service")):
            assert balancer.process(icmp_frame(version, CLIENT[version], vip, request)).reason == reason


def test_one_client_port_and_two_vips_of_a_prefix_need_two_backends() -> None:
    """The backend could not tell the two flows apart."""
    balancer = datapath(service("nat", vip=PREFIX[4]))
    outs = [balancer.process(frame(CLIENT[4], 40000, f"203.0.113.{last}", 80)) for last in range(4)]
    assert sorted(out.reason for out in outs) == ["nat_conflict", "scheduled", "scheduled", "scheduled"]
    assert len({out.backend for out in outs if out.backend}) == 3
