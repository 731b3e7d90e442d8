"""ICMP through ``fastlb run``: pings, and the errors of real kernels on either side of a flow.

In nat and fullnat both sides' errors pass the balancer; in dsr and gue those of the client's side do.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frames import checksum, ip4_packet, ip6_packet
from tests.netns.balancer import PATIENCE, Balancer, drops, fastlb, until, within

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "netns-lab"))

from topology import ALL_VIPS, BACKENDS, NODES, TWO_WAY, Lab, address, own_prefix

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
RECVERR = {4: 11, 6: 25}  # IP_RECVERR, IPV6_RECVERR
PORT, NAT_PORT = 7000, 7001  # of a UDP service whose server is the test
NARROW = 1400  # bytes
VIPS = {way: vip for way, vip in ALL_VIPS.items() if way[0] not in ("ipip", "gre")}  # as gue, but for the headers
every_way = pytest.mark.parametrize(("forward", "version"), VIPS)
both_ways = pytest.mark.parametrize(("forward", "version"), [way for way in VIPS if way[0] in TWO_WAY])


def lonely(forward: str, version: int) -> dict[str, Any]:
    """One backend, b1, on whose port nobody listens but a test."""
    backend: dict[str, Any] = {"address": address("b1", "eth0", version)}
    return {
        "name": f"lonely-{forward}-{version}", "vip": VIPS[forward, version], "port": PORT, "protocol": "udp",
        "forward": forward, "backends": [backend | ({"port": NAT_PORT} if forward in TWO_WAY else {})],
    }  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Its kernels complain as often as they have reason to; by default it is a few times a second to one address."""
    with Lab(own_prefix("test") + "icmp-", every_mode=True) as lab:
        for node in NODES:
            lab.sysctl(node, "net.ipv4.icmp_ratelimit", 0)
            lab.sysctl(node, "net.ipv6.icmp.ratelimit", 0)
        yield lab


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def running(lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    config = lab.config(workers=request.param)
    config["services"] += [lonely(*way) for way in VIPS]
    with Balancer(lab.namespace("lb"), config, tmp_path_factory.mktemp("icmp")) as balancer:
        yield balancer


def udp(lab: Lab, node: str, version: int) -> socket.socket:
    sock: socket.socket = within(lab.namespace(node), socket.socket, FAMILY[version], socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    return sock


def paths(balancer: Balancer) -> dict[str, int]:
    found: dict[str, int] = balancer.status()["counters"]["paths"]
    return found


@every_way
def test_a_vip_answers_pings(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    before = paths(balancer)["echo"]
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    with within(lab.namespace("client"), socket.socket, FAMILY[version], socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(PATIENCE)
        for number in range(20):
            asked = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 4711, number) + os.urandom(number * 50)
            if version == 4:  # the kernel itself sums up ICMPv6
                asked = asked[:2] + checksum(asked).to_bytes(2, "big") + asked[4:]
            sock.sendto(asked, (VIPS[forward, version], 0))
            while True:
                answer, sender = sock.recvfrom(2000)
                answer = answer[(answer[0] & 15) * 4 :] if version == 4 else answer
                if answer[0] == (0 if version == 4 else 129):
                    break
            assert (sender[0], answer[4:]) == (VIPS[forward, version], asked[4:])
    assert paths(balancer)["echo"] == before + 20


@every_way
def test_a_closed_port_refuses_the_client(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    """Where addresses are translated, the backend's kernel complains about a packet that the client never sent so."""
    before = paths(balancer)["icmp"]
    with udp(lab, "client", version) as client:
        client.connect((VIPS[forward, version], PORT))
        client.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)
    assert paths(balancer)["icmp"] == before + (forward in TWO_WAY)


@every_way
def test_a_client_that_has_gone_refuses_the_backend(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    """The client's kernel complains to the VIP; the backend that had answered hears of it."""
    own = (address("b1", "eth0", version), NAT_PORT) if forward in TWO_WAY else (VIPS[forward, version], PORT)
    with udp(lab, "b1", version) as server, udp(lab, "client", version) as client:
        server.bind(own)
        client.sendto(b"hello", (VIPS[forward, version], PORT))
        _, peer = server.recvfrom(100)
        server.connect(peer)
        server.send(b"first answer")
        assert client.recv(100) == b"first answer"
        client.close()
        server.send(b"second answer")
        with pytest.raises(ConnectionRefusedError):
            server.recv(100)
    assert not {"icmp_unknown", "icmp_header", "wrong_worker"} & set(drops(balancer.status()))


def raw_packets(version: int, client: str, vip: str) -> dict[str, tuple[int, bytes]]:
    """What no balancer understands: protocol and content, by the name under which it is left to the host."""
    wrap, kind, protocol = (ip4_packet, 3, 1) if version == 4 else (ip6_packet, 1, 58)
    inner = wrap(vip, client, protocol, struct.pack("!BBHI", kind, 0, 0, 0) + bytes(40))
    found = {
        "not_tcp_udp": (4, ip4_packet("192.0.2.1", "192.0.2.2", 17, bytes(20))),
        "icmp_quote": (protocol, struct.pack("!BBHI", kind, 0, 0, 0) + inner),
    }
    if version == 6:
        chain = b"".join(bytes([following, 0, 1, 4, 0, 0, 0, 0]) for following in (60, 60, 60, 60, 60, 60, 17))
        found["extension_headers"] = (60, chain + bytes(20))
    else:
        found["icmp_fragment"] = (protocol, struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(1400))
    return found


@every_way
def test_what_is_odd_at_a_vip_is_counted(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    """Though the host gets it; ``fastlb status`` shows it."""
    client, vip = address("client", "eth0", version), VIPS[forward, version]
    for reason, (protocol, content) in raw_packets(version, client, vip).items():
        before = balancer.status()["counters"]
        sock = within(lab.namespace("client"), socket.socket, FAMILY[version], socket.SOCK_RAW, protocol)
        with sock:
            for _ in range(5):
                sock.sendto(content + bytes(1400) * (reason == "icmp_fragment"), (vip, 0))
        wanted = before["passed"][reason] + (10 if reason == "icmp_fragment" else 5)
        assert until(lambda: balancer.status()["counters"]["passed"][reason] >= wanted)  # noqa: B023
        after = balancer.status()["counters"]
        assert after["passed"] == before["passed"] | {reason: wanted}
        assert after["drops"] == before["drops"]
    assert f"{reason} " in fastlb("status", "--socket", balancer.socket_path).stdout


def hop(lab: Lab, forward: str, version: int, hops: int) -> tuple[str | None, str]:
    """Who complains about a packet to the closed port that may go this far, and what its sender hears of it."""
    level, limit = (socket.IPPROTO_IP, socket.IP_TTL) if version == 4 else (
        socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)  # fmt: skip
    with udp(lab, "client", version) as client:
        client.setsockopt(level, limit, hops)
        client.setsockopt(level, RECVERR[version], 1)
        client.connect((VIPS[forward, version], PORT))
        client.send(b"x")
        with pytest.raises(OSError) as heard:  # noqa: PT011 (which one it is, the caller compares)
            client.recv(100)
        [(_, _, data)] = client.recvmsg(100, 200, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)[1]
    where = data[20:24] if version == 4 else data[24:40]  # struct sock_extended_err, then the complainer's sockaddr
    return socket.inet_ntop(FAMILY[version], where), type(heard.value).__name__


@both_ways
def test_traceroute(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    """The router, the balancer, which speaks as the VIP, and the backend, which does so too."""
    vip = VIPS[forward, version]
    before = paths(balancer)["time_exceeded"]
    assert [hop(lab, forward, version, hops) for hops in (1, 2, 3)] == [
        (address("router", "c0", version), "OSError"), (vip, "OSError"), (vip, "ConnectionRefusedError"),
    ]  # fmt: skip
    assert paths(balancer)["time_exceeded"] == before + 1


@pytest.mark.parametrize(("forward", "version"), [way for way in VIPS if way[0] not in TWO_WAY])
def test_the_balancer_is_no_hop_where_nothing_is_translated(
    lab: Lab, balancer: Balancer, forward: str, version: int
) -> None:
    vip = VIPS[forward, version]
    assert hop(lab, forward, version, 2) == (vip, "ConnectionRefusedError")


# ---- path MTU towards the client


@pytest.fixture
def narrow_to_client(lab: Lab) -> Iterator[None]:
    """The router's way to the client; what the backends have learned of it is forgotten afterwards."""
    ways = [(f"-{version}", address("client", "eth0", version)) for version in (4, 6)]
    for version, client in ways:
        lab.check("router", ["ip", version, "route", "add", client, "dev", "c0", "mtu", str(NARROW)])
    yield
    for version, client in ways:
        lab.check("router", ["ip", version, "route", "del", client, "dev", "c0", "mtu", str(NARROW)])
        for node in BACKENDS:
            lab.check(node, ["ip", version, "route", "flush", "table", "all", "cached"])


@every_way
def test_a_download_finds_the_mtu_of_the_way(
    lab: Lab, balancer: Balancer, narrow_to_client: None, forward: str, version: int
) -> None:
    """The router complains to the VIP; the backend hears of it, and of its own packet."""
    before = paths(balancer)["icmp"]
    got = lab.client("download", VIPS[forward, version], "--bytes", 3_000_000)
    assert (got["bytes"], got["verified"]) == (3_000_000, True)
    assert paths(balancer)["icmp"] > before
    assert not {"icmp_unknown", "icmp_header"} & set(drops(balancer.status()))
