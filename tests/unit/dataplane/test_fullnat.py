"""Full NAT: a flow's source port, from where it is taken to where it is given back; and the flow log.

What comes out is taken apart by dpkt, with every checksum summed anew (tests/frames.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlb import Datapath, Verdict
from fastlb._core import FlowMemory
from fastlb.plan.tables import services_table
from fastlb.workers.workers import open_pipelines
from tests import tables
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import RST, TCP, Seen, frame, mac_of, take_apart
from tests.unit.dataplane.test_icmperror import ERRORS, ROUTER, error, every_error, quoted_of

SNAT = {4: ["10.3.0.5", "10.3.0.6"], 6: ["fd00:3::5", "fd00:3::6"]}
EVERY = [*SNAT[4], *SNAT[6]]
SHARDS = 64
LOWEST_PORT = 1024  # of snat_ports, unless configured
ALL = [(version, protocol) for version in (4, 6) for protocol in ("tcp", "udp")]
every_kind = pytest.mark.parametrize(("version", "protocol"), ALL)


def full(version: int = 4, protocol: str = "tcp", **changes: Any) -> dict[str, Any]:
    return service("fullnat", version, protocol, **changes)


def balancer_of(*services: dict[str, Any], **changes: Any) -> Datapath:
    return datapath(*services, **{"snat": EVERY, **changes})


def taken(balancer: Datapath, version: int = 4, protocol: str = "tcp") -> int:
    """Source ports that flows have."""
    found = balancer.stats()["flows"]["source_ports"]
    return next(row["taken"] for row in found if (row["version"], row["protocol"]) == (version, protocol))


def other_port(port: int) -> int:
    """Another source port of the same shard; the first is drawn by lot, and may be the last of the range."""
    return port - SHARDS if port >= LOWEST_PORT + SHARDS else port + SHARDS


def payload_of(seen: Seen) -> bytes:
    return seen.segment[20 if seen.protocol == TCP else 8 :]


def opening(sport: int, version: int = 4, protocol: str = "tcp", **more: Any) -> bytes:
    return frame(CLIENT[version], sport, VIP[version], 80, protocol, **more)


# --- translation --------------------------------------------------------------


@every_kind
def test_both_legs(version: int, protocol: str) -> None:
    balancer = balancer_of(full(version, protocol, backends=[{"address": BACKENDS[version][0], "port": 8080}]))
    out = balancer.process(opening(40000, version, protocol, payload=b"hello"))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "scheduled")
    seen = take_apart(out.frames[0])
    assert (seen.src in SNAT[version], seen.dst, seen.dport) == (True, BACKENDS[version][0], 8080)
    assert 1024 <= seen.sport <= 32767
    assert (seen.eth_dst, seen.ttl, payload_of(seen)) == (mac_of(seen.dst), 63, b"hello")
    back = balancer.process(reply_to(out.frames[0], "SA", b"there"))
    assert (back.verdict, back.reason, back.backend) == (Verdict.FORWARD, "conntrack", out.backend)
    answer = take_apart(back.frames[0])
    assert (answer.src, answer.sport, answer.dst, answer.dport) == (VIP[version], 80, CLIENT[version], 40000)
    assert (answer.eth_dst, payload_of(answer)) == (mac_of(CLIENT[version]), b"there")
    again = balancer.process(opening(40000, version, protocol, flags=flags("A")))
    later = take_apart(again.frames[0])
    assert (again.reason, later.src, later.sport) == ("conntrack", seen.src, seen.sport)


@every_kind
@settings(max_examples=60)
@given(data=st.data())
def test_any_packet(version: int, protocol: str, data: st.DataObject) -> None:
    """Whatever is in it: the payload as it was, every checksum right, and back again."""
    balancer = balancer_of(full(version, protocol, port="any"))
    dport = data.draw(st.integers(1, 65535))
    payload = data.draw(st.binary(max_size=100))
    raw = frame(CLIENT[version], data.draw(st.integers(1, 65535)), VIP[version], dport, protocol, payload=payload)
    out = take_apart(balancer.process(raw).frames[0])
    assert (out.dport, payload_of(out)) == (dport, payload)
    back = take_apart(balancer.process(reply_to(balancer.process(raw).frames[0], "A", payload)).frames[0])
    sent = take_apart(raw)
    assert (back.src, back.sport, back.dst, back.dport) == (sent.dst, sent.dport, sent.src, sent.sport)
    assert payload_of(back) == payload


def test_a_super_frame_stays_one() -> None:
    """Its checksum is only begun: the device goes on with the new addresses."""
    balancer = balancer_of(full())
    balancer.process(opening(1))
    raw = opening(40000, payload=bytes(4000), flags=flags("S"))
    vnet = bytes([1, 1, 54, 0, 0x64, 5, 34, 0, 16, 0])  # NEEDS_CSUM, TCPv4, 1380 bytes a segment
    verdict, reason, frames, *_ = balancer.pipeline.process([raw], 0, 0, [vnet])[0]
    assert (verdict, reason, len(frames), len(frames[0])) == (0, "scheduled", 1, len(raw))


# --- source ports -------------------------------------------------------------


@every_kind
def test_no_two_flows_share_a_source(version: int, protocol: str) -> None:
    balancer = balancer_of(full(version, protocol))
    sources = set()
    for sport in range(1000, 2000):
        seen = take_apart(balancer.process(opening(sport, version, protocol)).frames[0])
        sources.add((seen.src, seen.sport))
    assert len(sources) == 1000
    assert {address for address, _ in sources} == set(SNAT[version])
    assert taken(balancer, version, protocol) == 1000


def test_a_flow_takes_a_port_of_its_own_shard() -> None:
    """With two workers: what steering sends to one, the other does not own."""
    settings = config(full(), snat=EVERY)
    one, two = open_pipelines(settings, 2)
    known = Balancer(settings)
    for pipeline in (one, two):
        pipeline.publish(services_table(settings, known.plans), known.routes())
    forwarded = []
    for sport in range(1000, 1400):
        for pipeline, other in ((one, two), (two, one)):
            _, reason, sent, *_ = pipeline.process([opening(sport)], 0)[0]
            if reason == "wrong_worker":
                continue
            forwarded.append(pipeline)
            answer = reply_to(sent[0])
            assert other.process([answer], 0)[0][1] == "wrong_worker"
            assert pipeline.process([answer], 0)[0][1] == "conntrack"
    assert len(forwarded) == 400
    assert set(forwarded) == {one, two}


@every_kind
def test_exhaustion_has_a_name_and_harms_nobody(version: int, protocol: str) -> None:
    """64 ports: one for each shard."""
    balancer = balancer_of(full(version, protocol), snat=SNAT[version][:1], snat_ports="2048-2111")
    first = balancer.process(opening(1, version, protocol)).frames[0]
    reasons = [balancer.process(opening(sport, version, protocol)).reason for sport in range(2, 2000)]
    assert set(reasons) == {"scheduled", "no_source_port"}
    assert reasons.count("scheduled") == 63
    assert taken(balancer, version, protocol) == 64
    assert balancer.stats()["counters"]["drops"]["no_source_port"] == len(reasons) - 63
    assert balancer.process(reply_to(first)).reason == "conntrack"


def test_more_addresses_are_more_ports() -> None:
    for count in (1, 2):
        balancer = balancer_of(full(), snat=SNAT[4][:count], snat_ports="2048-2111")
        reasons = [balancer.process(opening(sport)).reason for sport in range(1, 4000)]
        assert reasons.count("scheduled") == 64 * count


def test_a_port_is_used_again_only_after_its_flow_is_over() -> None:
    balancer = balancer_of(full(), snat=SNAT[4][:1], snat_ports="2048-2111")
    sent = {}
    for sport in range(1, 2000):
        out = balancer.process(opening(sport))
        if out.reason == "scheduled":
            sent[sport] = out.frames[0]
    sport, raw = next(iter(sent.items()))
    assert balancer.process(opening(sport, flags=RST), now=1.0).reason == "conntrack"
    others = range(2000, 4000)
    assert {balancer.process(opening(each), now=2.0).reason for each in others} == {"no_source_port"}, "remembered"
    again = [balancer.process(opening(each), now=33.0) for each in others]  # tcp_closing: 30 s
    fresh = [take_apart(out.frames[0]) for out in again if out.reason == "scheduled"]
    assert (take_apart(raw).src, take_apart(raw).sport) in {(seen.src, seen.sport) for seen in fresh}


def test_the_port_that_has_been_free_longest_comes_first() -> None:
    """128 ports, two of each shard; one client port's flow, again and again: its shard's two take turns."""
    balancer = balancer_of(full(), snat=SNAT[4][:1], snat_ports="2048-2175")
    ports = []
    for turn in range(6):
        out = balancer.process(opening(7), now=turn * 100.0)
        ports.append(take_apart(out.frames[0]).sport)
        balancer.process(opening(7, flags=RST), now=turn * 100.0)
    assert ports == [ports[0], ports[1]] * 3
    assert abs(ports[0] - ports[1]) == SHARDS


def test_a_reconnect_takes_another_port() -> None:
    """A SYN on a flow that is over starts anew; the backend may still be in TIME-WAIT with the old port."""
    balancer = balancer_of(full())
    before = take_apart(balancer.process(opening(7)).frames[0])
    balancer.process(opening(7, flags=RST))
    after = take_apart(balancer.process(opening(7)).frames[0])
    assert (before.src, before.sport) != (after.src, after.sport)
    assert taken(balancer) == 1


def test_a_full_table_drops_by_name_and_gives_the_port_back() -> None:
    balancer = balancer_of(full(), flows=64)
    for sport in range(1, 3000):
        out = balancer.process(opening(sport))
        if out.frames:
            balancer.process(reply_to(out.frames[0]))
            balancer.process(opening(sport, flags=flags("A")))  # established: never given up
    counters = balancer.stats()
    assert counters["counters"]["drops"]["flow_table_full"] > 0
    assert taken(balancer) == counters["flows"]["active"]


def test_answers_find_flows_whose_entries_have_moved() -> None:
    """A port remembers where its flow's entry was; filling a table moves many."""
    balancer = balancer_of(full(), flows=4000)
    sent = [balancer.process(opening(sport)) for sport in range(1, 4001)]
    tracked = [out for out in sent if out.frames]
    assert len(tracked) == balancer.stats()["flows"]["active"] > 3900
    for _ in range(2):  # the second time by the place that the first has found
        for sport, out in enumerate(sent, 1):
            if out.frames:
                answer = balancer.process(reply_to(out.frames[0]))
                assert answer.reason == "conntrack"
                assert take_apart(answer.frames[0]).dport == sport


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 300), st.sampled_from("SARF"), st.integers(0, 40)), max_size=300))
def test_ports_and_entries_agree(steps: list[tuple[int, str, int]]) -> None:
    """Whatever happens to flows: each has one port, and no port is lost."""
    balancer = balancer_of(full(), snat=SNAT[4][:1], snat_ports="2048-2303", flows=64)
    now = 0.0
    for sport, letter, wait in steps:
        now += wait
        balancer.process(opening(sport, flags=flags(letter)), now=now)
        assert taken(balancer) == balancer.stats()["flows"]["active"]
    balancer.process(opening(1), now=now + 10_000)
    assert taken(balancer) <= 1


