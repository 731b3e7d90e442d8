"""Recovery without state: a balancer that gets flows in the middle which another one had placed."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb import Datapath
from tests.balancers import BACKENDS, CLIENT, VIP, datapath, flags, reply_to, service
from tests.frames import frame, take_apart

HASHES = ["maglev", "ketama", "source-hash"]
ONE_WAY = ["dsr", "ipip", "gre", "gue"]
WEIGHTS = (1, 2, 5)
PORTS = range(2000, 2200)

every_hash = pytest.mark.parametrize("scheduler", HASHES)
both_versions = pytest.mark.parametrize("version", [4, 6])
both_protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def members(forward: str, version: int) -> list[dict[str, Any]]:
    port = {"port": 8080} if forward in ("nat", "fullnat") else {}
    return [
        {"address": address, "weight": weight, **port}
        for address, weight in zip(BACKENDS[version], WEIGHTS, strict=True)
    ]


def balancer(scheduler: str, forward: str, version: int, protocol: str = "tcp", reverse: bool = False) -> Datapath:
    """``reverse``: with the same backends, listed the other way round."""
    backends = members(forward, version)[:: -1 if reverse else 1]
    settings = {"snat": ["192.0.2.77", "2001:db8::77"]} if forward == "fullnat" else {}
    described = service(forward, version, protocol, scheduler=scheduler, backends=backends)
    return datapath(described, maglev_size=65537, **settings)


def clients(version: int) -> list[tuple[str, int]]:
    """Many addresses, so that a hash of the address alone has what to spread."""
    prefix = CLIENT[version].rsplit("." if version == 4 else ":", 1)[0]
    return [(f"{prefix}{'.' if version == 4 else ':'}{1 + port % 97}", port) for port in PORTS]


def packets(version: int, protocol: str, letters: str) -> list[bytes]:
    return [
        frame(address, port, VIP[version], 80, protocol, flags=flags(letters), payload=b"question")
        for address, port in clients(version)
    ]


def introduce(dp: Datapath, version: int) -> Datapath:
    """The clients are on its link, too."""
    for address, _ in clients(version):
        dp.set_neighbour(address, "02:00:00:00:00:fe")
    return dp


@both_protocols
@both_versions
@pytest.mark.parametrize("forward", ["nat", *ONE_WAY])
@every_hash
def test_another_balancer_sends_it_to_the_same_backend(
    scheduler: str, forward: str, version: int, protocol: str
) -> None:
    first = balancer(scheduler, forward, version, protocol)
    other = balancer(scheduler, forward, version, protocol, reverse=True)
    placed = first.process_batch(packets(version, protocol, "S"))
    assert {result.reason for result in placed} == {"scheduled"}
    assert len({result.backend for result in placed}) == len(WEIGHTS)
    later = packets(version, protocol, "PA")
    found = other.process_batch(later)
    assert {result.reason for result in found} == {"maglev" if protocol == "tcp" else "scheduled"}
    assert [result.backend for result in found] == [result.backend for result in placed]
    if forward in ("nat", "dsr"):
        assert [result.frames for result in found] == [result.frames for result in first.process_batch(later)]


@both_versions
@every_hash
def test_the_backend_s_answers_go_back_from_the_vip(scheduler: str, version: int) -> None:
    """In nat, whichever side is the first that the other balancer hears of."""
    first = balancer(scheduler, "nat", version)
    other = introduce(balancer(scheduler, "nat", version), version)
    for syn, (address, port) in zip(packets(version, "tcp", "S"), clients(version), strict=True):
        sent = first.process(syn)
        back = other.process(reply_to(sent.frames[0], "PA", b"answer"))
        assert (back.reason, back.backend) == ("maglev", sent.backend)
        seen = take_apart(back.frames[0])
        assert (seen.src, seen.sport, seen.dst, seen.dport) == (VIP[version], 80, address, port)
    assert {result.reason for result in other.process_batch(packets(version, "tcp", "A"))} == {"conntrack"}


@both_versions
@pytest.mark.parametrize("forward", ["nat", *ONE_WAY])
def test_ketama_moves_only_flows_of_a_backend_that_left(forward: str, version: int) -> None:
    """A balancer and a backend are lost at once."""
    placed = balancer("ketama", forward, version).process_batch(packets(version, "tcp", "S"))
    staying = members(forward, version)[1:]  # the heaviest stays, and with it everybody's points
    other = datapath(service(forward, version, scheduler="ketama", backends=staying))
    found = other.process_batch(packets(version, "tcp", "A"))
    pairs = [(one.backend, two.backend) for one, two in zip(placed, found, strict=True)]
    gone = [one for one, _ in pairs if BACKENDS[version][0] in str(one)]
    assert 0 < len(gone) < len(pairs)
    assert [one for one, two in pairs if one != two] == gone


@both_versions
@every_hash
def test_fullnat_resets_what_it_does_not_know(scheduler: str, version: int) -> None:
    """The backend knows the flow by a source port that only the first balancer knew."""
    other = balancer(scheduler, "fullnat", version)
    for packet in packets(version, "tcp", "A")[:20]:
        result = other.process(packet)
        assert result.reason == "rejected"
        (answer,) = map(take_apart, result.frames)
        assert (answer.src, answer.tcp.flags & flags("R")) == (VIP[version], flags("R"))


@both_versions
@pytest.mark.parametrize("scheduler", ["rr", "wrr", "random", "lc", "wlc", "lrt", "p2c"])
def test_the_others_agree_where_a_flow_goes_that_nobody_knows(scheduler: str, version: int) -> None:
    """By the Maglev table: mostly another backend than the flow had, and the same at every balancer."""
    later = packets(version, "tcp", "A")
    one = balancer(scheduler, "nat", version).process_batch(later)
    other = balancer(scheduler, "nat", version, reverse=True).process_batch(later)
    by_hash = balancer("maglev", "nat", version).process_batch(later)
    assert [result.backend for result in one] == [result.backend for result in other]
    assert [result.backend for result in one] == [result.backend for result in by_hash]
