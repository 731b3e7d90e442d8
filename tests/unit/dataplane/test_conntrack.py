"""conntrack.pxd: what the flow table remembers, for how long, and what it gives up first."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb._core import FlowMemory, Pipeline, explain_tuple
from fastlb.config import Config
from fastlb.model.names import owner_of_shard
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.workers.workers import open_pipelines
from tests.balancers import BACKENDS, CLIENT, HOSTS, KEY, VIP, Balancer, config, flags, reply_to, service
from tests.frames import ACK, FIN, RST, SYN, UDP, frame

TIMEOUTS = {"tcp_syn": 15, "tcp_established": 900, "tcp_half_closed": 120, "tcp_closing": 30, "udp": 60}
ONE = {forward: [{"address": BACKENDS[4][0]}] for forward in ("nat", "dsr")}


def balancer_for(*forwards: str, protocol: str = "tcp", flows: int = 4096) -> Balancer:
    services = [service(forward, protocol=protocol, backends=ONE[forward]) for forward in forwards]
    return Balancer(config(*services, timeouts=TIMEOUTS, flows=flows))


def client(letters: str, sport: int = 40000, host: str = CLIENT[4]) -> bytes:
    return frame(host, sport, VIP[4], 80, flags=flags(letters))


def backend(letters: str, dport: int = 40000) -> bytes:
    return frame(BACKENDS[4][0], 80, CLIENT[4], dport, flags=flags(letters))


# --- states -------------------------------------------------------------------

# Packets in their order: from the client ">SA" (SYN and ACK), from the backend "<SA".
TWO_WAY = [
    (">S", "syn"),
    (">S >S", "syn"),
    (">S >A", "syn"),  # the backend has not answered: one side alone proves nothing
    (">S <SA", "syn-ack"),
    (">S <SA <SA", "syn-ack"),
    (">S <SA >S", "syn-ack"),
    (">S <SA >A", "established"),
    (">S <SA >AP", "established"),
    (">S <A", "established"),
    (">S <SA >A >S", "established"),
    (">S <SA >A <SA", "established"),
    (">S <SA >A >AP <AP", "established"),
    (">S <SA >A >FA", "fin-client"),
    (">S <SA >A >FA >FA", "fin-client"),
    (">S <SA >A >FA <A", "fin-client"),
    (">S <SA >A >FA <AP >A", "fin-client"),
    (">S <SA >A <FA", "fin-backend"),
    (">S <SA >A <FA <FA", "fin-backend"),
    (">S <SA >A <FA >A", "fin-backend"),
    (">S <SA >A <FA >S", "fin-backend"),  # anybody can forge a SYN
    (">S <SA >A >FA >S", "fin-client"),
    (">S <SA >A <FA >S <A", "fin-backend"),  # a challenge ACK: the backend has the old connection still
    (">S <SA >A >FA >S <A", "fin-client"),
    (">S <SA >A <FA >S <A >R", "reset"),
    (">S <SA >A >FA <S", "fin-client"),
    (">S <SA >A <FA >S <SA", "syn-ack"),  # it has not, and a new one begins
    (">S <SA >A >FA >S <SA", "syn-ack"),
    (">S <SA >A <FA >S <SA >A", "established"),
    (">S <SA >A >FA >S <SA >A", "established"),
    (">S <SA >A <FA >S <SA >A >AP <AP", "established"),
    (">S <SA >A <FA >S <SA >A >FA", "fin-client"),  # the FIN of before is not this one's
    (">S <SA >A >FA >S <SA >A <FA", "fin-backend"),
    (">S <SA >A <FA >S <SA >A >FA <FA", "closing"),
    (">S <SA >A <FA >S <RA", "reset"),
    (">S <SA >A >FA <SA <A >A", "established"),  # a SYN-ACK sent again, before the backend saw the FIN
    (">S <SA >A >FA <FA", "closing"),
    (">S <SA >A <FA >FA", "closing"),
    (">S <SA >A >FA <FA >A", "closing"),
    (">S <SA >A >FA <FA >A <A", "closing"),
    (">S <SA >A >R", "reset"),
    (">S <SA >A <R", "reset"),
    (">S <RA", "reset"),
    (">S <SA >A >FA <RA", "reset"),
    (">S <SA >A >R <A", "reset"),
    (">S <SA >A >FA <FA >S", "syn"),
    (">S <SA >A >R >S", "syn"),
    (">S <RA >S <SA >A", "established"),
    (">A", "picked-up"),
    (">A >A", "picked-up"),
    (">A <A", "established"),
    (">A >FA", "closing"),  # no backend has answered: it may be forged
    (">S >FA", "closing"),
    (">S <SA >A >R >A", "picked-up"),  # the RST was not the client's own
    (">S <SA >A >R >A <A", "established"),
    (">A >R", "reset"),
    ("<A", "picked-up"),
    ("<A >A", "picked-up"),
    ("<SA", "picked-up"),
    ("<A <A", "established"),
    (">R", None),
    ("<R", None),
]
ONE_WAY = [
    (">S", "syn"),
    (">S >S", "syn"),
    (">S >A", "established"),
    (">S >AP", "established"),
    (">S >A >S", "established"),
    (">S >A >FA", "closing"),
    (">S >A >FA >A", "closing"),
    (">S >FA", "closing"),
    (">S >A >R", "reset"),
    (">S >A >R >A", "picked-up"),
    (">S >R", "reset"),
    (">S >A >FA >S", "syn"),
    (">S >A >R >S", "syn"),
    (">S >A >R >S >A", "established"),
    (">A", "picked-up"),
    (">A >A", "established"),
    (">FA", "picked-up"),
    (">A >FA", "closing"),
    (">SA", "picked-up"),
    (">R", None),
]


def play(balancer: Balancer, packets: str) -> None:
    for packet in packets.split():
        raw = client(packet[1:]) if packet[0] == ">" else backend(packet[1:])
        reason, _, key = balancer.send(raw)
        assert reason in ("scheduled", "maglev", "conntrack")
        assert key == "10.3.0.11:80"


@pytest.mark.parametrize(
    ("forward", "packets", "state"),
    [("nat", *row) for row in TWO_WAY] + [("dsr", *row) for row in ONE_WAY],
)
def test_tcp_state(forward: str, packets: str, state: str | None) -> None:
    balancer = balancer_for(forward)
    play(balancer, packets)
    assert [flow[6] for flow in balancer.flows()] == ([state] if state else [])
    assert balancer.counts_agree()


@pytest.mark.parametrize(
    ("forward", "packets", "state"),
    [
        ("nat", ">", "udp-new"),
        ("nat", "> >", "udp-new"),
        ("nat", "> <", "udp"),
        ("nat", "> < >", "udp"),
        ("dsr", ">", "udp-new"),
        ("dsr", "> >", "udp"),
    ],
)
def test_udp_state(forward: str, packets: str, state: str) -> None:
    balancer = balancer_for(forward, protocol="udp")
    for packet in packets.split():
        if packet == ">":
            balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, "udp"))
        else:
            balancer.send(frame(BACKENDS[4][0], 80, CLIENT[4], 40000, "udp"))
    assert [flow[6] for flow in balancer.flows()] == [state]


def test_a_flow_is_listed_whole() -> None:
    balancer = balancer_for("nat")
    balancer.send(client("S"), now=1.5)
    number = balancer.plans[0].members[0].id
    protocol, host, port, vip, vport, *rest = balancer.flows()[0]
    assert (protocol, str(host), port, str(vip), vport) == (6, CLIENT[4], 40000, VIP[4], 80)
    assert rest == [number, "syn", 1500]


# --- time ---------------------------------------------------------------------

# state, the packets that lead there, its timeout in seconds
IDLE = [
    ("nat", ">S", 15),
    ("nat", ">S <SA", 15),
    ("nat", ">A", 15),
    ("nat", ">S <SA >A", 900),
    ("nat", ">S <SA >A >FA", 120),
    ("nat", ">S <SA >A <FA", 120),
    ("nat", ">S <SA >A <FA >AP <A", 120),
    ("nat", ">S <SA >A <FA >S", 120),
    ("nat", ">S <SA >A <FA >S <SA", 15),
    ("nat", ">S <SA >A <FA >S <SA >A", 900),
    ("nat", ">S <SA >A >FA >S <SA >A", 900),
    ("nat", ">S <SA >A >FA <FA", 30),
    ("nat", ">S <SA >A >R", 30),
    ("dsr", ">S", 15),
    ("dsr", ">S >A", 900),
    ("dsr", ">S >A >FA", 30),
    ("dsr", ">S >A >R", 30),
]


@pytest.mark.parametrize(("forward", "packets", "timeout"), IDLE)
def test_tcp_timeout(forward: str, packets: str, timeout: int) -> None:
    """Remembered up to the very millisecond; afterwards the packet is one of a flow that nobody knows."""
    balancer = balancer_for(forward)
    play(balancer, packets)
    assert balancer.send(client("A"), now=timeout)[0] == "conntrack"
    balancer = balancer_for(forward)
    play(balancer, packets)
    assert balancer.send(client("A"), now=timeout + 0.001)[0] == "maglev"
    assert balancer.counts_agree()


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_udp_timeout(forward: str) -> None:
    balancer = balancer_for(forward, protocol="udp")
    raw = frame(CLIENT[4], 40000, VIP[4], 80, "udp")
    reasons = [balancer.send(raw, now)[0] for now in (0, 60, 120, 180.001)]
    assert reasons == ["scheduled", "conntrack", "conntrack", "scheduled"]


def test_every_packet_starts_the_timeout_anew() -> None:
    balancer = balancer_for("nat")
    play(balancer, ">S <SA >A")
    assert [balancer.send(raw, now)[0] for raw, now in
            [(client("A"), 899), (backend("A"), 1798), (client("A"), 2697)]] == ["conntrack"] * 3  # fmt: skip


def test_a_reply_after_the_timeout_leaves_one_entry() -> None:
    """The reply is picked up in place of the entry that it finds expired and not yet swept."""
    for sport in range(40000, 40010):
        balancer = balancer_for("nat")
        balancer.send(client("S", sport), now=100)
        balancer.pipeline.process([], 114_950)
        assert balancer.send(backend("SA", sport), now=115.05)[0] == "maglev"
        assert [flow[2] for flow in balancer.flows()] == [sport]
        assert balancer.counts_agree()
        assert balancer.send(client("A", sport), now=115.1)[0] == "conntrack"


def test_the_sweep_forgets_what_expired() -> None:
    """Every bucket within about ten seconds, without a packet of the flow: counters stay true."""
    balancer = balancer_for("dsr", flows=100_000)
    for sport in range(1000, 3000):
        balancer.send(client("S", sport), now=1)
    assert balancer.pipeline.flow_count() == 2000
    balancer.pipeline.process([], 16_000)
    assert balancer.pipeline.flow_count() == 2000  # exactly at the timeout they are still remembered
    for now in range(16_001, 26_501, 100):
        balancer.pipeline.process([], now)
        assert balancer.counts_agree()
    assert balancer.pipeline.flow_count() == 0
    assert balancer.pipeline.counters()["flows_expired"] == 2000
    assert balancer.pipeline.backend_stats(1)["active_flows"] == 0


@pytest.mark.parametrize("step", [1, 13, 99])
def test_the_sweep_of_a_small_table_takes_no_longer(step: int) -> None:
    """Batches that come at odd times (``step`` in ms) must not add up to a slower sweep."""
    balancer = balancer_for("dsr", flows=4096)
    for sport in range(1000, 3000):
        balancer.send(client("S", sport), now=1)
    balancer.pipeline.process([], 16_000)
    for now in range(16_001, 27_000, step):
        balancer.pipeline.process([], now)
    assert balancer.pipeline.flow_count() == 0


def test_the_sweep_is_spread_over_its_period() -> None:
    balancer = balancer_for("dsr", flows=100_000)
    balancer.pipeline.process([client("S", sport) for sport in range(1000, 5000)], 1000)
    balancer.pipeline.process([], 100_000)
    assert balancer.pipeline.flow_count() == 0  # after a long silence one full round
    balancer.pipeline.process([client("S", sport) for sport in range(1000, 5000)], 100_000)
    balancer.pipeline.process([], 115_001)
    balancer.pipeline.process([client("S", sport) for sport in range(1000, 5000)], 115_001)
    balancer.pipeline.process([], 130_001)
    before = balancer.pipeline.flow_count()
    balancer.pipeline.process([], 131_001)
    assert 0.85 < balancer.pipeline.flow_count() / before < 0.95  # a second visits a tenth of the table


def test_the_clock_wraps() -> None:
    """Milliseconds in 32 bits begin anew after 49.7 days."""
    balancer = balancer_for("nat")
    wrap = 2**32 / 1000
    for raw in (client("S"), backend("SA"), client("A")):
        balancer.pipeline.process([raw], round((wrap - 5) * 1000))
    assert balancer.pipeline.process([client("A")], 5000)[0][1] == "conntrack"
    balancer.pipeline.process([], 906_000)
    balancer.pipeline.process([], 917_000)
    assert balancer.pipeline.flow_count() == 0


def test_a_clock_that_steps_back_expires_nothing() -> None:
    balancer = balancer_for("dsr")
    play(balancer, ">S >A")
    balancer.send(client("A"), now=2000)
    assert balancer.send(client("A"), now=10)[0] == "conntrack"
    assert balancer.pipeline.flow_count() == 1


# --- a new connection on an old port ------------------------------------------


@pytest.mark.parametrize(
    ("forward", "packets"),
    [("nat", ">S <SA >A >FA <FA"), ("nat", ">S <SA >A <R"), ("dsr", ">S >A >FA"), ("dsr", ">S >A >R")],
)
def test_syn_on_a_flow_that_is_over_starts_anew(forward: str, packets: str) -> None:
    """By the scheduler, not by the entry: meanwhile the backend has been drained."""
    drained = service(forward, backends=[*({"address": a, "weight": 0} for a in BACKENDS[4][:1]),
                                         {"address": BACKENDS[4][1]}])  # fmt: skip
    balancer = balancer_for(forward)
    play(balancer, packets)
    balancer.reload(config(drained, timeouts=TIMEOUTS))
    assert balancer.send(client("A"))[::2] == ("conntrack", "10.3.0.11:80")
    assert balancer.send(client("S"))[::2] == ("scheduled", "10.3.0.12:80")
    assert len(balancer.flows()) == 1
    assert balancer.counts_agree()


def test_syn_on_a_live_flow_stays() -> None:
    balancer = balancer_for("nat")
    play(balancer, ">S <SA >A")
    assert balancer.send(client("S"))[0] == "conntrack"


# --- room ---------------------------------------------------------------------


def stream(count: int, letters: str, first: int = 0) -> list[bytes]:
    """``count`` packets, each of another client."""
    template = bytearray(client(letters))
    made = []
    for number in range(first, first + count):
        template[26:30] = (0x0A000000 + number // 60000 * 256 + number % 251).to_bytes(4, "big")
        template[34:36] = (1024 + number % 60000).to_bytes(2, "big")
        made.append(bytes(template))
    return made


def test_a_flood_of_syns_evicts_no_established_flow() -> None:
    balancer = balancer_for("dsr", flows=1024)
    established = stream(900, "S")
    balancer.pipeline.process(established, 0)
    balancer.pipeline.process(stream(900, "A"), 0)
    kept = {flow[1:3] for flow in balancer.flows() if flow[6] == "established"}
    assert len(kept) >= 890  # a few met eight SYNs of others and were evicted before their ACK
    for at in range(10):
        flood = stream(5000, "S", first=100_000 + at * 5000)
        balancer.pipeline.process(flood, at)
    assert {flow[1:3] for flow in balancer.flows() if flow[6] == "established"} >= kept
    assert {result[1] for result in balancer.pipeline.process(stream(900, "A"), 11)} <= {"conntrack", "maglev"}
    assert balancer.pipeline.counters()["flows_evicted"] > 40_000
    assert balancer.counts_agree()


def test_a_full_table_forwards_without_an_entry() -> None:
    """Twice as many established flows as it has entries: those without one are counted, and go on by Maglev."""
    balancer = balancer_for("dsr", flows=1024)
    for part in range(0, 3000, 100):
        balancer.pipeline.process(stream(100, "S", part), 0)
        balancer.pipeline.process(stream(100, "A", part), 0)
    established = sum(flow[6] == "established" for flow in balancer.flows())
    assert established > 0.95 * balancer.pipeline.flow_capacity
    results = balancer.pipeline.process(stream(3000, "A"), 1)
    assert {result[0] for result in results} == {0}
    assert sum(result[1] == "conntrack" for result in results) >= established
    counters = balancer.pipeline.counters()
    assert counters["flows_untracked"] > 0
    assert counters["packets"] == counters["forwarded"] == 9000
    assert balancer.counts_agree()


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_table_for_n_flows_takes_n_flows(forward: str) -> None:
    balancer = balancer_for(forward, flows=200_000)
    balancer.pipeline.process(stream(200_000, "S"), 0)
    counters = balancer.pipeline.counters()
    assert (counters["flows_untracked"], counters["flows_evicted"]) == (0, 0)
    assert balancer.pipeline.flow_count() == 200_000
    assert balancer.counts_agree()


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_flow_has_one_entry_whatever_a_batch_holds(forward: str) -> None:
    """Flows that begin twice within a batch, while others in their buckets end, begin anew, or are given up."""
    balancer = balancer_for(forward, flows=200)
    packets = [packet for letters in ("S", "S", "S", "A", "R") for packet in stream(600, letters)]
    random.Random(1).shuffle(packets)
    for at in range(0, len(packets), 32):
        balancer.pipeline.process(packets[at : at + 16] + packets[at : at + 32], at)
        flows = [flow[1:3] for flow in balancer.flows()]
        assert len(flows) == len(set(flows))
        assert balancer.counts_agree()
    counters = balancer.pipeline.counters()
    assert counters["flows_evicted"] > 0
    assert sum(balancer.pipeline.backend_stats(number)["new_flows"] for number in balancer.keys) > 1000


def test_expired_flows_make_room() -> None:
    balancer = balancer_for("dsr", flows=1024)
    for round_ in range(5):
        now = round_ * 16_000
        balancer.pipeline.process(stream(700, "S", round_ * 1000), now)
    counters = balancer.pipeline.counters()
    assert (counters["flows_untracked"], counters["flows_evicted"]) == (0, 0)
    assert counters["flows_expired"] >= 4 * 700 - 700
    assert balancer.counts_agree()


@pytest.mark.parametrize("flows", [200, 10_000, 1_000_000, 10_000_000])
def test_memory(flows: int) -> None:
    """At most 28 bytes a flow where every packet looks; the cold part is told apart."""
    hot, cold = Balancer(config(flows=flows)).pipeline.memory()
    assert hot <= 28 * flows + 64 * 64  # each of 64 shards is rounded up to a whole bucket
    assert cold > hot


def test_counts_per_backend_follow_the_flows() -> None:
    balancer = Balancer(config(service("nat"), service("dsr", vip="203.0.113.20"), timeouts=TIMEOUTS))
    for number in range(600):
        vip = VIP[4] if number % 2 else "203.0.113.20"
        balancer.send(frame(CLIENT[4], 1000 + number, vip, 80, flags=SYN), now=number / 50)
        if number % 3 == 0:
            balancer.send(frame(CLIENT[4], 1000 + number, vip, 80, flags=ACK), now=number / 50)
        if number % 7 == 0:
            balancer.send(frame(CLIENT[4], 1000 + number, vip, 80, flags=RST | ACK), now=number / 50)
        if number % 100 == 99:
            assert balancer.counts_agree()
    started = sum(balancer.pipeline.backend_stats(number)["new_flows"] for number in balancer.keys)
    assert started == 600
    for now in (30, 41, 42, 60, 2000):
        balancer.pipeline.process([], now * 1000)
        assert balancer.counts_agree()
    assert balancer.flows() == []


@pytest.mark.parametrize("flags_", [SYN | FIN, SYN | RST])
def test_malformed_packets_leave_no_flow(flags_: int) -> None:
    balancer = balancer_for("nat")
    balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags_))
    assert balancer.flows() == []


def test_protocols_do_not_mix() -> None:
    balancer = Balancer(config(service("nat"), service("nat", protocol="udp")))
    balancer.send(frame(CLIENT[4], 40000, VIP[4], 80))
    balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, "udp"))
    assert sorted(flow[0] for flow in balancer.flows()) == [6, UDP]


# --- one table, several workers -----------------------------------------------

SHARDS = 64
EVEN, ODD = range(0, SHARDS, 2), range(1, SHARDS, 2)
PORTS = range(40000, 40200)


class Part(Balancer):
    """A balancer whose pipeline is one of several over one flow table."""

    def __init__(self, settings: Config, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.ids = BackendIds()
        self.standings = BackendStates()
        self.hosts = list(HOSTS)
        self.reload(settings)

    def owned(self) -> set[int]:
        """The ports of PORTS whose packets it takes; makes their flows."""
        return {port for port in PORTS if self.send(client("S", port))[0] != "wrong_worker"}


def parts(settings: Config, *shards: Iterable[int]) -> list[Part]:
    memory = FlowMemory(settings.flows, KEY)
    return [Part(settings, Pipeline(memory, shards=part)) for part in shards]


def two_parts(forward: str = "dsr") -> list[Part]:
    return parts(config(service(forward, backends=ONE[forward]), timeouts=TIMEOUTS), EVEN, ODD)


def seen_of(part: Part, but: tuple[str, ...]) -> tuple[Any, ...]:
    """All that a packet could change, but these counters."""
    counters = {name: count for name, count in part.pipeline.counters().items() if name not in but}
    stats = [part.pipeline.backend_stats(number) for number in range(1, part.ids.highest + 1)]
    return counters, stats, part.flows(), part.pipeline.flow_count()


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
def test_every_packet_has_one_worker(workers: int) -> None:
    settings = config(service("dsr", backends=ONE["dsr"]))
    members = [Part(settings, pipeline) for pipeline in open_pipelines(settings, workers)]
    taken = Counter(port for member in members for port in member.owned())
    assert taken == dict.fromkeys(PORTS, 1)
    assert [member.pipeline.flow_count() for member in members] == [len(PORTS)] * workers


@pytest.mark.parametrize("workers", range(1, SHARDS + 1))
def test_every_worker_has_its_share_of_the_shards(workers: int) -> None:
    owners = [owner_of_shard(shard, workers) for shard in range(SHARDS)]
    counts = Counter(owners)
    assert owners == sorted(owners)
    assert set(counts) == set(range(workers))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("version", [4, 6])
def test_both_legs_of_a_flow_have_one_worker(version: int) -> None:
    members = parts(config(service("nat", version)), EVEN, ODD)
    taken = [0, 0]
    for port in PORTS:
        opened = [member.send(frame(CLIENT[version], port, VIP[version], 80)) for member in members]
        (owner,) = (at for at, (reason, _, _) in enumerate(opened) if reason == "scheduled")
        sent = opened[owner][1]
        assert sent is not None
        answer = reply_to(sent)
        assert members[owner].send(answer)[0] == "conntrack"
        assert members[1 - owner].send(answer)[::2] == ("wrong_worker", None)
        taken[owner] += 1
    assert min(taken) > len(PORTS) / 4
    assert all(member.pipeline.counters()["wrong_worker"] == 2 * len(PORTS) - 2 * own
               for member, own in zip(members, taken, strict=True))  # fmt: skip


def test_a_flow_is_seen_by_all() -> None:
    members = two_parts()
    owned = [member.owned() for member in members]
    assert owned[0] | owned[1] == set(PORTS)
    assert not owned[0] & owned[1]
    assert members[0].flows() == members[1].flows()
    assert {flow[2] for flow in members[0].flows()} == set(PORTS)
    for member in members:
        assert member.pipeline.flow_count() == len(PORTS)
        assert member.pipeline.memory() == members[0].pipeline.memory()
        for port in PORTS:
            known = explain_tuple(member.pipeline, ip_address(CLIENT[4]), port, ip_address(VIP[4]), 80, 6, 0)["entry"]
            assert known is not None
            assert (known["backend"], known["state"], known["void"]) == (1, "syn", None)


def test_a_packet_of_another_worker_changes_nothing() -> None:
    members = two_parts("nat")
    owned = [member.owned() for member in members]
    before = [seen_of(member, ("wrong_worker", "packets", "bytes")) for member in members]
    counted = [member.pipeline.counters()["wrong_worker"] for member in members]
    for at, member in enumerate(members):
        for port in owned[1 - at]:
            for letters in ("S", "A", "FA", "R"):
                for raw in (client(letters, port), backend(letters, port)):
                    verdict, reason, sent, number, _ = member.pipeline.process([raw], 5000)[0]
                    assert (verdict, reason, sent, number) == (2, "wrong_worker", [], 0)
    assert [seen_of(member, ("wrong_worker", "packets", "bytes")) for member in members] == before
    for at, member in enumerate(members):
        counters = member.pipeline.counters()
        assert counters["wrong_worker"] - counted[at] == 8 * len(owned[1 - at])
        assert counters["packets"] == counters["wrong_worker"] + counters["forwarded"]


def test_malformed_packets_are_everyone_s() -> None:
    """They get their own reason wherever they arrive; only sound ones, and ours, have a shard."""
    (member,) = parts(config(service("dsr")), [63])
    reasons = {member.send(client(letters, port))[0] for letters in ("SF", "S") for port in PORTS}
    assert reasons == {"wrong_worker", "scheduled", "tcp_flags"}
    assert member.send(frame(CLIENT[4], 1, "203.0.113.99", 80))[0] == "no_service"


def test_backend_counters_add_up() -> None:
    members = two_parts()
    whole = Balancer(config(service("dsr", backends=ONE["dsr"]), timeouts=TIMEOUTS))
    for port in PORTS:
        for letters in "SA":
            for balancer in (*members, whole):
                balancer.send(client(letters, port))
    stats: list[Any] = [member.pipeline.backend_stats(1) for member in members]
    assert all(each["active_flows"] > len(PORTS) / 4 for each in stats)
    assert {name: sum(each[name] for each in stats) for name in stats[0]} == whole.pipeline.backend_stats(1)
    assert whole.pipeline.flow_count() == members[0].pipeline.flow_count()


def test_each_sweeps_its_own_shards() -> None:
    members = two_parts()
    owned = [member.owned() for member in members]
    for at, left in ((0, owned[1]), (1, set())):
        members[at].pipeline.process([], 15_001)
        members[at].pipeline.process([], 25_002)
        assert {flow[2] for flow in members[0].flows()} == left
        assert [member.pipeline.flow_count() for member in members] == [len(left)] * 2
        assert members[at].pipeline.counters()["flows_expired"] == len(owned[at])
        assert members[at].pipeline.backend_stats(1)["active_flows"] == 0
    assert members[1].pipeline.backend_stats(1)["new_flows"] == len(owned[1])


@pytest.mark.parametrize("shards", [[0], [63], [5, 6, 40], range(64)])
def test_the_sweep_of_few_shards_takes_no_less_and_no_longer(shards: Iterable[int]) -> None:
    """A tenth of a worker's own buckets in a tenth of the period, however many they are."""
    settings = config(service("dsr", backends=ONE["dsr"]), timeouts=TIMEOUTS, flows=100_000)
    (member,) = parts(settings, shards)
    member.pipeline.process(stream(30_000, "S"), 1000)
    before = member.pipeline.flow_count()
    assert before > 200
    for now in range(1000, 16_000, 100):
        member.pipeline.process([], now)
    assert member.pipeline.flow_count() == before
    left = []
    for now in range(16_001, 26_102, 100):
        member.pipeline.process([], now)
        left.append(member.pipeline.flow_count() / before)
    assert left[-1] == 0
    assert all(abs(part - (1 - at / 100)) < 0.15 for at, part in enumerate(left[:100]))


