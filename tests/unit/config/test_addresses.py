"""Addresses, prefixes and ports: what they must not be, and advice where something near to them was written."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Address

import pytest
from pydantic_core import PydanticCustomError

from fastlb.config import Config
from fastlb.config.addresses import all_different, parse_ports, socket_path
from fastlb.model.net import PortRange
from tests.unit.config.written import messages_of, service


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.0", "the unspecified address"),
        ("224.0.0.1", "a multicast address"),
        ("127.0.0.1", "a loopback address"),
        ("169.254.0.1", "a link-local address"),
        ("255.255.255.255", "the broadcast address"),
        ("::", "the unspecified address"),
        ("ff02::1", "a multicast address"),
        ("::1", "a loopback address"),
        ("fe80::1", "a link-local address"),
        ("fe80::1%eth0", "an address with a zone"),
        ("::ffff:192.0.2.1", "an IPv4 address written as IPv6"),
    ],
)
def test_addresses_that_cannot_be(address: str, kind: str) -> None:
    shown = str(IPv6Address(address)) if ":" in address else address
    assert messages_of({"services": [service(vip=address)]}) == [
        ("services[0].vip", f"{shown} is {kind}; a VIP must be a unicast address that clients can reach")
    ]
    vip = "2001:db8::1" if ":" in address else "203.0.113.10"
    data = {"services": [service(vip=vip, backends=[{"address": address}])]}
    if kind == "a link-local address":
        assert Config.from_dict(data).services[0].backends
    else:
        assert messages_of(data) == [
            (
                "services[0].backends[0].address",
                f"{shown} is {kind}; it must be the unicast address of a backend",
            )
        ]


def test_lists_may_hold_what_ipaddress_makes() -> None:
    config = Config.from_dict({"services": [service(allow=[IPv4Network("10.0.0.0/8")], deny=["0.0.0.0/0"])]})
    assert config.services[0].allow == (IPv4Network("10.0.0.0/8"),)
    assert json.loads(config.model_dump_json())["services"][0]["deny"] == ["0.0.0.0/0"]


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("10.0.0.1:80", 'write the address alone, "10.0.0.1" and port: 80 beside it'),
        ("[2001:db8::7]:443", 'write the address alone, "2001:db8::7" and port: 443 beside it'),
        ("[2001:db8::7]", 'write the address alone, "2001:db8::7"'),
        ("web1.example.com", "host names are not looked up, so write an IPv4 or IPv6 address"),
        ("localhost", "host names are not looked up, so write an IPv4 or IPv6 address"),
    ],
)
def test_what_is_written_for_an_address(address: str, advice: str) -> None:
    message = f'found "{address}"; {advice}'
    assert messages_of({"services": [service(vip=address)]}) == [("services[0].vip", message)]
    data = {"services": [service(vip="203.0.113.10", backends=[{"address": address}])]}
    assert messages_of(data) == [("services[0].backends[0].address", message)]


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("10.0.0.1/24", 'write the address alone, "10.0.0.1"'),
        ("10.0.0.1/32", 'write the address alone, "10.0.0.1"'),
        ("10.0.0.0/24", "it must be an IPv4 or IPv6 address, as text"),
        ("10.0.0.256", "it must be an IPv4 or IPv6 address, as text"),
        ("10.0.0.1:65536", "it must be an IPv4 or IPv6 address, as text"),
        ("fd00::g", "it must be an IPv4 or IPv6 address, as text"),
        ("", "it must be an IPv4 or IPv6 address, as text"),
    ],
)
def test_what_is_written_for_a_backend(address: str, advice: str) -> None:
    assert messages_of({"services": [service(backends=[{"address": address}])]}) == [
        ("services[0].backends[0].address", f'found "{address}"; {advice}')
    ]


def test_a_source_address_has_no_port_beside_it() -> None:
    assert messages_of({"snat": ["10.0.0.5:80"]}) == [
        ("snat[0]", 'found "10.0.0.5:80"; write the address alone, "10.0.0.5", without a port')
    ]


@pytest.mark.parametrize(
    ("vip", "advice"),
    [
        ("10.9.1.100/24", 'for one address write "10.9.1.100", for the whole prefix "10.9.1.0/24"'),
        ("2001:db8::7/64", 'for one address write "2001:db8::7", for the whole prefix "2001:db8::/64"'),
    ],
)
def test_a_vip_with_host_bits_is_most_likely_one_address(vip: str, advice: str) -> None:
    assert messages_of({"services": [service(vip=vip)]}) == [
        ("services[0].vip", f'found "{vip}"; host bits are set: {advice}')
    ]


@pytest.mark.parametrize(
    ("written", "ports"),
    [(80, 80), ("any", "any"), ("80-80", 80), ("8000-8099", (8000, 8099)), (PortRange(1, 2), (1, 2))],
)
def test_ports(written: object, ports: object) -> None:
    assert parse_ports(written) == ports


@pytest.mark.parametrize("written", [0, 65536, True, 80.0, "80", "2-1", "0-1", "1-65536", "1-2-3", "١-٢", None, []])
def test_what_is_no_port(written: object) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_ports(written)


def test_a_list_in_which_something_comes_twice() -> None:
    assert all_different(("a", "b")) == ("a", "b")
    with pytest.raises(PydanticCustomError, match='"b" is listed twice; keep one'):
        all_different(("a", "b", "b"))


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/run/fastlb.sock", True),
        ("/" + "a" * 106, True),
        ("/" + "a" * 107, False),
        ("/" + "é" * 54, False),
        ("a", False),
    ],
)
def test_paths_of_sockets(path: str, right: bool) -> None:
    if right:
        assert socket_path(path) == path
    else:
        with pytest.raises(ValueError, match="path"):
            socket_path(path)
