"""`fastlb trace`: what it tells is what happens, and asking changes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from fastlb import Datapath
from fastlb.errors import FastlbError
from fastlb.observe import trace
from fastlb.plan import routes
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import frame, mac_of, take_apart
from tests.unit.dataplane.test_admission import LISTS
from tests.unit.plan.test_routes import view

SECOND = "203.0.113.20"


def says(dp: Datapath, stage: str, dport: int = 80, protocol: str = "tcp", dst: str = VIP[4]) -> str:
    steps = dp.trace(CLIENT[4], 40000, dst, dport, protocol).steps
    return next(step.says for step in steps if step.stage == stage)


# --- the tuple --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "shown"),
    [
        ("198.51.100.7:40000", "203.0.113.10:443/tcp", "198.51.100.7:40000 -> 203.0.113.10:443/tcp"),
        ("[2001:db8::7]:1", "[2001:DB8::10]:53/udp", "[2001:db8::7]:1 -> [2001:db8::10]:53/udp"),
    ],
)
def test_tuples(source: str, destination: str, shown: str) -> None:
    assert str(trace.parse_tuple(source, destination)) == shown


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("198.51.100.7:40000", "203.0.113.10:443", "a destination ends in /tcp or /udp, as in 203.0.113.10:443/tcp"),
        ("198.51.100.7:40000", "203.0.113.10:443/icmp", "a destination ends in /tcp or /udp"),
        ("198.51.100.7", "203.0.113.10:443/tcp", "'198.51.100.7' is not ADDRESS:PORT, as in"),
        ("198.51.100.7:65536", "203.0.113.10:443/tcp", "'198.51.100.7:65536' is not ADDRESS:PORT, as in"),
        ("2001:db8::7:40000", "203.0.113.10:443/tcp", "'2001:db8::7:40000' is not ADDRESS:PORT, as in"),
        ("client:40000", "203.0.113.10:443/tcp", "'client:40000': 'client' does not appear to be an IPv4 or IPv6"),
        ("[2001:db8::7]:1", "203.0.113.10:443/tcp", "2001:db8::7 and 203.0.113.10 are of different IP versions"),
    ],
)
def test_what_is_no_tuple(source: str, destination: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trace.parse_tuple(source, destination)
    with pytest.raises(FastlbError):
        trace.requested({"source": source, "destination": destination})


# --- whose packet -----------------------------------------------------------------------------------------------------

SERVICES = [
    service("dsr", name="one", port=80),
    service("dsr", name="range", port="80-89"),
    service("dsr", name="all", port="any"),
    service("dsr", name="net", vip="203.0.113.0/24", port=80),
    service("dsr", name="dns", protocol="udp", port=53),
]


@pytest.mark.parametrize(
    ("dst", "dport", "expected"),
    [
        (VIP[4], 80, "one: the address itself, port 80/tcp; more specific than range, all, net"),
        (VIP[4], 81, "range: the address itself, ports 80-89/tcp; more specific than all"),
        (VIP[4], 90, "all: the address itself, ports any/tcp"),
        ("203.0.113.77", 80, "net: prefix 203.0.113.0/24, port 80/tcp"),
        ("203.0.113.77", 81, "none has this address, port and protocol: net has 203.0.113.0/24 port 80/tcp"),
        ("203.0.114.1", 80, "none has this address, port and protocol: 203.0.114.1 is no VIP"),
    ],
)
def test_the_service_and_its_rule(dst: str, dport: int, expected: str) -> None:
    dp = datapath(*SERVICES)
    assert says(dp, "service", dst=dst, dport=dport) == expected
    told = dp.trace(CLIENT[4], 40000, dst, dport, "tcp")
    assert told.service == (None if expected.startswith("none") else expected.split(":")[0])
    assert told.reason == dp.process(frame(CLIENT[4], 40000, dst, dport)).reason


@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_an_answer_of_a_backend(forward: str) -> None:
    settings = {"snat": ["192.0.2.77"]} if forward == "fullnat" else {}
    dp = datapath(service(forward, name="web"), **settings)
    sent = dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).frames[0]
    seen = take_apart(sent)
    told = dp.trace(seen.dst, seen.dport, seen.src, seen.sport, "tcp")
    assert (told.service, told.backend, told.reason) == ("web", f"{seen.dst}:{seen.dport}", "conntrack")
    assert "10.1.0.2:40000 -> 203.0.113.10:80 of web, syn" in told.steps[1].says
    assert told.reason == dp.process(reply_to(sent)).reason


def test_an_answer_without_an_entry() -> None:
    dp = datapath(service("nat", name="web"))
    reasons = set()
    for port in range(1000, 1030):
        told = dp.trace(BACKENDS[4][0], 8080, CLIENT[4], port, "tcp")
        assert dp.trace(BACKENDS[4][0], 8080, CLIENT[4], port, "tcp") == told
        out = dp.process(frame(BACKENDS[4][0], 8080, CLIENT[4], port, flags=flags("A")))
        assert (told.reason, told.verdict, told.backend) == (out.reason, out.verdict, out.backend)
        reasons.add(told.reason)
    assert reasons == {"maglev", "reply_unknown"}


# --- who may begin a flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allow", "deny", "let_in", "kept_out"), LISTS)
def test_lists(allow: list[str], deny: list[str], let_in: list[str], kept_out: list[str]) -> None:
    version = ip_network([*allow, *deny][0]).version
    dp = datapath(service("dsr", version, name="web", allow=allow, deny=deny))
    for client in (*let_in, *kept_out):
        told = dp.trace(client, 40000, VIP[version], 80, "tcp")
        step = next(step for step in told.steps if step.stage == "access")
        out = dp.process(frame(client, 40000, VIP[version], 80))
        assert (told.verdict, told.reason, told.backend) == (out.verdict, out.reason, out.backend)
        assert step.facts["denied"] == (client in kept_out)
        assert step.says.startswith("denied" if client in kept_out else ("allowed", "in no list, so allowed"))


def test_a_known_flow_of_a_source_that_is_denied_now() -> None:
    dp = datapath(service("dsr", name="web"))
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    dp.reload(config(service("dsr", name="web", allow=["192.0.2.0/24", "10.0.0.0/8"], deny=["10.1.0.0/16"])))
    assert says(dp, "access") == "denied as of 10.1.0.0/16, the longest prefix of its lists"
    assert says(dp, "verdict") == "DROP denied: the service's lists do not let this source in"
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).reason == "denied"


def test_a_source_at_its_limit() -> None:
    dp = datapath(service("dsr", name="web", source_limit={"rate": 2, "burst": 3, "prefix": 24}))
    for at, left in enumerate((3, 2, 1)):
        assert says(dp, "access") == f"10.1.0.0/24 may begin {left} more flows at this moment"
        assert dp.process(frame(CLIENT[4], 1000 + at, VIP[4], 80)).reason == "scheduled"
    assert says(dp, "access") == "10.1.0.0/24 has begun as many flows as it may, the next one in 0.5 s"
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (told.reason, told.backend) == ("source_limit", None)
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).reason == "source_limit"
    assert dp.trace(CLIENT[4], 1000, VIP[4], 80, "tcp").reason == "conntrack"  # a flow that has begun goes on
    dp.process_batch([], 0.25)
    assert says(dp, "access").endswith("the next one in 0.2 s")
    dp.process_batch([], 0.6)
    assert dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").reason == "scheduled"


@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr", "nat-prefix"])
@pytest.mark.parametrize("changes", [{}, {"scheduler": "rr"}, {"affinity": {"timeout": "60s"}}, {"scheduler": "lc"}])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_more_new_flows_than_may_be_remembered(forward: str, changes: dict[str, Any], protocol: str) -> None:
    """Whether entries are made, were not made lately, or are made again."""
    vip = {"vip": "203.0.113.0/28"} if forward == "nat-prefix" else {}
    dp = datapath(
        service(forward.split("-")[0], name="web", protocol=protocol, **vip, **changes),
        snat=["192.0.2.77"], new_flow_rate=2, timeouts={"tcp_syn": 4, "udp": 4},
    )  # fmt: skip
    seen = set()
    for now in (0.0, 0.5, 1.0, 3.0, 30.0):
        for port in range(1000, 1012):
            dp.process_batch([], now)
            told = dp.trace(CLIENT[4], port + round(now * 100), VIP[4], 80, protocol)
            out = dp.process(frame(CLIENT[4], port + round(now * 100), VIP[4], 80, protocol), now)
            assert (told.verdict, told.reason, told.backend) == (out.verdict, out.reason, out.backend)
            seen.add(out.reason)
    assert seen > {"scheduled"}
    assert seen <= {"scheduled", "overload", "maglev", "new_flow_rate", "conntrack"}


# --- the flow ---------------------------------------------------------------------------------------------------------


def test_an_entry_through_its_life() -> None:
    dp = datapath(service("nat", name="web"), timeouts={"tcp_syn": 5, "tcp_established": 60, "tcp_closing": 5})
    assert says(dp, "flow") == "no entry: a new flow"
    out = dp.process(frame(CLIENT[4], 40000, VIP[4], 80), now=1.0)
    dp.process(reply_to(out.frames[0]), now=1.5)
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("A")), now=2.0)
    dp.process(b"", now=4.0)
    assert says(dp, "flow") == f"established at {out.backend}, 3.0 s old, idle for 2.0 s"
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (told.reason, told.state, told.backend) == ("conntrack", "established", out.backend)
    assert [step.stage for step in told.steps] == ["service", "worker", "flow", "backend", "forward", "verdict"]
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("RA")), now=5.0)
    assert says(dp, "flow").endswith("s: over, so a SYN begins a new flow; what else comes still goes there")
    assert dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").reason == "scheduled"


def test_an_expired_entry_does_not_decide() -> None:
    dp = datapath(service("dsr", name="web", backends=[{"address": BACKENDS[4][0]}]), timeouts={"tcp_syn": 5})
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80), now=1.0)
    dp._pipeline.process([], 6001)
    found = says(dp, "flow")
    assert found in ("no entry: a new flow", "syn at 10.3.0.11:80, 5.0 s old, idle for 5.0 s: expired, so a new flow")
    assert dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").reason == "scheduled"


def test_the_source_of_full_nat() -> None:
    dp = datapath(service("fullnat"), snat=["192.0.2.77"])
    sent = dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).frames[0]
    assert f"source 192.0.2.77:{int.from_bytes(sent[34:36], 'big')}" in says(dp, "flow")


def test_an_entry_from_before_a_reload_to_full_nat() -> None:
    dp = datapath(service("dsr", name="web"), snat=["192.0.2.77"])
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    dp.reload(config(service("fullnat", name="web"), snat=["192.0.2.77"]))
    assert "without a source port, from before the service went over to fullnat, so a new flow" in says(dp, "flow")


def test_no_source_port_is_left() -> None:
    """One port in 64 is a shard's: this range has one for each."""
    dp = datapath(service("fullnat"), snat=["192.0.2.77"], snat_ports="2048-2111")
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    refused = 0
    for port in range(40000, 40200):
        told = dp.trace(CLIENT[4], port, VIP[4], 80, "tcp")
        out = dp.process(frame(CLIENT[4], port, VIP[4], 80))
        assert (told.reason, told.verdict) == (out.reason, out.verdict)
        refused += out.reason == "no_source_port"
        assert "all 1 of the flow's shard are taken" in told.steps[-1].says or out.reason == "scheduled"
    assert refused > 50


