"""Full NAT in the lab: real servers that answer an address of the balancer, which the balancer's host uses as well."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import ROOT, Balancer, fastlb, until, whole_lines, within

sys.path.insert(0, str(ROOT / "netns-lab"))
from topology import BACKENDS, FULL_VIPS, Lab, LabError, address, own_prefix

every_version = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "full-", every_mode=True) as lab:
        yield lab


@pytest.fixture(scope="module")
def second_lab() -> Iterator[Lab]:
    """For balancers with configurations of their own."""
    with Lab(own_prefix("test") + "own-", every_mode=True) as lab:
        yield lab


@pytest.fixture(scope="module", params=[("auto", 1), ("sendmmsg", 1), ("auto", 2)], ids=str)
def balancer(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    transmit, workers = request.param
    folder = tmp_path_factory.mktemp("full")
    config = lab.config(workers=workers, transmit=transmit, flow_log=str(folder / "flows.log"))
    with Balancer(lab.namespace("lb"), config, folder) as balancer:
        yield balancer


@contextmanager
def started(lab: Lab, folder: Path, **changes: Any) -> Iterator[Balancer]:
    with Balancer(lab.namespace("lb"), lab.config(workers=1, **changes), folder) as balancer:
        yield balancer


def flow_lines(balancer: Balancer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(Path(balancer.config["flow_log"]))]


@every_version
def test_every_backend_serves_and_sees_the_balancer(lab: Lab, balancer: Balancer, version: int) -> None:
    vip = FULL_VIPS["fullnat", version]
    got = lab.client("fetch", vip, "--count", 300)
    assert (got["answered"], got["ports"], got["errors"]) == (300, 300, {})
    assert got["clients"] == {address("lb", "eth1", version): 300}
    assert sorted(got["backends"]) == list(BACKENDS)
    got = lab.client("echo", vip, "--count", 300, "--rounds", 3)
    assert (got["answered"], got["torn"], got["errors"]) == (300, 0, {})
    drops = balancer.status()["counters"]["drops"]
    assert not {name: drops[name] for name in ("wrong_worker", "reply_unknown", "no_source_port") if drops[name]}


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize("direction", ["download", "upload"])
@every_version
def test_bulk_transfer_is_intact(lab: Lab, balancer: Balancer, version: int, direction: str, offloads: bool) -> None:
    lab.set_offloads(offloads)
    try:
        got = lab.client(direction, FULL_VIPS["fullnat", version], "--bytes", 20_000_000)
    finally:
        lab.set_offloads(True)
    assert (got["bytes"], got["verified"]) == (20_000_000, True)


@every_version
def test_the_host_s_own_connections_are_its_own(lab: Lab, balancer: Balancer, version: int) -> None:
    """From the very address that full NAT uses, to the very port of a backend."""

    def ask() -> str:
        own = (address("lb", "eth1", version), 0)
        where = (address("b1", "eth0", version), 8080)
        with socket.create_connection(where, timeout=5, source_address=own) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(100).decode().split()[1]

    for _ in range(5):
        assert within(lab.namespace("lb"), ask) == "200"


@every_version
def test_the_flow_log_tells_both_tuples(lab: Lab, balancer: Balancer, version: int) -> None:
    vip = FULL_VIPS["fullnat", version]
    host = "[{}]" if version == 6 else "{}"
    lab.client("fetch", vip, "--count", 20)
    assert until(lambda: sum(line["service"] == f"web-fullnat-{version}" for line in flow_lines(balancer)) >= 20)
    lines = [line for line in flow_lines(balancer) if line["service"] == f"web-fullnat-{version}"]
    begun = [line for line in lines if line["event"] == "start"]
    assert {line["vip"] for line in begun} == {host.format(vip) + ":80"}
    assert {line["client"].rsplit(":", 1)[0] for line in begun} == {host.format(address("client", "eth0", version))}
    assert {line["source"].rsplit(":", 1)[0] for line in begun} == {host.format(address("lb", "eth1", version))}
    assert {line["backend"] for line in begun} == {
        host.format(address(node, "eth0", version)) + ":8080" for node in BACKENDS
    }


@every_version
def test_exhaustion_is_named_and_passes(second_lab: Lab, tmp_path: Path, version: int) -> None:
    """64 ports, one for each shard: more connections than that do not fit, and later ones do again."""
    vip = FULL_VIPS["fullnat", version]
    timeouts = {"tcp_closing": "1s", "tcp_syn": "1s"}
    with started(second_lab, tmp_path, snat_ports="2048-2111", timeouts=timeouts) as balancer:
        with pytest.raises(LabError):
            second_lab.client("fetch", vip, "--count", 200, timeout=4)
        status = balancer.status()
        assert status["counters"]["drops"]["no_source_port"] > 0
        described = fastlb("status", "--socket", balancer.socket_path).stdout
        assert f"source ports IPv{version} tcp: " in described
        assert until(lambda: all(row["taken"] == 0 for row in balancer.status()["flows"]["source_ports"]))
        assert second_lab.client("fetch", vip, "--count", 1)["answered"] == 1


def test_after_a_restart_connections_are_reset(second_lab: Lab, tmp_path: Path) -> None:
    def connect() -> socket.socket:
        return socket.create_connection((FULL_VIPS["fullnat", 4], 80), timeout=5)

    with started(second_lab, tmp_path) as balancer:
        connection = within(second_lab.namespace("client"), connect)
        with connection:
            balancer.terminate()
            balancer.start()
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                connection.recv(100)
        assert balancer.status()["counters"]["paths"]["rejected"] > 0


@contextmanager
def held(lab: Lab, count: int) -> Iterator[list[str]]:
    """Connections through fullnat that stay, by their client's end."""
    def connect() -> socket.socket:
        return socket.create_connection((FULL_VIPS["fullnat", 4], 80), timeout=5)

    with ExitStack() as stack:
        opened = [stack.enter_context(within(lab.namespace("client"), connect)) for _ in range(count)]
        yield ["{}:{}".format(*each.getsockname()) for each in opened]