# --- who is let in ------------------------------------------------------------


@every_kind
def test_spoofed_replies(version: int, protocol: str) -> None:
    """From another backend, from another port, to a port that no flow has: dropped by name, and no flow changes."""
    balancer = balancer_of(full(version, protocol))
    out = balancer.process(opening(40000, version, protocol))
    seen = take_apart(out.frames[0])
    other = next(host for host in BACKENDS[version] if host != seen.dst)
    before = tables.flows(balancer.pipeline)
    for source, sport, target, dport, reason in (
        (other, seen.dport, seen.src, seen.sport, "reply_unknown"),
        (seen.dst, seen.dport, seen.src, other_port(seen.sport), "reply_unknown"),
        (seen.dst, seen.dport + 1, seen.src, seen.sport, "no_service"),
        (CLIENT[version], seen.dport, seen.src, seen.sport, "no_service"),
        (seen.dst, seen.dport, seen.src, 40000, "no_service"),  # beyond the range: the host's own socket
        (seen.dst, seen.dport, CLIENT[version], seen.sport, "no_service"),
    ):
        assert balancer.process(frame(source, sport, target, dport, protocol, flags=RST)).reason == reason
    assert tables.flows(balancer.pipeline) == before


def test_an_any_port_service_expects_the_port_that_was_asked() -> None:
    balancer = balancer_of(full(port="any"))
    seen = take_apart(balancer.process(opening(40000)).frames[0])
    assert balancer.process(frame(seen.dst, 81, seen.src, seen.sport, flags=flags("SA"))).reason == "reply_unknown"
    assert balancer.process(frame(seen.dst, 80, seen.src, seen.sport, flags=flags("SA"))).reason == "conntrack"


