"""tunnel_offload.py, and joined segments of sendmmsg.pxd: GSO packets in tunnels leave whole, and are cut later.

Single frames over the cables of rig.py, to a backend in tunnels of every kind. Each is sent three times: for the core
to cut; for the kernel to cut at l1, whose offloads are off; and with them on, where nothing cuts it.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pyroute2.ethtool.ioctl import IoctlEthtool

from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.tunnel_offload import PROGRAM_NAME, TunnelOffload
from fastlb.kernel.ebpf.tunnel_program import describing_program
from fastlb.model.names import OFFLOAD_LINKS, OFFLOAD_TYPE
from tests import ebpf
from tests.frames import ACK, PSH, checksum, frame
from tests.netns.balancer import PATIENCE, Balancer, drops, until
from tests.netns.namespaces import Namespace, veth
from tests.netns.rig import BACKEND, CLIENT, HAIRPIN, PORT, Rig, make_rig, next_port, settled
from tests.netns.wire import GSO_TCP4, GSO_TCP6, GSO_UDP, NEEDS_CSUM, SEGMENT, Offload, leave_to_device, payload

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "netns-lab"))

from topology import set_offloads

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

KINDS: dict[str, dict[str, Any]] = {
    "ipip": {"forward": "ipip"},
    "gre": {"forward": "gre"},
    "gre with a key": {"forward": "gre", "tunnel": {"key": 0xCAFE}},
    "gue": {"forward": "gue", "tunnel": {"udp_checksum": False}},
    "gue with checksums": {"forward": "gue", "tunnel": {"udp_checksum": True}},
}
UDP_LEN, GUE_LEN = 8, 4
BODY = payload(20_000)


class Way(NamedTuple):
    """A tunnel, its IP version, that of what is inside, and its protocol."""

    kind: str
    outer: int
    inner: int
    protocol: str

    @property
    def vip(self) -> str:
        number = 16 * (1 + list(KINDS).index(self.kind)) + self.outer
        return f"203.0.113.{number}" if self.inner == 4 else f"2001:db8:cafe::{number}"

    @property
    def joined(self) -> bool:
        return self.kind == "gue with checksums"

    @property
    def outer_protocol(self) -> int:
        return {"ipip": 4 if self.inner == 4 else 41, "gre": 47, "gue": 17}[self.kind[:4].strip()]

    @property
    def headers(self) -> int:
        """Bytes of them, with Ethernet's."""
        behind = {"ipip": 0, "gre": 4, "gre with a key": 8}.get(self.kind, UDP_LEN + GUE_LEN)
        return 14 + (20 if self.outer == 4 else 40) + behind

    def service(self) -> dict[str, Any]:
        return {
            "name": f"{self.kind}-{self.outer}-{self.inner}-{self.protocol}".replace(" ", "-"), "vip": self.vip,
            "port": PORT, "protocol": self.protocol, **KINDS[self.kind],
            "backends": [{"address": BACKEND[self.outer]}],
        }  # fmt: skip


WAYS = [Way(*each) for each in itertools.product(KINDS, (4, 6), (4, 6), ("tcp", "udp"))]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))


def super_frame(way: Way, port: int, body: bytes = BODY) -> tuple[Offload, bytes]:
    whole = frame(CLIENT[way.inner], port, way.vip, PORT, way.protocol, flags=ACK | PSH, payload=body)
    return leave_to_device(whole, "gso")


class Sent(NamedTuple):
    """A GSO packet, and what arrived of it each time."""

    frame: bytes
    cut_here: list[bytes]
    cut_by_kernel: list[bytes]
    whole: tuple[Offload, bytes]


class Stage:
    """The rig with a balancer for all ways."""

    def __init__(self, rig: Rig, balancer: Balancer) -> None:
        self.rig, self.balancer = rig, balancer

    def offloaded(self) -> int:
        return int(self.balancer.status()["counters"]["tunnels_offloaded"])

    def reload(self, **changes: Any) -> None:
        """And wait until the worker goes by it: the links follow within a tick of the event loop."""
        assert self.balancer.reload(self.balancer.config | changes).returncode == 0
        wanted = changes["tunnel_offload"]
        assert until(lambda: self.probe() == wanted)

    def probe(self) -> bool:
        """Whether a GSO packet is left to the kernel now. What arrives of it is forgotten."""
        before = self.offloaded()
        offload, raw = super_frame(WAYS[0], next_port())
        self.rig.client.send(raw, offload)
        settled(self.balancer)
        self.rig.servers.arrived()
        return self.offloaded() > before

    def passes(self, probe: bytes) -> bool:
        """Whether the balancer sends the frame on."""
        before = settled(self.balancer)["counters"]["transmitted"]
        self.rig.client.send(probe)
        return bool(settled(self.balancer)["counters"]["transmitted"] > before)

    def set_offloads(self, enabled: bool) -> None:
        """Of l1."""
        def change() -> None:
            ethtool = IoctlEthtool()
            ethtool.change_ifname("l1")
            set_offloads(ethtool, enabled)
            ethtool.close()

        self.rig.host.run(change)

    def send(self, way: Way, port: int, count: int) -> list[tuple[Offload, bytes]]:
        """The first ``count`` frames that arrive."""
        offload, raw = super_frame(way, port)
        self.rig.client.send(raw, offload)
        return [self.rig.servers.receive_frame(way.outer_protocol) for _ in range(count)]


