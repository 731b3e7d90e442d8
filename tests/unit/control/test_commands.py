"""The commands of the control socket, against a stand-in for the balancer and the data path itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from ipaddress import ip_address, ip_network
from types import SimpleNamespace
from typing import Any

import pytest

from fastlb.config import Config
from fastlb.control import slices
from fastlb.control.commands import Commands
from fastlb.errors import FastlbError
from fastlb.model.hostview import KernelView, Link, Route
from fastlb.observe.status import AT_ONCE, split_counters
from fastlb.plan.leaving import Leaving, Reloaded
from fastlb.version import __version__
from tests import balancers
from tests.balancers import BACKENDS, CLIENT, VIP, flags, service
from tests.frames import frame

MAC = bytes.fromhex("020000000001")
VIEW = KernelView(
    links={2: Link(2, "eth0", MAC, 1500, True)},
    routes=(Route(ip_network("10.0.0.0/8"), None, 2),),
    neighbours={},
    addresses=frozenset(),
)
GUARD = {"guard_fragment": 3}
RINGS = {"transmitted": 5, "ring_drops": 1}


async def reloaded() -> Reloaded:
    await asyncio.sleep(0)
    return Reloaded(["it rains"], [Leaving("web", "b1", 3, "stay"), Leaving("web", "b2", 4, "stay")])


class Balancer:
    """What the daemon is to commands: a data path of one worker, and a record of what was asked of it."""

    def __init__(
        self, *services: dict[str, Any], reload: Callable[[], Awaitable[Reloaded]] = reloaded, **settings: Any
    ) -> None:
        self.bare = balancers.Balancer(balancers.config(*services, interfaces=["eth0"], **settings))
        self.pipelines = [self.bare.pipeline]
        self.view, self.started, self.reload = VIEW, time.monotonic(), reload
        self.told = {
            "interfaces": ["eth0"], "transmit": {"eth0": "sendmmsg"}, "tunnel_offload": ["eth0"], "open_blocks": True,
            "workers": [{"core": 2}], "counters": RINGS, "passed": GUARD, "flow_file": "/dev/shm/flows",
            "lost_lines": {"flow_log_lost": 4},
            "vips": ["203.0.113.10"], "event_loop": {"p50": 0.0, "p99": 0.001, "max": 0.002},
        }  # fmt: skip
        self.asked: list[object] = []

    @property
    def world(self) -> Any:
        config: Config = self.bare.settings
        configuration = SimpleNamespace(
            config=config, plans=self.bare.plans, summary=lambda: {"services": len(config.services)}
        )
        return SimpleNamespace(configuration=configuration, view=self.view, states=self.bare.standings)

    @property
    def operator(self) -> Any:
        states, now = self.bare.standings, time.monotonic()
        return SimpleNamespace(
            drain=lambda name, seconds: states.drain(name, None if seconds is None else now + seconds),
            enable=lambda name: states.enable(name, now),
            set_weight=lambda name, weight: states.set_weight(name, weight, now),
        )

    def describe(self) -> dict[str, Any]:
        return self.told

    async def follow(self) -> None:
        self.asked.append("follow")
        self.bare.plan(time.monotonic())

    def stop(self, handover: bool) -> None:
        self.asked.append(("stop", handover))


def ask(balancer: Balancer, command: str, **arguments: Any) -> Any:
    """What is answered, whether at once or later."""

    async def answer() -> Any:
        result = Commands(balancer).by_name()[command]({"command": command, **arguments})
        return await result if isawaitable(result) else result

    return asyncio.run(answer())


def state(balancer: Balancer, backend: str = f"{BACKENDS[4][0]}:8080") -> dict[str, Any]:
    listed = ask(balancer, "status")["services"][0]["backends"]
    found: dict[str, Any] = next(each for each in listed if each["backend"] == backend)
    return found


@pytest.fixture
def balancer() -> Balancer:
    return Balancer(service("nat", name="web"), service("dsr", name="dns", protocol="udp", port=53))


# --- looking ---------------------------------------------------------------------------------------------------------


def test_status(balancer: Balancer) -> None:
    balancer.bare.send(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("S")))
    shown = ask(balancer, "status")
    counters = balancer.bare.pipeline.counters()
    assert {name: shown[name] for name in ("version", "pid", "interfaces", "transmit", "open_blocks", "workers")} == {
        "version": __version__, "pid": os.getpid(), "interfaces": ["eth0"], "transmit": {"eth0": "sendmmsg"},
        "open_blocks": True, "workers": [{"core": 2}],
    }  # fmt: skip
    assert shown["tunnel_offload"] == ["eth0"]
    assert shown["event_loop"] == {"p50": 0.0, "p99": 0.001, "max": 0.002}
    assert shown["uptime"] >= 0
    lost = {"flow_log_lost": counters["flow_log_lost"] + 4, "log_lost": 0}
    assert shown["counters"] == split_counters(counters | GUARD | RINGS | lost)
    assert [each["name"] for each in shown["services"]] == ["web", "dns"]
    assert sum(each["new_flows"] for each in shown["services"][0]["backends"]) == 1
    assert (shown["flows"]["active"], shown["flows"]["file"]) == (1, "/dev/shm/flows")
    assert shown["affinity"]["clients"] == 0


def test_status_without_a_flow_file(balancer: Balancer) -> None:
    balancer.told["flow_file"] = None
    assert ask(balancer, "status")["flows"]["file"] is None


def test_conns(balancer: Balancer) -> None:
    assert ask(balancer, "conns", start=0) == {"flows": [], "next": None}
    with pytest.raises(FastlbError, match='there is no service "shop"; there are: web, dns'):
        ask(balancer, "conns", service="shop")


def test_trace_knows_the_worker_and_the_next_hop(balancer: Balancer) -> None:
    explained = ask(balancer, "trace", source=f"{CLIENT[4]}:40000", destination=f"{VIP[4]}:80/tcp")
    steps = {step["stage"]: step for step in explained["steps"]}
    assert explained["service"] == "web"
    assert steps["worker"]["says"].startswith("0 of 1, shard ")
    assert (steps["forward"]["interface"], steps["forward"]["next_hop"]) == ("eth0", explained["backend"].split(":")[0])


def test_trace_of_a_backend_behind_a_link_that_has_gone(balancer: Balancer) -> None:
    balancer.view = KernelView({}, VIEW.routes, {}, frozenset())
    explained = ask(balancer, "trace", source=f"{CLIENT[4]}:40000", destination=f"{VIP[4]}:80/tcp")
    assert next(step for step in explained["steps"] if step["stage"] == "forward")["interface"] is None


def test_trace_of_what_is_no_tuple(balancer: Balancer) -> None:
    with pytest.raises(FastlbError, match="a destination ends in /tcp or /udp"):
        ask(balancer, "trace", source=f"{CLIENT[4]}:40000", destination=f"{VIP[4]}:80")


# --- the states of backends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("drain", {}, ("draining", 1, None)),
        ("drain", {"deadline": None}, ("draining", 1, None)),
        ("drain", {"deadline": 600}, ("draining", 1, 600)),
        ("drain", {"deadline": "10m"}, ("draining", 1, 600)),
        ("weight", {"weight": 0}, ("unchecked", 0, None)),
        ("weight", {"weight": 65535}, ("unchecked", 65535, None)),
        ("enable", {}, ("unchecked", 1, None)),
    ],
)
def test_a_backend_is_changed(
    command: str, arguments: dict[str, Any], expected: tuple[str, int, float | None], balancer: Balancer
) -> None:
    named = ask(balancer, command, service="web", backend=BACKENDS[4][0], **arguments)
    assert (named["service"], named["backend"]) == ("web", f"{BACKENDS[4][0]}:8080")
    assert balancer.asked == ["follow"]
    shown = state(balancer)
    left = shown["drain_remaining"]
    full = shown["weight"] if command == "weight" else balancer.bare.settings.services[0].backends[0].weight
    assert (shown["state"], full) == expected[:2]
    assert left == (None if expected[2] is None else pytest.approx(expected[2], abs=30))


FATE_OF_DRAINED = [  # protocol, on_leave, a deadline; what becomes of the flows now, and at the deadline
    ("tcp", "keep", None, "stay", None), ("tcp", "rehash", None, "stay", None), ("tcp", "reset", None, "stay", None),
    ("tcp", "keep", "5m", "stay", "move"), ("tcp", "rehash", "5m", "stay", "move"),
    ("tcp", "reset", "5m", "stay", "end"), ("udp", "reset", "5m", "stay", "move"),
    ("udp", "keep", "5m", "stay", "move"),
    ("tcp", "keep", 0, "move", "move"), ("tcp", "reset", 0, "end", "end"),
]  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "on_leave", "deadline", "fate", "later"), FATE_OF_DRAINED)
def test_a_drain_says_what_becomes_of_the_flows(
    protocol: str, on_leave: str, deadline: str | int | None, fate: str, later: str | None, version: int
) -> None:
    web = service("nat", version, protocol, name="web", on_leave=on_leave)
    balancer = Balancer(web)
    sent = [balancer.bare.send(frame(CLIENT[version], port, VIP[version], 80, protocol, flags=flags("S")))[2]
            for port in range(40000, 40012)]  # fmt: skip
    key = balancer.bare.plans[0].keys[0]
    found = ask(balancer, "drain", service="web", backend=key, deadline=deadline)
    assert found == {
        "service": "web", "backend": key, "flows": sent.count(key), "fate": fate, "after_deadline": later, "takers": 2,
    }  # fmt: skip
    assert sent.count(key) > 0


@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr", "ipip", "gre", "gue"])
@pytest.mark.parametrize(("command", "more"), [("drain", {}), ("weight", {"weight": 0})])
def test_the_last_backend_for_new_flows(command: str, more: dict[str, Any], forward: str) -> None:
    balancer = Balancer(service(forward, name="web"), snat=["192.0.2.77"])
    left = []
    for key in balancer.bare.plans[0].keys:
        left.append(ask(balancer, command, service="web", backend=key, **more)["takers"])
    assert left == [2, 1, 0]
    assert ask(balancer, "enable", service="web", backend=key)["takers"] == 1


def test_enable_undoes_drain_and_weight(balancer: Balancer) -> None:
    before = state(balancer)
    named = {"service": "web", "backend": BACKENDS[4][0]}
    ask(balancer, "drain", **named, deadline="5m")
    ask(balancer, "weight", **named, weight=7)
    assert state(balancer) != before
    ask(balancer, "enable", **named)
    assert state(balancer) == before


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("drain", {"service": "shop", "backend": "x"}, 'there is no service "shop"'),
        ("drain", {"service": "web", "backend": "10.3.0.99"}, 'service web has no backend "10.3.0.99"; it has: '),
        ("drain", {"service": "web", "backend": BACKENDS[4][0], "deadline": "soon"}, "soon"),
        ("enable", {"service": "web"}, 'service web has no backend "None"'),
        ("weight", {"service": "web", "backend": BACKENDS[4][0]}, "a weight is a whole number from 0 to 65535"),
        *(
            ("weight", {"service": "web", "backend": BACKENDS[4][0], "weight": weight}, "a weight is a whole number")
            for weight in (-1, 65536, 1.5, True, "1")
        ),
    ],
)
def test_refusals_change_nothing(command: str, arguments: dict[str, Any], says: str, balancer: Balancer) -> None:
    before = state(balancer)
    with pytest.raises(FastlbError, match=says):
        ask(balancer, command, **arguments)
    assert (balancer.asked, state(balancer)) == ([], before)


# --- all of it -------------------------------------------------------------------------------------------------------


async def refuse() -> Reloaded:
    await asyncio.sleep(0)
    raise FastlbError("a reload cannot change flows: 1 -> 2; restart fastlb instead")


def test_reload() -> None:
    assert ask(Balancer(service("nat")), "reload") == {
        "services": 1, "warnings": ["it rains"], "flows": {"stay": 7},
        "left": [
            {"service": "web", "backend": f"b{n}", "flows": flows, "fate": "stay"} for n, flows in ((1, 3), (2, 4))
        ],
    }  # fmt: skip


def test_a_reload_that_is_refused() -> None:
    with pytest.raises(FastlbError, match="restart fastlb instead"):
        ask(Balancer(service("nat"), reload=refuse), "reload")


@pytest.mark.parametrize("arguments", [{}, {"handover": False}, {"handover": "yes"}])
def test_stop(arguments: dict[str, Any], balancer: Balancer) -> None:
    assert ask(balancer, "stop", **arguments) == {}
    assert balancer.asked == [("stop", False)]


def test_stop_for_the_next_one(balancer: Balancer) -> None:
    assert ask(balancer, "stop", handover=True) == {
        "interfaces": ["eth0"], "vips": ["203.0.113.10"], "flow_file": "/dev/shm/flows", "flows": 0,
    }  # fmt: skip
    assert balancer.asked == [("stop", True)]


def test_many_backends_do_not_hold_up_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """While 10,000 backends are described, whatever else waits in the event loop has its turns."""
    monkeypatch.setattr(slices, "SLICE", 0.0)
    backends = [{"address": str(ip_address("10.128.0.1") + number)} for number in range(10_000)]
    large = Balancer(service("dsr", name="large", backends=backends), maglev_size=65537)

    async def answer() -> tuple[int, Any]:
        turns, working = 0, asyncio.create_task(Commands(large).by_name()["status"]({}))
        while not working.done():
            await asyncio.sleep(0)
            turns += 1
        return turns, working.result()

    turns, shown = asyncio.run(answer())
    assert len(shown["services"][0]["backends"]) == 10_000
    assert turns > 10_000 / AT_ONCE
