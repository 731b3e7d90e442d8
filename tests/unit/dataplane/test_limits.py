"""Limits of what a backend may have, in schedule.pxd: bounded loads with the hashes, caps with every scheduler."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from math import ceil
from typing import Any

import pytest

from fastlb import Datapath, flow_hash, maglev_table
from fastlb._core import FlowMemory, Pipeline
from tests.balancers import BACKENDS, CLIENT, KEY, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import frame

EVERY = ["maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c"]
HASHES = ["maglev", "ketama", "source-hash"]
UNEVEN = (1, 2, 5)


def limited(scheduler: str, weights: tuple[int, ...] = (1, 1, 1), caps: tuple[int, ...] = (), **changes: Any) -> Any:
    backends: list[dict[str, Any]] = [
        {"address": address, "weight": weight} for address, weight in zip(BACKENDS[4], weights, strict=True)
    ]
    for backend, cap in zip(backends, caps, strict=False):
        backend |= {"max_flows": cap} if cap else {}
    return service(**{"forward": "nat", "scheduler": scheduler, "backends": backends} | changes)


def syn(sport: int, client: str = CLIENT[4], letters: str = "S") -> bytes:
    return frame(client, sport, VIP[4], 80, "tcp", flags=flags(letters))


def flows(dp: Datapath) -> list[int]:
    """Of each backend."""
    [described] = dp.stats()["services"]
    return [backend["active_flows"] for backend in described["backends"]]


# ---- bounded load


@pytest.mark.parametrize("bound", [1.01, 1.1, 1.25, 2.0, 10.0])
@pytest.mark.parametrize("weights", [(1, 1, 1), UNEVEN, (1, 0, 65535)])
@pytest.mark.parametrize("scheduler", HASHES)
def test_no_flow_comes_above_the_bound(scheduler: str, weights: tuple[int, ...], bound: float) -> None:
    """Flow by flow, and one client with source-hash, whose flows all want the same backend."""
    dp = datapath(limited(scheduler, weights, bounded_load=bound))
    exact = Fraction(str(bound))
    for number in range(200):
        before = flows(dp)
        assert dp.process(syn(1000 + number)).reason == "scheduled"
        [(took, now)] = [(at, now) for at, now in enumerate(flows(dp)) if now != before[at]]
        assert now <= ceil(exact * (sum(before) + 1) * weights[took] / sum(weights))


def test_within_a_batch_too() -> None:
    dp = datapath(limited("source-hash", bounded_load=1.25))
    results = dp.process_batch([syn(1000 + number) for number in range(300)])
    seen: Counter[str | None] = Counter()
    for number, result in enumerate(results):
        seen[result.backend] += 1
        assert seen[result.backend] <= ceil(Fraction(5, 4) * (number + 1) / 3)
    assert max(seen.values()) == 125


def test_who_is_at_its_bound_sends_on_to_the_next_slot() -> None:
    """Against a model that walks the table by itself."""
    dp = datapath(limited("maglev", UNEVEN, bounded_load=1.25, forward="dsr"), maglev_size=65537)
    keys = [f"{address}:80" for address in BACKENDS[4]]
    table = maglev_table(keys, UNEVEN)
    has = [0, 0, 0]
    moved = 0
    for sport in range(1000, 1400):
        slot = flow_hash(CLIENT[4], sport, VIP[4], 80, "tcp") % 65537
        bounds = [ceil(Fraction(5, 4) * (sum(has) + 1) * weight / 8) for weight in UNEVEN]
        walk = (table[(slot + step) % 65537] for step in range(65537))
        expected = next(position for position in walk if has[position] < bounds[position])
        moved += expected != table[slot]
        assert dp.trace(CLIENT[4], sport, VIP[4], 80, "tcp").backend == keys[expected]
        assert dp.process(syn(sport)).backend == keys[expected]
        has[expected] += 1
    assert moved > 5


def test_a_wide_bound_moves_nobody() -> None:
    bounded, free = datapath(limited("maglev", bounded_load=10.0)), datapath(limited("maglev"))
    frames = [syn(1000 + number) for number in range(10, 400)]
    first, second = bounded.process_batch(frames), free.process_batch(frames)
    assert [each.backend for each in first[20:]] == [each.backend for each in second[20:]]


def test_many_backends_of_which_one_is_wanted() -> None:
    """More than the looks of one flow, so that the rest falls to the least loaded."""
    many = [{"address": f"10.3.{number >> 8}.{number & 255}"} for number in range(1, 301)]
    dp = datapath(service("dsr", scheduler="source-hash", backends=many, bounded_load=1.01), maglev_size=4093)
    for address in many:
        dp.set_neighbour(address["address"], "02:00:00:00:00:0b")
    dp.process_batch([syn(1000 + number) for number in range(900)])
    assert Counter(flows(dp)).keys() <= {2, 3, 4}
    assert sum(flows(dp)) == 900


def test_candidates_alone_share_the_bound() -> None:
    """What one that takes no new flows still has is not for the others to bear."""
    dp = datapath(limited("maglev", bounded_load=1.25))
    dp.process_batch([syn(1000 + number) for number in range(300)])
    kept = flows(dp)[0]
    dp.reload(config(limited("maglev", (0, 1, 1), bounded_load=1.25)))
    for number in range(300):
        before = flows(dp)
        assert dp.process(syn(3000 + number)).reason == "scheduled"
        after = flows(dp)
        bound = ceil(Fraction(5, 4) * (sum(before[1:]) + 1) / 2)
        assert all(now <= bound or now == had for had, now in zip(before[1:], after[1:], strict=True))
        assert after[0] == kept


def test_workers_add_up_what_all_have() -> None:
    settings = config(limited("source-hash", bounded_load=1.25))
    memory = FlowMemory(settings.flows, KEY)
    workers = []
    for at in range(4):
        worker = Balancer(settings)
        worker.pipeline = Pipeline(memory, shards=range(at, 64, 4))
        worker.reload(settings)
        workers.append(worker)
    placed: Counter[str | None] = Counter()
    for sport in range(1000, 1400):
        before = placed.total()
        [sent] = [sent for each in workers if (sent := each.send(syn(sport)))[0] != "wrong_worker"]
        placed[sent[2]] += 1
        assert placed[sent[2]] <= ceil(Fraction(5, 4) * (before + 1) / 3)


def test_a_packet_in_mid_flow_goes_by_the_plain_hash() -> None:
    dp = datapath(limited("source-hash", bounded_load=1.01))
    wanted = dp.process(syn(999, letters="A")).backend
    dp.process_batch([syn(1000 + number) for number in range(100)])
    later = dp.process_batch([syn(2000 + number, letters="A") for number in range(100)])
    assert {(each.reason, each.backend) for each in later} == {("maglev", wanted)}


# ---- caps


@pytest.mark.parametrize("scheduler", EVERY)
def test_a_cap_is_never_exceeded_and_all_room_is_used(scheduler: str) -> None:
    dp = datapath(limited(scheduler, UNEVEN, caps=(20, 3, 9)))
    results = dp.process_batch([syn(1000 + number) for number in range(100)])
    assert flows(dp) == [20, 3, 9]
    assert [each.reason for each in results] == ["scheduled"] * 32 + ["backends_full"] * 68
    assert dp.trace(CLIENT[4], 5000, VIP[4], 80, "tcp").backend is None
    assert dp.stats()["counters"]["drops"]["backends_full"] == 68


@pytest.mark.parametrize("scheduler", EVERY)
def test_those_without_a_cap_take_the_rest(scheduler: str) -> None:
    dp = datapath(limited(scheduler, UNEVEN, caps=(5, 0, 7)))
    assert {each.reason for each in dp.process_batch([syn(1000 + number) for number in range(200)])} == {"scheduled"}
    has = flows(dp)
    assert (has[0] <= 5, sum(has), has[2] <= 7) == (True, 200, True)
    assert has == [5, 188, 7] or scheduler == "source-hash"  # one client: its backend may have no cap


@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr", "gre"])
def test_a_cap_in_every_mode(forward: str) -> None:
    dp = datapath(limited("wlc", caps=(4, 4, 4), forward=forward), snat=["192.0.2.77"])
    dp.process_batch([syn(1000 + number) for number in range(50)])
    assert flows(dp) == [4, 4, 4]


def test_with_a_bounded_load_too() -> None:
    dp = datapath(limited("maglev", caps=(5, 0, 0), bounded_load=1.25))
    results = dp.process_batch([syn(1000 + number) for number in range(200)])
    has = flows(dp)
    assert has[0] == 5
    assert Counter(each.reason for each in results) == {"scheduled": sum(has), "backends_full": 200 - sum(has)}
    assert max(has) <= ceil(Fraction(5, 4) * (sum(has) + 1) / 3)


def test_who_has_gone_makes_room() -> None:
    dp = datapath(limited("maglev", caps=(2, 2, 2)), timeouts={"tcp_syn": 1})
    assert [each.reason for each in dp.process_batch([syn(1000 + number) for number in range(8)])] == [
        "scheduled"] * 6 + ["backends_full"] * 2  # fmt: skip
    for second in range(1, 30):
        dp.process_batch([], now=second / 2)
    assert flows(dp) == [0, 0, 0]
    assert dp.process(syn(2000), now=15.0).reason == "scheduled"


def test_full_is_answered_as_no_backend_is() -> None:
    dp = datapath(limited("rr", caps=(1, 1, 1), no_backend="reset"))
    reasons = [dp.process(syn(1000 + number)).reason for number in range(5)]
    assert reasons == ["scheduled"] * 3 + ["rejected"] * 2


def test_flows_that_are_there_and_replies_pass_at_the_cap() -> None:
    dp = datapath(limited("rr", caps=(1, 1, 1)))
    first = dp.process(syn(1000))
    for number in range(1, 10):
        dp.process(syn(1000 + number))
    assert dp.process(reply_to(first.frames[0])).reason == "conntrack"
    assert dp.process(syn(1000, letters="A")).reason == "conntrack"
    assert dp.process(syn(9000, letters="A")).reason == "maglev"  # in mid-flow: not a new flow


def test_a_nat_conflict_finds_one_with_room() -> None:
    """Of three backends one already talks to this client port and one is full."""
    other = "203.0.113.20"
    first, second = limited("maglev", name="a"), limited("maglev", caps=(1, 1, 1), name="b", vip=other)
    dp = datapath(first, second)
    for sport in range(1000, 1002):  # two of b's are full
        dp.process(frame("10.9.0.9", sport, other, 80, "tcp", flags=flags("S")))
    taken = dp.process(syn(2000)).backend
    [_, described] = dp.stats()["services"]
    free = [backend["backend"] for backend in described["backends"] if backend["active_flows"] == 0]
    out = dp.process(frame(CLIENT[4], 2000, other, 80, "tcp", flags=flags("S")))
    if free == [taken]:
        assert out.reason == "nat_conflict"
    else:
        assert (out.reason, [out.backend]) == ("scheduled", free)


@pytest.mark.parametrize("scheduler", EVERY)
def test_random_comings_and_goings_stay_below_the_caps(scheduler: str) -> None:
    """With one worker, at any moment, and no flow is refused while there is room."""
    draw = random.Random(scheduler)
    caps = (3, 8, 13)
    timeouts = {"tcp_syn": 1, "tcp_closing": 1}
    lb = Balancer(config(limited(scheduler, UNEVEN, caps=caps), timeouts=timeouts))
    now = 0.0
    full = 0
    for _ in range(800):
        now += draw.choice((0.0, 0.0, 0.0, 0.05, 0.3))
        before = [lb.pipeline.backend_stats(number)["active_flows"] for number in (1, 2, 3)]
        reason = lb.send(syn(draw.randrange(1000, 1200), letters=draw.choice("SSA")), now)[0]
        after = [lb.pipeline.backend_stats(number)["active_flows"] for number in (1, 2, 3)]
        if reason == "scheduled":
            assert all(has <= max(had, cap) for had, has, cap in zip(before, after, caps, strict=True))
        if reason == "backends_full":
            assert all(had >= cap for had, cap in zip(before, caps, strict=True))
            full += 1
        assert lb.counts_agree()
    assert full > 5
