"""publish.pxd and snapshot.pxi: another configuration takes effect at once, and the old one goes."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest

from fastlb._core import Pipeline, Routes, Services, explain_tuple
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, CLIENT, KEY, VIP, Balancer, config, flags, service
from tests.frames import frame

PORTS = range(40000, 40200)


def weighted(*weights: int | None, **changes: Any) -> dict[str, Any]:
    """A dsr service with these weights, whose removed backends lose their flows; None leaves a backend out."""
    backends = [
        {"address": address, "weight": weight}
        for address, weight in zip(BACKENDS[4], weights, strict=True)
        if weight is not None
    ]
    return service("dsr", backends=backends, **({"on_leave": "rehash"} | changes))


def placements(balancer: Balancer, letters: str = "A", now: float = 0.0) -> dict[int, tuple[str, str | None]]:
    """By client port: how the packet's backend was found, and which it is."""
    sent = {port: balancer.send(frame(CLIENT[4], port, VIP[4], 80, flags=flags(letters)), now) for port in PORTS}
    return {port: (reason, key) for port, (reason, _, key) in sent.items()}


CHANGES = [
    ("other weights", weighted(1, 5, 20), set()),
    ("drained", weighted(0, 1, 1), set()),
    ("all drained", weighted(0, 0, 0), set()),
    ("first removed", weighted(None, 1, 1), {"10.3.0.11:80"}),
    ("two removed", weighted(None, 1, None), {"10.3.0.11:80", "10.3.0.13:80"}),
    ("one added", service("dsr", backends=[{"address": f"10.3.0.{n}"} for n in (10, 11, 12, 13, 14)]), set()),
    ("reordered", service("dsr", backends=[{"address": a} for a in reversed(BACKENDS[4])]), set()),
    ("another no_backend", weighted(1, 1, 1, no_backend="reset"), set()),
]


