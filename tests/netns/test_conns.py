"""`fastlb conns` and `fastlb trace` ask a balancer at work, two workers of it, and disturb nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.frames import ACK, SYN, frame
from tests.netns.balancer import Balancer, fastlb, until
from tests.netns.rig import (
    BACKEND,
    CLIENT,
    PORT,
    VIP,
    WORKERS,
    Flow,
    Rig,
    exchange,
    make_rig,
    new_flows,
    owner,
    port_of,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield from make_rig(queues=WORKERS)


@pytest.fixture(scope="module")
def running(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    with rig.balancer(tmp_path_factory.mktemp("fastlb"), workers=WORKERS) as balancer:
        rig.reach(balancer, *((kind, version) for kind in ("nat", "dsr") for version in (4, 6)))
        yield balancer


def asked(balancer: Balancer, *words: object) -> Any:
    done = fastlb(*words, "--socket", balancer.socket_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def name(flow: Flow) -> str:
    return f"{flow.kind}-{flow.version}-{flow.protocol}"


def test_the_flows_of_all_workers(rig: Rig, balancer: Balancer) -> None:
    flows = new_flows(2)
    exchange(rig, flows, SYN)
    exchange(rig, flows, ACK)
    rows = {(row["service"], row["client"]): row for row in asked(balancer, "conns", "--limit", 1000)["flows"]}
    for flow in flows:
        row = rows[name(flow), endpoint(CLIENT[flow.version], flow.port)]
        assert row["vip"] == endpoint(VIP[flow.kind, flow.version], PORT)
        assert row["backend"] == endpoint(BACKEND[flow.version], PORT)
        assert row["state"] == ("udp" if flow.protocol == "udp" else "established")
        assert 0 <= row["idle"] <= row["age"] < 60

    ports = sorted(str(flow.port) for flow in flows if name(flow) == "nat-6-tcp")
    shown = fastlb("conns", "--service", "nat-6-tcp", "--state", "established", "--socket", balancer.socket_path)
    head, *lines = shown.stdout.splitlines()
    assert head.split() == ["SERVICE", "PROTOCOL", "CLIENT", "VIP", "BACKEND", "SOURCE", "STATE", "AGE", "IDLE"]
    assert sorted(line.split()[2].rsplit(":", 1)[1] for line in lines) == ports
    for limit, last in ((len(ports) - 1, f"there are more than {len(ports) - 1}: "), (len(ports), "nat-6-tcp ")):
        words = ("conns", "--service", "nat-6-tcp", "--limit", limit, "--socket", balancer.socket_path)
        assert fastlb(*words).stdout.splitlines()[-1].startswith(last)


def test_counts_agree_with_the_status(rig: Rig, balancer: Balancer) -> None:
    flows = [Flow("dsr", 4, "tcp", port_of(at)) for at in range(WORKERS)]
    exchange(rig, flows, SYN)
    counted = {(row["service"], row["backend"]): row["flows"] for row in asked(balancer, "conns", "--count")}
    active = {
        (service["name"], backend["backend"]): backend["active_flows"]
        for service in balancer.status()["services"]
        for backend in service["backends"]
        if backend["active_flows"]
    }
    assert counted == active
    table = fastlb("conns", "--count", "--client", CLIENT[4], "--socket", balancer.socket_path).stdout.splitlines()
    of_version = sum(flows for (service, _), flows in counted.items() if "-4-" in service)
    assert table[-1].split() == ["total", str(of_version)]


def test_a_trace_of_flows_that_are_there_and_of_new_ones(rig: Rig, balancer: Balancer) -> None:
    for flow in new_flows(1):
        words = ("trace", endpoint(CLIENT[flow.version], flow.port),
                 f"{endpoint(VIP[flow.kind, flow.version], PORT)}/{flow.protocol}")  # fmt: skip
        before = asked(balancer, *words)
        assert (before["reason"], before["service"]) == ("scheduled", name(flow))
        exchange(rig, [flow], SYN)
        after = asked(balancer, *words)
        assert (after["reason"], after["backend"]) == ("conntrack", before["backend"])
        steps = {step["stage"]: step for step in after["steps"]}
        worker = owner(CLIENT[flow.version], flow.port)
        assert steps["worker"]["says"].startswith(f"{worker} of {WORKERS}, shard ")
        assert (steps["forward"]["interface"], steps["forward"]["next_hop"]) == ("l1", BACKEND[flow.version])
        assert len(steps["forward"]["mac"]) == 17
        assert steps["backend"]["state"] == "unchecked"


def test_a_trace_says_why_a_packet_is_dropped(rig: Rig, balancer: Balancer) -> None:
    def verdict(destination: str) -> str:
        done = fastlb("trace", f"{CLIENT[4]}:7", destination, "--socket", balancer.socket_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()[-1].split(maxsplit=1)[1]

    vip = VIP["dsr", 4]
    assert verdict(f"{vip}:81/tcp") == "PASS no_service: left to the host"
    assert verdict(f"{vip}:{PORT}/tcp") == "FORWARD scheduled"
    drained = fastlb("drain", "dsr-4-tcp", BACKEND[4], "--socket", balancer.socket_path)
    assert drained.returncode == 0
    assert verdict(f"{vip}:{PORT}/tcp") == "DROP no_backend: no backend takes new flows"
    assert fastlb("enable", "dsr-4-tcp", BACKEND[4], "--socket", balancer.socket_path).returncode == 0


def test_a_walk_among_new_flows_shows_none_that_never_was(rig: Rig, balancer: Balancer) -> None:
    """Workers write entries while they are read, and reuse their places."""
    stop = threading.Event()
    first, after = 61_000, 62_000

    def send() -> None:
        while not stop.is_set():
            for port in range(first, after):
                rig.client.send(frame(CLIENT[4], port, VIP["dsr", 4], PORT, "udp"))
                rig.client.send(frame(CLIENT[4], port, VIP["dsr", 4], PORT, flags=SYN if port % 2 else SYN | ACK))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        seen = 0
        for _ in range(4):
            rows = asked(balancer, "conns", "--client", CLIENT[4], "--limit", 100_000)["flows"]
            for row in rows:
                assert row["service"] in ("nat-4-tcp", "nat-4-udp", "dsr-4-tcp", "dsr-4-udp")
                assert row["vip"] == endpoint(VIP[row["service"].split("-")[0], 4], PORT)
                assert row["protocol"] == row["service"].split("-")[2]
                assert row["backend"] == endpoint(BACKEND[4], PORT)
            seen += sum(first <= int(row["client"].rsplit(":", 1)[1]) < after for row in rows)
    finally:
        stop.set()
        thread.join()
    assert seen > 100
    assert until(lambda: "dsr-4-udp" in {row["service"] for row in asked(balancer, "conns", "--count")})


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("conns", "--service", "api"), 1, 'fastlb: there is no service "api"; there are: '),
        (("conns", "--backend", "10.9.9.9"), 1, 'fastlb: there is no backend "10.9.9.9" in any service; there are: '),
        (("conns", "--client", "10.9.9.9/8"), 1, "fastlb: client: 10.9.9.9/8 has host bits set"),
        (("conns", "--state", "open"), 2, "invalid choice: 'open'"),
        (("conns", "--limit", "0"), 2, "0 is not in 1.."),
        (("trace", "client", "203.0.113.10:80/tcp"), 2, "'client' is not ADDRESS:PORT"),
        (("trace", "10.1.0.2:1", "203.0.113.10:80"), 2, "a destination ends in /tcp or /udp"),
        (("trace", "10.1.0.2:1", "203.0.113.10:80/tcp", "--offline"), 2, "--offline needs a configuration: -c FILE"),
    ],
)
def test_what_is_refused(balancer: Balancer, words: tuple[str, ...], code: int, message: str) -> None:
    done = fastlb(*words, "--socket", balancer.socket_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def test_offline(balancer: Balancer) -> None:
    done = fastlb("trace", "--offline", "-c", balancer.config_path, f"{CLIENT[4]}:7", f"{VIP['nat', 4]}:{PORT}/tcp")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("FORWARD scheduled, if the next hop can be reached")