# --- the scheduler ----------------------------------------------------------------------------------------------------

LEAST = "the least load at this moment, of equals the next in turn; 10.3.0.11:80 (0 + 1) / 1"
BY = {
    "maglev": "the flow's hash 0x",
    "ketama": "the flow's hash 0x",
    "source-hash": "the hash of 10.1.0.2 0x",
    "rr": "turn 1 of 3 of this worker, if no other flow comes first",
    "wrr": "turn 1 of 8 of this worker, if no other flow comes first",
    "random": "by lot, the next one of this worker, by weight 10.3.0.11:80 12.5%, 10.3.0.12:80 25.0%, ",
    "lc": LEAST + "; 10.3.0.12:80 (0 + 1) / 1",
    "wlc": LEAST + "; 10.3.0.12:80 (0 + 1) / 2",
    "lrt": LEAST + " x 0.06 ms",
    "p2c": "the better of two drawn by lot, if no other flow comes first; 10.3.0.11:80 (0 + 1) / 1 x 0.06 ms",
}
WEIGHTED = [{"address": address, "weight": weight} for address, weight in zip(BACKENDS[4], (1, 2, 5), strict=True)]


@pytest.mark.parametrize("scheduler", BY)
def test_by_what_the_scheduler_goes(scheduler: str) -> None:
    dp = datapath(service("nat", scheduler=scheduler, backends=WEIGHTED))
    assert says(dp, "scheduler").startswith(f"{scheduler}: {BY[scheduler]}")
    for port in range(40000, 40050):
        told = dp.trace(CLIENT[4], port, VIP[4], 80, "tcp")
        step = next(step for step in told.steps if step.stage == "scheduler")
        assert f"-> {step.facts['scheduled']}" in step.says
        other = Datapath(dp._config)  # which knows none of the flows
        for host in BACKENDS[4]:
            other.set_neighbour(host, mac_of(host))
        picked_up = other.process(frame(CLIENT[4], port, VIP[4], 80, flags=flags("A")))
        assert step.facts["without_a_syn"] == picked_up.backend
        assert ("no SYN goes by hash" in step.says) == (picked_up.backend != step.facts["scheduled"])
        out = dp.process(frame(CLIENT[4], port, VIP[4], 80))
        assert (told.backend, told.reason, told.verdict) == (out.backend, out.reason, out.verdict)


