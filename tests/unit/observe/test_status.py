"""What a data path tells about itself, and whether docs/counters.md tells all of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fastlb._core import Pipeline, counter_descriptions, reason_names, reason_rows
from fastlb.observe import status
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, reply_to, service
from tests.frames import frame

ROOT = Path(__file__).resolve().parents[3]


def documented(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    text = (ROOT / "docs/counters.md").read_text()
    table = text.split(f"\n## {section}")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


def test_every_reason_is_shown_once() -> None:
    split = status.split_counters(Pipeline(64).counters())
    shown = [*split["paths"], *split["passed"], *split["drops"]]
    assert sorted(shown) == sorted(reason_names())


def test_every_counter_is_documented() -> None:
    for verdict, section in enumerate(("paths", "passed", "drops")):
        assert documented(section) == {name for name, number, _ in reason_rows() if number == verdict}, section
    described = {group: {name for name, *_ in rows} for group, rows in counter_descriptions().items()}
    assert documented("events") == described["events"]
    assert documented("Totals") == described["pipeline"] | described["worker"]
    assert set(status.split_counters(Pipeline(64).counters())) == described["pipeline"] | {"paths", "passed", "drops"}


def test_flows_and_their_memory() -> None:
    described = status.describe_flows(Pipeline(3000))
    assert described == {
        "active": 0,
        "entries": described["entries"],
        "hot_bytes": described["entries"] * 16,
        "cold_bytes": described["entries"] * 48,
        "source_ports": [],
    }
    assert described["entries"] >= 4000  # three quarters of them are 3,000


# --- services and their backends -------------------------------------------------------------------------------------

WEB = service("nat", name="web", no_backend="drop")
COUNTED = ("packets", "bytes", "reply_packets", "reply_bytes", "new_flows", "answered_flows", "active_flows")


def test_a_service_and_its_backends() -> None:
    balancer = Balancer(config(WEB, service("dsr", name="range", port="8000-8009", backends=[])))
    _, sent, backend = balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("S")))
    assert sent is not None
    balancer.send(reply_to(sent))
    web, ports = status.describe_services([balancer.pipeline], balancer.plans, balancer.standings, 0.0)
    assert {name: value for name, value in web.items() if name != "backends"} == {
        "name": "web", "vip": VIP[4], "port": 80, "protocol": "tcp", "forward": "nat", "scheduler": "maglev",
        "paths": {}, "drops": {}, "events": {},
    }  # fmt: skip
    assert (ports["port"], ports["backends"]) == ("8000-8009", [])
    chosen = next(each for each in web["backends"] if each["backend"] == backend)
    assert {name: chosen[name] for name in COUNTED} == balancer.pipeline.backend_stats(
        next(member.id for member in balancer.plans[0].members if member.key == backend)
    )
    assert (chosen["packets"], chosen["reply_packets"], chosen["new_flows"], chosen["active_flows"]) == (1, 1, 1, 1)
    assert chosen["response"] is not None
    others = [each for each in web["backends"] if each is not chosen]
    assert [(each["weight"], each["state"], each["packets"], each["response"]) for each in others] == [
        (1, "unchecked", 0, None), (1, "unchecked", 0, None),
    ]  # fmt: skip


def test_what_a_service_dropped() -> None:
    balancer = Balancer(config(service("dsr", name="web", backends=[])))
    for port in (1, 2, 3):
        balancer.send(frame(CLIENT[4], port, VIP[4], 80))
    (web,) = status.describe_services([balancer.pipeline], balancer.plans)
    assert (web["drops"], web["paths"], web["events"]) == ({"no_backend": 3}, {}, {})


def test_states_of_backends() -> None:
    balancer = Balancer(config(WEB))
    one, two, three = (("web", f"{address}:8080") for address in BACKENDS[4])
    balancer.standings.drain(one, 60.0)
    balancer.standings.set_weight(two, 0, 0.0)
    balancer.standings.update(
        three, replace(balancer.standings.of(*three), state="down", reason="refused", response=0.25)
    )
    balancer.plan(10.0)
    (web,) = status.describe_services([balancer.pipeline], balancer.plans, balancer.standings, 10.0)
    assert [
        (each["state"], each["reason"], each["weight"], each["drain_remaining"], each["check_response"])
        for each in web["backends"]
    ] == [
        ("draining", "", 0, 50.0, None),
        ("unchecked", "", 0, None, None),
        ("down", "refused", 0, None, 0.25),
    ]


def test_the_counters_of_all_workers_are_added_up() -> None:
    """Each worker counts what it forwarded; the slowest one's word about the response time counts."""
    balancers = [Balancer(config(WEB)) for _ in range(3)]
    for number, balancer in enumerate(balancers):
        for port in range(number):
            balancer.send(frame(CLIENT[4], 1000 + port, VIP[4], 80, flags=flags("S")))
    pipelines = [balancer.pipeline for balancer in balancers]
    (web,) = status.describe_services(pipelines, balancers[0].plans)
    assert sum(each["packets"] for each in web["backends"]) == 0 + 1 + 2
    for member, shown in zip(balancers[0].plans[0].members, web["backends"], strict=True):
        assert shown["new_flows"] == sum(each.backend_stats(member.id)["new_flows"] for each in pipelines)


def test_many_backends_are_described_in_steps() -> None:
    backends = [{"address": f"10.4.{number // 250}.{number % 250 + 1}"} for number in range(4 * status.AT_ONCE)]
    balancer = Balancer(config(service("dsr", name="web", backends=backends), maglev_size=4093))
    steps = status.services_in_steps([balancer.pipeline], balancer.plans, balancer.standings, 0.0)
    assert sum(1 for _ in steps) >= 4
    (web,) = status.describe_services([balancer.pipeline], balancer.plans)
    assert [each["backend"] for each in web["backends"]] == [member.key for member in balancer.plans[0].members]


def test_affinity() -> None:
    balancer = Balancer(config(WEB | {"affinity": {"timeout": "60s"}}))
    assert status.describe_affinity(balancer.pipeline)["clients"] == 0
    balancer.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("S")))
    shown = status.describe_affinity(balancer.pipeline)
    assert (shown["clients"], shown["entries"]) == (1, balancer.pipeline.affinity_slots()[1])
