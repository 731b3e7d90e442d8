"""Checks of a whole configuration: who is checked, for whom, and that it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any

import pytest

from fastlb import Config
from fastlb.health.checker import Checker, differing
from fastlb.health.results import CheckResult
from tests.balancers import config, service
from tests.unit.health.loopback import HOST, answering, listening, nobody, serving

NOBODY = config(service("dsr"))
AT_HOME = "127.0.0.1:80"


def checked(*ports: int, **check: Any) -> Config:
    """A service for each port, ``s0`` and so on, with one backend on this host that is checked every 50 ms."""
    plain = {"type": "tcp", "interval": 0.05, "timeout": 0.3}
    services = [
        service("dsr", name=f"s{at}", vip=f"203.0.113.{at + 1}", backends=[{"address": "10.3.0.11"}],
                check={**plain, "port": port, **check})
        for at, port in enumerate(ports)
    ]  # fmt: skip
    return moved_home(config(*services))


def moved_home(conf: Config) -> Config:
    """The same with all backends on this host, which no configuration may name."""
    home = ip_address(HOST)
    services = [
        each.model_copy(update={"backends": tuple(b.model_copy(update={"address": home}) for b in each.backends)})
        for each in conf.services
    ]
    return conf.model_copy(update={"services": tuple(services)})


class Seen:
    """A checker in the running loop, and what it reported."""

    def __init__(self) -> None:
        self.results: list[CheckResult] = []
        self.troubles: list[Exception] = []
        self.checker = Checker(self._report, lambda error, count: self.troubles.append(error))

    def _report(self, results: Sequence[CheckResult]) -> None:
        self.results += results

    def passed(self, name: str) -> list[bool]:
        return [result.seconds is not None for result in self.results if result.backend == (name, AT_HOME)]

    async def until(self, wanted: Callable[[], object]) -> None:
        end = asyncio.get_running_loop().time() + 10
        while not wanted():
            assert asyncio.get_running_loop().time() < end, "it did not happen"
            await asyncio.sleep(0.005)


def test_the_checker_follows_a_configuration() -> None:
    """Results come again and again, from the check that is configured now, and end with it."""

    async def run(open_port: int, closed_port: int) -> None:
        seen = Seen()
        seen.checker.apply_config(checked(open_port))
        await seen.until(lambda: len(seen.results) >= 3)
        assert all(seen.passed("s0"))
        seen.checker.apply_config(checked(closed_port))
        seen.results.clear()
        await seen.until(lambda: len(seen.results) >= 2)
        assert not any(seen.passed("s0"))
        assert seen.results[0].reason == "Connection refused"
        seen.checker.apply_config(NOBODY)
        await ended(seen, open_port)
        seen.checker.close()
        assert not seen.troubles

    with listening() as listener, nobody() as closed_port:
        asyncio.run(run(listener.getsockname()[1], closed_port))


async def ended(seen: Seen, port: int) -> None:
    """While another service is checked several times, nothing more comes of what was checked before."""
    known = len(seen.results)
    witness = Seen()
    witness.checker.apply_config(checked(port))
    await witness.until(lambda: len(witness.results) >= 4)
    witness.checker.close()
    assert len(seen.results) == known


@pytest.mark.parametrize("ticks", range(12))
def test_a_check_ends_at_whatever_moment_it_is_taken_back(ticks: int) -> None:
    """Also when it has a result already and has not reported it: ``ticks`` rounds of the event loop after its start."""

    async def run(closed_port: int, open_port: int) -> None:
        seen = Seen()
        seen.checker.apply_config(checked(closed_port))
        for _ in range(ticks):
            await asyncio.sleep(0.002)
        seen.checker.apply_config(NOBODY)
        await ended(seen, open_port)
        seen.checker.close()

    with nobody() as closed_port, listening() as listener:
        asyncio.run(run(closed_port, listener.getsockname()[1]))


def test_closing_ends_all_and_it_may_begin_again() -> None:
    async def run(port: int) -> None:
        seen = Seen()
        seen.checker.close()
        for _ in range(2):
            seen.results.clear()
            seen.checker.apply_config(checked(port))
            await seen.until(lambda: seen.results)
            seen.checker.close()
            await ended(seen, port)

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))


def test_services_share_a_check() -> None:
    """Three services over one server: each request to it is a result for every one of them."""
    requests: list[bytes] = []

    async def run(port: int) -> int:
        seen = Seen()
        seen.checker.apply_config(checked(port, port, port, type="http"))
        await seen.until(lambda: len(seen.passed("s0")) >= 3)
        seen.checker.close()
        assert seen.passed("s0") == seen.passed("s1") == seen.passed("s2")
        return len(seen.passed("s0"))

    with serving(answering(b"HTTP/1.1 200 OK\r\n\r\n", requests)) as port:
        reported = asyncio.run(run(port))
    assert reported <= len([asked for asked in requests if asked]) <= reported + 1


def test_the_shortest_interval_rules() -> None:
    """A service that would wait for an hour hears of what another one asks every 50 ms, until that one goes."""

    async def run(port: int) -> None:
        slow, both = checked(port, interval=3600), checked(port, port)
        both = both.model_copy(update={"services": (slow.services[0], both.services[1])})
        seen = Seen()
        seen.checker.apply_config(slow)
        await seen.until(lambda: seen.passed("s0"))
        seen.checker.apply_config(both)
        await seen.until(lambda: len(seen.passed("s0")) >= 4)
        assert len(seen.passed("s0")) - len(seen.passed("s1")) in (1, 0)
        seen.checker.apply_config(slow)
        known = len(seen.passed("s1"))
        seen.checker.close()
        assert len(seen.passed("s1")) == known

    with listening() as listener:
        asyncio.run(run(listener.getsockname()[1]))


def test_only_what_is_said_to_have_changed_is_looked_at() -> None:
    async def run(open_port: int, closed_port: int) -> None:
        seen = Seen()
        seen.checker.apply_config(checked(open_port, open_port))
        await seen.until(lambda: seen.passed("s0") and seen.passed("s1"))
        seen.checker.apply_config(checked(closed_port, closed_port), changed={"s1"})
        await seen.until(lambda: not all(seen.passed("s1")))
        assert all(seen.passed("s0"))
        seen.checker.apply_config(checked(closed_port), changed={"s1"})
        known = len(seen.passed("s1"))
        await seen.until(lambda: len(seen.passed("s0")) > 6)
        assert len(seen.passed("s1")) == known
        seen.checker.close()

    with listening() as listener, nobody() as closed_port:
        asyncio.run(run(listener.getsockname()[1], closed_port))


CHECKED = {"type": "tcp"}
ELSEWHERE = [{"address": "10.3.0.19", "port": 8080}]


@pytest.mark.parametrize(("change", "differs"), [
    ({}, False),
    ({"scheduler": "rr"}, False),
    ({"check": CHECKED | {"rise": 7}}, True),
    ({"check": None}, True),
    ({"port": 81}, True),
    ({"backends": ELSEWHERE}, True),
    ({"name": "other"}, True),
])  # fmt: skip
def test_which_services_differ(change: dict[str, Any], differs: bool) -> None:
    def services(**changes: Any) -> dict[str, Any]:
        conf = config(service("nat", check=CHECKED, name="web"), service("nat", vip="203.0.113.9", **changes))
        return {each.name: each for each in conf.services}

    before, after = services(check=CHECKED), services(**{"check": CHECKED, **change})
    names = {"nat4tcp", change.get("name", "nat4tcp")} if differs else set()
    assert set(differing(before, after)) == names
