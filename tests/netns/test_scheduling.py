"""Schedulers, health and the operator's word in the lab: real connections through ``fastlb run``.

The balancer holds the VIPs itself (``vip_address: interface``), so that health checks leave from a host that has them.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fastlb.control.client import call
from tests.netns.balancer import PATIENCE, Balancer, backends, fastlb, until, within
from tests.tables import ring_points

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, address, own_prefix  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

SCHEDULERS = ("maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c")
WEIGHTS = dict(zip(BACKENDS, (1, 2, 5), strict=True))
PORTS = {scheduler: 8100 + number for number, scheduler in enumerate(SCHEDULERS)}  # of the nat VIPs
CHECKED, SERVER_PORT = 8200, 8300  # of the services with health checks, and of their servers
FLOWS = 400
CHECK = {"type": "http", "interval": "100ms", "timeout": "2s", "rise": 2, "fall": 2}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)
both_versions = pytest.mark.parametrize("version", [4, 6])


def service(name: str, port: int, server_port: int, version: int = 4, **more: Any) -> dict[str, Any]:
    plain = {
        "name": name, "vip": VIPS["nat", version], "port": port, "protocol": "tcp", "forward": "nat",
        "backends": [
            {"address": address(node, "eth0", version), "port": server_port, "weight": weight}
            for node, weight in WEIGHTS.items()
        ],
    }  # fmt: skip
    return plain | more


def settings(lab: Lab, **schedulers: str) -> dict[str, Any]:
    """A service for each scheduler, and a checked one for each IP version; ``schedulers`` replace some by name."""
    of_each = [
        service(name, port, 8080, scheduler=schedulers.get(name, name)) for name, port in PORTS.items()
    ]
    checked = [
        service(f"checked{version}", CHECKED, SERVER_PORT, version, scheduler="wrr", check=CHECK,
                slow_start={"window": "4s"})
        for version in (4, 6)
    ]  # fmt: skip
    return lab.config(workers=1, vip_address="interface", services=[*of_each, *checked])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "scheduling-") as lab:
        yield lab


class Server:
    """An HTTP server of a backend that can be stopped and started: it names the backend, and closes."""

    def __init__(self, lab: Lab, node: str) -> None:
        self._lab, self._node = lab, node
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Does nothing to one that runs."""
        if self._listener is not None:
            return

        def listen() -> socket.socket:
            return socket.create_server(("::", SERVER_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)

        self._listener = within(self._lab.namespace(self._node), listen)
        self._thread = threading.Thread(target=self._serve, args=[self._listener], daemon=True)
        self._thread.start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(PATIENCE)
                connection.recv(4096)
                connection.sendall(f"HTTP/1.1 200 OK\r\n\r\n{self._node}\n-\n".encode())

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._listener.close()
        self._listener = None


@pytest.fixture(scope="module")
def servers(lab: Lab) -> Iterator[dict[str, Server]]:
    """They run before the balancer does, so that there is no slow start at first."""
    made = {node: Server(lab, node) for node in BACKENDS}
    for server in made.values():
        server.start()
    yield made
    for server in made.values():
        server.stop()


@pytest.fixture(scope="module")
def running(
    lab: Lab, servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Balancer]:
    with Balancer(lab.namespace("lb"), settings(lab), tmp_path_factory.mktemp("scheduling")) as balancer:
        yield balancer


@pytest.fixture(autouse=True)
def as_configured(balancer: Balancer, lab: Lab) -> Iterator[None]:
    """Each test leaves weights, drains and schedulers as they were."""
    yield
    for each in balancer.status()["services"]:
        for backend in each["backends"]:
            call(str(balancer.socket_path), "enable", service=each["name"], backend=backend["backend"])
    balancer.configure(settings(lab))
    call(str(balancer.socket_path), "reload")


def command(balancer: Balancer, word: str, *words: str) -> str:
    """A `fastlb` command to the running balancer; what it prints."""
    done = fastlb(word, *words, "--socket", balancer.socket_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def key(node: str, port: int, version: int = 4) -> str:
    host = address(node, "eth0", version)
    return f"[{host}]:{port}" if version == 6 else f"{host}:{port}"


def shares(lab: Lab, port: int, count: int = FLOWS, version: int = 4) -> dict[str, int]:
    """Connections by backend; all of them are open at once."""
    got = lab.client("fetch", VIPS["nat", version], "--port", port, "--count", count)
    assert (got["answered"], got["ports"], got["errors"]) == (count, count, {})
    return dict(got["backends"])


# ---- shares


def assert_by_chance(got: Mapping[str, int], weights: Mapping[str, int]) -> None:
    """As if each flow were drawn by weight, within six standard deviations."""
    for node, weight in weights.items():
        expected = weight / sum(weights.values())
        spread = 6 * (FLOWS * expected * (1 - expected)) ** 0.5
        assert abs(got.get(node, 0) - FLOWS * expected) < spread, got


@pytest.mark.parametrize(("scheduler", "weights"), [
    ("rr", dict.fromkeys(BACKENDS, 1)), ("lc", dict.fromkeys(BACKENDS, 1)), ("wrr", WEIGHTS), ("wlc", WEIGHTS),
])  # fmt: skip
def test_exact_shares(lab: Lab, balancer: Balancer, scheduler: str, weights: dict[str, int]) -> None:
    """By turns, or by the flows that are open: by weight to the flow, or to the round that is not complete."""
    got = shares(lab, PORTS[scheduler])
    for node, weight in weights.items():
        assert abs(got[node] - FLOWS * weight / sum(weights.values())) <= max(weights.values()), got


@pytest.mark.parametrize("scheduler", ["maglev", "random"])
def test_shares_by_chance(lab: Lab, balancer: Balancer, scheduler: str) -> None:
    assert_by_chance(shares(lab, PORTS[scheduler]), WEIGHTS)


def test_ketama_s_shares_are_those_of_its_ring(lab: Lab, balancer: Balancer) -> None:
    from fastlb.plan.ketama import build_ring

    ring = build_ring([key(node, 8080) for node in BACKENDS], list(WEIGHTS.values()), 256, 0)
    assert ring is not None
    points = ring_points(ring)
    ends = [hashed for hashed, _ in points]
    arcs: Counter[str] = Counter()
    for begin, (end, position) in zip([ends[-1] - (1 << 64), *ends], points, strict=False):
        arcs[BACKENDS[position]] += end - begin
    assert_by_chance(shares(lab, PORTS["ketama"]), arcs)


def test_one_client_stays_with_source_hash(lab: Lab, balancer: Balancer) -> None:
    assert list(shares(lab, PORTS["source-hash"]).values()) == [FLOWS]


@pytest.mark.parametrize("scheduler", ["lrt", "p2c"])
def test_load_spreads(lab: Lab, balancer: Balancer, scheduler: str) -> None:
    """How much each gets, its response times say; the heaviest is the fastest as well, as all share the machine."""
    got = shares(lab, PORTS[scheduler])
    assert sorted(got) == list(BACKENDS)


@every_scheduler
def test_weight_0_gets_nothing_until_enabled(lab: Lab, balancer: Balancer, scheduler: str) -> None:
    usual = next(iter(shares(lab, PORTS[scheduler], 100)))
    command(balancer, "weight", scheduler, address(usual, "eth0", 4), "0")
    assert usual not in shares(lab, PORTS[scheduler], 100)
    command(balancer, "enable", scheduler, address(usual, "eth0", 4))
    # By response times it may be the slowest for a while, and then gets few: it gets some again, that is all.
    assert until(lambda: usual in shares(lab, PORTS[scheduler], 200))


def test_another_weight_is_kept_over_a_reload(lab: Lab, balancer: Balancer) -> None:
    command(balancer, "weight", "wrr", address("b1", "eth0", 4), "993")
    assert balancer.reload().returncode == 0
    assert backends(balancer.status(), "wrr")[key("b1", 8080)]["weight"] == 993
    assert shares(lab, PORTS["wrr"], 100)["b1"] >= 98


# ---- changes, and connections that go on


class Held:
    """A keep-alive connection through the balancer."""

    def __init__(self, lab: Lab, port: int, version: int = 4) -> None:
        target = VIPS["nat", version], port
        self._socket = within(lab.namespace("client"), socket.create_connection, target, PATIENCE)
        self._file = self._socket.makefile("rb")
        self.backend = self.ask()

    def ask(self) -> str:
        """One request; the backend that answers."""
        self._socket.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
        assert self._file.readline().startswith(b"HTTP/1.1 200 ")
        length = 0
        while (line := self._file.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return self._file.read(length).decode().split()[0]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextmanager
def held(lab: Lab, port: int, count: int) -> Iterator[list[Held]]:
    with ExitStack() as stack:
        connections = [Held(lab, port) for _ in range(count)]
        for each in connections:
            stack.callback(each.close)
        yield connections


@pytest.mark.parametrize("before", ["rr", "maglev", "wlc", "p2c"])
def test_the_scheduler_changes_and_connections_stay(lab: Lab, balancer: Balancer, before: str) -> None:
    with held(lab, PORTS[before], 20) as connections:
        assert balancer.reload(settings(lab, **{before: "source-hash"})).returncode == 0
        assert len(shares(lab, PORTS[before], 50)) == 1
        assert [each.ask() for each in connections] == [each.backend for each in connections]


@pytest.mark.parametrize("scheduler", ["maglev", "ketama", "rr", "lc"])
def test_drain(lab: Lab, balancer: Balancer, scheduler: str) -> None:
    """New flows go elsewhere, those that it has stay; enable takes it back."""
    with held(lab, PORTS[scheduler], 12) as connections:
        drained = connections[0].backend
        command(balancer, "drain", scheduler, address(drained, "eth0", 4))
        assert backends(balancer.status(), scheduler)[key(drained, 8080)]["state"] == "draining"
        assert drained not in shares(lab, PORTS[scheduler], 100)
        assert [each.ask() for each in connections] == [each.backend for each in connections]
        command(balancer, "enable", scheduler, address(drained, "eth0", 4))
        assert drained in shares(lab, PORTS[scheduler], 200)


# ---- health


def standing(balancer: Balancer, node: str, version: int) -> tuple[str, float]:
    """(state, weight as slow start has it) of a backend of the checked service."""
    found: dict[str, Any] = backends(balancer.status(), f"checked{version}")[key(node, SERVER_PORT, version)]
    return found["state"], found["weight"] * (found["slow_start"] or 1)


def is_up(balancer: Balancer, version: int) -> bool:
    """Are all up, and through their slow start?"""
    return all(standing(balancer, node, version) == ("up", weight) for node, weight in WEIGHTS.items())


@both_versions
def test_a_server_stops_and_starts_again(
    lab: Lab, balancer: Balancer, servers: dict[str, Server], version: int
) -> None:
    """Down: new flows go elsewhere. Up again: its weight rises step by step, as does its share."""
    assert until(is_up, balancer, version)
    assert sorted(shares(lab, CHECKED, 80, version)) == list(BACKENDS)
    servers["b3"].stop()
    assert until(lambda: standing(balancer, "b3", version)[0] == "down")
    assert shares(lab, CHECKED, 90, version) == {"b1": 30, "b2": 60}
    servers["b3"].start()
    assert until(lambda: standing(balancer, "b3", version)[0] == "up")
    rise = [standing(balancer, "b3", version)[1]]
    assert until(lambda: rise.append(standing(balancer, "b3", version)[1]) or rise[-1] == WEIGHTS["b3"])
    assert rise == sorted(rise)
    assert rise[0] < 5
    assert len(set(rise)) > 3
    assert shares(lab, CHECKED, 80, version) == {"b1": 10, "b2": 20, "b3": 50}


@both_versions
def test_no_server_at_all(lab: Lab, balancer: Balancer, servers: dict[str, Server], version: int) -> None:
    """Nobody answers; and all is well with the first that does, which alone has no slow start."""
    for server in servers.values():
        server.stop()
    try:
        assert until(lambda: {standing(balancer, node, version) for node in BACKENDS} == {("down", 0)})
        servers["b2"].start()
        assert until(lambda: standing(balancer, "b2", version) == ("up", WEIGHTS["b2"]))
        assert shares(lab, CHECKED, 50, version) == {"b2": 50}
    finally:
        for server in servers.values():
            server.start()
