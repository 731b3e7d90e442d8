"""Single frames through ``fastlb run``: tags, offloads, broken frames, full rings; seen on the wire on both sides.

    client                        host (fastlb)                      servers
      c0 10.9.0.1  fd09::1  ────    l0 10.9.0.2  fd09::2
                                    l1 10.8.0.2  fd08::2  mtu 1400  ────  s0 (no address: only watched)
    a program  ───────────────      tap0 10.7.0.2

Raw frames come from 10.9.0.99 and fd09::99, which no kernel holds, so nobody but fastlb answers to them; 10.8.0.11 and
fd08::11 are the backends, 10.9.0.50 and fd09::50 one on the client's own link. The host knows their MACs for good.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from operator import methodcaller
from typing import Any

import dpkt
import pytest

from tests.frames import (
    ACK,
    BALANCER_MAC,
    FIN,
    PSH,
    ROUTER_MAC,
    ROUTING,
    RST,
    SYN,
    TCP,
    UDP,
    Seen,
    checksum,
    ethernet,
    frame,
    ip4_packet,
    ip6_packet,
    mac_bytes,
    pseudo_header,
    take_apart,
)
from tests.netns.balancer import PATIENCE, Balancer, drops, snmp, until, within
from tests.netns.namespaces import Namespace, veth
from tests.netns.wire import GSO_UFO, OFFLOADS, PLAIN, Wire, leave_to_device, payload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000

CLIENT = {4: "10.9.0.99", 6: "fd09::99"}
BACKEND = {4: "10.8.0.11", 6: "fd08::11"}
HAIRPIN = {4: "10.9.0.50", 6: "fd09::50"}  # a backend on the client's link
BACKEND_MAC, HAIRPIN_MAC = "02:00:00:00:08:11", "02:00:00:00:09:50"
VIPS = {  # of (service, IP version)
    ("nat", 4): "203.0.113.10", ("nat", 6): "2001:db8:cafe::10",
    ("dsr", 4): "203.0.113.20", ("dsr", 6): "2001:db8:cafe::20",
    ("hairpin", 4): "203.0.113.30", ("hairpin", 6): "2001:db8:cafe::30",
    ("drop", 4): "203.0.113.40", ("drop", 6): "2001:db8:cafe::40",
    ("reset", 4): "203.0.113.50", ("reset", 6): "2001:db8:cafe::50",
}  # fmt: skip
PORT, NAT_PORT = 80, 8080
BLOCKS = 32  # of the ring, 128 KiB each: as few as let fastlb wait some 30 ms for a processor
MTU = 1400  # of the link to the servers
NUMBERS = {"tcp": TCP, "udp": UDP}


def service(kind: str, version: int, protocol: str) -> dict[str, Any]:
    of_kind: dict[str, list[dict[str, Any]]] = {
        "nat": [{"address": BACKEND[version], "port": NAT_PORT}],
        "dsr": [{"address": BACKEND[version]}],
        "hairpin": [{"address": HAIRPIN[version]}],
    }
    return {
        "name": f"{kind}-{version}-{protocol}", "vip": VIPS[kind, version], "port": PORT, "protocol": protocol,
        "forward": "nat" if kind == "nat" else "dsr", "no_backend": "reset" if kind == "reset" else "drop",
        "backends": of_kind.get(kind, []),
    }  # fmt: skip


CONFIG = {
    "interfaces": ["l0", "l1", "tap0"],
    "workers": 1,
    "flows": 10_000,
    "maglev_size": 251,
    "ring": {"block_size": "128KiB", "blocks": BLOCKS},
    "services": [service(*at, protocol) for at in VIPS for protocol in ("tcp", "udp")],
}


# ---- the host and its links


class Rig:
    """Both wires, the tap, and the balancer between them."""

    def __init__(
        self, namespaces: tuple[Namespace, Namespace], client: Wire, servers: Wire, tap: int, balancer: Balancer
    ) -> None:
        self.client_namespace, self.host = namespaces
        self.client, self.servers, self.tap, self.balancer = client, servers, tap, balancer
        self._counted: dict[str, Any] = {}
        self._marker = 1024

    def packets(self) -> int:
        """How many frames the pipeline has seen."""
        return int(self.balancer.status()["counters"]["packets"])

    def snmp(self) -> dict[str, int]:
        return within(self.host.name, snmp)

    def settle(self) -> None:
        """Wait until everything sent from the client's side is dealt with: frames stay in order."""
        self._marker += 1
        self.client.send(frame(CLIENT[4], self._marker, VIPS["dsr", 4], PORT, "udp", payload=b"marker"))
        while self.servers.receive().seen.sport != self._marker:
            pass

    def new_drops(self) -> dict[str, int]:
        """The drops since the last call."""
        before, self._counted = self._counted, drops(self.balancer.status())
        fresh = {name: count - before.get(name, 0) for name, count in self._counted.items()}
        return {name: count for name, count in fresh.items() if count}


