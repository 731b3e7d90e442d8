"""`fastlb trace` as a whole: replies of backends, and a configuration alone."""

from __future__ import annotations

import pytest

from fastlb.observe.explanation import parse_tuple
from fastlb.observe.trace import explain_offline
from tests.balancers import BACKENDS, CLIENT, VIP, config, datapath, flags, reply_to, service
from tests.explanations import backend_says
from tests.frames import frame, take_apart


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


# --- without a balancer -----------------------------------------------------------------------------------------------


def test_a_configuration_alone() -> None:
    settings = config(service("dsr", name="web"), service("fullnat", name="full", port=81), snat=["192.0.2.77"])
    running = datapath(service("dsr", name="web"))
    told = explain_offline(settings, parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"))
    assert told.backend == running.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").backend
    assert [step.says for step in told.steps][-2:] == [
        "dsr; the next hop is a running balancer's to know", "FORWARD scheduled, if the next hop can be reached",
    ]  # fmt: skip
    full = explain_offline(settings, parse_tuple("10.1.0.2:40000", "203.0.113.10:81/tcp"))
    assert full.reason == "scheduled"
    assert explain_offline(settings, parse_tuple("10.1.0.2:1", "10.9.9.9:1/udp")).reason == "no_service"


def test_a_configuration_with_checks_is_traced_as_before_the_first() -> None:
    settings = config(service("dsr", name="web", check={"type": "tcp"}))
    told = explain_offline(settings, parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"))
    assert " is unknown, weight 1, 33.3% of the weight for new flows" in backend_says(told)
