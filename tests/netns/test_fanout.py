"""A fanout group with real sockets: the steering, the bin, and the bells beside them.

    client  c0 ────────────  h0  host        the bin, WORKERS sockets in place of rings, a bell for each

Frames carry a number in their last four bytes, and go out from one core, so that they arrive in order.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.syscall import SOCKET_FILTER
from fastlb.model.names import SHARDS
from fastlb.workers.fanout import PACKET_FANOUT, SOL_PACKET, Group
from tests.ebpf import Word
from tests.netns import test_classifier as table
from tests.netns.balancer import until
from tests.netns.namespaces import Namespace, veth
from tests.netns.test_classifier import OWNERS, WORKERS, shard_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

ETH_P_ALL, WHOLE_FRAME = 3, 0x7FFF_FFFF
SO_DETACH_FILTER, SO_RCVBUFFORCE, SO_ATTACH_BPF = 27, 33, 50
PACKET_IGNORE_OUTGOING = 23
NUMBER = 4  # bytes


class Rig:
    """Both ends of the cable; what it makes is closed with it."""

    def __init__(self, client: Namespace, host: Namespace, undo: ExitStack) -> None:
        self.host, self._undo = host, undo
        self.classified = undo.enter_context(Classifier(WORKERS))
        table.fill(self.classified)
        self.classified.set_workers(OWNERS)
        self._client, self._mac, self._numbers = client, host.mac("h0"), itertools.count()
        client.run(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
        self._sender = undo.enter_context(client.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        client.run(self._sender.bind, ("c0", 0))
        self._witness = self.tap()

    def tap(self, program_fd: int | None = None, member_of: Group | None = None) -> socket.socket:
        """A packet socket on the host's end; without a program it keeps every frame."""
        sock = self._undo.enter_context(self.host.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        if program_fd is not None:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program_fd)
        self.host.run(sock.bind, ("h0", ETH_P_ALL))
        if member_of:
            sock.setsockopt(SOL_PACKET, PACKET_FANOUT, member_of.join_argument)
        return sock

    def group(self) -> Group:
        return self._undo.enter_context(self.host.run(Group, "h0", self.classified.nothing_fd))

    def members(self, group: Group) -> list[socket.socket]:
        """A socket for each worker, joined as a ring does."""
        joined = [self.tap(self.classified.nothing_fd, group) for _ in range(WORKERS)]
        for member in joined:
            member.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        return joined

    def send(self, frame: bytes) -> int:
        """To the host, unless the frame is for another; returns its number."""
        number = next(self._numbers)
        target = self._mac if frame[:6] == table.HOST else frame[:6]
        data = target + frame[6:-NUMBER] + number.to_bytes(NUMBER, "big")
        self._client.run(self._sender.send, data)
        return number

    def settle(self) -> None:
        """Every frame that was sent before has been through all sockets; what the witness saw is forgotten."""
        last = self.send(table.FOREIGN)
        assert until(lambda: last in numbers(self._witness))

    def arrivals(self, members: list[socket.socket]) -> dict[int, list[int]]:
        """Frames by number: the workers that have got them, since the last time."""
        self.settle()
        found = defaultdict(list)
        for worker, member in enumerate(members):
            for number in numbers(member):
                found[number].append(worker)
        return dict(found)

    def flap(self) -> None:
        """The link down and up, until frames pass again."""
        self.host.set_link("h0", state="down")
        self.host.link_up("h0")

        def passes() -> bool:
            self.send(table.FOREIGN)
            return numbers(self._witness) != []

        assert until(passes)


def read(sock: socket.socket) -> list[bytes]:
    """All that is in the socket by now. A link that was down meanwhile says so once, as an error."""
    sock.setblocking(False)
    found = []
    while True:
        try:
            found.append(sock.recv(65536))
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise


def numbers(sock: socket.socket) -> list[int]:
    """Of the frames that are in the socket by now."""
    return [int.from_bytes(frame[-NUMBER:], "big") for frame in read(sock)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        client = undo.enter_context(Namespace("fanout-client"))
        host = undo.enter_context(Namespace("fanout-host"))
        veth(client, "c0", host, "h0")
        for end, interface in ((client, "c0"), (host, "h0")):
            end.sysctl(f"net/ipv6/conf/{interface}/disable_ipv6", 1)  # nothing but the test's frames
            end.set_link(interface, mtu=9000)
        yield Rig(client, host, undo)


def tagged(frame: bytes, protocol: int = 0x8100) -> bytes:
    """With an outer tag, which the kernel takes out."""
    return frame[:12] + struct.pack("!HH", protocol, 5) + frame[12:]


def flows(count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Shard and frame, of both legs of random flows, some in an outer VLAN."""
    rng = random.Random(seed)
    for client, port, protocol in table.clients(count, rng):
        for frame in table.legs(client, port, protocol, rng):
            yield shard_of(client, port), rng.choice((frame, tagged(frame)))


def assert_steered(rig: Rig, members: list[socket.socket], owners: list[int], seed: int, count: int = 300) -> None:
    expected = {}
    for shard, frame in flows(count, seed):
        expected[rig.send(frame)] = [owners[shard]]
    assert rig.arrivals(members) == expected


def test_both_legs_arrive_at_the_worker_of_their_client_and_the_hosts_frames_at_none(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    foreign = itertools.cycle([tagged(frame) for _, frame, ours in table.FRAMES if not ours])
    expected = {}
    for shard, frame in flows(4000, seed=1):
        expected[rig.send(frame)] = [OWNERS[shard]]
        rig.send(next(foreign))
    assert rig.arrivals(members) == expected


def test_what_is_ours_is_steered_over_a_cable_too(rig: Rig) -> None:
    """The classification's table, each frame with an outer tag for the kernel to take out."""
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    wrong = []
    for name, frame, ours in table.FRAMES:
        for protocol in (0x8100, 0x88A8):
            number = rig.send(tagged(frame, protocol))
            if len(rig.arrivals(members).get(number, [])) != ours:
                wrong.append((name, protocol))
    assert wrong == []


def test_shards_move_when_the_map_changes(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    assert_steered(rig, members, OWNERS, seed=2)
    for owners in ([2] * SHARDS, [1, *OWNERS[1:]], OWNERS):
        rig.classified.set_workers(owners)
        assert_steered(rig, members, owners, seed=3)


def test_nothing_arrives_before_the_start_nor_after_the_stop(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    for seed in (5, 6):
        for _shard, frame in flows(200, seed=4):
            rig.send(frame)
        assert rig.arrivals(members) == {}
        group.start(rig.classified.steer_fd)
        assert_steered(rig, members, OWNERS, seed)
        group.stop()


def test_the_members_have_their_numbers_after_the_link_was_down(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    for seed in range(3):
        rig.flap()
        rig.arrivals(members)
        assert_steered(rig, members, OWNERS, seed)


def test_a_group_that_was_taken_down_in_order_loses_no_frame_to_a_wrong_member(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    assert_steered(rig, members, OWNERS, seed=6)
    group.stop()
    while members:
        members.pop(0).close()
        for _shard, frame in flows(50, seed=7):
            rig.send(frame)
        assert rig.arrivals(members) == {}
    group.close()
    again = rig.group()
    members = rig.members(again)
    again.start(rig.classified.steer_fd)
    assert_steered(rig, members, OWNERS, seed=8)


def test_two_groups_have_numbers_of_their_own(rig: Rig) -> None:
    first, second = rig.group(), rig.group()
    assert first.id != second.id
    assert {first.join_argument & ~0xFFFF, second.join_argument & ~0xFFFF} == {0x4007_0000}


def test_an_interface_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(KernelError, match=r"^nowhere0: cannot make a fanout group: .*there is no such interface here"):
        rig.host.run(Group, "nowhere0", rig.classified.nothing_fd)


def test_without_privilege_the_error_says_what_would_help() -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(KernelError, match=r"^lo: .*\(this needs root or CAP_NET_RAW\)"):
            Group("lo", -1)
    finally:
        os.seteuid(0)


def test_a_program_of_another_kind_is_refused_and_changes_nothing(rig: Rig) -> None:
    group = rig.group()
    members = rig.members(group)
    group.start(rig.classified.steer_fd)
    with pytest.raises(KernelError, match=r"^h0: cannot set the program of the fanout group: Invalid argument"):
        group.start(rig.classified.guard_fd)
    assert_steered(rig, members, OWNERS, seed=10)


def test_a_group_that_cannot_be_made_leaves_no_descriptor(rig: Rig) -> None:
    before = os.listdir("/proc/self/fd")
    for interface, program in (("nowhere0", rig.classified.nothing_fd), ("h0", -1), ("h0", rig.classified.guard_fd)):
        with pytest.raises(KernelError):
            rig.host.run(Group, interface, program)
    rig.host.run(Group, "h0", rig.classified.nothing_fd).close()
    assert os.listdir("/proc/self/fd") == before


class Bells:
    """Each worker's bell and its word."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        fds = [rig.classified.bell_fd(worker) for worker in range(WORKERS)]
        words = [rig.classified.asleep(worker) for worker in range(WORKERS)]
        self._taps = [rig.tap(fd) for fd in fds if fd is not None]
        self._words = [word for word in words if word is not None]

    def arm(self, *workers: int) -> None:
        for worker in workers:
            self._words[worker][:] = table.BELL_ASLEEP

    def armed(self) -> list[int]:
        return [worker for worker, word in enumerate(self._words) if word[0]]

    def rung(self) -> list[bytes]:
        """What each of the bells has kept since the last time."""
        self._rig.settle()
        return [b"".join(read(tap)) for tap in self._taps]


def frames_of(worker: int, count: int) -> list[bytes]:
    """Frames of both legs that are this worker's."""
    return [frame for shard, frame in flows(20 * count, seed=11) if OWNERS[shard] == worker][:count]


def test_a_bell_rings_once_for_a_frame_of_its_sleeping_worker(rig: Rig) -> None:
    bells = Bells(rig)
    everything = [frame for worker in range(WORKERS) for frame in frames_of(worker, 10)]
    for frame in everything:
        rig.send(frame)
    assert bells.rung() == [b"", b"", b""], "nobody sleeps"
    bells.arm(1)
    for frame in frames_of(0, 10) + frames_of(2, 10):
        rig.send(frame)
    assert (bells.rung(), bells.armed()) == ([b"", b"", b""], [1]), "these are other workers' frames"
    for _ in range(3):
        bells.arm(1)
        for frame in everything:
            rig.send(frame)
        rung = bells.rung()
        assert ([len(each) for each in rung], bells.armed()) == ([0, 1, 0], [])
    bells.arm(0, 2)
    for frame in everything:
        rig.send(frame)
    assert ([len(each) for each in bells.rung()], bells.armed()) == ([1, 0, 1], [])


def test_no_bell_rings_for_the_hosts_traffic(rig: Rig) -> None:
    bells = Bells(rig)
    bells.arm(0, 1, 2)
    for _name, frame, ours in table.FRAMES:
        if not ours:
            rig.send(tagged(frame))
    assert (bells.rung(), bells.armed()) == ([b"", b"", b""], [0, 1, 2])


def test_a_bell_follows_its_shards_and_the_link(rig: Rig) -> None:
    bells = Bells(rig)
    rig.classified.set_workers([2] * SHARDS)
    rig.flap()
    bells.arm(0, 1, 2)
    for frame in frames_of(0, 5):
        rig.send(frame)
    assert ([len(each) for each in bells.rung()], bells.armed()) == ([0, 0, 1], [0, 1])


def word_program(word: Word, write: bool) -> int:
    """A socket filter that keeps as many bytes as the word says; before that it may write "all"."""
    code = Assembler()
    code.map_value(Reg.R1, word.fd)
    if write:
        code.store(Reg.R1, 0, WHOLE_FRAME, Size.U32)
    code.load(Reg.R0, Reg.R1, 0, Size.U32)
    code.exit()
    return syscall.load_program(SOCKET_FILTER, code.assemble(), "fanout_test")


def test_a_bell_that_was_bound_before_the_group_is_asked_after_it(rig: Rig) -> None:
    """So the frame is in the ring when the bell rings, and a worker that looks once more before it sleeps sees it."""
    with ExitStack() as undo:
        word = Word("fanout_test")
        undo.callback(word.close)
        ring, bell = word_program(word, write=True), word_program(word, write=False)
        for fd in (ring, bell):
            undo.callback(os.close, fd)
        early = rig.tap(bell)
        group = rig.group()
        members = [rig.tap(ring, group) for _ in range(WORKERS)]
        group.start(rig.classified.steer_fd)
        late = rig.tap(bell)
        for passed in ("as made", "after the link was down"):
            word.set(0)
            number = rig.send(frames_of(0, 1)[0])
            assert rig.arrivals(members) == {number: [0]}, passed
            assert number in numbers(early), passed
            assert number not in numbers(late), passed
            rig.flap()
            rig.arrivals(members)