def open_tap(name: str) -> int:
    """A tap in the calling thread's namespace whose frames carry a virtio_net_hdr."""
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return tap


def set_up(client: Namespace, host: Namespace, servers: Namespace) -> int:
    """Cables, addresses, and the neighbours that nobody would answer for; returns the tap."""
    servers.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    veth(client, "c0", host, "l0")
    veth(host, "l1", servers, "s0")
    tap = host.run(open_tap, "tap0")
    client.set_link("c0", address=ROUTER_MAC)
    host.set_link("l1", mtu=MTU)
    servers.set_link("s0", mtu=MTU)
    for interface, network in (("l0", "9"), ("l1", "8"), ("tap0", "7")):
        host.set_link(interface, address=BALANCER_MAC)
        host.link_up(interface)
        host.add_address(interface, f"10.{network}.0.2/24")
        host.add_address(interface, f"fd0{network}::2/64")
    client.add_address("c0", "10.9.0.1/24")
    client.add_address("c0", "fd09::1/64")
    client.add_route("203.0.113.0/24", "10.9.0.2")
    client.add_route("2001:db8:cafe::/64", "fd09::2")
    for version in (4, 6):
        for address, interface, mac in (
            (CLIENT[version], "l0", ROUTER_MAC),
            (HAIRPIN[version], "l0", HAIRPIN_MAC),
            (BACKEND[version], "l1", BACKEND_MAC),
        ):
            place = {"dst": address, "lladdr": mac, "ifindex": host.index(interface), "state": "permanent"}
            host.rtnl(methodcaller("neigh", "replace", **place))
    return tap


@pytest.fixture(scope="module")
def whole_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with ExitStack() as undo:
        client, host, servers = (
            undo.enter_context(Namespace(label)) for label in ("client", "host", "servers")
        )
        cpu = {min(os.sched_getaffinity(0))}  # what one processor sends arrives in order
        undo.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        tap = set_up(client, host, servers)
        undo.callback(os.close, tap)
        balancer = undo.enter_context(Balancer(host.name, CONFIG, tmp_path_factory.mktemp("frames")))
        os.sched_setaffinity(0, cpu)
        yield Rig((client, host), Wire(client, "c0", undo), Wire(servers, "s0", undo), tap, balancer)


@pytest.fixture
def rig(whole_rig: Rig) -> Iterator[Rig]:
    whole_rig.client.arrived()
    whole_rig.servers.arrived()
    whole_rig.new_drops()
    yield whole_rig
    whole_rig.balancer.show_log()
    assert whole_rig.balancer.running


_ports = iter(range(2000, 60000))


def sent_frame(kind: str, version: int, protocol: str = "tcp", size: int = 100, **more: Any) -> bytes:
    """From the client to a service, from a port of its own."""
    more = {"flags": SYN if size == 0 else ACK | PSH, "payload": payload(size), **more}
    return frame(CLIENT[version], next(_ports), VIPS[kind, version], PORT, protocol, **more)