def start(rig: Rig, undo: ExitStack, directory: Path, **changes: Any) -> Stage:
    """With a balancer that knows the backends' MAC addresses."""
    services = [way.service() for way in WAYS]
    stage = Stage(rig, undo.enter_context(rig.balancer(directory, **{"services": services, **changes})))
    for way in (WAYS[0], next(each for each in WAYS if each.outer == 6)):
        probe = frame(CLIENT[way.inner], next_port(), way.vip, PORT, way.protocol, flags=ACK, payload=b"probe")
        assert until(stage.passes, probe), stage.balancer.status()
    rig.send_in_order()
    rig.servers.arrived()
    return stage


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[Way, Sent]:
    """Every way's."""
    segments = math.ceil(len(BODY) / SEGMENT)
    ports = {way: next_port() for way in WAYS}
    with ExitStack() as undo:
        rig = Rig(undo)
        stage = start(rig, undo, tmp_path_factory.mktemp("offload"), tunnel_offload=False)
        here = {way: stage.send(way, ports[way], segments) for way in WAYS}
        assert stage.offloaded() == 0
        stage.reload(tunnel_offload=True)
        before = stage.offloaded()
        stage.set_offloads(False)
        kernel = {way: stage.send(way, ports[way], segments) for way in WAYS}
        stage.set_offloads(True)
        whole = {way: stage.send(way, ports[way], 1) for way in WAYS}
        assert stage.offloaded() - before == 2 * len(WAYS)
        assert drops(stage.balancer.status()).keys() <= {"no_neighbour"}
        return {
            way: Sent(
                super_frame(way, ports[way])[1], [raw for _, raw in here[way]], [raw for _, raw in kernel[way]],
                whole[way][0],
            )
            for way in WAYS
        }  # fmt: skip


def without_number(raw: bytes, first: int) -> bytes:
    """The frame; its outer identification counted from that of the first, and the checksum over that left out."""
    if raw[12:14] != b"\x08\x00":
        return raw
    assert checksum(raw[14:34]) == 0
    number = (int.from_bytes(raw[18:20], "big") - first) % 2**16
    return raw[:18] + struct.pack("!H", number) + raw[20:24] + bytes(2) + raw[26:]


@every_way
def test_the_kernel_makes_the_same_segments(sent: dict[Way, Sent], way: Way) -> None:
    """Byte for byte, but for where the outer identifications begin."""
    found = sent[way]
    for cut in (found.cut_here, found.cut_by_kernel):
        assert b"".join(raw[way.headers + len(found.frame) - 14 - len(BODY) :] for raw in cut) == BODY
    firsts = [int.from_bytes(cut[0][18:20], "big") for cut in (found.cut_here, found.cut_by_kernel)]
    assert [without_number(raw, firsts[0]) for raw in found.cut_here] == [
        without_number(raw, firsts[1]) for raw in found.cut_by_kernel
    ]


@every_way
def test_where_nothing_cuts_it_arrives_whole(sent: dict[Way, Sent], way: Way) -> None:
    found = sent[way]
    offload, raw = found.whole
    assert raw[:14] == found.cut_here[0][:14]
    inner_headers = len(found.frame) - 14 - len(BODY)
    if not way.joined:
        kind = GSO_UDP if way.protocol == "udp" else GSO_TCP4 if way.inner == 4 else GSO_TCP6
        start = way.headers + (20 if way.inner == 4 else 40)
        assert raw[way.headers :] == found.frame[14:]
        assert offload == (NEEDS_CSUM, kind, offload.hdr_len, SEGMENT, start, 6 if way.protocol == "udp" else 16)
        return
    common = way.headers - GUE_LEN
    assert raw[common:] == b"".join(each[common:] for each in found.cut_here)
    size = GUE_LEN + inner_headers + SEGMENT
    assert offload == (NEEDS_CSUM, GSO_UDP, offload.hdr_len, size, common - UDP_LEN, 6)


