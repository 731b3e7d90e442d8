"""Schedulers: where new flows go, by share, by load, by hash; and where packets in mid-flow go."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from math import exp
from typing import Any

import pytest
import xxhash

from fastlb import Datapath, flow_hash
from fastlb._core import KetamaRing, SmoothWrr, explain_tuple
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import CLIENT, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import frame, mac_of
from tests.tables import position_on_ring, ring_points

WEIGHTS = {"10.3.0.11": 1, "10.3.0.12": 2, "10.3.0.13": 5}
EVERY = ["maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c"]


def weighted(weights: dict[str, int] = WEIGHTS) -> list[dict[str, Any]]:
    return [{"address": address, "weight": weight} for address, weight in weights.items()]


def balancer(scheduler: str, weights: dict[str, int] = WEIGHTS, forward: str = "nat", **changes: Any) -> Datapath:
    return datapath(service(forward, scheduler=scheduler, backends=weighted(weights), **changes))


def syn(port: int, client: str = CLIENT[4], letters: str = "S") -> bytes:
    return frame(client, port, VIP[4], 80, "tcp", flags=flags(letters))


def shares(dp: Datapath, ports: Iterable[int], letters: str = "S") -> dict[str, int]:
    """New flows by backend address."""
    results = dp.process_batch([syn(port, letters=letters) for port in ports])
    return dict(Counter((result.backend or "none").rsplit(":", 1)[0] for result in results))


# ---- shares


def test_rr_gives_each_its_turn_whatever_its_weight() -> None:
    assert shares(balancer("rr"), range(1000, 1300)) == dict.fromkeys(WEIGHTS, 100)


def test_wrr_is_exact_and_smooth() -> None:
    dp = balancer("wrr")
    assert shares(dp, range(1000, 1800)) == {"10.3.0.11": 100, "10.3.0.12": 200, "10.3.0.13": 500}
    order = [result.backend for result in dp.process_batch([syn(port) for port in range(2000, 2080)])]
    rows = "".join("x" if backend == "10.3.0.13:80" else "." for backend in order)
    assert max(map(len, rows.split("."))) <= 3  # it has five turns of eight


@pytest.mark.parametrize("weights", [[1, 2, 5], [7, 11, 13, 17], [1] * 60, [100, 1, 1], [65535, 65534, 3, 30_000]])
def test_wrr_is_within_1_percent_of_the_weights(weights: list[int]) -> None:
    by_address = {f"10.3.0.{11 + at}": weight for at, weight in enumerate(weights)}
    dp = datapath(service("dsr", scheduler="wrr", backends=weighted(by_address)), flows=20_000)
    for address in by_address:
        dp.set_neighbour(address, mac_of(address))
    got = shares(dp, range(1000, 11_000))
    for address, weight in by_address.items():
        due = 10_000 * weight / sum(weights)
        assert abs(got.get(address, 0) - due) <= max(1, 0.01 * due)


@pytest.mark.parametrize(("scheduler", "within"), [("random", 0.03), ("maglev", 0.03), ("ketama", 0.04)])
def test_shares_by_weight(scheduler: str, within: float) -> None:
    dp = datapath(service("dsr", scheduler=scheduler, backends=weighted()), flows=20_000, maglev_size=65537)
    got = shares(dp, range(1000, 11_000))
    for address, weight in WEIGHTS.items():
        assert got[address] / 10_000 == pytest.approx(weight / 8, abs=within)


@pytest.mark.parametrize("scheduler", EVERY)
def test_weight_0_takes_no_new_flow(scheduler: str) -> None:
    got = shares(balancer(scheduler, {"10.3.0.11": 0, "10.3.0.12": 1, "10.3.0.13": 0}), range(1000, 1100))
    assert got == {"10.3.0.12": 100}


@pytest.mark.parametrize("scheduler", EVERY)
def test_no_backend_with_a_weight(scheduler: str) -> None:
    result = balancer(scheduler, {"10.3.0.11": 0}).process(syn(1000))
    assert (result.reason, result.frames) == ("no_backend", [])


MANY = [f"10.4.{number // 250}.{number % 250 + 1}" for number in range(1000)]


@pytest.mark.parametrize("scheduler", EVERY)
def test_weights_that_overflow_32_bits_together(scheduler: str) -> None:
    """The highest there are, times the hundred by which a slow start counts: 6.5 * 10^9."""
    settings = config(
        service("nat", scheduler=scheduler, backends=weighted(dict.fromkeys(MANY, 65535)), slow_start={"window": 60}),
        maglev_size=65537, ring_points=64,
    )  # fmt: skip
    real = Balancer(settings)
    name = settings.services[0].name, f"{MANY[0]}:80"
    real.standings.update(name, replace(real.standings.of(*name), slow_since=0.0))
    real.plan()
    assert sum(member.weight for member in real.plans[0].members) > 1 << 32
    got = Counter(real.pipeline.process([syn(port)], 0)[0][3] for port in range(1000, 5000))
    assert 0 not in got
    if scheduler == "source-hash":
        assert len(got) == 1
    elif scheduler in ("rr", "wrr", "lc", "wlc", "lrt"):
        assert {count for count in got.values() if not 3 <= count <= 5} <= {1}
    else:
        assert len(got) > 900
        assert max(got.values()) < 25


@pytest.mark.parametrize("scheduler", EVERY)
def test_the_highest_weight_beside_the_lowest(scheduler: str) -> None:
    got = shares(balancer(scheduler, {"10.3.0.11": 65535, "10.3.0.12": 1, "10.3.0.13": 0}), range(1000, 1500))
    assert sum(got.values()) == 500
    assert "10.3.0.13" not in got
    if scheduler in ("rr", "lc"):
        assert got == {"10.3.0.11": 250, "10.3.0.12": 250}
    elif scheduler not in ("source-hash", "p2c"):
        assert got["10.3.0.11"] >= 490


# ---- load


def test_lc_goes_by_the_flows_that_are_not_over() -> None:
    """An entry stays for a while after its flow has ended, and is no load."""
    dp = balancer("lc")
    first = dp.process_batch([syn(port) for port in range(1000, 1030)])
    assert Counter(result.backend for result in first) == dict.fromkeys({result.backend for result in first}, 10)
    gone = [1000 + at for at, result in enumerate(first) if result.backend == "10.3.0.12:80"]
    dp.process_batch([syn(port, letters="RA") for port in gone])
    assert shares(dp, range(2000, 2010)) == {"10.3.0.12": 10}
    dp.process_batch([syn(port, letters="A") for port in gone])  # the RSTs were not the clients'
    assert set(shares(dp, range(3000, 3020))) == {"10.3.0.11", "10.3.0.13"}


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_flow_is_over_when_all_that_is_seen_has_closed(forward: str) -> None:
    """In nat by a FIN from both sides, where only clients are seen by theirs; its entry stays."""
    dp = balancer("rr", {"10.3.0.11": 1}, forward)

    def active() -> int:
        return int(dp.stats()["services"][0]["backends"][0]["active_flows"])

    sent = dp.process(syn(1000)).frames[0]
    if forward == "nat":
        dp.process(reply_to(sent))
    dp.process(syn(1000, letters="A"))
    assert active() == 1
    dp.process(syn(1000, letters="FA"))
    if forward == "nat":
        assert active() == 1
        dp.process(reply_to(sent, "FA"))
    dp.process(syn(1000, letters="A"))
    assert (active(), dp.stats()["flows"]["active"]) == (0, 1)
    dp.process(syn(1000))
    assert (active(), dp.stats()["flows"]["active"]) == (1, 1)


def test_wlc_by_weight() -> None:
    assert shares(balancer("wlc"), range(1000, 1800)) == {"10.3.0.11": 100, "10.3.0.12": 200, "10.3.0.13": 500}


@pytest.mark.parametrize(("scheduler", "least"), [("lrt", 2.5), ("p2c", 1.5)])
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_the_faster_backend_gets_more(scheduler: str, least: float, forward: str) -> None:
    """One takes a hundred milliseconds, the others ten."""
    settings = {"snat": ["192.0.2.77"]} if forward == "fullnat" else {}
    backends = weighted(dict.fromkeys(WEIGHTS, 1))
    dp = datapath(service(forward, scheduler=scheduler, backends=backends), **settings)
    got: Counter[str] = Counter()
    for number in range(300):
        sent = dp.process(syn(1000 + number), now=number / 2)
        assert sent.backend is not None
        address = sent.backend.rsplit(":", 1)[0]
        dp.process(reply_to(sent.frames[0]), now=number / 2 + (0.1 if address == "10.3.0.11" else 0.01))
        got[address] += 1
    assert min(got["10.3.0.12"], got["10.3.0.13"]) > least * got["10.3.0.11"]


def test_p2c_over_idle_backends_goes_by_chance() -> None:
    """Each flow is over before the next one comes, and nothing is known of response times."""
    dp = balancer("p2c", dict.fromkeys(WEIGHTS, 7), "dsr")
    got: Counter[str] = Counter()
    for port in range(1000, 4000):
        got[str(dp.process(syn(port)).backend).removesuffix(":80")] += 1
        dp.process(syn(port, letters="RA"))
    assert all(abs(got[address] - 1000) < 6 * (3000 * 2 / 9) ** 0.5 for address in WEIGHTS)


def test_p2c_gives_an_idle_backend_in_slow_start_its_share() -> None:
    conf = config(service("dsr", scheduler="p2c", slow_start={"window": 100}))
    standings = BackendStates()
    standings.apply_config(conf, 0.0)
    standings.drain(("dsr4tcp", "10.3.0.11:80"), 0.0)
    standings.enable(("dsr4tcp", "10.3.0.11:80"), 0.0)
    one = Balancer(conf)
    [planned] = plan_services(conf, one.ids, 10.0, standings)
    one.pipeline.publish(services_table(conf, [planned]), one.routes())
    count = 0
    for port in range(1000, 5000):
        count += one.send(syn(port))[2] == "10.3.0.11:80"
        one.send(syn(port, letters="RA"))
    expected = 10 / 210
    assert abs(count - 4000 * expected) < 6 * (4000 * expected * (1 - expected)) ** 0.5


def test_p2c_over_busy_backends_goes_by_weight() -> None:
    """Flows that stay: even of two, where every draw is of both."""
    got = shares(balancer("p2c", {"10.3.0.11": 1, "10.3.0.12": 4}, "dsr"), range(1000, 2000))
    assert got["10.3.0.12"] / got["10.3.0.11"] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("scheduler", ["lrt", "p2c"])
def test_a_backend_that_was_slow_once_is_tried_again(scheduler: str) -> None:
    dp = balancer(scheduler, dict.fromkeys(WEIGHTS, 1))

    def visit(port: int, now: float) -> str:
        """A flow that is over at once; the one backend takes a hundred milliseconds at first, the others one."""
        sent = dp.process(syn(port), now)
        address = str(sent.backend).rsplit(":", 1)[0]
        answered = now + (0.1 if address == "10.3.0.11" and now < 10 else 0.001)
        dp.process(reply_to(sent.frames[0]), answered)
        dp.process(syn(port, letters="RA"), answered)
        return address

    lots = 8 if scheduler == "p2c" else 0  # p2c draws the same one five times in 3 ** 5 flows; nine in 100: 1e-9
    early = [visit(1000 + number, 1 + number / 100) for number in range(100)]
    assert 1 <= early.count("10.3.0.11") <= 1 + lots
    late = [visit(2000 + number, 11 + number) for number in range(120)]
    assert late.count("10.3.0.11") > 10
    assert late[:10].count("10.3.0.11") <= min(4, lots)


class Failing:
    """Three equal backends in nat, of which 10.3.0.13 may fail; flows last a second."""

    def __init__(self, scheduler: str) -> None:
        hosts = [f"10.2.{at // 250}.{at % 250 + 1}" for at in range(1000)]
        self.clients = iter((host, port) for port in range(1024, 60000) for host in hosts)
        self.balancer = Balancer(
            config(service("nat", scheduler=scheduler), flows=100_000), hosts=[*hosts, *WEIGHTS])
        self.open: list[tuple[float, bytes, bytes]] = []

    def visit(self, now: float, answer: str = "SA") -> str:
        """The backend of a new flow; 10.3.0.13 gives this answer, if any, and the others two milliseconds later SA."""
        while self.open and self.open[0][0] <= now:
            _, fin, closed = self.open.pop(0)
            self.balancer.send(fin, now)
            self.balancer.send(closed, now)
        client, port = next(self.clients)
        _, sent, key = self.balancer.send(syn(port, client), now)
        assert sent is not None
        address = str(key).rsplit(":", 1)[0]
        letters = answer if address == "10.3.0.13" else "SA"
        if letters:
            self.balancer.send(reply_to(sent, letters), now + 0.002)
        if letters == "SA":
            self.balancer.send(syn(port, client, "A"), now + 0.003)
            self.open.append((now + 1, syn(port, client, "FA"), reply_to(sent, "FA")))
        return address


@pytest.mark.parametrize("scheduler", ["lrt", "p2c"])
@pytest.mark.parametrize("answer", ["", "RA"])
def test_a_backend_that_fails_gets_next_to_nothing_until_it_works_again(scheduler: str, answer: str) -> None:
    failing = Failing(scheduler)
    early = Counter(failing.visit(10 + at / 100) for at in range(1000))
    assert min(early.values()) > 200
    failed = [failing.visit(20 + at / 100, answer) for at in range(6000)]
    assert failed.count("10.3.0.13") < 60  # of 2,000 that would be its share
    assert failed[300:].count("10.3.0.13") < 40
    late = [failing.visit(80 + at / 100) for at in range(16000)]
    assert late[13000:].count("10.3.0.13") > 600


@pytest.mark.parametrize("scheduler", ["lrt", "p2c"])
@pytest.mark.parametrize("answer", ["", "RA"])
def test_where_all_fail_all_are_tried(scheduler: str, answer: str) -> None:
    dp = balancer(scheduler, dict.fromkeys(WEIGHTS, 1))
    got: Counter[str] = Counter()
    for number in range(300):
        sent = dp.process(syn(1000 + number), number / 100)
        got[str(sent.backend)] += 1
        if answer:
            dp.process(reply_to(sent.frames[0], answer), number / 100)
    assert min(got.values()) > 60


# What came when, at what time it is looked, and the seconds that it counts as then. S: a SYN to the backend, A: its
# SYN-ACK, R: its RST, on flow by flow; x: a SYN that nobody answers.
SILENCE: list[tuple[str, float, float]] = [
    ("", 100, 64e-6),
    ("0S 0A", 0, 64e-6),
    ("0S 0.05A", 0.05, 0.05),
    ("0x", 0.001, 64e-6),
    ("0x", 0.5, 0.499),
    ("0x 0.4x", 0.5, 0.499),  # since the first of them
    ("0x 0.4x", 1.4, 1.399),
    ("0x", 11, 10.999 * exp(-1)),  # the last was long ago: forgiven by and by
    ("0x", 101, 100.999 * exp(-10)),
    ("0x 10x", 11, 10.999),  # and it has still not answered
    ("0x 5S 5.002A", 5.002, 0.002),
    ("0S 0.05A 1x", 1.02, 0.05),
    ("0S 0R", 0, 1),
    ("0S 0R 1S 1R", 1, 2),
    ("0S 0R 1S 1R 2S 2R", 2, 4),
    (" ".join(f"{at}S {at}R" for at in range(11)), 10, 1024),
    (" ".join(f"{at}S {at}R" for at in range(20)), 19, 1024),
    ("0S 0R", 11, exp(-1)),
    ("0S 0R 20S 20R", 21, 2),
    ("0S 0R 1S 1.003A", 1.003, 0.003),
    ("0S 0R 1S 1.003A 2S 2R", 2, 1),
    ("0x " + " ".join(f"{at}x" for at in range(100, 3000, 100)), 2900, 1024),  # never more
]


@pytest.mark.parametrize(("events", "when", "expected"), SILENCE)
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_what_silence_counts_as(events: str, when: float, expected: float, forward: str) -> None:
    conf = config(
        service(forward, scheduler="lrt", backends=[{"address": "10.3.0.13"}]), snat=["10.3.0.5"], flows=4096)
    one = Balancer(conf)
    sent: bytes | None = None
    for port, event in enumerate(events.split(), 1000):
        kind, now = event[-1], float(event[:-1])
        if kind in "Sx":
            _, sent, _ = one.send(syn(port), now)
        else:
            assert sent is not None
            one.send(reply_to(sent, {"A": "SA", "R": "RA"}[kind]), now)
    assert response_seen(one, when) == pytest.approx(expected, rel=0.01)


def response_seen(one: Balancer, now: float) -> float:
    """Of the only backend, as `fastlb trace` shows it."""
    one.pipeline.process([], round(now * 1000))
    vip = one.plans[0].network.network_address
    found = explain_tuple(one.pipeline, ip_address(CLIENT[4]), 9, vip, 80, 6, round(now * 1000))
    return float(found["placement"]["candidates"][0]["response"])


@pytest.mark.parametrize(("forward", "scheduler", "proto"), [("nat", "rr", "tcp"), ("dsr", "p2c", "tcp")])
def test_silence_is_none_where_nobody_listens(forward: str, scheduler: str, proto: str) -> None:
    """A SYN of a service that does not go by it, or of a mode in which answers pass by."""
    one = Balancer(config(service(forward, scheduler=scheduler, backends=[{"address": "10.3.0.13"}])))
    one.send(frame(CLIENT[4], 1000, VIP[4], 80, proto, flags=flags("S")), 0)
    one.reload(config(service(forward, scheduler="p2c", backends=[{"address": "10.3.0.13"}])))
    assert response_seen(one, 0.9) == pytest.approx(64e-6)


def test_a_backend_that_works_again_is_no_longer_slow() -> None:
    one = Balancer(config(service("nat", scheduler="lrt", backends=weighted(dict.fromkeys(WEIGHTS, 1)))))
    sent = one.send(syn(1000), 1.0)
    assert sent[1] is not None
    one.send(reply_to(sent[1]), 1.1)
    (slow,) = (number for number, key in one.keys.items() if key == sent[2])
    assert one.pipeline.response_time(slow) == pytest.approx(0.1, abs=0.001)
    one.pipeline.forget_response(slow)
    assert one.pipeline.response_time(slow) is None
    with pytest.raises(ValueError, match="backend ids end at"):
        one.pipeline.forget_response(1 << 20)


def test_a_backend_that_works_again_is_no_longer_silent() -> None:
    one = Balancer(config(service("nat", scheduler="lrt", backends=[{"address": "10.3.0.13"}])))
    one.send(syn(1000), 1)
    assert response_seen(one, 6) > 3
    one.pipeline.forget_response(1)
    assert response_seen(one, 6) == pytest.approx(64e-6)


# ---- hashes


def test_ketama_goes_by_the_ring() -> None:
    dp = datapath(service("dsr", scheduler="ketama", backends=weighted()), ring_points=500)
    keys = [f"{address}:80" for address in WEIGHTS]
    counts = {key: 100 * weight for key, weight in zip(keys, WEIGHTS.values(), strict=True)}
    points = sorted(
        (xxhash.xxh64_intdigest(f"{key}_{number}".encode()), keys.index(key))
        for key, count in counts.items()
        for number in range(count)
    )
    for port in range(1000, 1500):
        hashed = flow_hash(CLIENT[4], port, VIP[4], 80, "tcp")
        expected = next((position for at, position in points if at >= hashed), points[0][1])
        assert dp.process(syn(port)).backend == keys[expected]
        assert dp.trace(CLIENT[4], port, VIP[4], 80, "tcp").backend == keys[expected]


def test_points_of_one_hash_go_by_position() -> None:
    points = [5, 1 << 63, 5, 5, (1 << 64) - 1]
    ring = KetamaRing([hashed.to_bytes(8, sys.byteorder) for hashed in points])
    assert ring_points(ring) == sorted((hashed, position) for position, hashed in enumerate(points))


@pytest.mark.parametrize("weight", [0, 50])
def test_a_ring_moves_no_flow_between_backends_that_stay(weight: int) -> None:
    """One goes, or comes back slowly: what moves is from it, or to it."""
    backends = {f"10.3.0.{host}": 100 for host in range(11, 21)}

    def placed(weights: dict[str, int]) -> list[str | None]:
        dp = datapath(service("dsr", scheduler="ketama", backends=weighted(weights)), flows=8192)
        return [dp.trace(CLIENT[4], port, VIP[4], 80, "tcp").backend for port in range(1000, 6000)]

    moves = {
        (one, other)
        for one, other in zip(placed(backends), placed(backends | {"10.3.0.15": weight}), strict=True)
        if one != other
    }
    assert {one for one, _ in moves} == {"10.3.0.15:80"}
    assert len(moves) == 9


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 5000])
def test_a_ring_finds_the_first_point_from_a_hash_on(size: int) -> None:
    hashed_at = [flow_hash("10.0.0.1", number, "10.0.0.2", 1, 6) for number in range(size)]
    points = sorted((at, number) for number, at in enumerate(hashed_at))
    ring = KetamaRing([at.to_bytes(8, sys.byteorder) for at in hashed_at])
    hashes = [at for at, _ in points]
    for hashed in {0, (1 << 64) - 1, *(at + delta for at in hashes[:300] for delta in (-1, 0, 1))}:
        expected = next((position for at, position in points if at >= hashed), points[0][1])
        assert position_on_ring(ring, hashed) == expected


def test_a_client_stays_with_source_hash() -> None:
    dp = balancer("source-hash")
    by_client = {
        client: {dp.process(syn(port, client)).backend for port in range(1000, 1050)}
        for client in (f"10.1.0.{host}" for host in range(2, 60))
    }
    assert {len(backends) for backends in by_client.values()} == {1}
    assert len(set.union(*by_client.values())) == 3


@pytest.mark.parametrize("scheduler", EVERY)
def test_a_flow_keeps_its_backend(scheduler: str) -> None:
    dp = balancer(scheduler)
    first = {port: dp.process(syn(port)).backend for port in range(1000, 1100)}
    assert {port: dp.process(syn(port, letters="A")).backend for port in first} == first


@pytest.mark.parametrize("scheduler", EVERY)
def test_another_balancer_goes_on_in_mid_flow(scheduler: str) -> None:
    """Where the scheduler is a hash, with the flow's backend; else wherever Maglev says, the same on each balancer."""
    placed = {port: balancer(scheduler).process(syn(port)).backend for port in range(1000, 1005)}
    one, other = balancer(scheduler), balancer(scheduler)
    picked_up = {port: one.process(syn(port, letters="A")).backend for port in range(1000, 1100)}
    assert {port: other.process(syn(port, letters="A")).backend for port in picked_up} == picked_up
    if scheduler in ("maglev", "ketama", "source-hash"):
        assert {port: picked_up[port] for port in placed} == placed


