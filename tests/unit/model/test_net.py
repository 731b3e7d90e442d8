"""Addresses and ports as they are written."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest

from fastlb.model.net import PortRange, endpoint_text, host_text, parse_endpoint


@pytest.mark.parametrize(
    ("address", "port", "text"),
    [
        ("10.0.0.11", 8080, "10.0.0.11:8080"),
        ("fd00::11", 8080, "[fd00::11]:8080"),
        ("10.0.0.11", 0, "10.0.0.11:0"),
    ],
)
def test_endpoints_there_and_back(address: str, port: int, text: str) -> None:
    assert endpoint_text(address, port) == endpoint_text(ip_address(address), port) == text
    assert parse_endpoint(text) == (ip_address(address), port)


def test_a_host_in_front_of_a_port() -> None:
    assert (host_text("10.0.0.1"), host_text(ip_address("fd00::1"))) == ("10.0.0.1", "[fd00::1]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.1", "is not ADDRESS:PORT, as in 198.51.100.7:40000 or [2001:db8::7]:40000"),
        ("10.0.0.1:", "is not ADDRESS:PORT"),
        ("10.0.0.1:65536", "is not ADDRESS:PORT"),
        ("10.0.0.1:http", "is not ADDRESS:PORT"),
        ("fd00::1:80", "is not ADDRESS:PORT"),
        ("10.0.0.1:80 ", "is not ADDRESS:PORT"),
        ("10.0.0.1:٨٠", "is not ADDRESS:PORT"),
        ("１０.0.0.1:80", "does not appear to be an IPv4 or IPv6 address"),
        ("10.0.0.256:80", "does not appear to be an IPv4 or IPv6 address"),
        ("[web]:80", "does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_what_is_no_endpoint(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))) as caught:
        parse_endpoint(text)
    assert message in str(caught.value)


def test_a_range_of_ports() -> None:
    assert str(PortRange(8000, 8099)) == "8000-8099"