# ---- offloads and rewriting


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_to_the_backend(rig: Rig, forward: str, version: int, protocol: str, offload: str) -> None:
    whole = sent_frame(forward, version, protocol, 20_000 if offload == "gso" else 999)
    left, raw = leave_to_device(whole, offload)
    rig.client.send(raw, left)
    got, sent = rig.servers.receive(), take_apart(whole)
    assert (got.seen.eth_dst, got.seen.eth_src) == (BACKEND_MAC, BALANCER_MAC)
    assert got.offload[:2] == left[:2]
    assert got.offload[3:] == left[3:]
    if forward == "dsr":
        assert got.raw[12:] == raw[12:], "nothing but the MAC addresses has changed"
    else:
        assert (got.seen.src, got.seen.sport, got.seen.ttl) == (sent.src, sent.sport, sent.ttl - 1)
        assert (got.seen.dst, got.seen.dport) == (BACKEND[version], NAT_PORT)
        assert got.raw[-900:] == raw[-900:]
    assert rig.new_drops() == {}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_back_to_the_client(rig: Rig, version: int, protocol: str, offload: str) -> None:
    asked = sent_frame("nat", version, protocol, 0)
    rig.client.send(asked)
    there = rig.servers.receive().seen
    flags, size = ACK | PSH, 20_000 if offload == "gso" else 999
    whole = frame(there.dst, there.dport, there.src, there.sport, protocol, flags=flags, payload=payload(size))
    left, raw = leave_to_device(whole, offload)
    rig.servers.send(raw, left)
    got = rig.client.receive()
    assert (got.seen.eth_dst, got.seen.eth_src) == (ROUTER_MAC, BALANCER_MAC)
    assert (got.seen.src, got.seen.sport) == (VIPS["nat", version], PORT)
    assert (got.seen.dst, got.seen.dport, got.seen.ttl) == (CLIENT[version], take_apart(asked).sport, 63)
    assert got.raw[-900:] == raw[-900:]
    assert (got.offload[:2], got.offload[3:]) == (left[:2], left[3:])
    assert rig.new_drops() == {}


# ---- VLAN tags

TAGS: list[tuple[str, tuple[tuple[int, int], ...]]] = [
    ("802.1q", ((0x8100, 5),)),
    ("with priority", ((0x8100, 0x6FFE),)),
    ("priority only", ((0x8100, 0x6000),)),
    ("802.1ad", ((0x88A8, 7),)),
    ("qinq", ((0x88A8, 7), (0x8100, 5))),
    ("two 802.1q", ((0x8100, 7), (0x8100, 5))),
]
tagged = pytest.mark.parametrize("tags", [row[1] for row in TAGS], ids=[row[0] for row in TAGS])


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("version", [4, 6])
@tagged
def test_tags_stay_on_their_link(rig: Rig, tags: tuple[tuple[int, int], ...], version: int, offload: str) -> None:
    whole = sent_frame("hairpin", version, size=20_000 if offload == "gso" else 999, tags=tags)
    left, raw = leave_to_device(whole, offload)
    rig.client.send(raw, left)
    got = rig.client.receive()
    assert got.seen == replace(take_apart(whole), eth_dst=HAIRPIN_MAC, eth_src=BALANCER_MAC)
    assert got.seen.tags == tags
    assert (got.offload.gso_type, got.offload.gso_size) == (left.gso_type, left.gso_size)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("forward", ["nat", "dsr"])
@pytest.mark.parametrize("version", [4, 6])
@tagged
def test_tags_do_not_cross_to_another_link(
    rig: Rig, tags: tuple[tuple[int, int], ...], version: int, forward: str, offload: str
) -> None:
    whole = sent_frame(forward, version, size=20_000 if offload == "gso" else 999, tags=tags)
    left, raw = leave_to_device(whole, offload)
    rig.client.send(raw, left)
    got, sent = rig.servers.receive(), take_apart(whole)
    target = (BACKEND[version], NAT_PORT) if forward == "nat" else (sent.dst, sent.dport)
    assert (got.seen.tags, got.seen.eth_dst) == ((), BACKEND_MAC)
    assert (got.seen.src, got.seen.sport, got.seen.dst, got.seen.dport) == (sent.src, sent.sport, *target)
    assert got.seen.segment[20:] == sent.segment[20:]
    assert (got.offload.gso_type, got.offload.gso_size) == (left.gso_type, left.gso_size)


