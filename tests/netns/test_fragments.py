"""Datagrams that real kernels cut and put together again, through every mode; and storms of fragments and of ICMP."""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.frames import frame, ip4_packet, ip6_packet, mac_bytes
from tests.netns.balancer import ROOT, Balancer, until, within
from tests.unit.dataplane.test_fragments import one_fragment
from tests.unit.dataplane.test_icmperror import error

sys.path.insert(0, str(ROOT / "netns-lab"))
from topology import ALL_VIPS, VIPS, Lab, address, own_prefix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

ECHO = 5000
TUNNELS = ("ipip", "gre", "gue")
STORM = 20_000  # packets
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
every_way = pytest.mark.parametrize(("forward", "version"), ALL_VIPS)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "fragments-", every_mode=True) as lab:
        yield lab


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def balancer(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    folder = tmp_path_factory.mktemp("fragments")
    with Balancer(lab.namespace("lb"), lab.config(workers=request.param), folder) as balancer:
        yield balancer


def echoed(vip: str, version: int, sizes: list[int]) -> list[bytes]:
    """What comes back for datagrams of these sizes, each from a port of its own.

    Sent again where the way turns out to be narrower, of which the sender learns by ICMP.
    """
    answers = []
    for size in sizes:
        with socket.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.connect((vip, ECHO))
            for _ in range(3):
                with suppress(OSError):
                    sock.send(random.Random(size).randbytes(size))
                    answers.append(sock.recv(1 << 16))
                    break
    return answers


@every_way
def test_datagrams_of_every_size(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    """Up to 60,000 bytes, 42 fragments each way."""
    sizes = [1400, 1473, 2900, 4000, 8192, 16_000, 30_000, 60_000] * 3
    counters = balancer.status()["counters"]
    before, drops = counters["paths"]["fragment"], counters["drops"]
    answers = within(lab.namespace("client"), echoed, ALL_VIPS[forward, version], version, sizes)
    for size, answer in zip(sizes, answers, strict=True):
        assert answer.split(b" ", 1)[1] == random.Random(size).randbytes(size)
    assert balancer.status()["counters"]["paths"]["fragment"] - before > sum(size // 1500 for size in sizes)
    if forward not in TUNNELS:  # there a first one may be answered by "packet too big", and leaves the others alone
        lost = balancer.status()["counters"]["drops"]
        assert {name: lost[name] - drops[name] for name in lost if lost[name] != drops[name]} == {}


# ---- what is the host's


BIG = [1400, 4000, 8192, 30_000, 60_000] * 4
STRANGER, OWN_PORT = 9999, 40_000  # a port of the client's that no service knows; one of the host's, beside snat_ports


@pytest.fixture
def router(lab: Lab) -> Iterator[None]:
    """The balancer's host forwards what fastlb does not take, as the gateway of the backends."""
    forwarding = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    for name in forwarding:
        lab.sysctl("lb", name, 1)
    yield
    for name in forwarding:
        lab.sysctl("lb", name, 0)


def opened(family: int, where: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(3)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind(where)
    return sock


@pytest.mark.parametrize("sport", [514, STRANGER])
@pytest.mark.parametrize("version", [4, 6])
def test_a_backend_s_own_datagrams_pass_through_the_host(
    lab: Lab, balancer: Balancer, router: None, version: int, sport: int
) -> None:
    """To the client of a service, between answers of that service."""
    client = address("client", "eth0", version)
    taken = balancer.status()["counters"]["drops"]
    receiver = within(lab.namespace("client"), opened, FAMILY[version], (client, STRANGER))
    sender = within(lab.namespace("b1"), opened, FAMILY[version], (address("b1", "eth0", version), sport))
    with receiver, sender:
        for size in BIG:
            sender.sendto(random.Random(size).randbytes(size), (client, STRANGER))
            assert receiver.recv(1 << 16) == random.Random(size).randbytes(size)
            [answer] = within(lab.namespace("client"), echoed, ALL_VIPS["nat", version], version, [size])
            assert answer.split(b" ", 1)[1] == random.Random(size).randbytes(size)
    assert balancer.status()["counters"]["drops"] == taken


@pytest.mark.parametrize("version", [4, 6])
def test_sockets_on_the_source_address_of_full_nat_get_whole_datagrams(
    lab: Lab, balancer: Balancer, version: int
) -> None:
    """Answers of the very port that backends serve at, to a port that is none of full NAT's; and from another port."""
    own, backend = address("lb", "eth1", version), address("b1", "eth0", version)
    taken = balancer.status()["counters"]["drops"]
    host = within(lab.namespace("lb"), opened, FAMILY[version], (own, OWN_PORT))
    stranger = within(lab.namespace("b1"), opened, FAMILY[version], (backend, 514))
    with host, stranger:
        for size in BIG:
            content = random.Random(size).randbytes(size)
            host.sendto(content, (backend, ECHO))
            assert host.recv(1 << 16).split(b" ", 1)[1] == content
            stranger.sendto(content, (own, OWN_PORT))
            assert host.recv(1 << 16) == content
            [answer] = within(lab.namespace("client"), echoed, ALL_VIPS["fullnat", version], version, [size])
            assert answer.split(b" ", 1)[1] == content
    assert balancer.status()["counters"]["drops"] == taken


# ---- storms


@pytest.fixture(scope="module")
def storm_lab() -> Iterator[Lab]:
    """Its kernels' memory for reassembly is full of what will never be complete, so it serves nothing else."""
    with Lab(own_prefix("test") + "storms-", every_mode=True) as lab:
        yield lab


@pytest.fixture(scope="module")
def stormy(storm_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    config = storm_lab.config(workers=2)
    with Balancer(storm_lab.namespace("lb"), config, tmp_path_factory.mktemp("storms")) as balancer:
        yield balancer


def next_hop(lab: Lab) -> bytes:
    """The router's MAC address, seen from the client."""
    with lab.rtnl("router") as rtnl:
        [link] = rtnl.get_links(ifname="c0")
    return mac_bytes(link.get_attr("IFLA_ADDRESS"))


def own_mac(lab: Lab) -> bytes:
    with lab.rtnl("client") as rtnl:
        [link] = rtnl.get_links(ifname="eth0")
    return mac_bytes(link.get_attr("IFLA_ADDRESS"))


def fragments(version: int, forward: str) -> Iterator[bytes]:
    """Later ones without a first, firsts without later ones, overlapping ones."""
    rng = random.Random(7)
    vip = ALL_VIPS[forward, version]
    raw = frame(address("client", "eth0", version), 40000, vip, ECHO, "udp", payload=bytes(64))
    header, body = (raw[14:34], raw[34:]) if version == 4 else (raw[14:54], raw[54:])
    for number in range(STORM):
        offset = rng.choice((0, 8 * rng.randint(1, 1000)))
        yield one_fragment(header, body[:24], offset, bool(rng.randint(0, 4)), rng.randint(1, number + 1))


def errors(version: int, forward: str) -> Iterator[bytes]:
    """About flows that are none, nested, cut short."""
    rng = random.Random(8)
    vip, client = ALL_VIPS[forward, version], address("client", "eth0", version)
    for _ in range(STORM):
        about = frame(vip, 80, client, rng.randint(1, 65535), payload=bytes(20))[14:]
        if rng.randint(0, 3) == 0:
            wrap = ip4_packet if version == 4 else ip6_packet
            about = wrap(vip, client, 1 if version == 4 else 58, struct.pack("!BBHI", 3, 1, 0, 0) + about)
        raw = error(about, rng.choice(("unreachable", "too big", "time exceeded")), client, target=vip)
        yield raw[: rng.choice((len(raw), 14 + 20 + 8 + rng.randint(0, 40)))]


def memory_of(pid: int) -> int:
    """Resident KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def send_all(frames: list[bytes], link: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        for number, raw in enumerate(frames):
            sock.send(link + raw[12:])
            if number % 200 == 0:
                time.sleep(0.002)


@pytest.mark.parametrize("storm", [fragments, errors], ids=["fragments", "icmp"])
@pytest.mark.parametrize(("forward", "version"), [*VIPS, ("fullnat", 4), ("gue", 6)])
def test_storms(storm_lab: Lab, stormy: Balancer, forward: str, version: int, storm: object) -> None:
    """Memory stays flat, and transfers that are under way arrive whole."""
    assert callable(storm)
    frames = list(storm(version, forward))
    link = next_hop(storm_lab) + own_mac(storm_lab)
    storm_lab.client("upload", ALL_VIPS[forward, version], "--bytes", 1_000_000)
    storm_lab.client("fetch", ALL_VIPS[forward, version], "--count", 500)  # touches the flow table all over
    within(storm_lab.namespace("client"), send_all, frames[:2000], link)
    before, seen = memory_of(stormy.pid), stormy.status()["counters"]["packets"]
    sender = threading.Thread(target=within, args=(storm_lab.namespace("client"), send_all, frames, link))
    sender.start()
    try:
        for direction in ("upload", "download"):
            got = storm_lab.client(direction, ALL_VIPS[forward, version], "--bytes", 20_000_000)
            assert (got["bytes"], got["verified"]) == (20_000_000, True)
    finally:
        sender.join()
    assert stormy.status()["counters"]["packets"] - seen > STORM / 4
    assert memory_of(stormy.pid) - before < 4 << 10, "KiB"
    assert until(lambda: stormy.status()["counters"]["paths"]["held"] == 0)
    assert storm_lab.client("fetch", ALL_VIPS[forward, version], "--count", 50)["answered"] == 50