def test_renew_forgets_in_its_own_shards() -> None:
    settings = config(service("dsr"), timeouts=TIMEOUTS)
    members = parts(settings, EVEN, ODD)
    owned = [member.owned() for member in members]
    of_two = {flow[2] for flow in members[0].flows() if flow[5] == 2}
    others = {flow[2] for flow in members[0].flows() if flow[5] != 2}
    assert of_two & owned[0]
    assert of_two & owned[1]
    members[0].pipeline.renew({2})
    assert {flow[2] for flow in members[1].flows()} == others | of_two & owned[1]
    assert set(members[0].pipeline.backend_stats(2).values()) == {0}
    assert members[1].pipeline.backend_stats(2)["active_flows"] == len(of_two & owned[1])
    members[1].pipeline.renew({2})
    assert {flow[2] for flow in members[1].flows()} == others
    assert set(members[1].pipeline.backend_stats(2).values()) == {0}
    assert members[0].pipeline.flow_count() == len(others)


def test_a_flood_of_one_worker_s_flows_leaves_the_others_alone() -> None:
    settings = config(service("dsr", backends=ONE["dsr"]), timeouts=TIMEOUTS, flows=1024)
    flooded, other = parts(settings, EVEN, ODD)
    other.pipeline.process(stream(300, "S"), 0)
    before = seen_of(other, ())[1:3]
    flooded.pipeline.process(stream(20_000, "S", first=100_000), 0)
    assert flooded.pipeline.counters()["flows_evicted"] > 5000
    mine = {flow[1:3] for flow in other.flows()} - {flow[1:3] for flow in before[1]}
    assert mine
    assert [flow for flow in other.flows() if flow[1:3] not in mine] == before[1]
    assert seen_of(other, ())[1] == before[0]