# ---- what only the core can cut


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from make_rig(queues=1)


def test_what_the_outer_header_cannot_count_is_cut_here(rig: Rig, tmp_path: Path) -> None:
    """65,535 bytes from the inner IP header on. What just fits the kernel cuts, as l1 takes less than 64 KiB."""
    way = WAYS[0]
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path)
        assert until(stage.probe)
        for length, offloaded in ((65_535, 0), (65_535 - 20, 1)):
            body = payload(length - 40)
            before = stage.offloaded()
            rig.client.send(*reversed(super_frame(way, next_port(), body)))
            segments = math.ceil(len(body) / SEGMENT)
            got = [rig.servers.receive_frame(way.outer_protocol)[1] for _ in range(segments)]
            assert b"".join(raw[way.headers + 40 :] for raw in got) == body
            assert stage.offloaded() - before == offloaded


def test_behind_a_tag_it_is_cut_here(rig: Rig, tmp_path: Path) -> None:
    """A backend on the client's link, where the tag stays in front of the tunnel."""
    services = [
        way.service() | {"backends": [{"address": HAIRPIN}]} if way == WAYS[0] else way.service() for way in WAYS
    ]
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path, services=services)
        for tags, offloaded in (((), 1), (((0x8100, 5),), 0)):
            whole = frame(CLIENT[4], next_port(), WAYS[0].vip, PORT, flags=ACK, payload=BODY, tags=tags)
            before = settled(stage.balancer)["counters"]
            rig.client.send(*reversed(leave_to_device(whole, "gso")))
            after = settled(stage.balancer)["counters"]
            assert after["tunnels_offloaded"] - before["tunnels_offloaded"] == offloaded
            frames = 1 if offloaded else math.ceil(len(BODY) / SEGMENT)
            assert after["transmitted"] - before["transmitted"] == frames


def test_what_is_shorter_than_the_program_reads_is_cut_here(rig: Rig, tmp_path: Path) -> None:
    """It takes as many bytes as the longest outer headers have."""
    offload, raw = super_frame(Way("ipip", 4, 4, "udp"), next_port(), b"ab")
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path)
        assert until(stage.probe)
        before = settled(stage.balancer)["counters"]
        rig.client.send(raw, offload._replace(gso_size=1))
        after = settled(stage.balancer)["counters"]
    assert after["tunnels_offloaded"] == before["tunnels_offloaded"]
    assert after["transmitted"] - before["transmitted"] == 2


# ---- datagrams of gue that leave together

JOINED = Way("gue with checksums", 4, 4, "tcp")


@pytest.mark.parametrize(("size", "segment"), [(60_000, 500), (60_000, 1300), (65_000, 9000 - 72)])
def test_more_than_one_message_holds(rig: Rig, tmp_path: Path, size: int, segment: int) -> None:
    """64 datagrams leave together, or 64 KiB; several GSO packets one behind the other."""
    body = payload(size)
    count = math.ceil(size / segment)
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path)
        assert until(stage.probe)
        stage.set_offloads(False)
        ports = [next_port() for _ in range(4)]
        for port in ports:
            offload, raw = super_frame(JOINED, port, body)
            rig.client.send(raw, offload._replace(gso_size=segment))
        for port in ports:
            got = [rig.servers.receive_frame(JOINED.outer_protocol)[1] for _ in range(count)]
            assert b"".join(each[JOINED.headers + 40 :] for each in got) == body
            assert {each[JOINED.headers + 20 : JOINED.headers + 22] for each in got} == {port.to_bytes(2, "big")}
            for each in got:
                assert checksum(each[26:34] + struct.pack("!HH", 17, len(each) - 34) + each[34:]) == 0


def test_one_datagram_that_leaves_no_room_for_another(rig: Rig, tmp_path: Path) -> None:
    """On links with an MTU of 65,535 a GSO packet can be of two segments, one of them of three bytes."""
    for namespace, name in ((rig.client_side, "c0"), (rig.host, "l0"), (rig.host, "l1"), (rig.server_side, "s0")):
        namespace.set_link(name, mtu=65_535)
    body = payload(65_463)
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path)
        assert until(stage.probe)
        offload, raw = super_frame(JOINED, next_port(), body)
        rig.client.send(raw, offload._replace(gso_size=len(body) - 3))
        got = [rig.servers.receive_frame(JOINED.outer_protocol)[1] for _ in range(2)]
    assert b"".join(each[JOINED.headers + 40 :] for each in got) == body


# ---- where the program is


def loaded(balancer: Balancer) -> int:
    """How many of them the balancer holds."""
    return ebpf.names(ebpf.held(balancer.pid)).count(PROGRAM_NAME)


