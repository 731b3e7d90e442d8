"""Real traffic through ``fastlb run`` in the lab: both protocols, both modes, both IP versions.

And the other side of that: what is not a service's traffic stays with the balancer's own kernel, and what is never
reaches it.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import PATIENCE, Balancer, backends, drops, forget_neighbours, snmp, until, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, LabError, address, own_prefix  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

WAYS = [(forward, version) for forward in ("nat", "dsr") for version in (4, 6)]
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
HTTP, ECHO, PLAIN = 80, 5000, 7000  # ports of the VIPs
PORT = {("nat", HTTP): 8080, ("nat", ECHO): 5001, ("nat", PLAIN): 7001, ("dsr", PLAIN): 7000}

every_way = pytest.mark.parametrize(("forward", "version"), WAYS)


def plain(forward: str, version: int) -> dict[str, Any]:
    """A TCP service with b1 alone behind it, where the tests themselves listen."""
    backend: dict[str, Any] = {"address": address("b1", "eth0", version)}
    return {
        "name": f"plain-{forward}-{version}",
        "vip": VIPS[forward, version],
        "port": PLAIN,
        "protocol": "tcp",
        "forward": forward,
        "backends": [backend | {"port": 7001} if forward == "nat" else backend],
    }


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "traffic-") as lab:
        yield lab


@pytest.fixture(scope="module")
def running(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    config = lab.config(workers=1)
    config["services"] += [plain(*way) for way in WAYS]
    with Balancer(lab.namespace("lb"), config, tmp_path_factory.mktemp("traffic")) as balancer:
        yield balancer


# ---- what is balanced arrives


def assert_shared(counts: dict[str, int], total: int) -> None:
    """Three backends of one weight share evenly: a third each, within six standard deviations."""
    spread = 6 * (total * 2 / 9) ** 0.5
    assert sorted(counts) == list(BACKENDS)
    assert all(abs(count - total / 3) < spread for count in counts.values()), counts


@every_way
def test_fetch_from_200_ports(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    got = lab.client("fetch", VIPS[forward, version], "--count", 200)
    assert (got["answered"], got["ports"], got["errors"]) == (200, 200, {})
    assert got["clients"] == {address("client", "eth0", version): 200}
    assert_shared(got["backends"], 200)


@every_way
def test_a_thousand_connections_at_once(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    got = lab.client("fetch", VIPS[forward, version], "--count", 1000)
    assert (got["answered"], got["ports"], got["errors"]) == (1000, 1000, {})
    assert_shared(got["backends"], 1000)


@every_way
def test_udp_flows_are_never_torn(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    got = lab.client("echo", VIPS[forward, version], "--count", 300, "--rounds", 5)
    assert (got["answered"], got["ports"], got["torn"], got["errors"]) == (300, 300, 0, {})
    assert_shared(got["backends"], 300)


@pytest.fixture(scope="module", params=[True, False], ids=["offloads", "no offloads"])
def offloads(lab: Lab, request: pytest.FixtureRequest) -> Iterator[bool]:
    lab.set_offloads(request.param)
    yield request.param
    lab.set_offloads(True)


@pytest.mark.parametrize("direction", ["download", "upload"])
@every_way
def test_bulk_transfer_is_intact(
    lab: Lab, balancer: Balancer, offloads: bool, forward: str, version: int, direction: str
) -> None:
    size = 200_000_000 if offloads and direction == "download" else 50_000_000
    before = balancer.status()["counters"]
    got = lab.client(direction, VIPS[forward, version], "--bytes", size)
    after = balancer.status()["counters"]
    assert (got["bytes"], got["verified"]) == (size, True)
    assert got["backend"] in BACKENDS
    sent = after["transmitted_bytes"] - before["transmitted_bytes"]
    average = sent / (after["transmitted"] - before["transmitted"])
    if direction == "upload" or forward == "nat":
        assert sent > size
    assert average <= 1514 or offloads
    if direction == "upload":
        assert (average > 1514) == offloads, "a GSO packet leaves as it came"


# ---- connections end as their ends want it


class Pair:
    """A connection through the balancer, both ends in hand."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        for end in (client, server):
            end.settimeout(PATIENCE)