@pytest.mark.parametrize("version", [4, 6])
def test_after_a_restart_a_connection_is_reset(version: int) -> None:
    """Nobody knows its source port any more; silence would keep the client waiting."""
    balancer = balancer_of(full(version))
    out = balancer.process(opening(40000, version, flags=flags("A"), payload=b"x"))
    assert out.reason == "rejected"
    seen = take_apart(out.frames[0])
    assert (seen.src, seen.dst, seen.protocol) == (VIP[version], CLIENT[version], TCP)
    assert seen.segment[13] & RST
    assert balancer.process(opening(40000, version, flags=RST)).reason == "flow_unknown"
    assert taken(balancer, version) == 0


@pytest.mark.parametrize("before", ["dsr", "ipip", "nat"])
@every_kind
def test_flows_from_before_a_reload_to_fullnat_are_over(version: int, protocol: str, before: str) -> None:
    """They have no source port: their packets would leave with the client's address."""
    balancer = balancer_of(service(before, version, protocol, name="web"))
    for flags_ in ("S", "A"):
        balancer.process(opening(40000, version, protocol, flags=flags(flags_)))
    balancer.reload(config(full(version, protocol, name="web"), snat=EVERY), now=1.0)
    out = balancer.process(opening(40000, version, protocol, flags=flags("A")), now=2.0)
    if protocol == "tcp":
        assert (out.reason, take_apart(out.frames[0]).dst) == ("rejected", CLIENT[version])
        out = balancer.process(opening(40000, version, protocol), now=3.0)
    assert (out.reason, take_apart(out.frames[0]).src in SNAT[version]) == ("scheduled", True)
    assert taken(balancer, version, protocol) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_an_error_about_a_flow_from_before_a_reload_to_fullnat(version: int) -> None:
    balancer = balancer_of(service("dsr", version, name="web"))
    balancer.process(opening(40000, version))
    balancer.reload(config(full(version, name="web"), snat=EVERY), now=1.0)
    reply = frame(VIP[version], 80, CLIENT[version], 40000)[14:]
    assert balancer.process(error(reply, "port", ROUTER[version]), now=2.0).reason == "icmp_unknown"


