"""fastlb decap in a namespace of its own: its host answers clients whose packets come through hand-made tunnels.

    sender                                             receiver
      client's sockets ─► TUN "far" ─► encapsulated      lo: the VIPs, with a UDP echo and a TCP server
                          by this test ─► s0 ══════════ r0 ─► fastlb decap ─► TUN "fastlb0" ─► the host's stack
      ◄──────────────── straight from the VIPs, without a tunnel ◄──────────────────────────────┘
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from fastlb._core import Decapsulator
from fastlb.daemon.decap import load_programs, open_tun
from fastlb.kernel import guard
from fastlb.kernel.ebpf.syscall import run_program
from tests.frames import (
    BALANCER_MAC,
    DEST_OPTS,
    FRAGMENT,
    HOP_BY_HOP,
    PADDING4,
    ROUTER_MAC,
    UDP,
    ethernet,
    frame,
    ip4_packet,
    ip6_packet,
)
from tests.netns.balancer import PATIENCE, ROOT, fastlb, snmp, until, whole_lines
from tests.netns.namespaces import Namespace, veth
from tests.netns.wire import NEEDS_CSUM, PACKET_VNET_HDR, PLAIN, SOL_PACKET, VNET_HDR, Offload
from tests.tunnels import HOST, LB, MODES, PORT, WAYS, outer_packet, tunnel, udp_segment, with_ip4_checksum

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

CLIENT = {4: "192.0.2.7", 6: "2001:db8::7"}
VIP = {4: "203.0.113.10", 6: "2001:db8:cafe::10"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
TCP_PORT, UDP_PORT = 80, 53
INNER = {version: frame(CLIENT[version], 4000, VIP[version], UDP_PORT, "udp", payload=b"x")[14:] for version in (4, 6)}
OTHER = "10.3.0.12"  # an address of the receiver's interface beside those of HOST
TUNSETIFF, IFF_TUN_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x1001, 0x4000
TUNSETOFFLOAD, TUN_F_CSUM_TSO = 0x400454D0, 7


def with_bytes(packet: bytes, at: int, new: bytes) -> bytes:
    return packet[:at] + new + packet[at + len(new) :]


class Tunneller:
    """What a balancer does: everything that the client sends to the VIPs goes into the tunnel of ``how``.

    ``offload``: GSO packets go in whole, with their checksums open, as a kernel's own tunnel device has it. The kernel
    takes no such frame from a packet socket, so then it goes to ``deliver``.
    """

    def __init__(self, sender: Namespace, undo: ExitStack, offload: bool) -> None:
        self.how: Callable[[bytes], bytes] = bytes
        self.deliver: Callable[[bytes, Offload], None] = self.send
        self._offload = offload
        self._tun = sender.run(self._open)
        undo.callback(os.close, self._tun)
        self._wire = undo.enter_context(sender.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.run(self._wire.bind, ("s0", 0))
        self._end, ended = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        undo.callback(self._thread.join)
        undo.callback(os.close, ended)

    def _open(self) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"far", IFF_TUN_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM_TSO if self._offload else 0)
        return fd

    def _run(self) -> None:
        while self._end not in (ready := select.select([self._tun, self._end], [], [])[0]):
            if ready:
                data = os.read(self._tun, 1 << 17)
                offload, packet = Offload(*struct.unpack_from("<BBHHHH", data)), data[VNET_HDR:]
                if packet[0] >> 4 == 4 or packet[6] in (6, 17):  # no neighbour discovery
                    self._forward(offload, packet)
        os.close(self._end)

    def _forward(self, offload: Offload, packet: bytes) -> None:
        raw = self.how(packet)
        if offload.flags & NEEDS_CSUM:
            further = len(raw) - len(packet)
            offload = offload._replace(hdr_len=offload.hdr_len + further, csum_start=offload.csum_start + further)
        self.deliver(raw, offload)

    def send(self, raw: bytes, offload: Offload = PLAIN) -> None:
        """A frame to the receiver."""
        self._wire.send(offload.pack() + raw)


class Servers:
    """A UDP echo and a TCP server on the VIPs; the latter answers with a digest of what it was sent."""

    def __init__(self, receiver: Namespace, undo: ExitStack) -> None:
        for version, vip in VIP.items():
            echo = undo.enter_context(receiver.run(socket.socket, FAMILY[version], socket.SOCK_DGRAM))
            echo.bind((vip, UDP_PORT))
            digest = undo.enter_context(receiver.run(socket.socket, FAMILY[version], socket.SOCK_STREAM))
            digest.bind((vip, TCP_PORT))
            digest.listen()
            for serve, server in ((self._echo, echo), (self._digest, digest)):
                threading.Thread(target=serve, args=(server,), daemon=True).start()

    def _echo(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                server.sendto(*server.recvfrom(1 << 16))

    def _digest(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _peer = server.accept()
                with connection:
                    digest = hashlib.sha256()
                    while data := connection.recv(1 << 16):
                        digest.update(data)
                    connection.sendall(digest.digest())


class Rig:
    """Both namespaces, the client's tunnels and the servers; ``fastlb decap`` is started by each test."""

    def __init__(self, undo: ExitStack, offload: bool = False) -> None:
        self.sender, self.receiver = (undo.enter_context(Namespace(label)) for label in ("sender", "receiver"))
        for namespace in (self.sender, self.receiver):
            for scope in ("all", "default"):
                namespace.sysctl(f"net/ipv4/conf/{scope}/rp_filter", 0)
        veth(self.sender, "s0", self.receiver, "r0")
        for namespace, name, mac, addresses in (
            (self.sender, "s0", ROUTER_MAC, LB), (self.receiver, "r0", BALANCER_MAC, HOST),
        ):  # fmt: skip
            namespace.set_link(name, address=mac)
            namespace.add_address(name, f"{addresses[4]}/24")
            namespace.add_address(name, f"{addresses[6]}/64")
        self.receiver.add_address("r0", f"{OTHER}/24")
        self.tunneller = Tunneller(self.sender, undo, offload)
        self.sender.set_link("far", mtu=1400, gso_max_size=32768, state="up")  # an outer IPv4 header fits
        for version in (4, 6):
            length = 32 if version == 4 else 128
            self.sender.add_address("far", f"{CLIENT[version]}/{length}")
            index = self.sender.index("far")
            vip = f"{VIP[version]}/{length}"
            self.sender.rtnl(lambda ipr, vip=vip, index=index: ipr.route("add", dst=vip, oif=index))
            self.receiver.add_address("lo", vip)
            self.receiver.add_route("0.0.0.0/0" if version == 4 else "::/0", LB[version])
            place = {"dst": LB[version], "lladdr": ROUTER_MAC, "ifindex": self.receiver.index("r0")}
            self.receiver.rtnl(methodcaller("neigh", "replace", state="permanent", **place))
        self.servers = Servers(self.receiver, undo)

    def echo(self, version: int, payload: bytes, patience: float = 1.0) -> bytes | None:
        """What a client's datagram is answered with; None: nothing."""
        with self.sender.run(socket.socket, FAMILY[version], socket.SOCK_DGRAM) as client:
            client.settimeout(patience)
            client.bind((CLIENT[version], 0))
            client.connect((VIP[version], UDP_PORT))
            client.send(payload)
            with suppress(TimeoutError):
                return client.recv(1 << 16)
            return None

    def upload(self, version: int, data: bytes) -> bytes:
        """The digest that the server answers with."""
        with self.sender.run(socket.socket, FAMILY[version], socket.SOCK_STREAM) as client:
            client.settimeout(PATIENCE)
            client.bind((CLIENT[version], 0))
            client.connect((VIP[version], TCP_PORT))
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return client.recv(64)

    def icmp_sent(self) -> int:
        """Errors and resets that the receiver's host has sent."""
        counts = self.receiver.run(snmp)
        return counts["IcmpOutDestUnreachs"] + counts["Icmp6OutDestUnreachs"] + counts["TcpOutRsts"]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        yield Rig(undo)