@pytest.mark.parametrize(("changed", "gone"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_flows_keep_their_backend_over_a_reload(changed: dict[str, Any], gone: set[str]) -> None:
    balancer = Balancer(config(weighted(1, 1, 1)), hosts=[CLIENT[4], *(f"10.3.0.{n}" for n in range(10, 15))])
    placements(balancer, "S")
    before = placements(balancer)
    assert {reason for reason, _ in before.values()} == {"conntrack"}
    assert {key for _, key in before.values()} == {f"{address}:80" for address in BACKENDS[4]}
    balancer.reload(config(changed), now=1)
    after = placements(balancer)
    for port, (_, key) in before.items():
        if key in gone:
            assert after[port][0] == "maglev"
            assert after[port][1] not in gone
        else:
            assert after[port] == ("conntrack", key)
    assert balancer.counts_agree()


def test_flows_of_a_removed_backend_go_where_maglev_sends_them() -> None:
    balancer = Balancer(config(weighted(1, 1, 1)))
    placements(balancer, "S")
    balancer.reload(config(weighted(None, 1, 1)), now=1)
    moved = {port: key for port, (reason, key) in placements(balancer).items() if reason == "maglev"}
    fresh = placements(Balancer(config(weighted(None, 1, 1))), "S")
    assert moved
    assert all(fresh[port][1] == key for port, key in moved.items())


def test_a_removed_service_is_the_host_s_again() -> None:
    balancer = Balancer(config(weighted(1, 1, 1)))
    placements(balancer, "S")
    balancer.reload(config(), now=1)
    assert {reason for reason, _ in placements(balancer).values()} == {"no_service"}
    balancer.pipeline.process([], 10_001)
    assert balancer.flows() == []
    balancer.reload(config(weighted(1, 1, 1)), now=2)
    assert {reason for reason, _ in placements(balancer, now=11).values()} == {"maglev"}


def test_a_new_hash_seed_moves_new_flows_only() -> None:
    balancer = Balancer(config(weighted(1, 1, 1)))
    placements(balancer, "S")
    before = placements(balancer)
    balancer.reload(config(weighted(1, 1, 1), hash_seed=9), now=1)
    assert placements(balancer) == before


def test_timeouts_take_effect_on_flows_that_are_there() -> None:
    balancer = Balancer(config(weighted(1, 1, 1)))
    placements(balancer, "S")
    placements(balancer, "A")
    balancer.reload(config(weighted(1, 1, 1), timeouts={"tcp_established": 5}), now=1)
    assert {reason for reason, _ in placements(balancer, now=6).values()} == {"maglev"}


def test_old_snapshots_are_freed() -> None:
    pipeline = Pipeline(64, KEY)
    settings = config(service("dsr"))
    plans = plan_services(settings, BackendIds(), 0.0)
    first = services_table(settings, plans), Routes([], [], {}, {})
    held = [sys.getrefcount(part) for part in first]
    pipeline.publish(*first)
    assert [sys.getrefcount(part) for part in first] == [count + 1 for count in held]
    for _ in range(5):
        pipeline.publish(services_table(settings, plans), Routes([], [], {}, {}))
        assert pipeline.reclaim() == 1
    assert [sys.getrefcount(part) for part in first] == held
    pipeline.process([frame(CLIENT[4], 1, VIP[4], 80)], 0)
    assert pipeline.reclaim() == 1


def test_tables_that_did_not_change_are_shared() -> None:
    balancer = Balancer(config(service("nat"), weighted(1, 1, 1, vip="203.0.113.20")))
    nat, dsr = (plan.table for plan in balancer.plans)
    balancer.reload(config(weighted(1, 1, 2, vip="203.0.113.20"), service("nat", no_backend="reset")), now=1)
    assert balancer.plans[1].table is nat
    assert balancer.plans[0].table is not dsr


def test_a_table_lives_as_long_as_a_snapshot_needs_it() -> None:
    balancer = Balancer(config(weighted(1, 1, 2)))
    table = weakref.ref(balancer.plans[0].table)
    balancer.plans = []
    gc.collect()
    assert table() is not None
    assert balancer.send(frame(CLIENT[4], 1, VIP[4], 80))[0] == "scheduled"
    balancer.reload(config(weighted(2, 1, 1)), now=1)
    gc.collect()
    assert table() is None


def test_many_reloads_in_traffic() -> None:
    """A backend comes, another goes, a hundred times; a packet meets a backend of its configuration each time."""
    balancer = Balancer(config(), hosts=[CLIENT[4], *(f"10.3.0.{n}" for n in range(1, 100))])
    for turn in range(100):
        hosts = {f"10.3.0.{n}" for n in range(1 + turn % 50, 11 + turn % 50)}
        backends = [{"address": host} for host in hosts]
        balancer.reload(config(service("dsr", on_leave="rehash", backends=backends)), now=turn)
        for reason, key in placements(balancer, "A", turn).values():
            assert reason in ("conntrack", "maglev")
            assert key.removesuffix(":80") in hosts  # type: ignore[union-attr]
        assert balancer.counts_agree()


def test_renewed_numbers_start_from_zero() -> None:
    """What a backend number's former bearer left behind, flows and counters, goes; all else stays."""
    balancer = Balancer(config(weighted(1, 1, 1)))
    placements(balancer, "S")
    before = {number: balancer.pipeline.backend_stats(number) for number in (1, 2, 3)}
    assert all(stats["new_flows"] for stats in before.values())
    balancer.pipeline.renew({2})
    assert {flow[5] for flow in balancer.flows()} == {1, 3}
    assert set(balancer.pipeline.backend_stats(2).values()) == {0}
    assert [balancer.pipeline.backend_stats(number) for number in (1, 3)] == [before[1], before[3]]
    assert balancer.counts_agree()


def test_before_the_first_publish() -> None:
    with pytest.raises(RuntimeError, match="publish services and routes first"):
        Pipeline(64).process([], 0)
    with pytest.raises(RuntimeError, match="publish services and routes first"):
        explain_tuple(Pipeline(64), None, 0, None, 0, 6, 0)


TIMES = ("tcp_syn", "tcp_established", "tcp_half_closed", "tcp_closing", "udp")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Pipeline(0), ValueError, "a flow table takes 1..1073741824 flows, not 0"),
        (lambda: Pipeline((1 << 30) + 1), ValueError, "a flow table takes 1..1073741824 flows, not 1073741825"),
        (lambda: Pipeline(64, b"short"), ValueError, "the flow table's key has 32 bytes, not 5"),
        (lambda: Pipeline(64).backend_stats(1 << 20), ValueError, "backend ids end at 1048575, got 1048576"),
        (lambda: Pipeline(64).publish(None, None), TypeError, "services"),
        (lambda: Services([], hash_seed=0, timeouts={}), KeyError, "tcp_syn"),
        (lambda: Services([], hash_seed=0, timeouts=dict.fromkeys(TIMES, 0)), ValueError,
         "a timeout is above 0 and at most 7 days, not 0.0 s"),
        (lambda: Routes([(b"", b"", 0, 0, "elsewhere")], [], {}, {}), KeyError, "elsewhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_services_in_a_cycle_leave_alone_what_they_share() -> None:
    """The garbage collector takes their references away before they end."""
    balancer = Balancer(config(weighted(1, 1, 1)))
    origin = services_table(balancer.settings, balancer.plans)
    for _ in range(3):
        cycle: list[object] = [origin.with_changes([(0, balancer.plans[0], [0])])]
        cycle.append(cycle)
        del cycle
        assert gc.collect()
    balancer.pipeline.publish(origin, balancer.routes())
    assert {key for _, key in placements(balancer).values()} == {f"{address}:80" for address in BACKENDS[4]}