def logged(balancer: Balancer, event: str, clients: list[str]) -> list[str]:
    """The backends that the log names at this event of these clients' flows."""
    lines = [line for line in flow_lines(balancer) if line["client"] in clients]
    return [line["backend"].split(":")[0] for line in lines if line["event"] == event]


def test_a_stop_ends_every_flow_in_the_log(second_lab: Lab, tmp_path: Path) -> None:
    with started(second_lab, tmp_path, flow_log=str(tmp_path / "flows.log")) as balancer:
        with held(second_lab, 10) as clients:
            balancer.terminate()
        assert len(logged(balancer, "start", clients)) == len(logged(balancer, "end", clients)) == 10


def test_a_handover_ends_only_those_that_nobody_wants(second_lab: Lab, tmp_path: Path) -> None:
    """The next process does without a backend, and does not keep what was its."""
    gone = address(BACKENDS[0], "eth0", 4)
    log = str(tmp_path / "flows.log")
    with started(second_lab, tmp_path, flow_log=log) as balancer, held(second_lab, 30) as clients:
        assert fastlb("stop", "--handover", "--socket", balancer.socket_path).returncode == 0
        at = logged(balancer, "start", clients)
        assert (len(at), logged(balancer, "end", clients)) == (30, [])
        services = [
            each | {"backends": [backend for backend in each["backends"] if backend["address"] != gone]}
            | {"on_leave": "rehash"}
            for each in balancer.config["services"]
        ]
        balancer.configure(balancer.config | {"services": services})
        balancer.start()
        assert until(lambda: logged(balancer, "end", clients) == [gone] * at.count(gone))
        assert 0 < at.count(gone) < 30
        assert balancer.status()["flows"]["active"] == 30 - at.count(gone)


def test_ports_of_the_host_are_refused(second_lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "fastlb.yaml"
    second_lab.write_config(config, control=str(tmp_path / "fastlb.sock"), snat_ports="1024-65535")
    refused = fastlb("run", "-c", config, namespace=second_lab.namespace("lb"))
    assert refused.returncode == 1
    assert "snat_ports: 1024-65535, but the kernel gives port 32768 of 10.3.0.2 to sockets" in refused.stderr
