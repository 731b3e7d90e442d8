"""Each field by itself: what it accepts, and what is refused, with its line, key path and what would be right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastlb.config import Config, Service, drain_time
from fastlb.errors import FastlbError
from tests.unit.config.written import NAT, messages_of, problems_in, service

SERVICE_KEYS = ", ".join(Service.model_fields)

NAME = '1 to 64 letters, digits, "_", "." or "-" (in quotes if YAML would take it for a number)'

WORKERS = '"auto" or a whole number from 1 to 64'

SPIN = 'a time from 0us to 10ms: "50us", or a number of seconds'


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
    ("text", "line", "path", "message"),
    [
        ("workers: 0", 1, "workers", f"found 0; it must be {WORKERS}"),
        ("workers: 65", 1, "workers", f"found 65; it must be {WORKERS}"),
        ("workers: -1", 1, "workers", f"found -1; it must be {WORKERS}"),
        ("workers: 2.0", 1, "workers", f"found 2.0; it must be {WORKERS}"),
        ("\nworkers: true", 2, "workers", f"found true; it must be {WORKERS}"),
        ('workers: "2"', 1, "workers", f'found "2"; it must be {WORKERS}; remove the quotes'),
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
        ("interfaces: eth0", 1, "interfaces", 'found "eth0"; it must be a list: write ["eth0"]'),
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
        (
            "ring: {open_blocks: 'true'}",
            1,
            "ring.open_blocks",
            'found "true"; it must be auto, true or false; remove the quotes',
        ),
        ("ring: {open_blocks: AUTO}", 1, "ring.open_blocks", 'found "AUTO"; it must be auto, true or false'),
        ("ring: {open_blocks: }", 1, "ring.open_blocks", "found nothing; it must be auto, true or false"),
        ("ring: {spin: 11ms}", 1, "ring.spin", f'found "11ms"; it must be {SPIN}'),
        ("ring: {spin: 10001us}", 1, "ring.spin", f'found "10001us"; it must be {SPIN}'),
        ("ring: {spin: 1s}", 1, "ring.spin", f'found "1s"; it must be {SPIN}'),
        ("ring: {spin: 50 us}", 1, "ring.spin", f'found "50 us"; it must be {SPIN}'),
        ("ring: {spin: -1us}", 1, "ring.spin", f'found "-1us"; it must be {SPIN}'),
        ("ring: {spin: -0.001}", 1, "ring.spin", f"found -0.001; it must be {SPIN}"),
        ("ring: {spin: 50}", 1, "ring.spin", f"found 50; it must be {SPIN}"),
        ("ring: {spin: '0'}", 1, "ring.spin", f'found "0"; it must be {SPIN}; remove the quotes'),
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
            'found "80"; it must be a whole number from 1 to 65535, a range such as "8000-8099", or "any"; remove the '
            "quotes",
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


@pytest.mark.parametrize("value", [0, 100_000_001, 2.5, "all", True])
def test_rates_of_new_flows_that_cannot_be(value: object) -> None:
    [(path, message)] = messages_of({"new_flow_rate": value})
    assert path == "new_flow_rate"
    assert message.endswith('it must be "auto" or a whole number from 1 to 100000000')


@pytest.mark.parametrize(("given", "seconds"), [("5m", 300), ("0s", 0), ("90s", 90), (1.5, 1.5), ("168h", 604800)])
def test_the_time_of_a_drain(given: object, seconds: float) -> None:
    assert drain_time(given) == seconds


@pytest.mark.parametrize("given", [-1, "-1s", "8d", "169h", "soon", "", True, None, [], {}, math.nan, math.inf])
def test_what_is_no_time_of_a_drain(given: object) -> None:
    with pytest.raises(FastlbError, match="it must be a time from 0s to 168h"):
        drain_time(given)


ZEROS = {"arabic": "٠", "devanagari": "०", "fullwidth": "０", "mathematical": "\U0001d7ce"}
WITH_DIGITS: list[tuple[str, dict[str, Any]]] = [
    ("services[0].port", {"services": [service(port="80-90")]}),
    ("services[0].port", {"services": [service(port="80")]}),
    ("services[0].vip", {"services": [service(vip="203.0.113.10")]}),
    ("services[0].vip", {"services": [service(vip="2001:db8::1")]}),
    ("services[0].vip", {"services": [service(vip="203.0.113.0/28")]}),
    ("services[0].backends[0].address", {"services": [service(backends=[{"address": "10.0.0.1"}])]}),
    ("services[0].allow[0]", {"services": [service(allow=["10.0.0.0/8"])]}),
    ("services[0].check.interval", {"services": [service(check={"type": "tcp", "interval": "500ms"})]}),
    ("services[0].slow_start.window", {"services": [service(slow_start={"window": "5m"})]}),
    ("snat[0]", {"snat": ["10.3.0.5"]}),
    ("snat_ports", {"snat_ports": "1024-2047"}),
    ("flows", {"flows": "64"}),
    ("workers", {"workers": "1"}),
    ("timeouts.udp", {"timeouts": {"udp": "1.5s"}}),
    ("ring.block_size", {"ring": {"block_size": "256KiB"}}),
    ("ring.spin", {"ring": {"spin": "50us"}}),
]


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize(("path", "data"), WITH_DIGITS, ids=[path for path, _ in WITH_DIGITS])
def test_digits_of_other_scripts_are_no_numbers(path: str, data: dict[str, Any], zero: str) -> None:
    """Python's int(), float() and str.isdigit() take them."""
    table = {ord(digit): chr(ord(zero) + value) for value, digit in enumerate("0123456789")}

    def foreign(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: foreign(each) for key, each in value.items()}
        if isinstance(value, list):
            return [foreign(each) for each in value]
        return value.translate(table) if isinstance(value, str) else value

    assert path in [found for found, _ in messages_of(foreign(data))]
