"""From a file or a dict to a configuration."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
import yaml
from pydantic import ValidationError

from fastlb.config import Config, load_config
from fastlb.config.schema import Timeouts
from fastlb.errors import ConfigError
from tests.unit.config.written import EXAMPLE, service


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


def test_a_configuration_does_not_change() -> None:
    config = Config.from_dict({})
    with pytest.raises(ValidationError, match="frozen"):
        config.flows = 64


def test_a_default_that_is_written_down_changes_nothing() -> None:
    """Else a reload would be refused, though nothing is new: floats of the two must be the very same."""
    written = {"block_size": "256KiB", "blocks": 64, "timeout": "auto", "open_blocks": "auto", "spin": "50us"}
    assert Config.from_dict({"ring": written, "workers": "auto"}) == Config.from_dict({})


def test_more_interfaces_than_a_worker_reads() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"interfaces": [f"eth{number}" for number in range(17)]})
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("interfaces", "17 interfaces; a worker reads at most 16")
    ]