@pytest.fixture(scope="module")
def connect(lab: Lab, running: Balancer) -> Iterator[Callable[[str, int], Pair]]:
    with ExitStack() as undo:

        def listen(port: int) -> socket.socket:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

        listeners = {
            forward: undo.enter_context(within(lab.namespace("b1"), listen, PORT[forward, PLAIN]))
            for forward in ("nat", "dsr")
        }

        def make(forward: str, version: int) -> Pair:
            target = VIPS[forward, version], PLAIN
            client = undo.enter_context(
                within(lab.namespace("client"), socket.create_connection, target, PATIENCE)
            )
            listeners[forward].settimeout(PATIENCE)
            server, (peer, port, *_) = listeners[forward].accept()
            undo.enter_context(server)
            assert (peer.removeprefix("::ffff:"), port) == client.getsockname()[:2]
            return Pair(client, server)

        yield make


def abort(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@every_way
def test_half_close(connect: Callable[[str, int], Pair], forward: str, version: int) -> None:
    pair = connect(forward, version)
    pair.client.sendall(b"question")
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.server.makefile("rb").read() == b"question", "the FIN has come"
    for part in (b"a long ", b"answer"):
        pair.server.sendall(part)
        assert pair.client.recv(100) == part
    pair.server.close()
    assert pair.client.recv(100) == b""


@pytest.mark.parametrize("aborting", ["client", "server"])
@every_way
def test_reset(connect: Callable[[str, int], Pair], forward: str, version: int, aborting: str) -> None:
    pair = connect(forward, version)
    pair.client.sendall(b"question")
    assert pair.server.recv(100) == b"question"
    ends = {"client": pair.client, "server": pair.server}
    abort(ends.pop(aborting))
    (other,) = ends.values()
    with pytest.raises(ConnectionResetError):
        other.recv(100)


# ---- the counters say what happened


def counted(balancer: Balancer, service: str, key: str) -> dict[str, int]:
    """One counter of a service, by backend."""
    return {name: counters[key] for name, counters in backends(balancer.status(), service).items()}


def gained(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {key: after[key] - before[key] for key in before}


# service, client, VIP port, what is counted of each backend, how many of that for each port of the client's;
# a UDP port that an earlier test used is no new flow
COUNTED = [("web", "fetch", HTTP, "new_flows", 1), ("echo", "echo", ECHO, "packets", 3)]


@pytest.mark.parametrize(("service", "command", "port", "counter", "each"), COUNTED, ids=["tcp", "udp"])
@every_way
def test_each_backend_has_its_counters(
    lab: Lab,
    balancer: Balancer,
    forward: str,
    version: int,
    service: str,
    command: str,
    port: int,
    counter: str,
    each: int,
) -> None:
    name = f"{service}-{forward}-{version}"
    before = counted(balancer, name, counter)
    got = lab.client(command, VIPS[forward, version], "--count", 120)
    key = "[{}]:{}" if version == 6 else "{}:{}"
    expected = {
        key.format(address(node, "eth0", version), PORT.get((forward, port), port)): count * each
        for node, count in got["backends"].items()
    }
    assert gained(counted(balancer, name, counter), before) == expected


@every_way
def test_packets_are_counted_one_by_one(lab: Lab, balancer: Balancer, forward: str, version: int) -> None:
    service = f"discard-{forward}-{version}"
    before, packets = balancer.status()["counters"], counted(balancer, service, "packets")
    volume, flows = counted(balancer, service, "bytes"), counted(balancer, service, "new_flows")
    sent = lab.generate(VIPS[forward, version], "--frames", 3000, "--flows", 300, "--size", 100)
    assert until(lambda: balancer.status()["counters"]["packets"] - before["packets"] >= 3000)
    after = balancer.status()["counters"]
    total = gained(
        {key: value for key, value in after.items() if isinstance(value, int)},
        {key: value for key, value in before.items() if isinstance(value, int)},
    )
    paths = {name: count for name, count in gained(after["paths"], before["paths"]).items() if count}
    assert sent["frames"] == 3000
    assert {key: total[key] for key in ("packets", "bytes", "forwarded", "transmitted", "ring_drops")} == {
        "packets": 3000, "bytes": 300_000, "forwarded": 3000, "transmitted": 3000, "ring_drops": 0,
    }  # fmt: skip
    assert paths == {"scheduled": 300, "conntrack": 2700}
    assert (after["drops"], after["passed"]) == (before["drops"], before["passed"])
    assert sum(gained(counted(balancer, service, "packets"), packets).values()) == 3000
    assert sum(gained(counted(balancer, service, "bytes"), volume).values()) == 300_000
    assert sum(gained(counted(balancer, service, "new_flows"), flows).values()) == 300


def test_the_kernel_counts_the_same_frames(lab: Lab, balancer: Balancer) -> None:
    before, links = balancer.status()["counters"], lab.counters("lb")
    lab.client("fetch", VIPS["nat", 4], "--count", 200)
    after, links_after = balancer.status()["counters"], lab.counters("lb")
    received = sum(links_after[name].rx_packets - links[name].rx_packets for name in ("eth0", "eth1"))
    sent = sum(links_after[name].tx_packets - links[name].tx_packets for name in ("eth0", "eth1"))
    packets, transmitted = (after[key] - before[key] for key in ("packets", "transmitted"))
    assert packets == transmitted > 200 * 8
    assert 0 <= received - packets < 100, "beyond the service's traffic only ARP and neighbour discovery"
    assert 0 <= sent - transmitted < 100
    assert drops(balancer.status()) == {}


# ---- prefixes and ranges


@pytest.mark.parametrize("version", [4, 6])
def test_a_prefix_and_a_range(lab: Lab, balancer: Balancer, version: int) -> None:
    """Two addresses of a prefix, and the last port of a range; what lies beside them is the host's."""
    prefix, inside, outside = {
        4: ("203.0.113.64/28", ("203.0.113.64", "203.0.113.79"), "203.0.113.80"),
        6: ("2001:db8:cafe:0:1::/80", ("2001:db8:cafe:0:1::", "2001:db8:cafe:0:1:ffff::1"), "2001:db8:cafe:0:2::1"),
    }[version]
    backends = [{"address": address(node, "eth0", version)} for node in BACKENDS]
    service = {"name": "prefix", "vip": prefix, "protocol": "tcp", "forward": "nat", "backends": backends}
    before = dict(balancer.config)
    wanted = [*before["services"], {**service, "port": "8070-8080"}]
    assert balancer.reload(before | {"services": wanted}).returncode == 0
    try:
        for vip in inside:
            got = lab.client("fetch", vip, "--port", 8080, "--count", 60)
            assert (got["answered"], sorted(got["backends"])) == (60, list(BACKENDS))
            assert got["clients"] == {address("client", "eth0", version): 60}
        passed = packets(balancer)
        for vip, port in ((outside, 8080), (inside[0], 8081)):
            with pytest.raises(LabError):
                lab.client("fetch", vip, "--port", port, "--count", 1, timeout=2)
        assert packets(balancer) == passed
    finally:
        assert balancer.reload(before).returncode == 0


# ---- the host's own traffic is the host's


def packets(balancer: Balancer) -> int:
    return int(balancer.status()["counters"]["packets"])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("node", BACKENDS)
def test_the_host_reaches_a_backends_service_itself(
    lab: Lab, balancer: Balancer, node: str, version: int
) -> None:
    """As a health check does, while the service sends clients to that very address and port."""
    assert lab.client("fetch", VIPS["nat", version], "--count", 20)["answered"] == 20
    before = packets(balancer)
    target = address(node, "eth0", version)
    http = lab.client("fetch", target, "--port", 8080, "--count", 20, node="lb")
    udp = lab.client("echo", target, "--port", 5001, "--count", 20, node="lb")
    assert (http["backends"], http["clients"]) == ({node: 20}, {address("lb", "eth1", version): 20})
    assert udp["backends"] == {node: 20}
    assert packets(balancer) == before


@contextmanager
def echo_server(namespace: str, port: int) -> Iterator[None]:
    """One connection after another, each echoed to its end."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    listener = within(
        namespace, socket.create_server, ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
    )
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def receive(sock: socket.socket, count: int) -> bytes:
    """That many bytes, or fewer when the stream ends."""
    parts = []
    while count and (part := sock.recv(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("node", "interface"), [("router", "eth0"), ("client", "eth0"), ("b1", "eth1")])
def test_management_connections_stay_open(
    lab: Lab, balancer: Balancer, node: str, interface: str, version: int
) -> None:
    target = address("lb", interface, version), 2222
    with (
        echo_server(lab.namespace("lb"), target[1]),
        within(lab.namespace(node), socket.create_connection, target, PATIENCE) as session,
    ):
        for data in (b"ls\n", b"x" * 30_000):
            before = packets(balancer)
            session.sendall(data)
            assert receive(session, len(data)) == data
            assert packets(balancer) == before
            assert lab.client("fetch", VIPS["nat", version], "--count", 20)["answered"] == 20


@pytest.mark.parametrize("version", [4, 6])
def test_neighbours_are_still_found(lab: Lab, balancer: Balancer, version: int) -> None:
    """With every entry forgotten on both sides of the balancer, the next connection resolves anew."""
    for node in ("lb", "router", *BACKENDS):
        with lab.rtnl(node) as rtnl:
            forget_neighbours(rtnl, version)
    got = lab.client("fetch", VIPS["nat", version], "--count", 20)
    assert (got["answered"], got["errors"]) == (20, {})


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("target", [("router", "l0"), ("b1", "eth0")])
def test_the_host_can_ping(lab: Lab, balancer: Balancer, target: tuple[str, str], version: int) -> None:
    protocol, request = {
        4: (socket.IPPROTO_ICMP, "0800f7fd00010001"),
        6: (socket.IPPROTO_ICMPV6, "8000000000010001"),
    }[version]
    to = address(*target, version)
    with within(lab.namespace("lb"), socket.socket, FAMILY[version], socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(PATIENCE)
        sock.sendto(bytes.fromhex(request), (to, 0))
        while sock.recvfrom(1500)[1][0] != to:
            pass


# ---- and a service's traffic never is


@every_way
def test_no_packet_of_a_service_reaches_the_host(
    lab: Lab, balancer: Balancer, forward: str, version: int
) -> None:
    """The host holds the VIP for this test, so that its stack would answer every packet it saw."""
    bits = {4: 32, 6: 128}[version]
    with lab.rtnl("lb") as rtnl:
        rtnl.addr("add", index=1, address=VIPS[forward, version], prefixlen=bits)
    try:
        before, forwarded = within(lab.namespace("lb"), snmp), packets(balancer)
        assert lab.client("fetch", VIPS[forward, version], "--count", 100)["answered"] == 100
        assert lab.client("echo", VIPS[forward, version], "--count", 100)["answered"] == 100
        after = within(lab.namespace("lb"), snmp)
    finally:
        with lab.rtnl("lb") as rtnl:
            rtnl.addr("del", index=1, address=VIPS[forward, version], prefixlen=bits)
    came = gained(after, {key: before[key] for key in HOST_COUNTERS})
    assert packets(balancer) - forwarded > 800
    assert came.pop("IpInReceives") + came.pop("Ip6InReceives") < 100, "neighbour discovery"
    assert set(came.values()) == {0}, came


HOST_COUNTERS = (
    "IpInReceives",
    "Ip6InReceives",
    "TcpInSegs",
    "TcpOutRsts",
    "UdpInDatagrams",
    "UdpNoPorts",
    "Udp6NoPorts",
    "IcmpOutDestUnreachs",
    "Icmp6OutDestUnreachs",
)
