"""Configuration: what is accepted, and every fault with its line, key path and what would be right."""

from __future__ import annotations

import json
import math
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from fastlb.config.fields import drain_time
from fastlb.config.schema import (
    Affinity,
    Backend,
    Check,
    Config,
    Ring,
    Service,
    SlowStart,
    SourceLimit,
    Timeouts,
    Tunnel,
    json_schema,
    load_config,
)
from fastlb.errors import ConfigError, FastlbError

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/fastlb.yaml"

# Six lines: a service whose backends follow from line 7 on.
NAT = """\
services:
  - name: web
    vip: 203.0.113.10
    port: 80
    protocol: tcp
    forward: nat
"""
DSR = NAT.replace("nat", "dsr")
NAT_ANY = NAT.replace("port: 80", "port: any")

TOP_KEYS = (
    "interfaces, vip_address, workers, hash_seed, snat, snat_ports, flow_log, flows, flow_file, new_flow_rate, "
    "affinity_entries, maglev_size, ring_points, transmit, tunnel_offload, control, icmp_echo, timeouts, ring, services"
)
SERVICE_KEYS = ", ".join(Service.model_fields)
NAME = '1 to 64 letters, digits, "_", "." or "-" (in quotes if YAML would take it for a number)'

WORKERS = '"auto" or a whole number from 1 to 64'
SPIN = 'a time from 0us to 10ms: "50us", or a number of seconds'


def service(**changes: object) -> dict[str, Any]:
    """A valid service as a dict, with some keys changed."""
    plain = {"name": "web", "vip": "203.0.113.10", "port": 80, "protocol": "tcp", "forward": "nat"}
    return {**plain, **changes}


def problems_in(text: str | bytes, directory: Path) -> list[tuple[int, str, str]]:
    """(line, key path, message) of each Problem that a file with this text has; line 0 when there is none."""
    file = directory / "fastlb.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    found = []
    for problem in caught.value.problems:
        name, _, line = problem.where.removeprefix(str(directory)).partition(":")
        assert name == "/fastlb.yaml"
        found.append((int(line or 0), problem.path, problem.message))
    return found


