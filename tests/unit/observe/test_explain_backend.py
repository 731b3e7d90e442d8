"""`fastlb trace` of a backend's state, and of the way to it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from fastlb import Datapath
from fastlb.observe.explain_backend import MAX_NAMED
from fastlb.observe.explanation import Context, parse_tuple
from fastlb.observe.trace import explain
from fastlb.plan import routes
from fastlb.plan.backends import BackendStates
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, service
from tests.explanations import backend_says, explained, says
from tests.frames import frame, mac_of
from tests.unit.plan.test_routes import view


def test_why_nobody_takes_flows() -> None:
    """At most so many are named, each with the last check's fault."""
    assert says(datapath(service("nat", backends=[])), "backend") == "the service has none"
    backends = [{"address": f"10.3.0.{host}"} for host in range(11, 11 + MAX_NAMED + 2)]
    settings = config(service("dsr", name="web", backends=backends, check={"type": "tcp"}))
    standings = BackendStates()
    standings.apply_config(settings, 0.0)
    for name, state in list(standings.by_backend.items()):
        standings.update(name, replace(state, state="down", reason="Connection refused"))
    told = backend_says(explained(settings, standings))
    assert told.startswith("10.3.0.11:80 is down (Connection refused), weight 1; 10.3.0.12:80 is down")
    assert told.endswith("weight 1; and 2 more")


def test_the_state_of_the_backend() -> None:
    backends = [{"address": BACKENDS[4][0], "weight": 3}, {"address": BACKENDS[4][1], "weight": 5}]
    settings = config(service("dsr", name="web", backends=backends))
    standings = BackendStates()
    standings.apply_config(settings, 0.0)
    one, two = ("web", "10.3.0.11:80"), ("web", "10.3.0.12:80")
    standings.drain(two)
    told = explained(settings, standings)
    assert backend_says(told) == "10.3.0.11:80 is unchecked, weight 3, 100.0% of the weight for new flows"
    standings.enable(two, 0.0)
    standings.set_weight(two, 1, 0.0)
    standings.update(one, replace(standings.of(*one), state="down", reason="refused"))
    assert backend_says(explained(settings, standings)) == (
        "10.3.0.12:80 is unchecked, weight 1 by command (configured: 5), 100.0% of the weight for new flows"
    )


def test_what_a_running_balancer_adds() -> None:
    settings = config(service("dsr", name="web", backends=[{"address": BACKENDS[4][0]}]))
    told = explained(
        settings, BackendStates(), worker_of=lambda shard: f"1 of 2 ({shard}), ",
        next_hop=lambda address: ("eth1", ip_address("10.9.0.1")),
    )  # fmt: skip
    by_stage = {step.stage: step.says for step in told.steps}
    shard = told.as_json()["steps"][1]["shard"]
    assert by_stage["worker"] == f"1 of 2 ({shard}), shard {shard} of the flow table"
    assert by_stage["forward"].startswith("dsr to 10.3.0.11, by 10.9.0.1, interface eth1, MAC ")


# --- the backend and the way to it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forward", "target"), [("nat", "10.7.0.1:80"), ("gue", "10.7.0.1")])
def test_no_route_to_the_backend(forward: str, target: str) -> None:
    known = Balancer(config(service(forward, name="web", backends=[{"address": "10.7.0.1"}])))
    services = services_table(known.settings, known.plans)
    known.pipeline.publish(services, routes.routes_table(view(), known.plans))
    context = Context(known.plans, known.settings.services, known.standings)
    told = explain(known.pipeline, parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"), context, 0)
    said = next(step.says for step in told.steps if step.stage == "forward")
    assert said == f"{forward} to {target}: no route leads there, or its link is down"
    assert told.reason == "no_route"


def test_the_next_hop() -> None:
    settings = config(service("dsr", name="web", backends=[{"address": BACKENDS[4][0]}]))
    dp = Datapath(settings)
    assert says(dp, "forward") == "dsr to 10.3.0.11, on-link: the next hop's MAC is not known"
    assert says(dp, "verdict") == "DROP no_neighbour: the next hop's MAC is not known"
    dp.set_neighbour(BACKENDS[4][0], "02:00:00:00:00:0b")
    assert says(dp, "forward") == "dsr to 10.3.0.11, on-link, MAC 02:00:00:00:00:0b, packets of up to 1500 bytes"
    assert says(dp, "verdict") == "FORWARD scheduled"


@pytest.mark.parametrize(
    ("forward", "version", "room", "headers"),
    [("ipip", 4, 1480, 20), ("ipip", 6, 1460, 40), ("gre", 4, 1476, 24), ("gue", 4, 1468, 32)],
)
def test_what_fits_into_a_tunnel(forward: str, version: int, room: int, headers: int) -> None:
    dp = datapath(service(forward, version))
    told = dp.trace(CLIENT[version], 40000, VIP[version], 80, "tcp").steps[-2]
    assert told.says.endswith(f"packets of up to {room} bytes inside the tunnel's {headers} bytes of headers")
    assert told.facts["mtu"] == room


def test_a_tunnel_without_a_source() -> None:
    dp = Datapath(config(service("ipip")), addresses=["2001:db8::1"])
    for host in BACKENDS[4]:
        dp.set_neighbour(host, mac_of(host))
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert told.reason == dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).reason == "no_tunnel_source"
