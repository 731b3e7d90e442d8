"""docs/backends.md with real connections: what clients and backends see when a backend leaves, drains or dies."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import PATIENCE, Balancer, backends, fastlb, until, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import APPLICATIONS, BACKENDS, Lab, address, own_prefix, service  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

WEB, ECHO = APPLICATIONS[0], next(each for each in APPLICATIONS if each.protocol == "udp")
GONE = BACKENDS[0]
CONNECTIONS = 24
CHECKED_PORT = 7777
TCP_REPAIR = 19
by_mode = pytest.mark.parametrize("forward", ["nat", "dsr"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "leave-") as lab:
        yield lab


def config(lab: Lab, one: dict[str, Any], without: str | None = None, **changes: Any) -> dict[str, Any]:
    kept = [each for each in one["backends"] if without is None or each["address"] != address(without, "eth0", 4)]
    changed = one | changes | {"backends": kept, "timeouts": {"tcp_closing": 1}}
    return lab.config(workers=1, services=[changed | ({"timeouts": {}} if one["protocol"] == "udp" else {})])


def key_of(one: dict[str, Any], node: str) -> str:
    backend = next(each for each in one["backends"] if each["address"] == address(node, "eth0", 4))
    return f"{backend['address']}:{backend.get('port', one['port'])}"


class Clients:
    """Connections that stay open, each to the backend that answered first.

    Each has a port to itself: one that the kernel chooses at connect it may share with an old connection of another
    test, which is in TIME_WAIT, and then nobody can bind it again.
    """

    def __init__(self, lab: Lab, vip: str, count: int = CONNECTIONS) -> None:
        self.at: dict[socket.socket, str] = {}
        self._stack = ExitStack()
        place = address("client", "eth0", ip_address(vip).version), 0
        for _ in range(count):
            opened = within(
                lab.namespace("client"), socket.create_connection, (vip, WEB.port), PATIENCE, place)
            self._stack.enter_context(opened)
            self.at[opened] = ask(opened)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, node: str) -> list[socket.socket]:
        return [opened for opened, name in self.at.items() if name == node]

    def answers(self) -> list[bool]:
        """Of all connections but those of the backend that goes: is each where it was?"""
        return [ask(opened) == node for opened, node in self.at.items() if node != GONE]


def ask(connection: socket.socket) -> str:
    """The name of the backend at the other end; ConnectionResetError when there is none any more."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
    answer = b""
    while answer.count(b"\n") < 2 or not answer.endswith(b"\n") or b"\r\n\r\n" not in answer[:-1]:
        more = connection.recv(4096)
        if not more:
            raise ConnectionResetError("closed")
        answer += more
    return answer.partition(b"\r\n\r\n")[2].decode().split()[0]


@by_mode
def test_a_removed_backend_keeps_its_connections(lab: Lab, tmp_path: Path, forward: str) -> None:
    """Until they are closed; then fastlb knows it no more."""
    web = service(WEB, forward, 4)
    with Balancer(lab.namespace("lb"), config(lab, web, on_leave="keep"), tmp_path) as balancer:
        with Clients(lab, web["vip"]) as clients:
            assert clients.of(GONE)
            assert balancer.reload(config(lab, web, GONE, on_leave="keep")).returncode == 0
            assert [ask(opened) for opened in clients.of(GONE)] == [GONE] * len(clients.of(GONE))
            assert all(clients.answers())
            left = backends(balancer.status(), web["name"])[key_of(web, GONE)]
            assert (left["state"], left["weight"], left["active_flows"]) == ("removed", 0, len(clients.of(GONE)))
            with Clients(lab, web["vip"]) as later:
                assert GONE not in later.at.values()
        assert until(lambda: key_of(web, GONE) not in backends(balancer.status(), web["name"]))


@by_mode
def test_connections_of_a_removed_backend_are_reset(lab: Lab, tmp_path: Path, forward: str) -> None:
    web = service(WEB, forward, 4)
    with Balancer(lab.namespace("lb"), config(lab, web, on_leave="reset"), tmp_path) as balancer:
        with Clients(lab, web["vip"]) as clients:
            balancer.reload(config(lab, web, GONE, on_leave="reset"))
            for opened in clients.of(GONE):
                with pytest.raises(ConnectionResetError):
                    ask(opened)
            assert all(clients.answers())
            assert balancer.status()["counters"]["paths"]["reset"] == len(clients.of(GONE)) > 0
        assert until(lambda: key_of(web, GONE) not in backends(balancer.status(), web["name"]))