def messages_of(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(key path, message) of each Problem of a dict."""
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data)
    assert {problem.where for problem in caught.value.problems} == {""}
    return [(problem.path, problem.message) for problem in caught.value.problems]


# ---- What is accepted ----------------------------------------------------------


def test_the_example_file() -> None:
    config = load_config(EXAMPLE)
    assert config.interfaces == ("eth0",)
    assert config.timeouts == Timeouts(tcp_established=900.0, udp=30.0)
    assert [(s.name, s.vip, s.port, s.forward) for s in config.services] == [
        ("web", IPv4Address("203.0.113.10"), 443, "dsr"),
        ("api", IPv4Address("203.0.113.10"), 80, "nat"),
        ("dns", IPv6Address("2001:db8:cafe::53"), 53, "nat"),
    ]
    assert [[s.key(b) for b in s.backends] for s in config.services] == [
        ["10.0.0.11:443", "10.0.0.12:443"],
        ["10.0.0.11:8080", "10.0.0.12:8080"],
        ["[fd00:3::11]:53", "[fd00:3::12]:53"],
    ]


def test_a_dict_of_the_same_shape_is_the_same_configuration() -> None:
    assert Config.from_dict(yaml.safe_load(EXAMPLE.read_text())) == load_config(EXAMPLE)


def test_a_dict_may_hold_addresses_and_tuples() -> None:
    data = service(vip=IPv4Address("203.0.113.10"), backends=({"address": IPv4Address("10.0.0.1")},))
    assert Config.from_dict({"services": (data,)}) == Config.from_dict(
        {"services": [service(backends=[{"address": "10.0.0.1"}])]}
    )


def test_the_key_of_a_backend_of_any_port_has_port_0() -> None:
    config = Config.from_dict(
        {"services": [service(port="any", forward="dsr", backends=[{"address": "10.0.0.1"}])]}
    )
    assert config.services[0].key(config.services[0].backends[0]) == "10.0.0.1:0"


def test_a_configuration_does_not_change() -> None:
    config = Config.from_dict({})
    with pytest.raises(ValidationError, match="frozen"):
        config.flows = 64


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ({"timeouts": {"udp": "300s"}}, 300.0),
        ({"timeouts": {"udp": "5m"}}, 300.0),
        ({"timeouts": {"udp": "1h"}}, 3600.0),
        ({"timeouts": {"udp": "1500ms"}}, 1.5),
        ({"timeouts": {"udp": "1.5s"}}, 1.5),
        ({"timeouts": {"udp": 2}}, 2.0),
        ({"timeouts": {"udp": 1.0}}, 1.0),
        ({"timeouts": {"udp": "168h"}}, 604800.0),
        ({"ring": {"timeout": "1ms"}}, 0.001),
        ({"ring": {"timeout": 1}}, 1.0),
        ({"ring": {"timeout": "auto"}}, "auto"),
        ({"ring": {"block_size": "128KiB"}}, 131072),
        ({"ring": {"block_size": "1MiB"}}, 1048576),
        ({"ring": {"block_size": 4194304}}, 4194304),
        ({"ring": {"blocks": 4096}}, 4096),
        ({"workers": "auto"}, "auto"),
        ({"workers": 1}, 1),
        ({"workers": 2}, 2),
        ({"workers": 64}, 64),
        ({"ring": {"open_blocks": "auto"}}, "auto"),
        ({"ring": {"open_blocks": True}}, True),
        ({"ring": {"open_blocks": False}}, False),
        ({"ring": {"spin": "50us"}}, 50e-6),
        ({"ring": {"spin": "0.5us"}}, 0.5e-6),
        ({"ring": {"spin": "7us"}}, 7e-6),
        ({"ring": {"spin": "0us"}}, 0.0),
        ({"ring": {"spin": "1.1ms"}}, 0.0011),
        ({"ring": {"spin": "10ms"}}, 0.01),
        ({"ring": {"spin": 0}}, 0.0),
        ({"ring": {"spin": 0.01}}, 0.01),
        ({"hash_seed": 2**64 - 1}, 2**64 - 1),
        ({"flows": 64}, 64),
        ({"flows": 2**30}, 2**30),
        ({"maglev_size": 251}, 251),
        ({"maglev_size": 1048573}, 1048573),
        ({"interfaces": ["eth0", "bond0.100"]}, ("eth0", "bond0.100")),
        ({"control": "/tmp/x.sock"}, "/tmp/x.sock"),
    ],
)
def test_values(data: dict[str, Any], value: object) -> None:
    config: Any = Config.from_dict(data)
    for key, inner in data.items():
        got = getattr(config, key)
        got = getattr(got, next(iter(inner))) if isinstance(inner, dict) else got
        assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "name"),
    [("on", "on"), ("no", "no"), ("Yes", "Yes"), ("2024-02-30", "2024-02-30"), ("'0123'", "0123")],
)
def test_yaml_words_that_stay_text(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "c.yaml").write_text(NAT.replace("name: web", f"name: {text}"))
    assert load_config(tmp_path / "c.yaml").services[0].name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("true", True), ("True", True), ("FALSE", False), ('"auto"', "auto")],
)
def test_open_blocks_in_yaml(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "c.yaml").write_text(f"ring: {{open_blocks: {text}}}")
    got = load_config(tmp_path / "c.yaml").ring.open_blocks
    assert (got, type(got)) == (value, type(value))


def test_a_default_that_is_written_down_changes_nothing() -> None:
    """Else a reload would be refused, though nothing is new: floats of the two must be the very same."""
    written = {"block_size": "256KiB", "blocks": 64, "timeout": "auto", "open_blocks": "auto", "spin": "50us"}
    assert Config.from_dict({"ring": written, "workers": "auto"}) == Config.from_dict({})


def test_yaml_numbers_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "hash_seed: 0x1F\nflows: 1_000\nservices:\n"
        "  - {name: a, vip: 192.0.2.1, port: 1, protocol: udp, forward: dsr,"
        " backends: &b [{address: 10.0.0.1}]}\n"
        "  - {name: b, vip: 192.0.2.1, port: 2, protocol: udp, forward: dsr, backends: *b}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.hash_seed, config.flows) == (31, 1000)
    assert config.services[0].backends == config.services[1].backends != ()


# ---- What is refused: one field ------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "path", "message"),
    [
        ("workers: 0", 1, "workers", f"found 0; it must be {WORKERS}"),
        ("workers: 65", 1, "workers", f"found 65; it must be {WORKERS}"),
        ("workers: -1", 1, "workers", f"found -1; it must be {WORKERS}"),
        ("workers: 2.0", 1, "workers", f"found 2.0; it must be {WORKERS}"),
        ("\nworkers: true", 2, "workers", f"found true; it must be {WORKERS}"),
        ('workers: "2"', 1, "workers", f'found "2"; it must be {WORKERS}'),
        ("workers: Auto", 1, "workers", f'found "Auto"; it must be {WORKERS}'),
        ("workers:", 1, "workers", f"found nothing; it must be {WORKERS}"),
        ("flows: 1.5", 1, "flows", "found 1.5; it must be a whole number from 64 to 1073741824 (2^30)"),
        (
            "flows: 1073741825",
            1,
            "flows",
            "found 1073741825; it must be a whole number from 64 to 1073741824 (2^30)",
        ),
        (
            "hash_seed: -1",
            1,
            "hash_seed",
            "found -1; it must be a whole number from 0 to 18446744073709551615 (64 bits)",
        ),
        (
            "hash_seed: 18446744073709551616",
            1,
            "hash_seed",
            "found 18446744073709551616; it must be a whole number from 0 to 18446744073709551615 (64 bits)",
        ),
        (
            "maglev_size: 65536",
            1,
            "maglev_size",
            "found 65536; it must be one of these primes: 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, "
            "65537, 131071, 262139, 524287, 1048573",
        ),
        ("vip_address: nic", 1, "vip_address", 'found "nic"; use one of: none, interface'),
        ("vip_address:", 1, "vip_address", "found nothing; use one of: none, interface"),
        (
            "control: fastlb.sock",
            1,
            "control",
            'found "fastlb.sock"; it must be an absolute path of at most 107 bytes',
        ),
        ("interfaces: eth0", 1, "interfaces", 'found "eth0"; it must be a list ([] when there are none)'),
        ("interfaces:\n  - eth0\n  - eth1\n  - eth0", 1, "interfaces", '"eth0" is listed twice; keep one'),
        (
            "interfaces:\n  - eth0\n  - wireless-network-0",
            3,
            "interfaces[1]",
            'found "wireless-network-0"; it must be the name of a network interface: 1 to 15 characters '
            'without spaces, "/" and ":"',
        ),
        (
            "timeouts:\n  udp: 999ms",
            2,
            "timeouts.udp",
            'found "999ms"; it must be a time from 1s to 168h: "15s", "5m", "1h", or a number of seconds',
        ),
        (
            "timeouts:\n  udp: 5 minutes",
            2,
            "timeouts.udp",
            'found "5 minutes"; it must be a time from 1s to 168h: "15s", "5m", "1h", or a number of seconds',
        ),
        (
            "timeouts: 5m",
            1,
            "timeouts",
            'found "5m"; it must be a mapping with keys among: tcp_syn, tcp_established, '
            "tcp_half_closed, tcp_closing, udp",
        ),
        (
            "ring: {blocks: 1}",
            1,
            "ring.blocks",
            "found 1; it must be a whole number from 2 to 4096",
        ),
        (
            "ring:\n  block_size: 192KiB",
            2,
            "ring.block_size",
            'found "192KiB"; it must be a power of two from "128KiB" to "4MiB", or that number of bytes',
        ),
        (
            "ring:\n  timeout: 2s",
            2,
            "ring.timeout",
            'found "2s"; it must be "auto" or a time from 1ms to 1s: "1ms", or a number of seconds',
        ),
        ("ring: {open_blocks: on}", 1, "ring.open_blocks", 'found "on"; it must be auto, true or false'),
        ("ring: {open_blocks: no}", 1, "ring.open_blocks", 'found "no"; it must be auto, true or false'),
        ("ring: {open_blocks: 1}", 1, "ring.open_blocks", "found 1; it must be auto, true or false"),
        ("ring: {open_blocks: 'true'}", 1, "ring.open_blocks", 'found "true"; it must be auto, true or false'),
        ("ring: {open_blocks: AUTO}", 1, "ring.open_blocks", 'found "AUTO"; it must be auto, true or false'),
        ("ring: {open_blocks: }", 1, "ring.open_blocks", "found nothing; it must be auto, true or false"),
        ("ring: {spin: 11ms}", 1, "ring.spin", f'found "11ms"; it must be {SPIN}'),
        ("ring: {spin: 10001us}", 1, "ring.spin", f'found "10001us"; it must be {SPIN}'),
        ("ring: {spin: 1s}", 1, "ring.spin", f'found "1s"; it must be {SPIN}'),
        ("ring: {spin: 50 us}", 1, "ring.spin", f'found "50 us"; it must be {SPIN}'),
        ("ring: {spin: -1us}", 1, "ring.spin", f'found "-1us"; it must be {SPIN}'),
        ("ring: {spin: -0.001}", 1, "ring.spin", f"found -0.001; it must be {SPIN}"),
        ("ring: {spin: 50}", 1, "ring.spin", f"found 50; it must be {SPIN}"),
        ("ring: {spin: '0'}", 1, "ring.spin", f'found "0"; it must be {SPIN}'),
        ("ring: {spin: true}", 1, "ring.spin", f"found true; it must be {SPIN}"),
        ("ring: {timeout: 500us}", 1, "ring.timeout", 'found "500us"; it must be "auto" or a time from 1ms to 1s: '
         '"1ms", or a number of seconds'),
        ("services: {}", 1, "services", "found a mapping; it must be a list ([] when there are none)"),
        (
            "services:\n  - web",
            2,
            "services[0]",
            f'found "web"; it must be a mapping with keys among: {SERVICE_KEYS}',
        ),
        (
            NAT.replace("web", "my web"),
            2,
            "services[0].name",
            f'found "my web"; it must be {NAME}',
        ),
        (
            NAT.replace("web", "7"),
            2,
            "services[0].name",
            f"found 7; it must be {NAME}",
        ),
        (
            NAT.replace("113.10", "113.300"),
            3,
            "services[0].vip",
            'found "203.0.113.300"; it must be an IPv4 or IPv6 address, as text, or a prefix such as "203.0.113.0/28"',
        ),
        (
            NAT.replace("80", "65536"),
            4,
            "services[0].port",
            'found 65536; it must be a whole number from 1 to 65535, a range such as "8000-8099", or "any"',
        ),
        (
            NAT.replace("80", '"80"'),
            4,
            "services[0].port",
            'found "80"; it must be a whole number from 1 to 65535, a range such as "8000-8099", or "any"',
        ),
        (NAT.replace("tcp", "TCP"), 5, "services[0].protocol", 'found "TCP"; use one of: tcp, udp'),
        (
            NAT + "    nat_any_port: yes",
            7,
            "services[0].nat_any_port",
            'found "yes"; it must be true or false',
        ),
        (
            NAT + "    no_backend: refuse",
            7,
            "services[0].no_backend",
            'found "refuse"; use one of: drop, reset',
        ),
        (
            NAT + "    backends:\n",
            7,
            "services[0].backends",
            "found nothing; it must be a list ([] when there are none)",
        ),
        (
            NAT + "    backends:\n      - address: 10.0.0.1\n        port: any",
            9,
            "services[0].backends[0].port",
            'found "any"; it must be a whole number from 1 to 65535',
        ),
        (
            NAT + "    backends:\n      - address: 10.0.0.1\n        weight: 65536",
            9,
            "services[0].backends[0].weight",
            "found 65536; it must be a whole number from 0 to 65535",
        ),
        (
            NAT + "    backends:\n      - weight: 1",
            8,
            "services[0].backends[0].address",
            "it is missing; add it: the server's IPv4 or IPv6 address; in nat, fullnat and dsr of the same family as "
            "the VIP",
        ),
        (
            NAT.replace("    protocol: tcp\n", ""),
            2,
            "services[0].protocol",
            "it is missing; add it: tcp or udp",
        ),
    ],
)
def test_one_field(tmp_path: Path, text: str, line: int, path: str, message: str) -> None:
    assert problems_in(text, tmp_path) == [(line, path, message)]


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


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (
            {"intefaces": ["eth0"]},
            "intefaces",
            'there is no such key; did you mean "interfaces"?',
        ),
        ({"hash-seed": 1}, "hash-seed", 'there is no such key; did you mean "hash_seed"?'),
        (
            {"ring": {"colour": 1}},
            "ring.colour",
            "there is no such key; use one of: block_size, blocks, timeout, open_blocks, spin",
        ),
        (
            {"services": [service(backends=[{"address": "10.0.0.1", "weigth": 2}])]},
            "services[0].backends[0].weigth",
            'there is no such key; did you mean "weight"?',
        ),
        (
            {"services": [service(shceduler="maglev")]},
            "services[0].shceduler",
            'there is no such key; did you mean "scheduler"?',
        ),
        ({1: 2}, "[1]", "a key must be text; write it in quotes"),
    ],
)
def test_unknown_keys(data: dict[str, Any], path: str, message: str) -> None:
    assert messages_of(data) == [(path, message)]


def test_a_message_is_one_line_whatever_the_value() -> None:
    assert messages_of({"vip_address": "a\nb\ud800" + "c" * 100}) == [
        ("vip_address", 'found "a\\nb\\ud800' + "c" * 56 + '…"; use one of: none, interface')
    ]


# ---- What is refused: fields against each other --------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            DSR + "    backends:\n      - address: 10.0.0.1\n        port: 8080\n",
            (
                9,
                "services[0].backends[0].port",
                "forward: dsr cannot change the port; leave it out (backends listen on the service's port), "
                "or use forward: nat",
            ),
            id="a backend port in dsr",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 'fd00::1'}\n",
            (
                8,
                "services[0].backends[0].address",
                "fd00::1 is IPv6 and the VIP 203.0.113.10 is IPv4; both must be of one family (tunnels may mix them)",
            ),
            id="an IPv4 VIP with an IPv6 backend",
        ),
        pytest.param(
            NAT.replace("203.0.113.10", "2001:db8::1") + "    backends:\n      - {address: 10.0.0.1}\n",
            (
                8,
                "services[0].backends[0].address",
                "10.0.0.1 is IPv4 and the VIP 2001:db8::1 is IPv6; both must be of one family (tunnels may mix them)",
            ),
            id="an IPv6 VIP with an IPv4 backend",
        ),
        pytest.param(
            NAT_ANY,
            (
                4,
                "services[0].port",
                "forward: nat with port: any cuts every connection that a backend opens through this host; "
                "give a port, or accept that with nat_any_port: true",
            ),
            id="nat with port any",
        ),
        pytest.param(
            NAT + "    nat_any_port: true\n",
            (
                7,
                "services[0].nat_any_port",
                "it is only for forward: nat with port: any; leave it out",
            ),
            id="nat_any_port with a port",
        ),
        pytest.param(
            DSR.replace("80", "any") + "    nat_any_port: true\n",
            (
                7,
                "services[0].nat_any_port",
                "it is only for forward: nat with port: any; leave it out",
            ),
            id="nat_any_port with dsr",
        ),
        pytest.param(
            NAT_ANY + "    nat_any_port: true\n    backends:\n      - {address: 10.0.0.1, port: 1}\n",
            (
                9,
                "services[0].backends[0].port",
                "a service with port: any keeps each packet's port; leave it out",
            ),
            id="a backend port with port any",
        ),
        pytest.param(
            NAT + NAT.removeprefix("services:\n").replace("80", "81"),
            (7, "services[1].name", '"web" is already the name of services[0]; give each its own'),
            id="a name twice",
        ),
        pytest.param(
            NAT + NAT.removeprefix("services:\n").replace("web", "other"),
            (
                7,
                "services[1]",
                "services[0] already has VIP 203.0.113.10, port 80, tcp; change one of the three, or put the "
                "backends into one service",
            ),
            id="VIP, port and protocol twice",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 10.0.0.1}\n      - {address: 10.0.0.1, port: 80}\n",
            (
                9,
                "services[0].backends[1]",
                "10.0.0.1:80 is already backends[0]; keep one, with the sum of the weights",
            ),
            id="a backend twice",
        ),
        pytest.param(
            NAT + "    backends:\n      - {address: 203.0.113.10, port: 8080}\n",
            (
                8,
                "services[0].backends[0].address",
                '203.0.113.10 is the VIP of service "web"; it must be the server\'s own address',
            ),
            id="a VIP for a backend",
        ),
    ],
)
def test_fields_against_each_other(tmp_path: Path, text: str, expected: tuple[int, str, str]) -> None:
    assert problems_in(text, tmp_path) == [expected]


def ranges(*ports: str, vip: str = "203.0.113.10") -> list[dict[str, Any]]:
    return [service(name=f"s{number}", vip=vip, port=each) for number, each in enumerate(ports)]


@pytest.mark.parametrize(
    ("services", "path", "message"),
    [
        (
            ranges("8000-8099", "8050-8150"),
            "services[1].port",
            "8050-8150 overlaps 8000-8099 of services[0], which has the same VIP and protocol; one must lie within the "
            "other, or they must have no port in common",
        ),
        (
            ranges("8000-8099", "7950-8000"),
            "services[1].port",
            "7950-8000 overlaps 8000-8099 of services[0], which has the same VIP and protocol; one must lie within the "
            "other, or they must have no port in common",
        ),
        (
            [service(vip="203.0.113.1/28")],
            "services[0].vip",
            'found "203.0.113.1/28"; it has bits behind the prefix; write "203.0.113.0/28", or one address',
        ),
        (
            [service(vip="0.0.0.0/0")],
            "services[0].vip",
            "0.0.0.0 is the unspecified address; a VIP must be a unicast address that clients can reach",
        ),
        (
            [service(vip="10.0.0.0/8", backends=[{"address": "10.1.2.3"}])],
            "services[0].backends[0].address",
            '10.1.2.3 is in 10.0.0.0/8, the VIP of service "web"; it must be the server\'s own address',
        ),
        (
            [service(port="8000-8099", backends=[{"address": "10.0.0.1", "port": 8000}])],
            "services[0].backends[0].port",
            "a service with port: 8000-8099 keeps each packet's port; leave it out",
        ),
        (
            [*ranges("1-65534"), *ranges("1-65534", vip="10.0.0.0/24"), *ranges("1-65534", vip="10.0.0.0/23")],
            "services",
            "the prefixes and port ranges of VIPs take 44 look-ups of different kinds, and at most 31 are made; use "
            "fewer lengths of prefixes, or ranges that begin and end at multiples of a power of two (8000-8063, "
            "32768-49151), or any",
        ),
    ],
)
def test_prefixes_and_ranges(services: list[dict[str, Any]], path: str, message: str) -> None:
    for number, each in enumerate(services):
        each["name"] = each["name"] if len(services) == 1 else f"web{number}"
    assert messages_of({"services": services}) == [(path, message)]


def test_a_prefix_cannot_be_put_on_an_interface() -> None:
    assert messages_of({"vip_address": "interface", "services": [service(vip="203.0.113.0/28")]}) == [
        (
            "services[0].vip",
            "vip_address: interface puts single addresses on the interface, and 203.0.113.0/28 is a prefix; route it "
            "to this host, with vip_address: none",
        )
    ]


def test_prefixes_and_ranges_that_go_together() -> None:
    services = [
        *ranges("8000-8099", "8050-8060", "8000-8049", "8100-8200", "1-65535"),
        service(name="prefix", vip="203.0.113.0/24"),
        service(name="longer", vip="203.0.113.0/28", port="80-80"),
        service(name="whole", vip="203.0.113.11/32", port="any", nat_any_port=True),
    ]
    config = Config.from_dict({"services": services})
    assert [str(each.vip) for each in config.services[5:]] == ["203.0.113.0/24", "203.0.113.0/28", "203.0.113.11"]
    assert [each.port for each in config.services[4:]] == [(1, 65535), 80, 80, "any"]
    shown = json.loads(config.model_dump_json())
    assert [each["port"] for each in shown["services"]][3:] == ["8100-8200", "1-65535", 80, 80, "any"]


FULL = {"forward": "fullnat"}


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        (
            {"services": [service(**FULL)]},
            "services[0].forward",
            "fullnat needs an IPv4 address to send from; add one of this host's to snat, which stands beside services",
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, vip="2001:db8::1", backends=[])]},
            "services[0].forward",
            "fullnat needs an IPv6 address to send from; add one of this host's to snat, which stands beside services",
        ),
        (
            {"snat": ["203.0.113.10"], "services": [service(**FULL)]},
            "snat[0]",
            '203.0.113.10 is the VIP of service "web"; it must be an address of its own',
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, backends=[{"address": "10.0.0.5"}])]},
            "snat[0]",
            "10.0.0.5 is a backend; it must be an address of this host",
        ),
        (
            {"snat": ["10.0.0.5"], "services": [service(**FULL, backends=[{"address": "fd00::1"}])]},
            "services[0].backends[0].address",
            "fd00::1 is IPv6 and the VIP 203.0.113.10 is IPv4; both must be of one family (tunnels may mix them)",
        ),
        ({"snat": ["10.0.0.5", "10.0.0.5"]}, "snat", '"10.0.0.5" is listed twice; keep one'),
        (
            {"snat": ["127.0.0.1"]},
            "snat[0]",
            "127.0.0.1 is a loopback address; it must be a unicast address to which backends can answer",
        ),
        ({"snat": ["10.0.0.0/24"]}, "snat[0]", 'found "10.0.0.0/24"; it must be an IPv4 or IPv6 address, as text'),
        ({"snat": [f"10.0.{n}.1" for n in range(256)]}, "snat", "256 IPv4 addresses; at most 255 can be used"),
        *(
            (
                {"snat_ports": ports},
                "snat_ports",
                f'found {shown}; it must be a range of ports such as "1024-32767", within 1-65535',
            )
            for ports, shown in (
                ("2000-1000", '"2000-1000"'), ("0-9", '"0-9"'), ("1-65536", '"1-65536"'), (80, "80"), ("99", '"99"'),
            )
        ),
        ({"flow_log": "flows.log"}, "flow_log", 'found "flows.log"; it must be an absolute path'),
        ({"flow_file": "shm/x"}, "flow_file", 'found "shm/x"; it must be auto, none or an absolute path'),
    ],
)  # fmt: skip
def test_fullnat(data: dict[str, Any], path: str, message: str) -> None:
    assert messages_of(data) == [(path, message)]


def test_what_goes_together() -> None:
    """Near misses of the rules: each differs from a refused case in one thing."""
    config = Config.from_dict(
        {
            "services": [
                service(backends=[{"address": "10.0.0.1", "port": 1}, {"address": "10.0.0.1", "port": 2}]),
                service(name="udp", protocol="udp", backends=[{"address": "10.0.0.1", "port": 1}]),
                service(name="any", port="any", nat_any_port=True, backends=[{"address": "10.0.0.1"}]),
                service(name="dsr", vip="203.0.113.11", forward="dsr", port="any"),
            ]
        }
    )
    assert [s.name for s in config.services] == ["web", "udp", "any", "dsr"]


def test_everything_at_once(tmp_path: Path) -> None:
    """Faults of YAML, of fields and between fields, in one file, in the order of its lines."""
    text = """\
interfaces: [eth0]
workers: -1
workers: 2
servcies: []
services:
  - name: one
    vip: 203.0.113.10
    port: 0123
    protocol: sctp
    forward: dsr
    backends:
      - {address: 10.0.0.1, port: 8080, weight: heavy}
      - {address: fd00::1}
  - name: one
    vip: 203.0.113.10
    protocol: tcp
    forward: fullnat
    backends:
      - {address: 203.0.113.10}
"""
    assert [(line, path) for line, path, _ in problems_in(text, tmp_path)] == [
        (3, "workers"),
        (4, "servcies"),
        (8, "services[0].port"),
        (9, "services[0].protocol"),
        (12, "services[0].backends[0].weight"),
        (12, "services[0].backends[0].port"),
        (13, "services[0].backends[1].address"),
        (14, "services[1].port"),
        (14, "services[1].name"),
        (17, "services[1].forward"),
        (19, "services[1].backends[0].address"),
    ]


# ---- What YAML lets pass, and what is no YAML ----------------------------------


@pytest.mark.parametrize(
    ("text", "line", "path", "message"),
    [
        (
            NAT.replace("80", "0123"),
            4,
            "services[0].port",
            "YAML may read 0123 as a number in base 8 or 2; write a plain number, or quotes for text",
        ),
        (
            NAT.replace("203.0.113.10", "1:2:3:4:5:6:7:8"),
            3,
            "services[0].vip",
            "YAML may read 1:2:3:4:5:6:7:8 as a number in base 60; write it in quotes, or as a plain number",
        ),
        (
            "timeouts: {udp: 1:30}",
            1,
            "timeouts.udp",
            "YAML may read 1:30 as a number in base 60; write it in quotes, or as a plain number",
        ),
        (
            "timeouts: {udp: .inf}",
            1,
            "timeouts.udp",
            ".inf is not a number that can be used here; write a plain number, or quotes for text",
        ),
        (
            "flows: !!int many",
            1,
            "flows",
            "many is not a number that can be used here; write a plain number, or quotes for text",
        ),
        ("flows: 64\n\nflows: 65", 3, "flows", "it is given twice, first on line 1; keep one"),
        ("ring: {blocks: 64, blocks: 65}", 1, "ring.blocks", "it is given twice, first on line 1; keep one"),
        ("ring:\n  ? [a]\n  : 1", 1, "ring", "line 2 has a collection for a key; a key must be text"),
        ("80: 1", 1, "80", f"there is no such key; use one of: {TOP_KEYS}"),
        ("- a", 1, "", f"found a list; it must be a mapping with keys among: {TOP_KEYS}"),
        ("", 0, "", "it is empty; it must have keys such as interfaces and services"),
        ("# nothing\n", 0, "", "it is empty; it must have keys such as interfaces and services"),
        (b"flows: 64\nname: \xff\n", 2, "", "it is not UTF-8 text; save it as UTF-8"),
        ("flows: 64\nname: \x07\n", 2, "", "there is a control character here; remove it"),
        (
            f"services: {'[' * 100_000}",
            0,
            "",
            "it is nested deeper than 32 levels; the configuration needs 5",
        ),
    ],
)
def test_yaml(tmp_path: Path, text: str | bytes, line: int, path: str, message: str) -> None:
    assert problems_in(text, tmp_path) == [(line, path, message)]


@pytest.mark.parametrize(
    ("text", "line", "advice"),
    [
        ("flows: 64\n\tworkers: 1\n", 2, "indent with spaces"),
        ("flows: 64\nservices: [\n", 3, "check the indentation, brackets and quotes"),
        ("control: a: b\n", 1, "align the keys of a mapping"),
        ("flows: 64\n---\nflows: 65\n", 2, "remove the second '---'"),
        ("flows: *nowhere\n", 1, "check the indentation, brackets and quotes"),
    ],
)
def test_what_is_no_yaml(tmp_path: Path, text: str, line: int, advice: str) -> None:
    [(where, path, message)] = problems_in(text, tmp_path)
    assert (where, path) == (line, "")
    assert message.startswith("it is not valid YAML: ")
    assert advice in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for file, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value) == f"{file}: it cannot be read: {reason}"
        assert caught.value.exit_code == 2


def test_a_few_lines_of_aliases_do_not_grow(tmp_path: Path) -> None:
    """Each level names the one below ten times: 10^25 items if they were copied or printed."""
    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]" for n in range(1, 26)]
    text = "\n".join(["k0: &k0 [x]", *levels, "services: *k25", "interfaces: &own [*own]"])
    found = problems_in(text, tmp_path)
    assert {path for _, path, _ in found} >= {"k0", "k25", "services[9]", "interfaces[0]"}
    assert len(found) == 37


# ---- Schema and documentation --------------------------------------------------


def test_the_schema_is_valid_and_accepts_the_example() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(EXAMPLE.read_text()))


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        ({}, True),
        ({"timeouts": {"udp": "5m"}}, True),
        ({"timeouts": {"udp": 5}}, True),
        ({"timeouts": {"udp": "5 min"}}, False),
        ({"timeouts": {"udp": 0.5}}, False),
        ({"ring": {"block_size": "256KiB"}}, True),
        ({"ring": {"block_size": "256kB"}}, False),
        ({"ring": {"block_size": 1024}}, False),
        ({"workers": "auto"}, True),
        ({"workers": 64}, True),
        ({"workers": 0}, False),
        ({"workers": 65}, False),
        ({"workers": True}, False),
        ({"workers": "2"}, False),
        ({"ring": {"open_blocks": "auto"}}, True),
        ({"ring": {"open_blocks": False}}, True),
        ({"ring": {"open_blocks": "on"}}, False),
        ({"ring": {"open_blocks": 1}}, False),
        ({"ring": {"spin": "50us"}}, True),
        ({"ring": {"spin": 0}}, True),
        ({"ring": {"spin": "1s"}}, False),
        ({"ring": {"spin": 0.02}}, False),
        ({"maglev_size": 65536}, False),
        ({"hash_seed": 2**64 - 1}, True),
        ({"control": "relative"}, False),
        ({"unknown": 1}, False),
        ({"services": [service()]}, True),
        ({"services": [service(port="any")]}, True),
        ({"services": [service(port="80")]}, False),
        ({"services": [service(forward="gre")]}, True),
        ({"services": [service(forward="gre", tunnel={"key": 7, "source": ["10.99.0.0/16"], "df": "never"})]}, True),
        ({"services": [service(forward="gre", tunnel={"key": -1})]}, False),
        ({"services": [service(forward="gue", tunnel={"port": 0})]}, False),
        ({"services": [service(forward="gue", tunnel={"udp_checksum": "no"})]}, False),
        ({"services": [service(affinity={"timeout": "5m", "prefix": 24, "group": "web"})]}, True),
        ({"services": [service(affinity={"by": "cookie"})]}, False),
        ({"services": [service(affinity={"prefix": 129})]}, False),
        ({"services": [service(bounded_load=1.25)]}, True),
        ({"services": [service(bounded_load=1)]}, False),
        ({"services": [service(mss_clamp=True)]}, True),
        ({"services": [service(mss_clamp=1400)]}, True),
        ({"services": [service(mss_clamp=100)]}, False),
        ({"services": [service(forward="proxy")]}, False),
        ({"services": [{}]}, False),
        ({"services": [service(backends=[{"address": "10.0.0.1", "weight": 65536}])]}, False),
    ],
)
def test_the_schema_judges_like_the_models(data: dict[str, Any], valid: bool) -> None:
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(data) is valid


DOCUMENTED = {
    "The whole": Config,
    "timeouts": Timeouts,
    "ring": Ring,
    "services": Service,
    "check": Check,
    "slow_start": SlowStart,
    "affinity": Affinity,
    "source_limit": SourceLimit,
    "tunnel": Tunnel,
    "backends": Backend,
}


@pytest.mark.parametrize(("changes", "path", "message"), [
    ({"check": {"type": "icmp"}}, "check.type", 'found "icmp"; use one of: tcp, http'),
    ({"check": {"path": "/"}}, "check.type", "it is missing; add it: tcp: it takes"),
    ({"check": {"type": "tcp", "path": "/healthz"}}, "check.path", "it is only for type: http; leave it out"),
    ({"check": {"type": "http", "path": "healthz"}}, "check.path", "it must be a path that begins with /"),
    ({"check": {"type": "tcp", "interval": "10ms"}}, "check.interval", "a time from 50ms to 1h"),
    ({"check": {"type": "tcp", "fall": 0}}, "check.fall", "a whole number from 1 to 1000"),
    ({"check": {"type": "tcp"}, "port": "any", "forward": "dsr"}, "check", "no one port to check; give the check one"),
    ({"check": 5, "scheduler": "lrt", "forward": "dsr"}, "check", "it must be a mapping with keys among: type"),
    ({"scheduler": "lrt", "forward": "dsr"}, "scheduler", "forward: dsr does not show how long backends take"),
    ({"scheduler": "lrt", "protocol": "udp"}, "scheduler", "protocol: udp does not show how long backends take"),
    ({"mss_clamp": True, "protocol": "udp"}, "mss_clamp", "it is only for protocol: tcp; leave it out"),
    ({"slow_start": {}}, "slow_start.window", "it is missing; add it: how long it takes"),
    ({"slow_start": {"window": "0s"}}, "slow_start.window", "a time from 1s to 24h"),
    ({"slow_start": {"window": 30, "aggression": 0}}, "slow_start.aggression", "a number from 0.1 to 10"),
    ({"slow_start": {"window": 30, "floor": 2}}, "slow_start.floor", "a number from 0.01 to 1"),
    ({"on_leave": "drop"}, "on_leave", 'found "drop"; use one of: keep, rehash, reset'),
    ({"on_down": "move"}, "on_down", 'found "move"; use one of: auto, keep, rehash, reset'),
    ({"timeouts": {"udp": 5}}, "timeouts.udp", "it is only for protocol: udp; leave it out"),
    ({"timeouts": {"tcp_syn": 5}, "protocol": "udp"}, "timeouts.tcp_syn", "it is only for protocol: tcp; leave it out"),
    ({"timeouts": {"tcp_syn": "9d"}}, "timeouts.tcp_syn", "a time from 1s to 168h"),
    ({"timeouts": {"tcp": 5}}, "timeouts.tcp", 'there is no such key; did you mean "tcp_syn"?'),
    ({"timeouts": 5}, "timeouts", "it must be a mapping with keys among: tcp_syn, tcp_established"),
])  # fmt: skip
def test_what_a_service_says_of_its_backends(changes: dict[str, Any], path: str, message: str) -> None:
    [(found, text)] = messages_of({"services": [service(**changes)]})
    assert found == f"services[0].{path}"
    assert message in text


HUNDREDTHS = "it must be a number from 1.01 to 10, in hundredths"


@pytest.mark.parametrize(("changes", "path", "message"), [
    ({"affinity": {"by": "cookie"}}, "affinity.by", 'found "cookie"; use one of: client-ip'),
    ({"affinity": {"timeout": "0s"}}, "affinity.timeout", "a time from 1s to 24h"),
    ({"affinity": {"timeout": "25h"}}, "affinity.timeout", "a time from 1s to 24h"),
    ({"affinity": {"prefix": 0}}, "affinity.prefix", "from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6"),
    ({"affinity": {"prefix": 129}}, "affinity.prefix", "from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6"),
    ({"affinity": {"prefix": 33}}, "affinity.prefix",
     "found 33; clients of VIP 203.0.113.10 are IPv4, so it must be a whole number from 1 to 32"),
    ({"affinity": {"prefix": "24"}}, "affinity.prefix", 'found "24"; it must be a whole number'),
    ({"affinity": {"group": "a b"}}, "affinity.group", "it must be 1 to 64 letters"),
    ({"affinity": 300}, "affinity", "it must be a mapping with keys among: by, timeout, prefix, group"),
    ({"affinity": {"time": 1}}, "affinity.time", 'did you mean "timeout"?'),
    ({"bounded_load": 1}, "bounded_load", f"found 1; {HUNDREDTHS}"),
    ({"bounded_load": 11.0}, "bounded_load", f"found 11.0; {HUNDREDTHS}"),
    ({"bounded_load": 1.255}, "bounded_load", f"found 1.255; {HUNDREDTHS}"),
    ({"bounded_load": "1.25"}, "bounded_load", f'found "1.25"; {HUNDREDTHS}'),
    ({"bounded_load": 1.25, "scheduler": "wrr"}, "bounded_load",
     "scheduler: wrr goes by no hash; leave it out, or use one of: maglev, ketama, source-hash"),
    ({"backends": [{"address": "10.0.0.1", "max_flows": 0}]}, "backends[0].max_flows",
     "a whole number from 1 to 1073741824 (2^30)"),
])  # fmt: skip
def test_affinity_and_limits(changes: dict[str, Any], path: str, message: str) -> None:
    [(found, text)] = messages_of({"services": [service(**changes)]})
    assert found == f"services[0].{path}"
    assert message in text


GROUP = {"group": "site", "timeout": 60, "prefix": 24}


@pytest.mark.parametrize(("changes", "message"), [
    ({"affinity": GROUP}, None),
    ({"affinity": GROUP | {"timeout": "1m"}}, None),
    ({"affinity": GROUP | {"group": "other", "prefix": 32}}, None),
    ({"affinity": {"prefix": 32}}, None),
    ({"affinity": GROUP | {"prefix": 32}}, "prefix 32 differs from 24 of services[0]"),
    ({"affinity": GROUP | {"timeout": 61}}, "timeout 61.0 differs from 60.0 of services[0]"),
    ({"affinity": GROUP, "vip": "2001:db8::1"}, "IP version 6 differs from 4 of services[0]"),
])  # fmt: skip
def test_services_of_a_group_agree(changes: dict[str, Any], message: str | None) -> None:
    first = service(name="a", affinity=GROUP, backends=[])
    second = service(**{"name": "b", "port": 443, "backends": []} | changes)
    if message is None:
        assert len(Config.from_dict({"services": [first, second]}).services) == 2
    else:
        [(path, text)] = messages_of({"services": [first, second]})
        assert path == "services[1].affinity.group"
        assert text.startswith(message)


def test_an_ipv6_prefix() -> None:
    conf = Config.from_dict({"services": [service(vip="2001:db8::1", affinity={"prefix": 56}, backends=[])]})
    assert conf.services[0].client_prefix == 56
    conf = Config.from_dict({"services": [service(vip="2001:db8::1", affinity={}, backends=[])]})
    assert conf.services[0].client_prefix == 128


PREFIX = "a prefix of client addresses, such as 198.51.100.0/24; or one address"


@pytest.mark.parametrize(("changes", "path", "message"), [
    ({"allow": "10.0.0.0/8"}, "allow", 'found "10.0.0.0/8"; it must be a list ([] when there are none)'),
    ({"allow": ["10.0.0.0/33"]}, "allow[0]", f'found "10.0.0.0/33"; it must be {PREFIX}'),
    ({"deny": ["10.0.0.0/8", "web"]}, "deny[1]", f'found "web"; it must be {PREFIX}'),
    ({"deny": [10]}, "deny[0]", f"found 10; it must be {PREFIX}"),
    ({"deny": ["10.0.0.1/8"]}, "deny[0]",
     'found "10.0.0.1/8"; it has bits behind the prefix; write "10.0.0.0/8", or one address'),
    ({"deny": ["10.0.0.1", "10.0.0.1/32"]}, "deny", '"10.0.0.1/32" is listed twice; keep one'),
    ({"allow": ["10.0.0.0/8", "fd00::/8"]}, "allow[1]",
     "fd00::/8 is IPv6 and the VIP 203.0.113.10 is IPv4; no client of this service is in it; leave it out"),
    ({"allow": ["10.0.0.1", "10.0.0.0/8"], "deny": ["10.0.0.0/8"]}, "deny[0]",
     "10.0.0.0/8 is allow[1] as well; keep one of the two"),
    ({"source_limit": 5}, "source_limit", "found 5; it must be a mapping with keys among: rate, burst, prefix"),
    ({"source_limit": {"burst": 5}}, "source_limit.rate", "it is missing; add it: new flows a second, in the long run"),
    ({"source_limit": {"rate": 0}}, "source_limit.rate", "found 0; it must be a whole number from 1 to 100000"),
    ({"source_limit": {"rate": 1.5}}, "source_limit.rate", "found 1.5; it must be a whole number from 1 to 100000"),
    ({"source_limit": {"rate": 1, "burst": 0}}, "source_limit.burst",
     "found 0; it must be a whole number from 1 to 1000000"),
    ({"source_limit": {"rate": 2, "burst": 7201}}, "source_limit.burst",
     "found 7201; at 2 a second it must be at most 7200, an hour's worth"),
    ({"source_limit": {"rate": 1, "prefix": 33}}, "source_limit.prefix",
     "found 33; clients of VIP 203.0.113.10 are IPv4, so it must be a whole number from 1 to 32"),
    ({"source_limit": {"rate": 1, "prefix": 129}}, "source_limit.prefix",
     "found 129; it must be a whole number from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6"),
])  # fmt: skip
def test_who_may_open_flows(changes: dict[str, Any], path: str, message: str) -> None:
    assert messages_of({"services": [service(**changes)]}) == [(f"services[0].{path}", message)]


def test_lists_may_hold_what_ipaddress_makes() -> None:
    config = Config.from_dict({"services": [service(allow=[IPv4Network("10.0.0.0/8")], deny=["0.0.0.0/0"])]})
    assert config.services[0].allow == (IPv4Network("10.0.0.0/8"),)
    assert json.loads(config.model_dump_json())["services"][0]["deny"] == ["0.0.0.0/0"]


@pytest.mark.parametrize("value", [0, 100_000_001, 2.5, "all", True])
def test_rates_of_new_flows_that_cannot_be(value: object) -> None:
    [(path, message)] = messages_of({"new_flow_rate": value})
    assert path == "new_flow_rate"
    assert message.endswith('it must be "auto" or a whole number from 1 to 100000000')


@pytest.mark.parametrize(("section", "model"), DOCUMENTED.items())
def test_the_reference_has_every_key_with_its_default(section: str, model: Any) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    body = re.split(r"^## ", text.split(f"\n## {section}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", body, flags=re.MULTILINE)
    assert [key for key, _, _ in rows] == list(model.model_fields)
    for key, _, default in rows:
        field = model.model_fields[key]
        if default in ("required", "the service's", "see below", "none"):
            nested_or_none = field.default is None or key in ("timeouts", "ring", "tunnel")
            assert field.is_required() == (default == "required")
            assert field.is_required() or nested_or_none
        else:
            assert written_default(model, key, default) == field.default, key


def written_default(model: Any, key: str, text: str) -> object:
    """What the documented default means when it is written into a file."""
    value = yaml.safe_load(text.strip("`"))
    required = {
        Service: service(), Backend: {"address": "10.0.0.1"}, Check: {"type": "http"}, SlowStart: {"window": 30},
        SourceLimit: {"rate": 1},
    }.get(model, {})  # fmt: skip
    return getattr(model.model_validate({**required, key: value}), key)


def test_more_backends_than_a_table_can_tell_apart() -> None:
    backends = [{"address": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"} for n in range(1, 65536)]
    service = {"name": "a", "vip": "203.0.113.1", "port": 80, "protocol": "tcp", "forward": "dsr"}
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"services": [service | {"backends": backends}]})
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("services[0].backends", "65535 backends; a Maglev table takes at most 65534")
    ]


def test_more_backends_than_slots() -> None:
    backends = [{"address": f"10.0.{number // 250}.{number % 250 + 1}"} for number in range(252)]
    data = {"services": [service(backends=backends)], "maglev_size": 251}
    [(path, message)] = messages_of(data)
    assert path == "services[0].backends"
    assert message.startswith("252 backends, and 251 slots in a Maglev table; raise maglev_size")
    backends.pop()
    assert len(Config.from_dict(data).services[0].backends) == 251


def test_more_interfaces_than_a_worker_reads() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"interfaces": [f"eth{number}" for number in range(17)]})
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("interfaces", "17 interfaces; a worker reads at most 16")
    ]


@pytest.mark.parametrize(("given", "seconds"), [("5m", 300), ("0s", 0), ("90s", 90), (1.5, 1.5), ("168h", 604800)])
def test_the_time_of_a_drain(given: object, seconds: float) -> None:
    assert drain_time(given) == seconds


@pytest.mark.parametrize("given", [-1, "-1s", "8d", "169h", "soon", "", True, None, [], {}, math.nan, math.inf])
def test_what_is_no_time_of_a_drain(given: object) -> None:
    with pytest.raises(FastlbError, match="it must be a time from 0s to 168h"):
        drain_time(given)
