"""Both hooks on a real interface: each frame is taken by the ring or by the host, by exactly one of them.

    client                                host
      c0 10.9.0.1  fd09::1  ────────────    h0 10.9.0.2  fd09::2    (the guard, and a tap with the filter)
         10.9.0.11 fd09::11 (a backend)     lo 203.0.113.10, .20, 2001:db8:cafe::10 (VIPs)
                                               203.0.113.30 (behind the host, as far as fastlb knows)

The host holds the VIPs, so without the guard its UDP sockets would see what is sent to them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg
from fastlb.kernel.ebpf.bells import BELL_NAME
from fastlb.kernel.ebpf.classifier import FILTER_NAME, Classifier
from fastlb.model.match import Key, Keys
from fastlb.model.names import GUARD_NAME
from tests import ebpf
from tests.netns import test_classifier as table
from tests.netns.namespaces import Namespace, veth

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

ETH_P_ALL, SO_ATTACH_BPF = 3, 50
INGRESS, EGRESS, CLSACT = 0xFFFF_FFF2, 0xFFFF_FFF3, 0xFFFF_0000
SCHED_CLS, ACT_SHOT, ACT_UNSPEC = 3, 2, -1
UDP = socket.IPPROTO_UDP
PATIENCE = 60.0  # seconds until something that should have happened is called missing
SERVICE, OTHER, MARKER = 5000, 5001, 5999  # UDP ports of the host

CLIENT, CLIENT6, HOST, HOST6 = "10.9.0.1", "fd09::1", "10.9.0.2", "fd09::2"
BACKEND, BACKEND6 = "10.9.0.11", "fd09::11"
VIP, VIP_ANY, BEHIND, VIP6 = "203.0.113.10", "203.0.113.20", "203.0.113.30", "2001:db8:cafe::10"
VIPS = {
    Key(ip_address(VIP), SERVICE, UDP),
    Key(ip_address(VIP_ANY), 0, UDP),
    Key(ip_address(VIP6), SERVICE, UDP),
}
REPLIES = {Key(ip_address(BACKEND), 9000, UDP), Key(ip_address(BACKEND6), 9000, UDP)}
LOCALS = [ip_address(HOST), ip_address(HOST6)]


class Rig:
    """Both namespaces, the host's UDP sockets, and what the guard has dropped."""

    def __init__(self, client: Namespace, host: Namespace, undo: ExitStack) -> None:
        self.client, self.host, self._undo = client, host, undo
        client.run(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})  # frames arrive in order
        self.sockets = {port: self._listen(port) for port in (SERVICE, OTHER, MARKER)}

    def _listen(self, port: int) -> socket.socket:
        sock = self._undo.enter_context(self.host.run(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("::", port))
        sock.settimeout(PATIENCE)
        return sock

    def tap(self, filter_fd: int) -> socket.socket:
        """What the ring would get: the filter is in place before the first frame."""
        sock = self._undo.enter_context(self.host.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
        self.host.run(sock.bind, ("h0", ETH_P_ALL))
        sock.settimeout(PATIENCE)
        return sock

    def send(self, target: str, port: int, source: str = "", sport: int = 0) -> None:
        """A datagram from the client."""
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with self.client.run(socket.socket, family, socket.SOCK_DGRAM) as sock:
            if source:
                sock.bind((source, sport))
            self.client.run(sock.sendto, b"x", (target, port))

    def settle(self) -> None:
        """Wait until everything that was sent before has been through both hooks; resolves neighbours too."""
        for target in (HOST, HOST6):
            self.send(target, MARKER)
            self.sockets[MARKER].recv(100)

    def drops(self) -> int:
        """What the clsact qdisc has dropped since it was made."""
        (drops,) = self.host.rtnl(
            lambda ipr: [
                each.get_nested("TCA_STATS2", "TCA_STATS_QUEUE")["drops"]
                for each in ipr.get_qdiscs()
                if each["handle"] == CLSACT
            ]
        )
        return int(drops)

    def filters(self, parent: int = INGRESS) -> list[str]:
        """Names of the eBPF filters at the host's interface."""
        index = self.host.index("h0")
        messages = self.host.rtnl(lambda ipr: list(ipr.get_filters(index=index, parent=parent)))
        options = [each.get_attr("TCA_OPTIONS") for each in messages]
        return [each.get_attr("TCA_BPF_NAME") for each in options if each]

    def has_clsact(self) -> bool:
        return self.host.rtnl(lambda ipr: any(each["handle"] == CLSACT for each in ipr.get_qdiscs()))

    def attach(self, classified: Classifier) -> None:
        self.host.run(guard.attach, "h0", classified.guard_fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        client, host = undo.enter_context(Namespace("client")), undo.enter_context(Namespace("host"))
        veth(client, "c0", host, "h0")
        for end, interface in ((client, "c0"), (host, "h0")):
            end.set_link(interface, mtu=9000)
        for address in (f"{CLIENT}/24", f"{BACKEND}/24", f"{CLIENT6}/64", f"{BACKEND6}/64"):
            client.add_address("c0", address)
        for address in (f"{HOST}/24", f"{HOST6}/64"):
            host.add_address("h0", address)
        for address in (f"{VIP}/32", f"{VIP_ANY}/32", f"{BEHIND}/32", f"{VIP6}/128"):
            host.add_address("lo", address)
        client.add_route("203.0.113.0/24", HOST)
        client.add_route("2001:db8:cafe::/64", HOST6)
        yield Rig(client, host, undo)


@pytest.fixture
def classified() -> Iterator[Classifier]:
    with Classifier() as made:
        made.replace(Keys(VIPS, REPLIES), LOCALS)
        yield made


def waiting(sock: socket.socket) -> int:
    """How many datagrams or frames have arrived and not been read; they are read now."""
    count = 0
    while select.select([sock], [], [], 0)[0]:
        sock.recv(65536)
        count += 1
    return count


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true: the kernel frees eBPF objects some time after the last reference."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def add_filter(rig: Rig, name: str, result: int, parent: int = INGRESS) -> None:
    """Somebody else's filter, behind the guard's preference."""
    code = Assembler()
    code.alu(Reg.R0, "=", result)
    code.exit()
    fd = syscall.load_program(SCHED_CLS, code.assemble(), name)
    place = {"index": rig.host.index("h0"), "handle": 1, "parent": parent, "prio": 5}
    rig.host.rtnl(lambda ipr: ipr.tc("add-filter", "bpf", fd=fd, name=name, direct_action=True, **place))
    os.close(fd)


def add_qdisc(rig: Rig, kind: str) -> None:
    index = rig.host.index("h0")
    rig.host.rtnl(lambda ipr: ipr.tc("add", kind, index))


# source ("" for any) and port, target and port, who takes it
TRAFFIC: list[tuple[str, tuple[str, int, str, int], str]] = [
    ("vip", ("", 0, VIP, SERVICE), "ring"),
    ("vip, other port", ("", 0, VIP, OTHER), "host"),
    ("vip of any port", ("", 0, VIP_ANY, OTHER), "ring"),
    ("host", ("", 0, HOST, SERVICE), "host"),
    ("vip6", ("", 0, VIP6, SERVICE), "ring"),
    ("vip6, other port", ("", 0, VIP6, OTHER), "host"),
    ("host6", ("", 0, HOST6, SERVICE), "host"),
    ("reply", (BACKEND, 9000, BEHIND, OTHER), "ring"),
    ("backend's other port", (BACKEND, 9001, BEHIND, OTHER), "host"),
    ("health check's answer", (BACKEND, 9000, HOST, OTHER), "host"),
    ("health check's answer, ipv6", (BACKEND6, 9000, HOST6, OTHER), "host"),
    ("backend as a client", (BACKEND, 9000, VIP, SERVICE), "ring"),
]


@pytest.mark.parametrize(("flow", "taker"), [row[1:] for row in TRAFFIC], ids=[row[0] for row in TRAFFIC])
def test_traffic_is_taken_once(
    rig: Rig, classified: Classifier, flow: tuple[str, int, str, int], taker: str
) -> None:
    source, sport, target, port = flow
    rig.attach(classified)
    tap = rig.tap(classified.filter_fd)
    rig.settle()
    rig.send(target, port, source, sport)
    rig.settle()
    expected = {"ring": (1, 1, 0), "host": (0, 0, 1)}[taker]
    assert (waiting(tap), rig.drops(), waiting(rig.sockets[port])) == expected


def test_both_hooks_decide_alike(rig: Rig, classified: Classifier) -> None:
    """The classification's table over a cable, each frame with an outer tag for the kernel to take out."""
    cut = [
        (name, frame[:end], end >= enough)
        for name, frame, enough in table.WHOLE
        for end in range(18, enough + 2)
    ]
    table.fill(classified)
    rig.attach(classified)
    tap = rig.tap(classified.filter_fd)
    sender = rig.client.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
    mac, wrong, dropped = rig.host.mac("h0"), [], 0
    with sender:
        rig.client.run(sender.bind, ("c0", 0))
        for name, frame, ours in table.FRAMES + cut:
            target = mac if frame[:6] == table.HOST else frame[:6]
            rig.client.run(sender.send, target + frame[6:12] + struct.pack("!HH", 0x8100, 5) + frame[12:])
            rig.settle()
            seen, dropped_before, dropped = waiting(tap), dropped, rig.drops()
            if (seen, dropped - dropped_before) != (ours, ours):
                wrong.append((name, len(frame), seen, dropped - dropped_before))
    assert wrong == []
    assert dropped > 0


def test_neighbours_and_pings_stay_with_the_host(rig: Rig, classified: Classifier) -> None:
    rig.attach(classified)
    tap = rig.tap(classified.filter_fd)  # nothing has been sent yet: ARP and ND come first
    echo = {
        4: (socket.AF_INET, socket.IPPROTO_ICMP, "0800f7fd00010001"),
        6: (socket.AF_INET6, 58, "8000000000010001"),
    }
    for target in (HOST, VIP, HOST6, VIP6):
        family, protocol, request = echo[ip_address(target).version]
        with rig.client.run(socket.socket, family, socket.SOCK_RAW, protocol) as sock:
            sock.settimeout(PATIENCE)
            rig.client.run(sock.sendto, bytes.fromhex(request), (target, 0))
            while sock.recvfrom(1500)[1][0] != target:
                pass
    rig.settle()
    assert (waiting(tap), rig.drops()) == (0, 0)


def test_the_guard_outlives_the_classifier_and_goes_wholly(rig: Rig) -> None:
    others = ebpf.held(os.getpid())
    with Classifier() as classified:
        classified.replace(Keys(VIPS, REPLIES), LOCALS)
        rig.attach(classified)
        ours = ebpf.held(os.getpid()) - others
        maps = ["fastlb_datagram", "fastlb_locals", "fastlb_replies", "fastlb_to_host", "fastlb_vips"]
        maps += ["fastlb_masks"] * 2
        unused = ["fastlb_full", "fastlb_masks", "fastlb_sources"]  # without full NAT no program refers to them
        assert ebpf.names(ours) == sorted([*maps, *unused, "fastlb_asleep", FILTER_NAME, GUARD_NAME, BELL_NAME])
    assert until(lambda: ebpf.names(ours) == sorted([*maps, GUARD_NAME]))
    rig.settle()
    rig.send(VIP, SERVICE)
    rig.settle()
    assert (rig.drops(), waiting(rig.sockets[SERVICE])) == (1, 0)

    assert rig.host.run(guard.detach, "h0") is True
    assert (rig.host.run(guard.show), rig.filters(), rig.has_clsact()) == ([], [], False)
    assert until(lambda: ebpf.names(ours) == [])
    rig.send(VIP, SERVICE)
    rig.settle()
    assert waiting(rig.sockets[SERVICE]) == 1
    assert rig.host.run(guard.detach, "h0") is False


CRASHING = """
import sys
from ipaddress import ip_address
from fastlb.kernel import guard
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.match import Key, Keys
classified = Classifier()
classified.replace(Keys({Key(ip_address(sys.argv[1]), int(sys.argv[2]), 17)}))
guard.attach("h0", classified.guard_fd)
print("attached", flush=True)
sys.stdin.read()
"""


def test_the_guard_outlives_a_crash_and_goes_wholly(rig: Rig) -> None:
    command = [sys.executable, "-c", CRASHING, VIP, str(SERVICE)]
    root = Path(guard.__file__).parents[1]
    with rig.host.run(
        lambda: subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"attached\n"
        ours = ebpf.held(process.pid)
        (found,) = rig.host.run(guard.show)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (found.interface, ("prog_id", found.program_id) in ours) == ("h0", True)
    assert rig.host.run(guard.show) == [found]
    rig.settle()
    rig.send(VIP, SERVICE)
    rig.settle()
    assert (rig.drops(), waiting(rig.sockets[SERVICE])) == (1, 0)

    assert rig.host.run(guard.detach, "h0") is True
    assert (rig.host.run(guard.show), rig.has_clsact()) == ([], False)
    assert until(lambda: ebpf.names(ours) == [])


def test_no_frame_passes_while_the_guard_is_replaced(rig: Rig, classified: Classifier) -> None:
    stop = threading.Event()

    def send_until_stopped() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((VIP, SERVICE))
            sent = 0
            while not stop.is_set():
                sent += sock.send(b"x")
            return sent

    rig.attach(classified)
    rig.settle()
    with Classifier() as second:
        second.replace(Keys(VIPS, REPLIES), LOCALS)
        sending = rig.client.start(send_until_stopped)
        programs = []
        for number in range(100):
            rig.attach((second, classified)[number % 2])
            programs += [each.program_id for each in rig.host.run(guard.show)]
        stop.set()
        sent = sending.result()
    rig.settle()
    assert waiting(rig.sockets[SERVICE]) == 0
    assert rig.drops() == sent > 0
    assert programs == programs[:2] * 50
    assert programs[0] != programs[1]


@pytest.mark.parametrize("parent", [INGRESS, EGRESS], ids=["ingress", "egress"])
def test_somebody_elses_filter_stays(rig: Rig, classified: Classifier, parent: int) -> None:
    add_qdisc(rig, "clsact")
    add_filter(rig, "foreign", ACT_UNSPEC, parent)
    rig.attach(classified)
    assert GUARD_NAME in rig.filters()
    assert rig.host.run(guard.detach, "h0") is True
    assert (rig.filters(parent), GUARD_NAME in rig.filters()) == (["foreign"], False)


def test_an_older_ingress_qdisc_serves_and_stays(rig: Rig, classified: Classifier) -> None:
    add_qdisc(rig, "ingress")
    rig.attach(classified)
    rig.settle()
    rig.send(VIP, SERVICE)
    rig.settle()
    assert (rig.drops(), waiting(rig.sockets[SERVICE])) == (1, 0)
    assert rig.host.run(guard.detach, "h0") is True
    assert (rig.filters(), rig.has_clsact()) == ([], True)


def test_filters_behind_the_guard_get_what_is_not_ours(rig: Rig, classified: Classifier) -> None:
    rig.attach(classified)
    rig.settle()
    add_filter(rig, "foreign", ACT_SHOT)
    rig.send(VIP, SERVICE)
    rig.send(HOST, OTHER)
    assert until(lambda: rig.drops() == 2)
    assert (waiting(rig.sockets[SERVICE]), waiting(rig.sockets[OTHER])) == (0, 0)


def test_an_interface_that_is_not_there(rig: Rig, classified: Classifier) -> None:
    with pytest.raises(KernelError, match=r"nowhere0: cannot attach the guard: .*no such interface"):
        rig.host.run(guard.attach, "nowhere0", classified.guard_fd)
    assert rig.host.run(guard.detach, "nowhere0") is False


def test_what_the_kernel_refuses_leaves_no_qdisc(rig: Rig, classified: Classifier) -> None:
    with pytest.raises(KernelError, match="h0: cannot attach the guard: Invalid argument"):
        rig.host.run(guard.attach, "h0", classified.filter_fd)
    assert rig.has_clsact() is False


def test_a_filter_of_another_kind_in_our_place_is_named(rig: Rig, classified: Classifier) -> None:
    add_qdisc(rig, "clsact")
    place = {"index": rig.host.index("h0"), "parent": INGRESS, "prio": 1, "protocol": 0x0800}
    rig.host.rtnl(lambda ipr: ipr.tc("add-filter", "u32", keys=["0x0/0x0+0"], target=1, **place))
    with pytest.raises(KernelError, match="hold preference 1 at ingress"):
        rig.attach(classified)
    assert (rig.has_clsact(), rig.host.run(guard.show)) == (True, [])
