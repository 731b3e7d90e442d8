"""The tuple that is asked about, and an explanation in lines and for programs."""

from __future__ import annotations

import json
import re

import pytest

from fastlb.errors import FastlbError
from fastlb.observe.explanation import lines_of, parse_tuple
from fastlb.observe.trace import requested_tuple
from fastlb.plan.backends import BackendStates
from tests.balancers import config, service
from tests.explanations import explained
from tests.frames import mac_of


@pytest.mark.parametrize(
    ("source", "destination", "shown"),
    [
        ("198.51.100.7:40000", "203.0.113.10:443/tcp", "198.51.100.7:40000 -> 203.0.113.10:443/tcp"),
        ("[2001:db8::7]:1", "[2001:DB8::10]:53/udp", "[2001:db8::7]:1 -> [2001:db8::10]:53/udp"),
    ],
)
def test_tuples(source: str, destination: str, shown: str) -> None:
    assert str(parse_tuple(source, destination)) == shown


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
        parse_tuple(source, destination)
    with pytest.raises(FastlbError):
        requested_tuple({"source": source, "destination": destination})


def test_programs_get_the_same() -> None:
    told = explained(config(service("nat", name="web", scheduler="lrt")), BackendStates())
    data = json.loads(json.dumps(told.as_json()))
    assert (data["service"], data["verdict"], data["reason"]) == ("web", "FORWARD", "scheduled")
    steps = {step["stage"]: step for step in data["steps"]}
    assert len(steps["scheduler"]["candidates"]) == 3
    assert steps["forward"]["mac"] == mac_of(data["backend"].rsplit(":", 1)[0])
    lines = list(lines_of(data))
    assert lines[0] == "10.1.0.2:40000 -> 203.0.113.10:80/tcp"
    assert [line.split()[0] for line in lines[1:] if line[2] != " "] == list(steps)
    assert max(map(len, lines)) <= 118
    assert " ".join(" ".join(lines[1:]).split()) == " ".join(f"{name} {step['says']}" for name, step in steps.items())