@by_mode
def test_a_drain_with_a_deadline(lab: Lab, tmp_path: Path, forward: str) -> None:
    """Before it, connections stay; after it they go as `on_leave` says. New ones go elsewhere all the time."""
    web = service(WEB, forward, 4)
    with (
        Balancer(lab.namespace("lb"), config(lab, web, on_leave="reset"), tmp_path) as balancer,
        Clients(lab, web["vip"]) as clients,
    ):
        drain = ("drain", web["name"], address(GONE, "eth0", 4), "--socket", balancer.socket_path)
        assert fastlb(*drain, "--deadline", "1h").returncode == 0
        assert [ask(opened) for opened in clients.of(GONE)] == [GONE] * len(clients.of(GONE))
        shown = backends(balancer.status(), web["name"])[key_of(web, GONE)]
        assert shown["state"] == "draining"
        assert 3000 < shown["drain_remaining"] <= 3600
        assert "draining, 3" in fastlb("status", "--socket", balancer.socket_path).stdout
        assert fastlb(*drain, "--deadline", "1s").returncode == 0
        assert until(lambda: backends(balancer.status(), web["name"])[key_of(web, GONE)]["state"] == "drained")
        for opened in clients.of(GONE):
            assert until(is_reset, opened)
        assert all(clients.answers())
        with Clients(lab, web["vip"]) as later:
            assert GONE not in later.at.values()
        assert fastlb("enable", *drain[1:]).returncode == 0
        with Clients(lab, web["vip"]) as later:
            assert GONE in later.at.values()
    said = [line["event"] for line in balancer.logs() if line.get("backend") == key_of(web, GONE)]
    assert said == ["draining", "draining", "drained", "enabled"]


def is_reset(opened: socket.socket) -> bool:
    """The deadline is seen by the next tick, a tenth of a second later at most."""
    try:
        ask(opened)
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("deadline", ["soon", "-1", "8d", "200h", ""])
def test_a_deadline_that_cannot_be(deadline: str) -> None:
    done = fastlb("drain", "web", "10.0.0.1", f"--deadline={deadline}", "--socket", "/nonexistent")
    assert done.returncode == 2
    assert "it must be a time from 0s to 168h" in done.stderr


@by_mode
def test_datagrams_leave_a_backend_that_is_down(lab: Lab, tmp_path: Path, forward: str) -> None:
    """With the next one after its check has failed; those of the others stay."""
    echo = service(ECHO, forward, 4)
    check = {"type": "tcp", "port": CHECKED_PORT, "interval": "50ms", "timeout": "1s", "rise": 1, "fall": 1}
    with ExitStack() as stack:
        checked = {node: stack.enter_context(listener(lab, node)) for node in BACKENDS}
        balancer = stack.enter_context(Balancer(lab.namespace("lb"), config(lab, echo, check=check), tmp_path))
        assert until(lambda: {row["state"] for row in backends(balancer.status(), echo["name"]).values()} == {"up"})
        flows = {}
        for _ in range(CONNECTIONS):
            made = stack.enter_context(within(lab.namespace("client"), datagrams, (echo["vip"], ECHO.port)))
            flows[made] = echoed(made)
        assert set(flows.values()) == set(BACKENDS)
        checked[GONE].close()
        assert until(lambda: backends(balancer.status(), echo["name"])[key_of(echo, GONE)]["state"] == "down")
        later = {made: echoed(made) for made in flows}
        assert GONE not in later.values()
        assert {made for made in flows if later[made] != flows[made]} == {m for m in flows if flows[m] == GONE}


def listener(lab: Lab, node: str) -> socket.socket:
    def opened() -> socket.socket:
        return socket.create_server((address(node, "eth0", 4), CHECKED_PORT), backlog=128)

    return within(lab.namespace(node), opened)


def datagrams(to: tuple[str, int]) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.connect(to)
    made.settimeout(PATIENCE)
    return made


def echoed(made: socket.socket) -> str:
    """The backend that answered."""
    made.send(b" x")
    return made.recv(100).decode().split()[0]


# ---- a client that uses its port again


def forgotten(connection: socket.socket) -> tuple[str, int]:
    """Close it without a word to the other side; its port."""
    place: tuple[str, int] = connection.getsockname()
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    connection.close()
    return place


@by_mode
def test_a_port_is_used_again_while_the_backend_has_the_old_connection(lab: Lab, tmp_path: Path, forward: str) -> None:
    """SYN, challenge ACK, RST, SYN: the new connection is there, and each packet of it went through fastlb."""
    web = service(WEB, forward, 4)
    with Balancer(lab.namespace("lb"), config(lab, web), tmp_path) as balancer, Clients(lab, web["vip"]) as clients:
        challenged = sum(challenges(lab, node) for node in BACKENDS)
        before = balancer.status()["counters"]["paths"]
        for old in list(clients.at):
            place = forgotten(old)
            again = within(
                lab.namespace("client"), socket.create_connection, (web["vip"], WEB.port), PATIENCE, place)
            with again:
                assert ask(again) in BACKENDS
        after = balancer.status()["counters"]["paths"]
        assert sum(challenges(lab, node) for node in BACKENDS) - challenged == CONNECTIONS
        assert after["scheduled"] - before["scheduled"] == CONNECTIONS  # the second SYN of each


def challenges(lab: Lab, node: str) -> int:
    """Challenge ACKs that the node's kernel has sent."""

    def count() -> int:
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        for names, values in itertools.pairwise(lines):
            if names.startswith("TcpExt: S"):
                return int(dict(zip(names.split(), values.split(), strict=True))["TCPChallengeACK"])
        raise AssertionError("the kernel does not count them")

    return within(lab.namespace(node), count)
