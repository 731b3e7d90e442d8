"""Three namespaces in a row for the measurements of single packets: a generator, the balancer's host, a sink.

    +------------+          +---------------------+          +-------------+
    | gen     g0 +----------+ in0     lb     out0 +----------+ s0     sink |
    +------------+          +---------------------+          +-------------+
      10.2.0.1                10.2.0.2   10.3.0.2              10.3.0.11, and 203.0.113.20, the VIP

Both wires are veth pairs of two queues. A sender's core does all the work up to the next ring: generating a frame
includes its way into the balancer's, and forwarding it includes its way to the sink. The sink drops every frame at
ingress, behind the taps, so that it costs the same for all, and one counter tells what arrived.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from generator import ip_packet
from namespaces import inside, write_sysctl
from pyroute2 import IPRoute, netns
from sockets import mac_of, open_sender
from topology import add_address, index_of, own_prefix, remove_abandoned

from fastlb.kernel import guard
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg

PREFIX = own_prefix("bench")
NODES = ("gen", "lb", "sink")
QUEUES = 2
WIRES = (("gen", "g0", "lb", "in0"), ("lb", "out0", "sink", "s0"))
ENDS = [end for wire in WIRES for end in (wire[:2], wire[2:])]
ADDRESSES = {("gen", "g0"): "10.2.0.1/24", ("lb", "in0"): "10.2.0.2/24", ("lb", "out0"): "10.3.0.2/24"}
BACKEND, VIP, PORT = "10.3.0.11", "203.0.113.20", 9
SYSCTLS = {  # nothing but our frames on the wires
    "net.ipv6.conf.all.disable_ipv6": 1,
    "net.ipv6.conf.default.disable_ipv6": 1,
    "net.ipv4.ip_forward": 0,
}
FRAME = 64  # bytes
FLOWS = 1000
UDP_CHECKSUM = 40  # where it is in a frame
STOP_TIMEOUT = 10.0  # seconds from SIGTERM to SIGKILL
CARRIER_TIMEOUT = 5.0  # seconds until both wires must be up
QUIET = 0.2  # seconds without a frame, after which no more are expected
WARM_UP, WARM_UP_RATE = 20_000, 50_000  # frames, and frames a second

SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS
REDIRECT = 23  # BPF_FUNC_redirect
ACT_SHOT = 2


class RigError(Exception):
    """The rig cannot be built, or something in it failed; the message is one clear line."""


class Rig:
    """A context manager: up on entry, gone on exit."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.macs: dict[str, bytes] = {}

    def __enter__(self) -> Rig:
        remove_abandoned()
        with ExitStack() as stack:
            self.run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
            for node in NODES:
                make_namespace(node, stack)
            connect()
            for node, interface in ENDS:
                wait_for_carrier(node, interface)
                with self.inside(node):
                    self.macs[interface] = mac_of(interface)
            self._address()
            with self.inside("sink"):
                guard.attach("s0", load_classifier("fastlb_sink", dropping()))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _address(self) -> None:
        """The sink answers nobody, so its MAC address is made known."""
        for (node, interface), prefix in ADDRESSES.items():
            with rtnl(node) as ipr:
                add_address(ipr, interface, prefix)
        with rtnl("lb") as ipr:
            mac = self.macs["s0"].hex(":")
            ipr.neigh("add", dst=BACKEND, lladdr=mac, ifindex=index_of(ipr, "out0"), state="permanent")

    @contextmanager
    def inside(self, node: str) -> Iterator[None]:
        """Run the block in a node's namespace; sockets made meanwhile stay there."""
        with inside(PREFIX + node):
            yield

    def run(self, node: str, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process in a node's namespace; it is ended with the rig if it still runs then."""
        with self.inside(node):
            child = subprocess.Popen([str(word) for word in argv], **popen)
        self._stack.callback(end, child)
        return child

    def arrived(self) -> int:
        """Frames that the sink's interface has received since it was made."""
        with self.inside("sink"), open("/proc/thread-self/net/dev") as table:
            line = next(line for line in table if line.strip().startswith("s0:"))
        return int(line.partition(":")[2].split()[1])

    def settled(self) -> int:
        """The same, when all that was sent has passed or is lost."""
        count = self.arrived()
        time.sleep(QUIET)
        while (now := self.arrived()) != count:
            count = now
            time.sleep(QUIET)
        return count

    def sender(self) -> socket.socket:
        """A socket to send frames to the balancer by."""
        with self.inside("gen"):
            return open_sender("g0")

    def frames(self, checksum: bool = True) -> list[bytes]:
        """One 64-byte UDP frame a flow to the VIP; clients differ in addresses and ports.

        Without its checksum a datagram stays valid whatever is written into it (RFC 768).
        """
        link = self.macs["in0"] + self.macs["g0"] + b"\x08\x00"
        clients = ((f"198.18.{at >> 8}.{at & 255}", 1024 + at * 61 % 60000) for at in range(FLOWS))
        frames = [link + ip_packet(address, VIP, port, PORT, FRAME - len(link)) for address, port in clients]
        return frames if checksum else [frame[:UDP_CHECKSUM] + bytes(2) + frame[UDP_CHECKSUM + 2 :] for frame in frames]

    def warm_up(self, load: Any) -> None:
        """Let a forwarder that has just started open its flows, and touch its memory for the first time."""
        load.flood(WARM_UP, WARM_UP_RATE)
        self.settled()

    @property
    def socket_path(self) -> Path:
        """The control socket that the configuration names."""
        return self.run_dir / "fastlb.sock"

    def config(self, **changes: Any) -> dict[str, Any]:
        """fastlb's configuration for the rig: one worker, one dsr service; ``changes`` replace top-level keys."""
        service = {"name": "discard", "vip": VIP, "port": PORT, "protocol": "udp", "forward": "dsr"}
        services = [service | {"backends": [{"address": BACKEND}]}]
        base = {"interfaces": ["in0"], "control": str(self.socket_path), "workers": 1, "services": services}
        return base | changes

    @contextmanager
    def wire(self) -> Iterator[None]:
        """Nobody forwards: in0 hands every frame to out0 in the kernel, so that only the two wires are left."""
        with self.inside("lb"):
            guard.attach("in0", load_classifier("fastlb_wire", redirecting(socket.if_nametoindex("out0"))))
        try:
            yield
        finally:
            with self.inside("lb"):
                guard.detach("in0")


def make_namespace(node: str, stack: ExitStack) -> None:
    name = PREFIX + node
    netns.create(name)
    stack.callback(netns.remove, name)
    with inside(name):
        for key, value in SYSCTLS.items():
            write_sysctl(key, value)


def connect() -> None:
    """Both wires, and every end up."""
    queues = {"num_tx_queues": QUEUES, "num_rx_queues": QUEUES}
    for node, interface, peer_node, peer_interface in WIRES:
        with rtnl(node) as ipr:
            peer = {"ifname": peer_interface, "net_ns_fd": PREFIX + peer_node, **queues}
            ipr.link("add", ifname=interface, kind="veth", peer=peer, **queues)
            ipr.link("set", index=index_of(ipr, interface), state="up")
        with rtnl(peer_node) as ipr:
            ipr.link("set", index=index_of(ipr, peer_interface), state="up")


def wait_for_carrier(node: str, interface: str) -> None:
    deadline = time.monotonic() + CARRIER_TIMEOUT
    with rtnl(node) as ipr:
        while ipr.get_links(ifname=interface)[0].get("operstate") != "UP":
            if time.monotonic() > deadline:
                raise RigError(f"{node}: no carrier on {interface} after {CARRIER_TIMEOUT:g} s")
            time.sleep(0.01)


@contextmanager
def rtnl(node: str) -> Iterator[IPRoute]:
    with inside(PREFIX + node):
        ipr = IPRoute()
    with ipr:
        yield ipr


def cores() -> tuple[int, int]:
    """The core that generates and the core that forwards, the one that fastlb gives to its only worker."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise RigError("a generator and a forwarder need a core each; there is one")
    return allowed[0], allowed[-1]


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """The calling thread runs on this core alone for the length of the block."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def end(child: subprocess.Popen[Any]) -> None:
    """Stop a process, unless it has ended already."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            child.send_signal(number)
            try:
                child.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue


# --- what an interface's ingress does -------------------------------------------------------------------------------


def dropping() -> Assembler:
    """Drop every frame."""
    program = Assembler()
    program.alu(Reg.R0, "=", ACT_SHOT)
    program.exit()
    return program


def redirecting(ifindex: int) -> Assembler:
    """Send every frame out of an interface as it is."""
    program = Assembler()
    program.alu(Reg.R1, "=", ifindex)
    program.alu(Reg.R2, "=", 0)
    program.call(REDIRECT)
    program.exit()
    return program


def load_classifier(name: str, program: Assembler) -> int:
    """A descriptor of the loaded program, for `guard.attach`."""
    syscall.raise_memlock_limit()
    return syscall.load_program(SCHED_CLS, program.assemble(), name)
