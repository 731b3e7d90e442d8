"""Which checks are one on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Service
from fastlb.health.target import Target, targets_of
from tests.balancers import config, service


def services(*checks: dict[str, Any] | None, **changes: Any) -> list[Service]:
    """Services over the same backend, with these checks."""
    backends = [{"address": "10.3.0.11"}]
    raw = [
        service("dsr", name=f"s{at}", backends=backends, check=check, **{"vip": f"203.0.113.{at}", **changes})
        for at, check in enumerate(checks, 1)
    ]
    return list(config(*raw).services)


def test_every_backend_has_a_target() -> None:
    (given,) = services({"type": "http", "path": "/x", "timeout": 0.5})
    ((name, target),) = targets_of(given)
    assert name == ("s1", "10.3.0.11:80")
    assert target[:4] == ("http", "10.3.0.11", 80, 0.5)
    assert target.request.startswith(b"GET /x HTTP/1.1\r\nHost: 10.3.0.11:80\r\n")


def test_a_service_without_a_check_has_none() -> None:
    assert not list(targets_of(*services(None)))


def test_the_port_is_the_nearest_that_is_given() -> None:
    backends = [{"address": "10.3.0.11"}, {"address": "10.3.0.12", "port": 8080}]
    for check, ports in (({"type": "tcp"}, [80, 8080]), ({"type": "tcp", "port": 99}, [99, 99])):
        (given,) = config(service("nat", backends=backends, check=check)).services
        assert [target.port for _, target in targets_of(given)] == ports


TCP = {"type": "tcp"}
HTTP = {"type": "http", "path": "/x"}


@pytest.mark.parametrize(("one", "other", "alike"), [
    (TCP, TCP, True),
    (TCP, TCP | {"interval": 9, "rise": 5, "fall": 5}, True),
    (TCP, TCP | {"port": 80}, True),
    (TCP, TCP | {"port": 81}, False),
    (TCP, TCP | {"timeout": 2}, False),
    (TCP, HTTP, False),
    (HTTP, HTTP, True),
    (HTTP, HTTP | {"path": "/y"}, False),
    (HTTP, HTTP | {"host": "web.example"}, False),
    (HTTP, HTTP | {"host": "10.3.0.11:80"}, True),
])  # fmt: skip
def test_what_looks_the_same_is_one(one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    found: set[Target] = {target for given in services(one, other) for _, target in targets_of(given)}
    assert len(found) == (1 if alike else 2)