@tagged
def test_a_refusal_bears_the_tags_of_what_it_refuses(rig: Rig, tags: tuple[tuple[int, int], ...]) -> None:
    sent = take_apart(raw := sent_frame("reset", 4, size=0, tags=tags))
    rig.client.send(raw)
    got = rig.client.receive().seen
    assert (got.tags, got.eth_dst, got.src, got.sport) == (tags, ROUTER_MAC, sent.dst, sent.dport)
    assert (got.tcp.flags, got.tcp.ack) == (RST | ACK, sent.tcp.seq + 1)


# ---- whose frames they are


@pytest.mark.parametrize(
    "mac", ["02:00:00:00:00:77", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"], ids=["other", "broadcast", "multicast"]
)
def test_frames_for_others_are_ignored(rig: Rig, mac: str) -> None:
    rig.settle()
    before = rig.packets()
    for version in (4, 6):
        rig.client.send(mac_bytes(mac) + sent_frame("dsr", version)[6:])
    rig.settle()
    assert rig.packets() - before == 1, "the marker"
    assert rig.new_drops() == {}


def unknown(version: int, port: int = PORT, vip: str | None = None, protocol: str = "udp", **more: Any) -> bytes:
    return frame(CLIENT[version], 1024, vip or VIPS["dsr", version], port, protocol, payload=b"x", **more)


def fragment(more: bool, offset: int, **changes: Any) -> bytes:
    packet = bytearray(unknown(4, **changes)[14:])
    packet[6:8] = (more << 13 | offset).to_bytes(2, "big")
    packet[10:12] = bytes(2)
    packet[10:12] = checksum(bytes(packet[:20])).to_bytes(2, "big")
    return ethernet(bytes(packet))


FOR_THE_HOST: list[tuple[str, bytes, str]] = [
    ("unknown vip", unknown(4, vip="203.0.113.99"), "IpInReceives"),
    ("other port", unknown(4, port=81), "IpInReceives"),
    ("first fragment, other port", fragment(True, 0, port=81), "IpInReceives"),
    ("last fragment, unknown vip", fragment(False, 185, vip="203.0.113.99"), "IpInReceives"),
    ("other protocol", ethernet(ip4_packet(CLIENT[4], VIPS["dsr", 4], 132, bytes(20))), "IpInReceives"),
    ("timestamp", ethernet(ip4_packet(CLIENT[4], VIPS["dsr", 4], 1, b"\r\0\xf2\xff\0\0\0\0")), "IpInReceives"),
    ("cut before the ports", ethernet(ip4_packet(CLIENT[4], VIPS["dsr", 4], UDP, b"\0\0\0")), "IpInReceives"),
    ("unknown vip, ipv6", unknown(6, vip="2001:db8:cafe::99"), "Ip6InReceives"),
    ("other port, ipv6", unknown(6, port=81), "Ip6InReceives"),
    (
        "fragment of icmp, ipv6",
        ethernet(ip6_packet(CLIENT[6], VIPS["dsr", 6], 58, bytes(8), extensions=((44, b"\0\1" + bytes(4)),))),
        "Ip6InReceives",
    ),
]


@pytest.mark.parametrize(
    ("raw", "counter"), [row[1:] for row in FOR_THE_HOST], ids=[row[0] for row in FOR_THE_HOST]
)
def test_what_is_no_services_is_left_to_the_host(rig: Rig, raw: bytes, counter: str) -> None:
    rig.settle()
    host, before = rig.snmp(), rig.packets()
    for _ in range(10):
        rig.client.send(raw)
    rig.settle()
    assert rig.packets() - before == 1, "the marker"
    assert 10 <= rig.snmp()[counter] - host[counter] < 20, "beyond these only neighbour discovery"
    assert rig.new_drops() == {}


def test_a_service_is_not_the_hosts(rig: Rig) -> None:
    """The same count, with frames of a service."""
    rig.settle()
    host, before = rig.snmp(), rig.packets()
    for _ in range(10):
        rig.client.send(sent_frame("dsr", 4))
    rig.settle()
    assert rig.packets() - before == 11
    assert rig.snmp()["IpInReceives"] == host["IpInReceives"]


# ---- broken frames


def edited(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def tcp4(**more: Any) -> bytes:
    return frame(CLIENT[4], 1500, VIPS["nat", 4], PORT, **more)


def udp4(**more: Any) -> bytes:
    return frame(CLIENT[4], 1500, VIPS["nat", 4], PORT, "udp", payload=b"12345678", **more)


def short4(protocol: int, l4: bytes) -> bytes:
    return ethernet(ip4_packet(CLIENT[4], VIPS["nat", 4], protocol, struct.pack("!HH", 1500, PORT) + l4))


BROKEN: list[tuple[str, bytes, str]] = [
    ("ipv4 longer than the frame", edited(tcp4(), 16, b"\x05\xdc"), "ip_length"),
    ("ipv4 shorter than its header", edited(tcp4(), 16, b"\x00\x13"), "ip_length"),
    ("ipv6 longer than the frame", edited(sent_frame("nat", 6), 18, b"\x05\xdc"), "ip_length"),
    (
        "ipv6 routing header",
        sent_frame("nat", 6, extensions=((ROUTING, b"\x03\x01" + bytes(4)),)),
        "routing_header",
    ),
    ("tcp cut short", short4(TCP, bytes(12)), "tcp_header"),
    ("tcp header of 16 bytes", edited(tcp4(), 46, b"\x40"), "tcp_header"),
    ("tcp header beyond the packet", edited(tcp4(), 46, b"\xf0"), "tcp_header"),
    ("syn and fin", tcp4(flags=SYN | FIN), "tcp_flags"),
    ("syn and rst", tcp4(flags=SYN | RST), "tcp_flags"),
    ("udp cut short", short4(UDP, bytes(2)), "udp_length"),
    ("udp length below 8", edited(udp4(), 38, b"\x00\x07"), "udp_length"),
    ("udp length beyond the packet", edited(udp4(), 38, b"\x01\x00"), "udp_length"),
    ("no backend", sent_frame("drop", 4), "no_backend"),
    ("no backend, ipv6", sent_frame("drop", 6, "udp"), "no_backend"),
    ("rst that would be refused", sent_frame("reset", 4, flags=RST), "no_backend"),
]


@pytest.mark.parametrize(("raw", "reason"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_broken_frames_are_counted_by_name(rig: Rig, raw: bytes, reason: str) -> None:
    rig.settle()
    host = rig.snmp()["IpInReceives"]
    rig.client.send(raw)
    rig.settle()
    assert rig.new_drops() == {reason: 1}
    assert rig.snmp()["IpInReceives"] == host, "it is not given to the host either"


# ---- size

# service, IP version, protocol, offload, payload: the largest that fits, one byte more
FITTING = [
    ("dsr", 4, "tcp", "plain", MTU - 40),
    ("nat", 4, "udp", "plain", MTU - 28),
    ("nat", 6, "tcp", "plain", MTU - 60),
    ("dsr", 6, "udp", "partial", MTU - 48),
]


@pytest.mark.parametrize(("kind", "version", "protocol", "offload", "size"), FITTING)
def test_frames_over_the_mtu(rig: Rig, kind: str, version: int, protocol: str, offload: str, size: int) -> None:
    """What must not be fragmented is answered, with the MTU."""
    left, raw = leave_to_device(sent_frame(kind, version, protocol, size, df=True), offload)
    rig.client.send(raw, left)
    assert len(rig.servers.receive().raw) == MTU + 14
    before = rig.balancer.status()["counters"]["paths"]["too_big"]
    left, raw = leave_to_device(sent_frame(kind, version, protocol, size + 1, df=True), offload)
    rig.client.send(raw, left)
    answer = told_too_big(rig, version)
    assert (answer.src, answer.dst) == (VIPS[kind, version], CLIENT[version])
    assert (answer.segment[0], int.from_bytes(answer.segment[4:8], "big")) == (3 if version == 4 else 2, MTU)
    assert rig.balancer.status()["counters"]["paths"]["too_big"] == before + 1
    assert rig.new_drops() == {}


def told_too_big(rig: Rig, version: int) -> Seen:
    """The next ICMP error that the client gets; ICMPv6 is more than errors."""
    while True:
        seen = take_apart(ethernet(rig.client.receive_packet(1 if version == 4 else 58)))
        if seen.segment[0] == (3 if version == 4 else 2):
            return seen


@pytest.mark.parametrize("kind", ["nat", "dsr"])
@pytest.mark.parametrize("offload", ["plain", "partial"])
def test_what_may_be_fragmented_is(rig: Rig, kind: str, offload: str) -> None:
    """Each fragment is a message of headers in memory of its own and a payload in the ring."""
    whole = sent_frame(kind, 4, "udp", 1472)
    left, raw = leave_to_device(whole, offload)
    rig.client.send(raw, left)
    packets = [dpkt.ip.IP(rig.servers.receive_packet(UDP)) for _ in range(2)]
    datagram = b"".join(bytes(packet.data) for packet in packets)
    assert [(packet.offset * 8, packet.mf) for packet in packets] == [(0, 1), ((MTU - 20) // 8 * 8, 0)]
    assert datagram[8:] == take_apart(whole).segment[8:]
    source, target = packets[0].src, packets[0].dst
    assert checksum(pseudo_header(source, target, UDP, len(datagram)) + datagram) == 0


@pytest.mark.parametrize("kind", ["nat", "dsr"])
def test_datagrams_of_a_super_frame_are_fragmented(rig: Rig, kind: str) -> None:
    """In more pieces than one system call takes; the servers find each as it was sent."""
    data = payload(60_000)
    left, raw = leave_to_device(frame(CLIENT[4], 1500, VIPS[kind, 4], PORT, "udp", payload=data), "gso")
    size = MTU - 20
    before = rig.balancer.status()["counters"]["transmitted"]
    rig.client.send(raw, left._replace(gso_size=size))
    count = -(-len(data) // size)
    got: dict[int, list[dpkt.ip.IP]] = {}
    for _ in range(2 * count - 1):
        packet = dpkt.ip.IP(rig.servers.receive_packet(UDP))
        got.setdefault(packet.id, []).append(packet)
    datagrams = [b"".join(bytes(part.data) for part in parts) for parts in got.values()]
    assert all(
        checksum(pseudo_header(parts[0].src, parts[0].dst, UDP, len(whole)) + whole) == 0
        for parts, whole in zip(got.values(), datagrams, strict=True)
    )
    assert [whole[8:] for whole in datagrams] == [data[at : at + size] for at in range(0, len(data), size)]
    assert until(lambda: rig.balancer.status()["counters"]["transmitted"] - before == 2 * count - 1)
    assert rig.new_drops() == {}


@pytest.mark.parametrize("kind", ["nat", "dsr"])
@pytest.mark.parametrize(
    ("version", "protocol", "headers"), [(4, "tcp", 40), (4, "udp", 28), (6, "tcp", 60), (6, "udp", 48)]
)
def test_super_frames_are_judged_by_their_segments(
    rig: Rig, kind: str, version: int, protocol: str, headers: int
) -> None:
    left, raw = leave_to_device(sent_frame(kind, version, protocol, 30_000, df=True), "gso")
    fitting = left._replace(gso_size=MTU - headers)
    rig.client.send(raw, fitting)
    got = rig.servers.receive()
    assert (len(got.raw), got.offload.gso_size) == (len(raw), fitting.gso_size)
    rig.client.send(raw, left._replace(gso_size=MTU - headers + 1))
    assert told_too_big(rig, version).dst == CLIENT[version]


# ---- the ring


def numbered(count: int, size: int) -> list[bytes]:
    """Frames of one flow that tell their place."""
    fill = payload(size)
    return [
        frame(CLIENT[4], 1999, VIPS["dsr", 4], PORT, "udp", payload=number.to_bytes(4, "big") + fill)
        for number in range(count)
    ]


def numbers(wire: Wire, count: int) -> list[int]:
    return [int.from_bytes(wire.receive().seen.segment[8:12], "big") for _ in range(count)]


def test_more_frames_than_the_ring_holds(rig: Rig) -> None:
    """6 MB through a ring of 4 MiB, a bit at a time: every frame comes out, in order."""
    before = rig.balancer.status()["counters"]
    frames, got = numbered(5000, 1200), []
    for start in range(0, len(frames), 50):
        for each in frames[start : start + 50]:
            rig.client.send(each)
        got += numbers(rig.servers, 50)
    after = rig.balancer.status()["counters"]
    assert got == list(range(5000))
    assert after["blocks_read"] - before["blocks_read"] > BLOCKS, "each block has been used again"
    assert after["ring_drops"] == before["ring_drops"]
    assert rig.new_drops() == {}


def test_what_the_ring_loses_is_counted(rig: Rig) -> None:
    """While fastlb stands still, the ring takes what it can hold; the rest is lost, and known to be."""
    count = 6000
    frames = numbered(count, 1200)
    rig.settle()
    before = rig.balancer.status()["counters"]
    rig.balancer.send_signal(signal.SIGSTOP)
    try:
        for each in frames:
            rig.client.send(each)
    finally:
        rig.balancer.send_signal(signal.SIGCONT)

    def gained(name: str) -> int:
        return int(rig.balancer.status()["counters"][name] - before[name])

    assert until(lambda: gained("packets") + gained("ring_drops") == count)
    kept = gained("packets")
    assert count - kept > 1000 < kept
    assert numbers(rig.servers, kept) == list(range(kept)), "the first ones were kept"
    rig.settle()
    assert rig.new_drops() == {}


def test_a_frame_that_the_kernel_cannot_describe(rig: Rig) -> None:
    """UFO is nothing that virtio_net_hdr tells of: the kernel takes a slot for the frame and leaves it a hole."""
    whole = sent_frame("dsr", 4, "udp", 4000)
    left, raw = leave_to_device(whole, "gso")
    ufo = left._replace(gso_type=GSO_UFO)
    frames = numbered(30, 500)
    for number, each in enumerate(frames):
        os.write(rig.tap, PLAIN.pack() + each)
        if number % 10 == 4:
            os.write(rig.tap, ufo.pack() + raw)
    assert numbers(rig.servers, 30) == list(range(30)), "what comes before and after it is forwarded"
    assert until(lambda: rig.balancer.status()["counters"]["drops"]["ring_hole"] >= 3)
    assert rig.new_drops() == {"ring_hole": 3}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_frames_from_a_tap(rig: Rig, offload: str) -> None:
    """As from a virtual machine: the checksum is open, and GSO packets come whole."""
    whole = sent_frame("nat", 4, size=20_000 if offload == "gso" else 999)
    left, raw = leave_to_device(whole, offload)
    os.write(rig.tap, left.pack() + raw)
    got = rig.servers.receive()
    assert (got.seen.dst, got.seen.dport) == (BACKEND[4], NAT_PORT)
    assert got.offload[:2] == left[:2]


# ---- nobody there


def real_socket(rig: Rig, version: int, kind: int) -> socket.socket:
    """Of the client's kernel, which takes what is said to it."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    sock = rig.client_namespace.run(socket.socket, family, kind)
    sock.settimeout(PATIENCE)
    return sock


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_is_refused(rig: Rig, version: int) -> None:
    with real_socket(rig, version, socket.SOCK_STREAM) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect((VIPS["reset", version], PORT))


@pytest.mark.parametrize("size", [0, 1, 1400])
@pytest.mark.parametrize("version", [4, 6])
def test_udp_is_refused(rig: Rig, version: int, size: int) -> None:
    with real_socket(rig, version, socket.SOCK_DGRAM) as sock:
        sock.connect((VIPS["reset", version], PORT))
        sock.send(payload(size))
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_drop_says_nothing(rig: Rig, version: int, kind: int) -> None:
    with real_socket(rig, version, kind) as sock:
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(sock, (VIPS["drop", version], PORT))
    assert rig.new_drops() == {"no_backend": 1}


def ask(sock: socket.socket, target: tuple[str, int]) -> bytes:
    sock.connect(target)
    sock.send(b"x")
    return sock.recv(100)


def test_refusals_are_limited(rig: Rig) -> None:
    """RFC 4443 section 2.4 (f). Last: it uses up a second's allowance."""
    before = rig.balancer.status()["counters"]
    frames = [sent_frame("reset", 4, size=0) for _ in range(3000)]
    for start in range(0, 3000, 100):
        for each in frames[start : start + 100]:
            rig.client.send(each)
        rig.settle()
    limited = rig.new_drops()
    refused = rig.balancer.status()["counters"]["paths"]["rejected"] - before["paths"]["rejected"]
    assert list(limited) == ["reject_limit"]
    assert refused + limited["reject_limit"] == 3000
