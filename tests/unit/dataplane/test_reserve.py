"""reserve.pxd: two packets from each of many sources take no room from flows that both sides take part in."""

from __future__ import annotations

import random
from collections import Counter
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb._core import explain_tuple
from fastlb.plan.tables import new_flows
from tests.balancers import CLIENT, VIP, Balancer, config, flags, reply_to, service
from tests.frames import frame

FLOWS = 40_000
FULL, RR = "203.0.113.20", "203.0.113.30"
PROVEN = (
    service("fullnat", name="full", vip=FULL),
    service("nat", name="rr", vip=RR, scheduler="rr"),
)
# the service that is flooded, and what its flows look like after two packets from their source
FLOODED = [("dsr", "tcp", "established"), ("dsr", "udp", "udp"), ("nat", "udp", "udp")]


def mixed(forward: str, protocol: str, rate: int | str = "auto", **changes: Any) -> Balancer:
    flooded = service(forward, protocol=protocol, name="flooded", **changes)
    return Balancer(config(flooded, *PROVEN, flows=FLOWS, new_flow_rate=rate, snat=["10.3.0.5"], maglev_size=251))


def flood(balancer: Balancer, protocol: str, count: int, now: float, seed: int = 1) -> Counter[str]:
    """Two packets for each source: SYN and ACK, or two datagrams, of which the first is answered where that is seen."""
    dice = random.Random(seed)
    reasons: Counter[str] = Counter()
    for _ in range(count):
        source, port = str(ip_address(0x64000000 + dice.randrange(1 << 24))), dice.randrange(1024, 65536)
        reason, sent, _ = balancer.send(frame(source, port, VIP[4], 80, protocol, flags=flags("S")), now)
        if sent is not None and protocol == "udp" and balancer.settings.services[0].forward == "nat":
            balancer.pipeline.process([reply_to(sent)], round(now * 1000))
        balancer.send(frame(source, port, VIP[4], 80, protocol, flags=flags("A")), now)
        reasons[reason] += 1
    return reasons


def connect(balancer: Balancer, vip: str, port: int, now: float) -> tuple[str, str | None]:
    """How a client's SYN ends and where it goes; one that is forwarded becomes a connection."""
    reason, sent, key = balancer.send(frame(CLIENT[4], port, vip, 80, flags=flags("S")), now)
    if sent is not None:
        assert balancer.send(reply_to(sent), now)[0] == "conntrack"
        assert balancer.send(frame(CLIENT[4], port, vip, 80, flags=flags("A")), now)[0] == "conntrack"
    return reason, key


@pytest.mark.parametrize(("forward", "protocol", "state"), FLOODED)
@pytest.mark.parametrize("rate", ["auto", 1_000_000])
def test_connections_get_their_entries_beside_a_flood(forward: str, protocol: str, state: str, rate: int | str) -> None:
    balancer = mixed(forward, protocol, rate)
    reasons = Counter[str]()
    begun = Counter[str]()
    turns = []
    for second in range(60):
        reasons += flood(balancer, protocol, 1000, second, second)
        for at in range(10):
            begun[connect(balancer, FULL, 1000 + 10 * second + at, second)[0]] += 1
            reason, key = connect(balancer, RR, 20_000 + 10 * second + at, second)
            begun[reason] += 1
            turns.append(key)
    assert begun == {"scheduled": 1200}
    assert set(Counter(turns).values()) == {200}  # in turn: the flood of another service changes nothing
    assert reasons["overload"] > 15_000
    states = Counter(flow[6] for flow in balancer.flows() if flow[4] == 80 and str(flow[3]) == VIP[4])
    assert states[state] > 0.7 * balancer.pipeline.flow_capacity
    assert states.total() <= 13 / 16 * balancer.pipeline.flow_capacity + 64
    assert balancer.counts_agree()


def test_connections_come_first_when_new_flows_are_too_many() -> None:
    """Half-open flows of the flood use up what time pays, but for a quarter of what is saved up."""
    balancer = mixed("dsr", "tcp", rate=100)
    rate, burst = new_flows(balancer.settings)
    assert (rate, burst) == (100, 1500)
    syns = [frame(f"100.{at // 250}.1.{at % 250}", 1000, VIP[4], 80, flags=flags("S")) for at in range(3000)]
    assert Counter(result[1] for result in balancer.pipeline.process(syns, 0)) == {"scheduled": 1125, "overload": 1875}
    assert Counter(connect(balancer, FULL, port, 0)[0] for port in range(1000, 1500)) == {
        "scheduled": 375, "new_flow_rate": 125}  # fmt: skip