@pytest.mark.parametrize("scheduler", BY)
def test_a_client_that_sticks_to_a_backend_without_weight(scheduler: str) -> None:
    """The only one: the scheduler has nobody to name."""
    web = service("nat", scheduler=scheduler, backends=WEIGHTED[:1], affinity={"timeout": "60s"})
    dp = datapath(web)
    dp.process(frame(CLIENT[4], 1000, VIP[4], 80))
    dp.reload(config(web | {"backends": [WEIGHTED[0] | {"weight": 0}]}))
    assert says(dp, "scheduler").startswith("affinity: the client's last flow went to 10.3.0.11:80; remembered for 6")
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (told.reason, told.backend) == ("scheduled", "10.3.0.11:80")
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).backend == told.backend
    assert dp.trace("10.1.0.3", 40000, VIP[4], 80, "tcp").reason == "no_backend"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("policy", "reason"), [("drop", "no_backend"), ("reset", "rejected")])
def test_nobody_takes_flows(policy: str, reason: str, protocol: str) -> None:
    backends = [{"address": BACKENDS[4][0], "weight": 0}]
    dp = datapath(service("nat", protocol=protocol, no_backend=policy, backends=backends))
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, protocol)
    out = dp.process(frame(CLIENT[4], 40000, VIP[4], 80, protocol))
    assert (told.verdict, told.reason, told.backend) == (out.verdict, reason, None)
    assert out.reason == reason
    assert says(dp, "scheduler", protocol=protocol) == "maglev: no backend takes new flows"
    assert says(dp, "backend", protocol=protocol) == "10.3.0.11:80 is unchecked, weight 0"


