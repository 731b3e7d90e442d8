"""`fastlb trace` of a client's packet: its service, who may begin a flow, the flow's entry, the verdict."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from tests.balancers import BACKENDS, CLIENT, VIP, config, datapath, flags, reply_to, service
from tests.explanations import says
from tests.frames import frame
from tests.unit.dataplane.test_admission import LISTS

# --- the service -----------------------------------------------------------------------------------------------------

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
    dp.process_batch([], now=6.001)
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