class Receiver:
    """One ``fastlb decap r0``, from "running" on."""

    def __init__(self, rig: Rig, directory: Path, *words: str) -> None:
        self.rig, self.log_path = rig, directory / "decap.log"
        command = [sys.executable, "-m", "fastlb", "decap", "r0", *words]
        with self.log_path.open("wb") as log:
            self.process = rig.receiver.run(subprocess.Popen, command, cwd=ROOT, stdout=log, stderr=log)

    def __enter__(self) -> Receiver:
        assert until(lambda: self.events("running") or self.process.poll() is not None)
        assert self.process.poll() is None, self.log_path.read_text()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.rig.receiver.run(guard.detach, "r0")
        if kind is not None:
            print(self.log_path.read_text(), file=sys.stderr)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has logged under this name."""
        lines = [json.loads(line) for line in whole_lines(self.log_path) if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def counters(self) -> dict[str, Any]:
        """When every packet that came is counted; the host may answer the last write before that returns."""
        assert until(self._is_settled)
        return self.events("counters")[-1]

    def _is_settled(self) -> bool:
        before = len(self.events("counters"))
        self.process.send_signal(signal.SIGUSR1)
        assert until(lambda: len(self.events("counters")) > before)
        last = self.events("counters")[-1]
        return bool(last["packets"] == last["decapsulated"] + sum(last["drops"].values()))

    def stop(self, by: signal.Signals = signal.SIGTERM) -> dict[str, Any]:
        """End it; what it says at its end."""
        self.process.send_signal(by)
        assert self.process.wait(PATIENCE) == 0, self.log_path.read_text()
        return self.events("stopped")[0]


def leftovers(rig: Rig) -> list[str]:
    """What a fastlb decap that has ended may not leave behind."""
    left = [f"guard on {found.interface}" for found in rig.receiver.run(guard.show)]
    left += [name for _, name in rig.receiver.run(socket.if_nameindex) if name not in ("lo", "r0")]
    sockets = rig.receiver.run(Path("/proc/thread-self/net/packet").read_text)
    return left + [f"packet socket: {line}" for line in sockets.splitlines()[1:]]


@pytest.fixture(scope="module")
def offloading() -> Iterator[Rig]:
    """A rig whose tunnels bring GSO packets."""
    with ExitStack() as undo:
        yield Rig(undo, offload=True)


@pytest.fixture
def host() -> Iterator[Rig]:
    """A rig of a test's own."""
    with ExitStack() as undo:
        yield Rig(undo)