@pytest.mark.parametrize(("forward", "protocol", "_"), FLOODED)
def test_a_service_alone_has_the_whole_table(forward: str, protocol: str, _: str) -> None:
    """There is nobody to keep room for."""
    balancer = Balancer(config(service(forward, protocol=protocol), flows=1000))
    reasons = flood(balancer, protocol, 3000, 0)
    assert reasons["scheduled"] > 0.97 * balancer.pipeline.flow_capacity
    assert balancer.counts_agree()


def test_a_table_for_n_flows_takes_n_flows_of_any_kind() -> None:
    balancer = mixed("dsr", "tcp", rate=1_000_000)
    assert flood(balancer, "tcp", FLOWS, 0)["scheduled"] > 0.99 * FLOWS


@pytest.mark.parametrize("letters", ["S", "A"])
def test_half_open_flows_of_the_same_kind_make_way(letters: str) -> None:
    """Of the flooded service itself; the handshakes of others, in the same buckets and older, stay."""
    balancer = Balancer(config(service("dsr", name="flooded"), *PROVEN, flows=6400, snat=["10.3.0.5"]))
    sent = [frame(CLIENT[4], port, RR, 80, flags=flags("S")) for port in range(1000, 1100)]
    balancer.pipeline.process(sent, 0)
    begun = {flow[2] for flow in balancer.flows()}
    assert len(begun) == 100
    for now in range(1, 10):
        packets = [
            frame(f"100.{now}.{at // 250}.{at % 250}", 1000, VIP[4], 80, flags=flags(letters)) for at in range(2000)]
        balancer.pipeline.process(packets, now)
    assert {flow[2] for flow in balancer.flows() if str(flow[3]) == RR} == begun
    assert balancer.pipeline.counters()["flows_evicted"] > 8000
    assert balancer.counts_agree()
    balancer.pipeline.process([], 12_000)
    late = [frame("100.200.0.1", port, VIP[4], 80, flags=flags("S")) for port in range(1000, 1200)]
    balancer.pipeline.process(late, 15_500)  # the handshakes have expired, and make way like any
    assert balancer.counts_agree()


def test_every_packet_of_a_flow_without_an_entry_goes_to_one_backend() -> None:
    balancer = mixed("dsr", "tcp", 1_000_000, scheduler="rr")
    flood(balancer, "tcp", FLOWS + 10_000, 0)
    without = 0
    for port in range(1000, 1200):
        went = [balancer.send(frame(CLIENT[4], port, VIP[4], 80, flags=flags(each)), 1)[::2] for each in "SAA"]
        without += went[0][0] == "overload"
        assert len({key for _, key in went}) == 1
    assert without > 150


def test_what_needs_an_entry_is_dropped_and_trace_says_so() -> None:
    """UDP in fullnat, beside TCP that can prove itself."""
    balancer = mixed("fullnat", "udp", 1_000_000, timeouts={"udp": "100s"})
    whole = mixed("dsr", "tcp", 1_000_000).settings
    both = [*balancer.settings.services, whole.services[0].model_copy(update={"port": 81})]
    balancer.reload(balancer.settings.model_copy(update={"services": tuple(both)}))
    for at in range(FLOWS + 15_000):
        client = str(ip_address(0x64000000 + at * 7919 % (1 << 24)))
        for letters in "SA":
            balancer.send(frame(client, 1000, VIP[4], 81, flags=flags(letters)), 1)
    client = ip_address(CLIENT[4])
    found = {
        port: explain_tuple(balancer.pipeline, client, port, ip_address(VIP[4]), 80, 17, 1000)["admission"]
        for port in range(1000, 1100)
    }
    reasons = {port: balancer.send(frame(CLIENT[4], port, VIP[4], 80, "udp"), 1)[0] for port in found}
    assert Counter(reasons.values())["flow_table_full"] > 90
    assert {port for port in found if found[port]["crowded"]} == {
        port for port, reason in reasons.items() if reason == "flow_table_full"}  # fmt: skip