@pytest.mark.parametrize("scheduler", ["ketama", "source-hash"])
def test_a_reply_without_an_entry_is_explained_by_the_hash(scheduler: str) -> None:
    one, other = balancer(scheduler), balancer(scheduler)
    for port in range(1000, 1100):
        sent = one.process(syn(port))
        back = other.process(reply_to(sent.frames[0], "A"))
        assert (back.reason, back.backend) == ("maglev", sent.backend)


def test_the_scheduler_changes_and_flows_stay() -> None:
    dp = balancer("rr")
    before = {port: dp.process(syn(port)).backend for port in range(1000, 1030)}
    dp.reload(config(service("nat", scheduler="source-hash", backends=weighted())))
    assert {port: dp.process(syn(port, letters="A")).backend for port in before} == before
    assert len({dp.process(syn(port)).backend for port in range(3000, 3030)}) == 1


@pytest.mark.parametrize("scheduler", EVERY)
def test_trace_names_the_scheduler_and_changes_nothing(scheduler: str) -> None:
    dp = balancer(scheduler)
    for port in range(1000, 1050):
        told = [dp.trace(CLIENT[4], port, VIP[4], 80, "tcp") for _ in range(3)]
        assert told[0] == told[1] == told[2]
        assert told[0].why == scheduler
        assert dp.process(syn(port)).backend == told[0].backend
        assert dp.trace(CLIENT[4], port, VIP[4], 80, "tcp").why == "conntrack"


def test_tables_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        KetamaRing([])
    with pytest.raises(ValueError, match="at least one turn"):
        SmoothWrr([])
