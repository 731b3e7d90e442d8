"""Plans as tables of the data path, and how many flows it may remember."""

from __future__ import annotations

import pytest

from fastlb._core import Pipeline, Routes
from fastlb.model.modes import MODES, SCHEDULERS
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import MAX_FLOWS, new_flows, services_table
from tests.balancers import BACKENDS, CLIENT, KEY, VIP, Balancer, config, datapath, flags, service
from tests.frames import frame

# --- the automatic rate -----------------------------------------------------------------------------------------------

# of each service its protocol and its own timeouts; the entries a second that flows: 6000 come to
RATES: list[tuple[list[tuple[str, dict[str, str]]], int]] = [
    ([("tcp", {})], 200),
    ([("tcp", {"tcp_syn": "30s"})], 100),
    ([("tcp", {"tcp_syn": "5s"})], 600),
    ([("tcp", {}), ("tcp", {"tcp_syn": "60s"})], 50),
    ([("tcp", {}), ("udp", {"udp": "10m"})], 200),
    ([("udp", {})], 50),
    ([("udp", {}), ("udp", {"udp": "300s"})], 10),
    ([], 200),
]


@pytest.mark.parametrize(("services", "rate"), RATES)
def test_the_longest_memory_of_any_service_makes_the_automatic_rate(
    services: list[tuple[str, dict[str, str]]], rate: int
) -> None:
    made = [
        service("dsr", protocol=protocol, port=port, name=f"s{port}", timeouts=own,
                backends=[{"address": BACKENDS[4][0]}])
        for port, (protocol, own) in enumerate(services, 80)
    ]  # fmt: skip
    settings = config(*made, flows=6000, new_flow_rate="auto", timeouts={"tcp_syn": 15, "udp": 60})
    assert new_flows(settings) == (rate, 3000)


# new_flow_rate, flows, tcp_syn; entries a second, and at once
GIVEN: list[tuple[int | str, int, float, tuple[int, int]]] = [
    (1000, 4096, 15, (1000, 15_000)),  # as many as are remembered at a time
    (1000, 4096, 2.5, (1000, 2500)),
    (1, 4096, 1, (1, 1)),
    (100_000_000, 4096, 15, (100_000_000, MAX_FLOWS)),
    ("auto", 64, 600, (1, 32)),  # at least one a second
    ("auto", 1 << 30, 15, ((1 << 30) // 30, 1 << 29)),
]


@pytest.mark.parametrize(("rate", "flows", "remembered", "expected"), GIVEN)
def test_how_many_flows_at_once(rate: int | str, flows: int, remembered: float, expected: tuple[int, int]) -> None:
    settings = config(service("dsr"), flows=flows, new_flow_rate=rate, timeouts={"tcp_syn": remembered})
    assert new_flows(settings) == expected


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("forward", MODES)
def test_a_table_for_every_mode_and_scheduler(forward: str, scheduler: str) -> None:
    """Its packets go to one of the service's backends, whatever the plan has of tables."""
    needs = {"check": {"type": "tcp"}} if SCHEDULERS[scheduler].needs_response else {}
    balancer = datapath(service(forward, scheduler=scheduler, **needs), snat=["10.3.0.5"])
    result = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, "tcp", flags=flags("S")))
    assert result.reason == "scheduled"
    assert result.backend in {f"{address}:{8080 if forward == 'nat' else 80}" for address in BACKENDS[4]}


def test_the_seed_of_hashes_reaches_the_data_path() -> None:
    syns = [frame(CLIENT[4], port, VIP[4], 80, "tcp", flags=flags("S")) for port in range(1000, 1032)]
    spread = [[Balancer(config(service("dsr"), hash_seed=seed)).send(syn)[2] for syn in syns] for seed in (0, 0, 1)]
    assert spread[0] == spread[1]
    assert spread[0] != spread[2]


@pytest.mark.parametrize(("tcp_syn", "after", "known"), [(15, 14, True), (15, 16, False), (30, 16, True)])
def test_timeouts_reach_the_data_path(tcp_syn: float, after: float, known: bool) -> None:
    """The flow of a SYN is known as long as it says; from then on its next packet is one in mid-flow."""
    balancer = Balancer(config(service("dsr"), timeouts={"tcp_syn": tcp_syn}))
    assert balancer.send(frame(CLIENT[4], 1000, VIP[4], 80, "tcp", flags=flags("S")))[0] == "scheduled"
    reason, _, _ = balancer.send(frame(CLIENT[4], 1000, VIP[4], 80, "tcp", flags=flags("A")), after)
    assert (reason == "conntrack") is known


def test_a_table_without_services_takes_nothing() -> None:
    settings = config()
    pipeline = Pipeline(64, KEY)
    pipeline.publish(services_table(settings, plan_services(settings, BackendIds(), 0.0)), Routes([], [], {}, {}, {}))
    [(_, reason, sent, *_)] = pipeline.process([frame(CLIENT[4], 1, VIP[4], 80, "tcp")], 0)
    assert (reason, sent) == ("no_service", [])