def test_why_nobody_takes_flows() -> None:
    """At most so many are named, each with the last check's fault."""
    assert says(datapath(service("nat", backends=[])), "backend") == "the service has none"
    backends = [{"address": f"10.3.0.{host}"} for host in range(11, 11 + trace.MOST_CANDIDATES + 2)]
    settings = config(service("dsr", name="web", backends=backends, check={"type": "tcp"}))
    standings = BackendStates()
    standings.apply_config(settings, 0.0)
    for name, state in list(standings.by_backend.items()):
        standings.update(name, replace(state, state="down", reason="Connection refused"))
    told = standing_says(explained(settings, standings))
    assert told.startswith("10.3.0.11:80 is down (Connection refused), weight 1; 10.3.0.12:80 is down")
    assert told.endswith("weight 1; and 2 more")


# --- the backend and the way to it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forward", "target"), [("nat", "10.7.0.1:80"), ("gue", "10.7.0.1")])
def test_no_route_to_the_backend(forward: str, target: str) -> None:
    known = Balancer(config(service(forward, name="web", backends=[{"address": "10.7.0.1"}])))
    services = services_table(known.settings, known.plans)
    known.pipeline.publish(services, routes.routes_table(view(), known.plans))
    scene = trace.Scene(known.plans, known.settings.services, known.standings)
    told = trace.explain(known.pipeline, trace.parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"), scene, 0)
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


def explained(settings: Any, standings: BackendStates, **more: Any) -> trace.Explanation:
    """Of a balancer whose backends stand so."""
    balancer = Balancer(settings)
    balancer.plans = plan_services(settings, balancer.ids, 0.0, standings)
    balancer.pipeline.publish(services_table(settings, balancer.plans), balancer.routes())
    scene = trace.Scene(balancer.plans, settings.services, standings, **more)
    return trace.explain(balancer.pipeline, trace.parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"), scene, 0)


def standing_says(told: trace.Explanation) -> str:
    return next(step.says for step in told.steps if step.stage == "backend")


def test_how_the_backend_stands() -> None:
    backends = [{"address": BACKENDS[4][0], "weight": 3}, {"address": BACKENDS[4][1], "weight": 5}]
    settings = config(service("dsr", name="web", backends=backends))
    standings = BackendStates()
    standings.apply_config(settings, 0.0)
    one, two = ("web", "10.3.0.11:80"), ("web", "10.3.0.12:80")
    standings.drain(two)
    told = explained(settings, standings)
    assert standing_says(told) == "10.3.0.11:80 is unchecked, weight 3, 100.0% of the weight for new flows"
    standings.enable(two, 0.0)
    standings.set_weight(two, 1, 0.0)
    standings.update(one, replace(standings.of(*one), state="down", reason="refused"))
    assert standing_says(explained(settings, standings)) == (
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


def test_programs_get_the_same() -> None:
    told = explained(config(service("nat", name="web", scheduler="lrt")), BackendStates())
    data = json.loads(json.dumps(told.as_json()))
    assert (data["service"], data["verdict"], data["reason"]) == ("web", "FORWARD", "scheduled")
    steps = {step["stage"]: step for step in data["steps"]}
    assert len(steps["scheduler"]["candidates"]) == 3
    assert steps["forward"]["mac"] == mac_of(data["backend"].rsplit(":", 1)[0])
    lines = list(trace.described(data))
    assert lines[0] == "10.1.0.2:40000 -> 203.0.113.10:80/tcp"
    assert [line.split()[0] for line in lines[1:] if line[2] != " "] == list(steps)
    assert max(map(len, lines)) <= 118
    assert " ".join(" ".join(lines[1:]).split()) == " ".join(f"{name} {step['says']}" for name, step in steps.items())


# --- without a balancer -----------------------------------------------------------------------------------------------


def test_a_configuration_alone() -> None:
    settings = config(service("dsr", name="web"), service("fullnat", name="full", port=81), snat=["192.0.2.77"])
    running = datapath(service("dsr", name="web"))
    told = trace.from_configuration(settings, trace.parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"))
    assert told.backend == running.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").backend
    assert [step.says for step in told.steps][-2:] == [
        "dsr; the next hop is a running balancer's to know", "FORWARD scheduled, if the next hop can be reached",
    ]  # fmt: skip
    full = trace.from_configuration(settings, trace.parse_tuple("10.1.0.2:40000", "203.0.113.10:81/tcp"))
    assert full.reason == "scheduled"
    assert trace.from_configuration(settings, trace.parse_tuple("10.1.0.2:1", "10.9.9.9:1/udp")).reason == "no_service"


def test_a_configuration_with_checks_is_traced_as_before_the_first() -> None:
    settings = config(service("dsr", name="web", check={"type": "tcp"}))
    told = trace.from_configuration(settings, trace.parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"))
    assert " is unknown, weight 1, 33.3% of the weight for new flows" in standing_says(told)
