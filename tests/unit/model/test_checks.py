"""The table of check types is the one that the configuration goes by."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Check, Config
from fastlb.errors import ConfigError
from fastlb.model.checks import CHECKS, OPTIONS

VALUES = {"path": "/healthz", "host": "www.example.com"}


def checked(**check: Any) -> Config:
    service = {"name": "a", "vip": "203.0.113.1", "port": 80, "protocol": "tcp", "forward": "nat", "check": check}
    return Config.from_dict({"services": [service]})


@pytest.mark.parametrize("name", CHECKS)
def test_a_type_has_its_options_and_no_others(name: str) -> None:
    for option, types in OPTIONS.items():
        if option in CHECKS[name].options:
            check = checked(type=name, **{option: VALUES[option]}).services[0].check
            assert check is not None
            assert getattr(check, option) == VALUES[option]
        else:
            with pytest.raises(ConfigError, match=f"only for type: {', '.join(types)}; leave it out"):
                checked(type=name, **{option: VALUES[option]})


def test_options_are_keys_of_a_check() -> None:
    assert OPTIONS.keys() <= Check.model_fields.keys()
    assert all(set(types) < set(CHECKS) for types in OPTIONS.values())


def test_what_is_said_of_a_type() -> None:
    description = Check.model_fields["type"].description or ""
    assert all(f"{name}: {check.help}" in description for name, check in CHECKS.items())
