"""Next hops under a running balancer: MACs, routes and links change, and traffic goes on without a restart."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import Balancer, drops, forget_neighbours, until, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, address, index_of, own_prefix  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

WAYS = [(forward, version) for forward in ("nat", "dsr") for version in (4, 6)]
every_way = pytest.mark.parametrize(("forward", "version"), WAYS)
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
PROCFS = {4: "ipv4", 6: "ipv6"}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "nexthop-") as lab:
        for version in (4, 6):  # a silent neighbour is doubted after a second, not after thirty
            for key, value in (
                ("base_reachable_time_ms", 1000),
                ("delay_first_probe_time", 1),
                ("retrans_time_ms", 100),
            ):
                lab.sysctl("lb", f"net.{PROCFS[version]}.neigh.eth1.{key}", value)
        # IPv6 addresses, and with them the routes, come back when a link is switched on again.
        lab.sysctl("lb", "net.ipv6.conf.all.keep_addr_on_down", 1)
        yield lab


@pytest.fixture(scope="module")
def running(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    with Balancer(lab.namespace("lb"), lab.config(workers=1), tmp_path_factory.mktemp("nexthop")) as balancer:
        yield balancer


def fetched(lab: Lab, vip: str, count: int = 30, **options: Any) -> tuple[int, list[str]]:
    """How many of ``count`` connections were answered, and the backends that answered."""
    got = lab.client("fetch", vip, "--count", count, **options)
    return got["answered"], sorted(got["backends"])


def connects(lab: Lab, vip: str, patience: float = 1.0) -> bool:
    """Does one connection come about in time?"""

    def attempt() -> bool:
        try:
            with socket.create_connection((vip, 80), timeout=patience):
                return True
        except TimeoutError:
            return False

    return within(lab.namespace("client"), attempt)


def is_silent(lab: Lab, vip: str) -> bool:
    return not connects(lab, vip, 0.3)


# ---- a backend with another MAC


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "silent"])
def test_a_backend_moves_to_another_mac(lab: Lab, balancer: Balancer, announced: bool) -> None:
    """Announced by gratuitous ARP and unsolicited ND; or noticed because the old MAC does not answer any more."""
    for vip in VIPS.values():
        assert fetched(lab, vip) == (30, list(BACKENDS))
    for key in ("net.ipv4.conf.eth0.arp_notify", "net.ipv6.conf.eth0.ndisc_notify"):
        lab.sysctl("b1", key, int(announced))
    lab.sysctl("lb", "net.ipv4.neigh.eth1.locktime", 0)  # else an announcement within a second of the last is ignored
    lab.set_link("b1", "eth0", address=f"02:00:00:00:01:{announced:02x}")
    for vip in VIPS.values():
        assert until(answers_everywhere, lab, vip), f"{vip}: {drops(balancer.status())}"
        assert fetched(lab, vip) == (30, list(BACKENDS))


def answers_everywhere(lab: Lab, vip: str) -> bool:
    """Does UDP reach every backend at the first attempt? It is not sent again, as a SYN would be."""
    script = lab.client("echo", vip, "--count", 30, "--rounds", 1)
    return bool(script["seconds"] < 1.0 and sorted(script["backends"]) == list(BACKENDS))


# ---- routes


@pytest.mark.parametrize("version", [4, 6])
def test_replies_follow_the_route_to_the_client(lab: Lab, balancer: Balancer, version: int) -> None:
    vip, client = VIPS["nat", version], address("client", "eth0", version)
    bits = {4: 32, 6: 128}[version]
    detour = {"dst": f"{client}/{bits}", "gateway": address("router", "br0", version)}

    def share_over_eth1() -> float:
        """Of what the router gets from lb; half of it goes to backends, by eth1."""
        before = lab.counters("lb")
        assert fetched(lab, vip, 100)[0] == 100
        after = lab.counters("lb")
        sent = {name: after[name].tx_packets - before[name].tx_packets for name in ("eth0", "eth1")}
        return sent["eth1"] / sum(sent.values())

    assert 0.3 < share_over_eth1() < 0.7
    with lab.rtnl("lb") as rtnl:
        rtnl.route("add", **detour)
        try:
            assert until(lambda: share_over_eth1() > 0.9)
        finally:
            rtnl.route("del", **detour)
    assert until(lambda: share_over_eth1() < 0.7)


@pytest.mark.parametrize("version", [4, 6])
def test_without_a_route_replies_are_dropped_by_name(lab: Lab, balancer: Balancer, version: int) -> None:
    default: dict[str, Any] = {
        "dst": {4: "0.0.0.0/0", 6: "::/0"}[version],
        "gateway": address("router", "l0", version),
    }
    vip, before = VIPS["nat", version], drops(balancer.status()).get("no_route", 0)
    with lab.rtnl("lb") as rtnl:
        default["oif"] = index_of(rtnl, "eth0")
        rtnl.route("del", **default)
        try:
            assert until(lambda: not connects(lab, vip))
            assert drops(balancer.status())["no_route"] > before
        finally:
            rtnl.route("add", **default)
    assert until(lambda: connects(lab, vip))
    assert fetched(lab, vip) == (30, list(BACKENDS))


# ---- links


# Switched off, the link takes its routes along: what is left is the default route, through which dsr cannot go.
@pytest.mark.parametrize(
    ("node", "interface", "reason"),
    [("lb", "eth1", "not_on_link"), ("router", "p0", "no_route")],
    ids=["switched off", "no carrier"],
)
def test_a_link_goes_and_comes_back(lab: Lab, balancer: Balancer, node: str, interface: str, reason: str) -> None:
    """The link to the backends: no backend can be reached, but the process stays, and goes on by itself."""
    before = drops(balancer.status()).get(reason, 0)
    lab.set_link(node, interface, state="down")
    try:
        for vip in VIPS.values():
            assert until(is_silent, lab, vip)
        assert drops(balancer.status())[reason] > before
    finally:
        lab.set_link(node, interface, state="up")
    for vip in VIPS.values():
        assert until(connects, lab, vip)
        assert fetched(lab, vip) == (30, list(BACKENDS))


def test_the_client_link_goes_and_comes_back(lab: Lab, balancer: Balancer) -> None:
    lab.set_link("lb", "eth0", state="down")
    for vip in VIPS.values():
        assert not connects(lab, vip, 0.3)
    lab.set_link("lb", "eth0", state="up")
    with lab.rtnl("lb") as rtnl:  # which went with the link
        for destination, version in (("0.0.0.0/0", 4), ("::/0", 6)):
            rtnl.route("replace", dst=destination, gateway=address("router", "l0", version))
    for vip in VIPS.values():
        assert until(connects, lab, vip)
        assert fetched(lab, vip) == (30, list(BACKENDS))


def test_a_link_that_was_down_costs_nothing(lab: Lab, balancer: Balancer) -> None:
    """A packet socket whose link went down reports an error until somebody asks: the worker must still sleep."""

    def used() -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{balancer.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rests() -> bool:
        """Does it use less than a quarter of a core? One that does not sleep uses all that it can have."""
        before, since = used(), time.monotonic()
        time.sleep(0.2)
        return used() - before < (time.monotonic() - since) / 4

    lab.set_link("lb", "eth1", state="down")
    lab.set_link("lb", "eth1", state="up")
    assert until(lambda: connects(lab, VIPS["nat", 4]))
    assert until(rests)


# ---- neighbours that nobody else asked for


@pytest.mark.parametrize("version", [4, 6])
def test_a_client_on_our_own_link(lab: Lab, balancer: Balancer, version: int) -> None:
    """Its replies need its MAC, and the kernel has no reason of its own to ask for it."""
    own, bits = {4: ("10.2.0.99", 24), 6: ("fd00:2::99", 64)}[version]
    with lab.rtnl("router") as rtnl:
        rtnl.addr("add", index=index_of(rtnl, "l0"), address=own, prefixlen=bits)
    before = drops(balancer.status()).get("no_neighbour", 0)

    def fetch() -> bytes:
        with socket.create_connection((VIPS["nat", version], 80), timeout=20, source_address=(own, 0)) as sock:
            with lab.rtnl("lb") as rtnl:
                forget_neighbours(rtnl, version)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
            return sock.makefile("rb").read()

    try:
        assert own.encode() in within(lab.namespace("router"), fetch)
    finally:
        with lab.rtnl("router") as rtnl:
            rtnl.addr("del", index=index_of(rtnl, "l0"), address=own, prefixlen=bits)
    assert drops(balancer.status())["no_neighbour"] > before