@pytest.fixture(scope="module")
def running(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One for all tests of traffic."""
    with Receiver(rig, tmp_path_factory.mktemp("decap")) as receiver:
        yield receiver
        receiver.stop()
    assert leftovers(rig) == []


# ---- traffic


@pytest.mark.parametrize(("mode", "outer", "inner"), WAYS)
def test_every_tunnel(rig: Rig, running: Receiver, mode: str, outer: int, inner: int) -> None:
    rig.tunneller.how = lambda packet: tunnel(mode, outer, packet)
    before, refused = running.counters(), rig.icmp_sent()
    assert rig.echo(inner, mode.encode()) == mode.encode()
    data = random.Random(mode).randbytes(300_000)
    assert rig.upload(inner, data) == hashlib.sha256(data).digest()
    after = running.counters()
    assert after["drops"] == {}
    assert after["decapsulated"] - before["decapsulated"] > 300_000 // 1400
    assert after["merged"] > before["merged"]
    assert (rig.icmp_sent(), after["ring_drops"]) == (refused, 0)


def test_bad_packets_are_counted_and_touch_nothing(rig: Rig, running: Receiver) -> None:
    question = INNER[4]
    whole = tunnel("ipip", 4, question)
    bad = {
        "outer_checksum": whole[:24] + bytes([whole[24] ^ 1]) + whole[25:],
        "gre_key": tunnel("gre", 4, question, key=1),
        "gue_control": ethernet(outer_packet(4, UDP, udp_segment(4, b"\x20\x04\0\0" + question))),
        "inner_truncated": tunnel("ipip", 6, question[:-1]),
        "nested": tunnel("gre", 6, outer_packet(4, 4, question)),
        "ecn": tunnel("ipip", 4, question, tos=3),
    }
    rig.tunneller.how = lambda packet: tunnel("gre", 6, packet)
    before, refused = running.counters()["drops"], rig.icmp_sent()
    for raw in bad.values():
        rig.tunneller.send(raw)
        assert rig.echo(4, b"in between") == b"in between"
    after = running.counters()["drops"]
    assert {name: after[name] - before.get(name, 0) for name in after} == dict.fromkeys(bad, 1)
    assert rig.icmp_sent() == refused


def test_what_is_not_ours_stays_with_the_host(rig: Rig, running: Receiver) -> None:
    """Fragments, another port, and tunnels to an address that the interface has not."""
    before = running.counters()["packets"]
    refused = rig.icmp_sent()
    question = INNER[4]
    whole = tunnel("gue", 4, question)
    elsewhere = ip4_packet(LB[4], VIP[4], 4, question)  # the VIP is on lo
    rig.tunneller.send(whole[:14] + with_ip4_checksum(whole[14:20] + b"\x20\0" + whole[22:]))
    rig.tunneller.send(tunnel("gue", 4, question, port=6081))
    rig.tunneller.send(whole[:12] + b"\x08\0" + elsewhere)
    assert until(lambda: rig.icmp_sent() >= refused + 2)  # the host's answers to the last two
    assert running.counters()["packets"] == before


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("mode", MODES)
def test_super_frames_in_tunnels(offloading: Rig, mode: str, outer: int) -> None:
    """As from a neighbour on the same machine, whose tunnel leaves segmentation and checksums to the device."""
    data = random.Random(mode).randbytes(3_000_000)
    offloading.tunneller.how = lambda packet: tunnel(mode, outer, packet)
    device = open_tun("tin")
    decap = Decapsulator(offloading.receiver.run(device.__enter__))
    offloading.tunneller.deliver = lambda raw, offload: decap.process([raw], offload.pack())
    try:
        for inner in (4, 6):
            assert offloading.upload(inner, data) == hashlib.sha256(data).digest()
            assert offloading.echo(inner, b"open checksum") == b"open checksum"
    finally:
        offloading.tunneller.deliver = lambda raw, offload: None  # late acknowledgements
        device.__exit__(None, None, None)
    counters = decap.counters()
    assert set(counters["drops"].values()) == {0}
    assert counters["decapsulated"] < 2 * len(data) // 1400  # so there were GSO packets


# ---- what is ours

RULES: dict[str, tuple[bytes, bool]] = {
    **{f"{mode} {inner} over {outer}": (tunnel(mode, outer, INNER[inner]), True) for mode, outer, inner in WAYS},
    "IPv4 options": (tunnel("ipip", 4, INNER[4], options=PADDING4 * 10), True),
    "destination options": (tunnel("gue", 6, INNER[4], extensions=((DEST_OPTS, bytes(14)),)), True),
    "two of them": (tunnel("gre", 6, INNER[4], extensions=((DEST_OPTS, bytes(6)), (DEST_OPTS, bytes(6)))), False),
    "hop-by-hop options": (tunnel("ipip", 6, INNER[4], extensions=((HOP_BY_HOP, bytes(6)),)), False),
    "IPv6 fragment": (tunnel("ipip", 6, INNER[4], extensions=((FRAGMENT, bytes(6)),)), False),
    "another port": (tunnel("gue", 4, INNER[4], port=6081), False),
    "UDP cut": (tunnel("gue", 6, INNER[4])[:57], False),
    "to a VIP": (ethernet(ip4_packet(LB[4], VIP[4], 4, INNER[4])), False),
    "to IPv4 as IPv6": (ethernet(ip6_packet(LB[6], f"::{HOST[4]}", 4, INNER[4])), False),
    "TCP": (frame(LB[4], 1, HOST[4], 80), False),
    "tagged": (ethernet(outer_packet(4, 4, INNER[4]), tags=((0x8100, 5),)), False),
    "ARP": (ethernet(outer_packet(4, 4, INNER[4]), ethertype=0x0806), False),
    "first fragment": (ethernet(with_bytes(outer_packet(4, 4, INNER[4]), 6, b"\x20\0")), False),
    "later fragment": (ethernet(with_bytes(outer_packet(4, 4, INNER[4]), 6, b"\0\1")), False),
    "header length 4": (ethernet(with_bytes(outer_packet(4, 4, INNER[4]), 0, b"\x44")), False),
    "version 5": (ethernet(with_bytes(outer_packet(4, 4, INNER[4]), 0, b"\x55"), ethertype=0x0800), False),
    "version 7": (ethernet(with_bytes(outer_packet(6, 4, INNER[4]), 0, b"\x70"), ethertype=0x86DD), False),
}


@pytest.fixture(scope="module")
def guard_fd() -> Iterator[Callable[..., int]]:
    with ExitStack() as undo:
        yield lambda *modes: load_programs(modes, PORT, [ip_address(HOST[4]), ip_address(HOST[6])], undo)[1]


def taken(guard_fd: int, raw: bytes) -> bool:
    """The kernel runs it as if received by lo, whose address is all zeros."""
    return run_program(guard_fd, bytes(12) + raw[12:])[0] == 2  # TC_ACT_SHOT


def test_what_is_taken(guard_fd: Callable[..., int]) -> None:
    program = guard_fd("ipip", "gre", "gue")
    for case, (raw, ours) in RULES.items():
        assert taken(program, raw) == ours, case
    assert run_program(program, RULES["IPv4 options"][0])[0] != 2  # to another host


@pytest.mark.parametrize("mode", ["ipip", "gre", "gue"])
def test_what_one_mode_takes(guard_fd: Callable[..., int], mode: str) -> None:
    program = guard_fd(mode)
    for kind, outer, inner in WAYS:
        assert taken(program, tunnel(kind, outer, INNER[inner])) == (kind.removesuffix("1") == mode)


# ---- the command


def test_options(host: Rig, tmp_path: Path) -> None:
    """Only one mode, with a key, to one address of the interface's, through a device of another name."""
    with Receiver(host, tmp_path, "--mode", "gre,gue", "--key", "0x2a", "--port", "6081", "--tun", "tin",
                  "--address", HOST[6], "--address", OTHER) as receiver:  # fmt: skip
        assert "tin" in [name for _, name in host.receiver.run(socket.if_nameindex)]
        assert receiver.events("running")[0]["addresses"] == [HOST[6], OTHER]
        ways: list[tuple[Callable[[bytes], bytes], bool]] = [
            (lambda packet: tunnel("gre", 6, packet, key=42), True),
            (lambda packet: tunnel("gue", 6, packet, port=6081), True),
            (lambda packet: tunnel("gre", 6, packet), False),
            (lambda packet: tunnel("gue", 6, packet), False),
            (lambda packet: tunnel("ipip", 6, packet), False),
            (lambda packet: tunnel("gre", 4, packet, key=42), False),  # to HOST[4]
        ]
        for how, taken in ways:
            host.tunneller.how = how
            assert (host.echo(4, b"hello", 1.0 if taken else 0.2) == b"hello") == taken
        last = receiver.stop(signal.SIGINT)
    assert last["drops"] == {"gre_key": 1}
    assert leftovers(host) == []


def test_a_restart_after_a_crash(host: Rig, tmp_path: Path) -> None:
    """The guard stays, so that the host answers nothing; the next one takes it over."""
    host.tunneller.how = lambda packet: tunnel("ipip", 4, packet)
    with Receiver(host, tmp_path) as receiver:
        assert host.echo(4, b"first") == b"first"
        receiver.process.kill()
        receiver.process.wait()
        refused = host.icmp_sent()
        assert host.echo(4, b"nobody", 0.2) is None
        assert host.icmp_sent() == refused
        assert [left for left in leftovers(host) if not left.startswith("guard")] == []
        (tmp_path / "second").mkdir()
        with Receiver(host, tmp_path / "second") as second:
            assert host.echo(4, b"again") == b"again"
            second.stop()
    assert leftovers(host) == []


def test_one_at_a_time(host: Rig, tmp_path: Path) -> None:
    with Receiver(host, tmp_path) as receiver:
        other = fastlb("decap", "r0", "--tun", "second", namespace=host.receiver.name)
        assert (other.returncode, other.stderr) == (1, "fastlb: another fastlb is running on interface r0\n")
        receiver.stop()
    assert leftovers(host) == []


def test_refusals(host: Rig) -> None:
    """What cannot work leaves nothing behind."""
    for words, code, message in (
        (("decap", "r9"), 1, "there is no interface r9 here"),
        (("decap", "r0", "--tun", "r0"), 1, "there is an interface of that name"),
        (("decap", "r0", "--mode", "vxlan"), 2, "none of ipip, gre, gue"),
        (("decap", "r0", "--key", "0x100000000"), 2, "not in 0..4294967295"),
        (("decap",), 2, "INTERFACE"),
    ):
        found = fastlb(*words, namespace=host.receiver.name)
        assert found.returncode == code
        assert message in found.stderr
        assert leftovers(host) == []


def test_the_interface_goes(tmp_path: Path) -> None:
    """It ends, with the reason, and takes its device along."""
    with Namespace("short") as short, Namespace("peer") as peer:
        veth(short, "r0", peer, "p0")
        short.add_address("r0", "10.3.0.11/24")
        log = (tmp_path / "log").open("wb")
        command = [sys.executable, "-m", "fastlb", "decap", "r0"]
        process = short.run(subprocess.Popen, command, cwd=ROOT, stdout=log, stderr=log)
        try:
            assert until(lambda: b"running" in (tmp_path / "log").read_bytes() or process.poll() is not None)
            peer.rtnl(lambda ipr: ipr.link("del", ifname="p0"))
            assert process.wait(PATIENCE) == 1
        finally:
            process.kill()
            process.wait()
            log.close()
        assert b"there is no interface r0 here" in (tmp_path / "log").read_bytes()
        assert [name for _, name in short.run(socket.if_nameindex)] == ["lo"]
