"""The tunnel modes, and packets that do not fit, with real clients and servers in the lab.

The backends' receivers are `fastlb decap`. Every link of the lab has an MTU of 1500 at first, so each full segment of
a client is too long for a tunnel: without the balancer's answer nothing but small packets would ever pass.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastlb.kernel import guard
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from tests.netns.balancer import Balancer, drops

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "netns-lab"))

from namespaces import inside
from topology import ALL_VIPS, BACKENDS, DSR_TABLE, TUNNEL_VIPS, TWO_WAY, Lab, LabError, address, own_prefix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

NARROW = 1400  # bytes
SKB_LOAD_BYTES, SCHED_CLS, ACT_SHOT, ACT_UNSPEC = 26, 3, 2, -1
every_tunnel = pytest.mark.parametrize(("forward", "version"), TUNNEL_VIPS)
every_way = pytest.mark.parametrize(("forward", "version"), ALL_VIPS)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "tunnels-", every_mode=True) as lab:
        yield lab


@pytest.fixture(scope="module", params=[("auto", True), ("sendmmsg", False)], ids=["offloaded", "cut here"])
def running(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    transmit, offload = request.param
    config = lab.config(workers=1, transmit=transmit, tunnel_offload=offload)
    with Balancer(lab.namespace("lb"), config, tmp_path_factory.mktemp("tunnels")) as balancer:
        yield balancer


@contextmanager
def reconfigured(balancer: Balancer, **changes: Any) -> Iterator[None]:
    """Another configuration for the length of the block."""
    before = balancer.config
    assert balancer.reload(before | changes).returncode == 0
    yield
    assert balancer.reload(before).returncode == 0


@contextmanager
def advertised(lab: Lab, version: int, mss: int) -> Iterator[None]:
    """The backends announce this MSS to clients."""
    gateway = address("router", "br0", version)
    for node in BACKENDS:
        route = ["ip", f"-{version}", "route", "replace", "default", "via", gateway, "table", str(DSR_TABLE)]
        lab.check(node, [*route, "advmss", str(mss)])
    yield
    for node in BACKENDS:
        lab.check(node, ["ip", f"-{version}", "route", "replace", "default", "via", gateway, "table", str(DSR_TABLE)])


def forget_paths(lab: Lab) -> None:
    """What the client has learned of path MTUs, so that each test learns them by itself."""
    for flag in ("-4", "-6"):
        lab.check("client", ["ip", flag, "route", "flush", "cache"])


@every_tunnel
def test_every_backend_serves(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    got = lab.client("fetch", TUNNEL_VIPS[forward, version], "--count", 100)
    assert (got["answered"], got["ports"], got["errors"]) == (100, 100, {})
    assert got["clients"] == {address("client", "eth0", version): 100}
    assert sorted(got["backends"]) == list(BACKENDS)
    got = lab.client("echo", TUNNEL_VIPS[forward, version], "--count", 100, "--rounds", 3)
    assert (got["answered"], got["torn"], got["errors"]) == (100, 0, {})


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize("direction", ["download", "upload"])
@every_tunnel
def test_bulk_transfer_is_intact(
    lab: Lab, balancer: Balancer, forward: str, version: int, direction: str, offloads: bool
) -> None:
    """GSO packets are cut in the core or behind it; without offloads every segment comes by itself."""
    before = balancer.status()["counters"]["tunnels_offloaded"]
    lab.set_offloads(offloads)
    try:
        got = lab.client(direction, TUNNEL_VIPS[forward, version], "--bytes", 20_000_000)
    finally:
        lab.set_offloads(True)
    assert (got["bytes"], got["verified"]) == (20_000_000, True)
    offloaded = balancer.status()["counters"]["tunnels_offloaded"] > before
    assert offloaded == (balancer.config["tunnel_offload"] and offloads and direction == "upload")


@pytest.fixture
def narrow_link(lab: Lab) -> Iterator[None]:
    """From the balancer to the backends, whose own links know nothing of it."""
    lab.set_link("lb", "eth1", mtu=NARROW)
    yield
    lab.set_link("lb", "eth1", mtu=1500)


def upload(lab: Lab, forward: str, version: int) -> None:
    got = lab.client("upload", ALL_VIPS[forward, version], "--bytes", 10_000_000)
    assert (got["bytes"], got["verified"]) == (10_000_000, True)


@every_way
def test_an_upload_finds_the_mtu_of_the_way(
    lab: Lab, balancer: Balancer, narrow_link: None, forward: str, version: int
) -> None:
    """Client and VIP at 1500, the way to the backends at 1400: the balancer says what fits."""
    forget_paths(lab)
    before = balancer.status()["counters"]["paths"]["too_big"]
    upload(lab, forward, version)
    assert balancer.status()["counters"]["paths"]["too_big"] > before
    assert not {"over_mtu", "tx_too_big"} & set(drops(balancer.status()))


# ---- where ICMP is filtered


def without_too_big() -> Assembler:
    """At ingress: drop ICMP destination unreachable and ICMPv6 packet too big."""
    a = Assembler()
    context, stack = Reg.R6, Reg.R10
    a.alu(context, "=", Reg.R1)
    for protocol_at, protocol, type_at, kind, after in ((23, 1, 34, 3, "six"), (20, 58, 54, 2, "pass")):
        for at, value in ((protocol_at, protocol), (type_at, kind)):
            a.alu(Reg.R1, "=", context)
            a.alu(Reg.R2, "=", at)
            a.alu(Reg.R3, "=", stack)
            a.alu(Reg.R3, "+", -8)
            a.alu(Reg.R4, "=", 1)
            a.call(SKB_LOAD_BYTES)
            a.jump_if(Reg.R0, "!=", 0, after)
            a.load(Reg.R1, stack, -8, Size.U8)
            a.jump_if(Reg.R1, "!=", value, after)
        a.alu(Reg.R0, "=", ACT_SHOT)
        a.exit()
        a.label(after)
    a.alu(Reg.R0, "=", ACT_UNSPEC)
    a.exit()
    return a


@pytest.fixture
def filtered(lab: Lab) -> Iterator[None]:
    with inside(lab.namespace("client")):
        program = syscall.load_program(SCHED_CLS, without_too_big().assemble(), "no_too_big")
        guard.attach("eth0", program)
        os.close(program)
    yield
    with inside(lab.namespace("client")):
        guard.detach("eth0")


def gets_stuck(lab: Lab, vip: str) -> bool:
    """An upload that gets nowhere within some seconds."""
    try:
        return not lab.client("upload", vip, "--bytes", 100_000, timeout=4)
    except LabError as error:
        return "still running" in str(error)


def test_without_icmp_every_upload_gets_stuck(lab: Lab, balancer: Balancer, narrow_link: None, filtered: None) -> None:
    forget_paths(lab)
    with ThreadPoolExecutor(len(ALL_VIPS)) as clients:
        assert all(clients.map(gets_stuck, [lab] * len(ALL_VIPS), ALL_VIPS.values()))


@pytest.fixture
def clamping(balancer: Balancer) -> Iterator[Balancer]:
    services = [each | {"mss_clamp": each["protocol"] == "tcp"} for each in balancer.config["services"]]
    with reconfigured(balancer, services=services):
        yield balancer


@every_way
def test_with_mss_clamping_no_upload_needs_icmp(
    lab: Lab, clamping: Balancer, narrow_link: None, filtered: None, forward: str, version: int
) -> None:
    """In nat and fullnat fastlb sees the SYN-ACK, which tells the client; elsewhere long segments are cut."""
    forget_paths(lab)
    before = clamping.status()["counters"]["paths"]["too_big"]
    upload(lab, forward, version)
    assert clamping.status()["counters"]["paths"]["too_big"] == before


@pytest.mark.parametrize(("forward", "version"), [way for way in ALL_VIPS if way[0] not in TWO_WAY])
def test_the_backends_routes_can_spare_it(
    lab: Lab, balancer: Balancer, narrow_link: None, filtered: None, forward: str, version: int
) -> None:
    """The SYN-ACK goes from the backend to the client directly: docs/configuration.md says so."""
    forget_paths(lab)
    with advertised(lab, version, NARROW - 56 - 60):
        upload(lab, forward, version)


# ---- where a link beyond is narrow: last, because the balancer remembers it for ten minutes


@pytest.fixture
def narrow_beyond(lab: Lab) -> Iterator[None]:
    """The way to the backends leads by the router, from where on it is narrow."""
    ways = [(version, address(node, "eth0", version)) for version in (4, 6) for node in BACKENDS]
    for version, backend in ways:
        lab.check("router", ["ip", f"-{version}", "route", "add", backend, "dev", "br0", "mtu", str(NARROW)])
        gateway = address("router", "br0", version)
        lab.check("lb", ["ip", f"-{version}", "route", "add", backend, "via", gateway])
    yield
    for version, backend in ways:
        lab.check("router", ["ip", f"-{version}", "route", "del", backend, "dev", "br0"])
        lab.check("lb", ["ip", f"-{version}", "route", "del", backend])


@every_tunnel
def test_an_upload_finds_a_narrow_link_beyond(
    lab: Lab, balancer: Balancer, narrow_beyond: None, forward: str, version: int
) -> None:
    """Routers tell the tunnel's source what does not fit, and the balancer tells the client."""
    forget_paths(lab)
    upload(lab, forward, version)
    said = [line["mtu"] for line in balancer.logs() if line["event"] == "the way to a backend is narrower"]
    assert said
    assert {*said} == {NARROW}