def test_it_ends_with_the_process_however_that_ends(rig: Rig, tmp_path: Path) -> None:
    with ExitStack() as undo:
        balancer = start(rig, undo, tmp_path).balancer
        assert loaded(balancer) == 1
        first = ebpf.held(balancer.pid)
        balancer.kill()
        assert until(lambda: PROGRAM_NAME not in ebpf.names(first))
        balancer.start()
        assert loaded(balancer) == 1
        second = ebpf.held(balancer.pid)
    assert until(lambda: PROGRAM_NAME not in ebpf.names(second))


def test_without_tunnels_there_is_none(rig: Rig, tmp_path: Path) -> None:
    with rig.balancer(tmp_path) as balancer:
        rig.reach(balancer)
        assert loaded(balancer) == 0
        assert balancer.reload(balancer.config | {"services": [way.service() for way in WAYS]}).returncode == 0
        assert until(lambda: loaded(balancer) == 1)


def test_an_interface_that_comes_back_gets_it_again(rig: Rig, tmp_path: Path) -> None:
    with ExitStack() as undo:
        stage = start(rig, undo, tmp_path, interfaces=["l0"])
        assert until(stage.probe)
        rig.cut("l1")
        rig.connect_servers()
        assert until(stage.probe)
        [(_, raw)] = stage.send(WAYS[0], next_port(), 1)
        assert raw[WAYS[0].headers + 40 :] == BODY


# ---- TunnelOffload


@pytest.fixture
def offload() -> Iterator[TunnelOffload]:
    offload = TunnelOffload()
    yield offload
    offload.close()


def test_a_worker_goes_by_so_many_interfaces(offload: TunnelOffload) -> None:
    with Namespace() as here, Namespace() as there:
        for number in range(OFFLOAD_LINKS + 1):
            veth(here, f"a{number}", there, f"b{number}")
        indices = [here.index(f"a{number}") for number in range(OFFLOAD_LINKS + 1)]
        assert here.run(offload.apply, indices) == indices[:-1]
        assert here.run(offload.apply, indices[1:]) == indices[1:]


def test_one_that_is_no_longer_wanted_keeps_it_until_workers_know(offload: TunnelOffload) -> None:
    def linked() -> int:
        return sum("bpf_link" in os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())

    with Namespace() as here, Namespace() as there:
        veth(here, "a", there, "b")
        before = linked()
        assert here.run(offload.apply, [here.index("a")]) == [here.index("a")]
        assert (here.run(offload.apply, []), linked() - before) == ([], 1)
        assert (here.run(offload.apply, []), linked() - before) == ([], 0)


def test_the_first_place_is_given_up_to_others(
    offload: TunnelOffload, capsys: pytest.CaptureFixture[str]
) -> None:
    code = describing_program()
    with Namespace() as here, Namespace() as there, ExitStack() as undo:
        veth(here, "a", there, "b")
        index = here.index("a")
        assert [here.run(offload.apply, [index]) for _ in range(2)] == [[index], [index]]
        other = syscall.load_program(3, code, "other")
        undo.callback(os.close, other)
        undo.callback(os.close, here.run(syscall.link_to_egress, other, index))
        assert [here.run(offload.apply, [index]) for _ in range(2)] == [[], []]
    assert "another one put in front of it" in capsys.readouterr().out


def test_frames_of_others_with_that_type_pass(offload: TunnelOffload) -> None:
    """It is a public one, for experiments."""
    with Namespace() as here, Namespace() as there, ExitStack() as undo:
        veth(here, "a", there, "b")
        here.run(offload.apply, [here.index("a")])
        sender, receiver = (
            undo.enter_context(side.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(OFFLOAD_TYPE)))
            for side in (here, there)
        )
        receiver.settimeout(PATIENCE)
        raw = bytes(12) + struct.pack("!H", OFFLOAD_TYPE) + bytes(range(100))
        sender.sendto(raw, ("a", 0))
        assert receiver.recv(1 << 16) == raw


def test_an_interface_that_has_just_gone_is_passed_over(offload: TunnelOffload) -> None:
    with Namespace() as here, Namespace() as there:
        veth(here, "a", there, "b")
        assert here.run(offload.apply, [9999, here.index("a")]) == [here.index("a")]


def test_a_kernel_that_refuses_is_not_asked_again_at_once(
    offload: TunnelOffload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As before Linux 6.6."""
    asked = []

    def refuse(_program: int, interface: int) -> int:
        asked.append(interface)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(syscall, "link_to_egress", refuse)
    assert [offload.apply([2, 3]), offload.apply([2, 3])] == [[], []]
    assert asked == [2, 3]
    assert capsys.readouterr().out.count("segmented by fastlb") == 2