def test_nat_and_fullnat_share_a_backend() -> None:
    nat = service("nat", vip="203.0.113.11")
    balancer = balancer_of(full(backends=nat["backends"]), nat)
    one = balancer.process(opening(40000)).frames[0]
    two = balancer.process(frame(CLIENT[4], 40000, "203.0.113.11", 80)).frames[0]
    for sent, vip in ((one, VIP[4]), (two, "203.0.113.11")):
        back = take_apart(balancer.process(reply_to(sent)).frames[0])
        assert (back.src, back.dst, back.dport) == (vip, CLIENT[4], 40000)


# --- ICMP ---------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("quoted", [8, 20, 1000])
@every_error
def test_an_error_about_a_reply(version: int, kind: str, quoted: int, protocol: str) -> None:
    balancer = balancer_of(full(version, protocol, backends=[{"address": BACKENDS[version][0], "port": 8080}]))
    sent = balancer.process(opening(40000, version, protocol)).frames[0]
    answer = reply_to(sent, "SA", b"x" * 30)
    back = balancer.process(answer).frames[0]
    out = balancer.process(error(back[14:], kind, ROUTER[version], quoted=quoted))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    seen, source = take_apart(out.frames[0]), take_apart(sent)
    assert (seen.src, seen.dst, seen.eth_dst) == (source.src, source.dst, mac_of(source.dst))
    assert seen.segment[:2] == bytes(ERRORS[version][kind])
    *ends, rest = quoted_of(seen)
    assert ends == [source.dst, 8080, source.src, source.sport]
    assert rest == take_apart(answer).segment[: len(rest)], "as the backend had sent it"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("quoted", [8, 20, 1000])