def test_flows_outlive_a_pipeline() -> None:
    """A worker's place is taken by another one, with other shards: the table is the same."""
    memory = FlowMemory(4096, KEY)
    settings = config(service("dsr", backends=ONE["dsr"]), timeouts=TIMEOUTS)
    first = Part(settings, Pipeline(memory, shards=EVEN))
    owned = first.owned()
    del first
    gc.collect()
    second = Part(settings, Pipeline(memory))
    del memory
    gc.collect()
    reasons = {port: second.send(client("A", port))[0] for port in PORTS}
    assert reasons == {port: "conntrack" if port in owned else "maglev" for port in PORTS}


def test_another_key_is_another_table() -> None:
    """Memory alone decides: a pipeline over it has its key."""
    drawn = [Part(config(service("dsr")), Pipeline(FlowMemory(4096))) for _ in range(2)]
    for member in drawn:
        member.owned()
    first, second = (member.flows() for member in drawn)
    assert sorted(first) == sorted(second)
    assert first != second, "the same flows in other places"


@pytest.mark.parametrize(
    ("shards", "error", "message"),
    [
        ([], ValueError, "a pipeline owns at least one shard"),
        ([64], ValueError, "shards are 0..63, not 64"),
        ([0, -1], ValueError, "shards are 0..63, not -1"),
        (range(65), ValueError, "shards are 0..63, not 64"),
        (["0"], TypeError, ""),
        (None, TypeError, ""),
    ],
)
def test_shards_that_cannot_be(shards: Any, error: type[Exception], message: str) -> None:
    for flows in (64, FlowMemory(64)):
        with pytest.raises(error) as caught:
            Pipeline(flows, shards=shards)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "a flow table takes 1..1073741824 flows, not 0"),
        (((1 << 30) + 1,), ValueError, "a flow table takes 1..1073741824 flows, not 1073741825"),
        ((64, b""), ValueError, "the flow table's key has 32 bytes, not 0"),
        ((64, bytes(33)), ValueError, "the flow table's key has 32 bytes, not 33"),
        (("many",), TypeError, ""),
        ((), TypeError, ""),
    ],
)
def test_memory_that_cannot_be(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        FlowMemory(*arguments)
    assert message in str(caught.value)
