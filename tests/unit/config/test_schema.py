"""The models, their JSON Schema, and the reference in docs."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import yaml

from fastlb.config import Affinity, Backend, Check, Config, Service, SlowStart, Tunnel, json_schema
from fastlb.config.fields import MAX_BACKENDS
from fastlb.config.schema import Ring, SourceLimit, Timeouts
from fastlb.model.checks import CHECKS
from fastlb.model.match import MAX_ENTRIES
from fastlb.model.modes import MODES, SCHEDULERS
from fastlb.model.names import MAX_BACKEND_ID, MAX_SERVICE_SLOT
from tests.unit.config.written import EXAMPLE, ROOT, service


def test_the_key_of_a_backend_of_any_port_has_port_0() -> None:
    config = Config.from_dict(
        {"services": [service(port="any", forward="dsr", backends=[{"address": "10.0.0.1"}])]}
    )
    assert config.services[0].key(config.services[0].backends[0]) == "10.0.0.1:0"


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


def test_an_ipv6_prefix() -> None:
    conf = Config.from_dict({"services": [service(vip="2001:db8::1", affinity={"prefix": 56}, backends=[])]})
    assert conf.services[0].client_prefix == 56
    conf = Config.from_dict({"services": [service(vip="2001:db8::1", affinity={}, backends=[])]})
    assert conf.services[0].client_prefix == 128


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


def test_the_reference_has_every_mode_scheduler_and_type_of_check() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    schedulers = text.split("\n## Schedulers\n")[1].split("\n- ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", schedulers, flags=re.MULTILINE) == list(SCHEDULERS)
    for key, names in (("forward", MODES), ("type", CHECKS)):
        [choices] = re.findall(rf"^\| `{key}` \| (.*?) \|", text, flags=re.MULTILINE)
        assert re.findall("`(.*?)`", choices) == list(names)


def test_the_reference_names_the_limits() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for limit in (MAX_BACKENDS, MAX_SERVICE_SLOT, MAX_BACKEND_ID, MAX_ENTRIES):
        assert f"{limit:,}" in text.rpartition("\nA service can have ")[2]


def written_default(model: Any, key: str, text: str) -> object:
    """What the documented default means when it is written into a file."""
    value = yaml.safe_load(text.strip("`"))
    required = {
        Service: service(), Backend: {"address": "10.0.0.1"}, Check: {"type": "http"}, SlowStart: {"window": 30},
        SourceLimit: {"rate": 1},
    }.get(model, {})  # fmt: skip
    return getattr(model.model_validate({**required, key: value}), key)