@pytest.mark.parametrize("by_backend", [True, False])
@every_error
def test_an_error_about_a_client_s_packet(
    version: int, kind: str, by_backend: bool, quoted: int, protocol: str
) -> None:
    balancer = balancer_of(full(version, protocol))
    raw = opening(40000, version, protocol, payload=b"hello")
    sent = balancer.process(raw).frames[0]
    complainer = take_apart(sent).dst if by_backend else ROUTER[version]
    out = balancer.process(error(sent[14:], kind, complainer, quoted=quoted))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    seen = take_apart(out.frames[0])
    expected = VIP[version] if by_backend else ROUTER[version]
    assert (seen.src, seen.dst, seen.eth_dst) == (expected, CLIENT[version], mac_of(CLIENT[version]))
    *ends, rest = quoted_of(seen)
    assert ends == [CLIENT[version], 40000, VIP[version], 80]
    assert rest == take_apart(raw).segment[: len(rest)]


@every_error
def test_an_error_about_no_flow(version: int, kind: str) -> None:
    balancer = balancer_of(full(version))
    seen = take_apart(balancer.process(opening(40000, version)).frames[0])
    unknown = frame(seen.src, other_port(seen.sport), seen.dst, 80)
    assert balancer.process(error(unknown[14:], kind, seen.dst)).reason == "icmp_unknown"
    reply = frame(VIP[version], 80, CLIENT[version], 999)
    assert balancer.process(error(reply[14:], kind, ROUTER[version])).reason == "icmp_unknown"


# --- the flow log -------------------------------------------------------------


def test_a_log_that_cannot_keep_up_counts_what_it_lost() -> None:
    """65,536 lines wait at most."""
    balancer = balancer_of(service("nat"), flows=100_000)
    balancer.pipeline.log_flows()
    balancer.process_batch([opening(sport) for sport in range(1, 65536)])
    assert balancer.stats()["counters"]["flow_log_lost"] == 0
    balancer.process_batch([frame("10.1.0.9", sport, VIP[4], 80) for sport in range(1, 12)])
    assert balancer.stats()["counters"]["flow_log_lost"] == 10
    assert len(balancer.pipeline.take_logged(70_000)) == 65536
    assert balancer.pipeline.take_logged(1) == []


@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr"])
def test_flows_that_are_made_to_end(forward: str) -> None:
    """Those of this pipeline's shards; in the modes that are logged, each has its line."""
    known = Balancer(config(service(forward), snat=EVERY))
    mine, others = open_pipelines(known.settings, 2)
    frames = [opening(sport) for sport in range(40000, 40200)]
    reasons = []
    for pipeline in (mine, others):
        pipeline.log_flows()
        pipeline.publish(services_table(known.settings, known.plans), known.routes())
        reasons += [result[1] for result in pipeline.process(frames, 0)]
    assert (reasons.count("scheduled"), reasons.count("wrong_worker")) == (200, 200)
    of_others = reasons[200:].count("scheduled")
    assert 0 < of_others < 200
    mine.take_logged(1000)
    ended = 0
    bucket: int | None = 0
    while bucket is not None:
        assert bucket % 100 == 0
        bucket = mine.forget_flows(bucket, 100)
        ended += len(mine.take_logged(1000))
    assert ended == (0 if forward == "dsr" else 200 - of_others)
    assert mine.flow_count() == of_others


@pytest.mark.parametrize("ports", [(0, 9), (9, 8), (1, 65536)])
def test_ranges_that_cannot_be(ports: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="source ports"):
        FlowMemory(64, sources=config(full(), snat=SNAT[4]).snat, ports=ports)
