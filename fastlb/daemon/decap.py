"""`fastlb decap`: the receiving end of ipip, gre and gue on a host whose kernel has no tunnel devices.

    interface ──► ring ──► Decapsulator (fastlb/dataplane/decap.pxd) ──► TUN device ──► the host's own stack
        '──► guard: takes the same packets from the host, which would answer them with ICMP "protocol unreachable"

Ring and guard run the same small eBPF program. Its rules, in order:

    not PACKET_HOST, or not IPv4 or IPv6                                    not ours
    a fragment (whole packets only: the host's own reassembly is not ours)  not ours
    protocol 4 or 41 (ipip), 47 (gre), or UDP to the port (gue)             ours, if the destination is
    anything else                                                           not ours

An IPv6 header may have one Destination Options header in front of that, which is where RFC 2473 puts the limit of
encapsulation; with any other extension a packet is left to the host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import structlog
from pyroute2 import IPRoute, NetlinkError

from fastlb._core import TUNNEL_MODES, Decapsulator, Ring, RingMemory
from fastlb.daemon import leftovers
from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.ebpf import assembler
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import ETH_HEADER, MAP_LOOKUP, load_bytes
from fastlb.model.names import GUARD_NAME
from fastlb.model.net import Address

MODES = tuple(TUNNEL_MODES)
BLOCK_SIZE, BLOCKS = 256 << 10, 64  # of the ring: four super-frames a block, 16 MiB in all
BLOCK_TIMEOUT = 1  # ms: the longest that a packet waits for others
TICK = 1.0  # seconds between looks at the interface
END_TIMEOUT = 5.0  # seconds that the loop may take to finish its block
MAX_ADDRESSES = 4096
FILTER_NAME = "fastlb_decap"

log = structlog.get_logger()


@dataclass(frozen=True)
class Options:
    """What the command line says. ``addresses``: empty means all of the interface's."""

    interface: str
    modes: tuple[str, ...] = MODES
    tun: str = "fastlb0"
    port: int = 6080
    key: int | None = None
    addresses: tuple[Address, ...] = ()


def run(options: Options) -> None:
    """Receive until SIGTERM or SIGINT; SIGUSR1 logs the counters. Raises KernelError, and leaves nothing behind."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the loop's thread inherits that
    with ExitStack() as stack:
        receiver = Receiver(options, stack)
        log.info("running", **receiver.summary())
        receiver.wait_for(signals)
    log.info("stopped", **receiver.counters())


class Receiver:
    """Everything that is open; the stack closes it in reverse. Raises KernelError."""

    def __init__(self, options: Options, stack: ExitStack) -> None:
        self._options = options
        self._totals: dict[str, int] = {}
        stack.enter_context(leftovers.claim(options.interface))
        self._index = _index(options.interface)
        self.addresses = options.addresses or interface_addresses(options.interface)
        tun = stack.enter_context(open_tun(options.tun))
        self._decap = Decapsulator(tun, modes=options.modes, port=options.port, key=options.key)
        filter_fd, guard_fd = load_programs(options.modes, options.port, self.addresses, stack)
        # First and last, so that the host never answers a tunnel's packet.
        guard.attach(options.interface, guard_fd)
        stack.callback(detach_guard, options.interface)
        self._ring = open_ring(options.interface, filter_fd, stack)
        stack.callback(self._ring_totals)  # while they can still be asked for
        self._thread = threading.Thread(target=self._decap.run, args=(self._ring,), name="decap", daemon=True)
        self._thread.start()
        stack.callback(self._end)

    def wait_for(self, signals: set[signal.Signals]) -> None:
        """Return when one has come that ends the process. Raises KernelError when the interface has gone."""
        while True:
            came = signal.sigtimedwait(signals, TICK)
            if came is not None and came.si_signo != signal.SIGUSR1:
                return
            if came is not None:
                log.info("counters", **self.counters())
            if not self._thread.is_alive():
                raise KernelError("the receiving thread has died")
            if _index(self._options.interface) != self._index:
                raise KernelError(f"interface {self._options.interface} has been replaced by another of that name")

    def summary(self) -> dict[str, Any]:
        """For the log."""
        options = self._options
        return {
            "interface": options.interface,
            "tun": options.tun,
            "modes": list(options.modes),
            "addresses": list(map(str, self.addresses)),
        }

    def counters(self) -> dict[str, Any]:
        """See `Decapsulator.counters`; of the drops those that happened, and the ring's own counts beside them."""
        found: dict[str, Any] = dict(self._decap.counters())
        found["drops"] = {name: count for name, count in found["drops"].items() if count}
        return found | self._ring_totals()

    def _ring_totals(self) -> dict[str, int]:
        with suppress(OSError):  # it is closed already
            self._totals = self._ring.statistics()
        return self._totals

    def _end(self) -> None:
        """The ring may not be unmapped while it is read."""
        self._decap.stop()
        self._thread.join(END_TIMEOUT)
        if self._thread.is_alive():
            log.error("the receiving thread does not stop; leaving without it")
            os._exit(1)


# --- the interface ---------------------------------------------------------------------------------------------------


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:
        raise KernelError(f"there is no interface {interface} here") from error


def interface_addresses(interface: str) -> tuple[Address, ...]:
    """All addresses of an interface as they are now. Raises KernelError when it has none."""
    with _netlink(f"{interface}: cannot read its addresses") as route:
        found = route.get_addr(index=_index(interface))
        # IFA_LOCAL is missing for IPv6; IFA_ADDRESS is the peer's on a point-to-point link.
        addresses = [each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS") for each in found]
    if not addresses:
        raise KernelError(f"{interface} has no address; name the tunnels' destinations with --address")
    return tuple(map(ip_address, addresses))


def open_ring(interface: str, filter_fd: int, stack: ExitStack) -> Ring:
    """Raises KernelError."""
    try:
        memory = RingMemory(1, BLOCK_SIZE, BLOCKS)
        stack.callback(memory.close)
        ring = Ring(interface, filter_fd, memory, BLOCK_TIMEOUT)
    except OSError as error:
        raise KernelError(f"cannot open a ring on {interface}: {error.strerror}") from error
    stack.callback(ring.close)
    return ring


def detach_guard(interface: str) -> None:
    """On the way out, where a failure is only worth a line: the interface may have gone."""
    try:
        guard.detach(interface)
    except KernelError as error:
        log.warning("guard not detached", interface=interface, error=str(error))


@contextmanager
def _netlink(what: str) -> Iterator[IPRoute]:
    """A netlink socket; whatever the kernel refuses becomes a KernelError that starts with ``what``."""
    try:
        with IPRoute() as route:
            yield route
    except (NetlinkError, OSError) as error:
        code = (error.code if isinstance(error, NetlinkError) else error.errno) or 0
        raise KernelError(f"{what}: {os.strerror(code)}") from error


# --- the TUN device --------------------------------------------------------------------------------------------------

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0001, 0x1000, 0x4000, 0x8000
_TUN_HINTS = {
    errno.ENOENT: "the kernel must have CONFIG_TUN, and /dev/net/tun must exist",
    errno.ENODEV: "the kernel must have CONFIG_TUN",
    errno.EPERM: "this needs root or CAP_NET_ADMIN",
    errno.EACCES: "this needs root or CAP_NET_ADMIN",
    errno.EBUSY: "there is an interface of that name; choose another with --tun",
    errno.EINVAL: "is that a name for an interface?",
}


@contextmanager
def open_tun(name: str) -> Iterator[int]:
    """The descriptor of a new TUN device that takes packets behind a virtio_net_hdr; the device goes with it.

    It is up and has no address: it brings packets in, and none is to leave by it. Raises KernelError.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _tun_error(name, error) from error
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        except OSError as error:
            raise _tun_error(name, error) from error
        set_up_tun(name)
        yield fd
    finally:
        os.close(fd)


def _tun_error(name: str, error: OSError) -> KernelError:
    hint = f" ({_TUN_HINTS[error.errno]})" if error.errno in _TUN_HINTS else ""
    return KernelError(f"cannot make the TUN device {name}: {error.strerror}{hint}")


def set_up_tun(name: str) -> None:
    """No reverse-path filter, since clients' addresses are routed elsewhere; no packets of the device's own.

    The kernel takes the larger of the device's ``rp_filter`` and that of ``all`` (ip-sysctl), and "loose" does not help
    a device without an address.
    """
    _set("net/ipv4/conf", name, "rp_filter", 0)
    _set("net/ipv6/conf", name, "addr_gen_mode", 1)  # none: no router solicitations, nothing to join
    with suppress(OSError, ValueError):
        if number := int(Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text()):
            log.warning(
                "net.ipv4.conf.all.rp_filter is on: IPv4 out of tunnels will be dropped; "
                "set it to 0, and that of each other interface to what this is",
                value=number,
            )
    with _netlink(f"cannot set {name} up") as route:
        route.link("set", index=_index(name), state="up", txqlen=1)  # nobody reads what is sent to it


def _set(directory: str, name: str, key: str, value: int) -> None:
    path = Path("/proc/sys", directory, name, key)
    try:
        path.write_text(str(value))
    except FileNotFoundError:
        pass  # without IPv6
    except OSError as error:
        log.warning("cannot set a sysctl", path=str(path), value=value, error=error.strerror)


# --- the filter and the guard ----------------------------------------------------------------------------------------

R0, R1, R2, _, _, _, R6, R7, R8, _, FP = Reg

_SOCKET_FILTER, _SCHED_CLS = 1, 3  # BPF_PROG_TYPE_*
_SKB_PKT_TYPE, _SKB_PROTOCOL = 4, 16  # offsets in struct __sk_buff
_PACKET_HOST = 0
_WHOLE_FRAME, _NOTHING = 0x7FFFFFFF, 0
_ACT_SHOT, _ACT_UNSPEC = 2, -1
_ETH_IPV4, _ETH_IPV6 = map(socket.htons, (0x0800, 0x86DD))
_IPV4_FRAGMENT = socket.htons(0x3FFF)  # more fragments, or an offset
_UDP, _DEST_OPTS = 17, 60
_PROTOCOLS = {"ipip": (4, 41), "gre": (47,), "gue": ()}
_KEY, _KEY_SIZE = -24, 20  # the destination as 16 bytes, and its family; on the stack
_HEADER = -64  # an IP header, 40 bytes


def load_programs(
    modes: Iterable[str], port: int, addresses: Sequence[Address], stack: ExitStack
) -> tuple[int, int]:
    """The descriptors of the ring's filter and of the guard. Raises KernelError."""
    assembler.raise_memlock_limit()
    if len(addresses) > MAX_ADDRESSES:
        raise KernelError(f"{len(addresses)} addresses are more than {MAX_ADDRESSES}; choose with --address")
    ours = assembler.HashMap("fastlb_outer", _KEY_SIZE, 1, MAX_ADDRESSES)
    stack.callback(ours.close)
    for address in addresses:
        ours.put(address.packed.rjust(16, b"\0") + struct.pack("=I", address.version), b"\1")
    programs = (
        (_SOCKET_FILTER, FILTER_NAME, _WHOLE_FRAME, _NOTHING),
        (_SCHED_CLS, GUARD_NAME, _ACT_SHOT, _ACT_UNSPEC),
    )
    fds = []
    for kind, name, taken, left in programs:
        fds.append(assembler.load_program(kind, tunnel_filter(modes, port, ours.fd, taken, left), name, "Apache-2.0"))
        stack.callback(os.close, fds[-1])
    return fds[0], fds[1]


def tunnel_filter(modes: Iterable[str], port: int, addresses_fd: int, taken: int, left: int) -> bytes:
    """The program: ``taken`` for tunnel packets to one of the addresses, ``left`` for everything else.

    R6 the frame's context, R7 offset of what is read next, R8 the protocol that is there.
    """
    modes = set(modes)
    a = Assembler()
    _link_layer(a)
    _ipv6(a)
    _ipv4(a)
    a.label("protocol")
    for protocol in (number for mode in modes for number in _PROTOCOLS[mode]):
        a.jump_if(R8, "==", protocol, "destination")
    if "gue" in modes:
        a.jump_if(R8, "!=", _UDP, "left")
        load_bytes(a, _HEADER, 4, "left")
        a.load(R1, FP, _HEADER + 2, Size.U16)
        a.jump_if(R1, "!=", socket.htons(port), "left")
    else:
        a.jump("left")
    a.label("destination")
    a.map(R1, addresses_fd)
    a.alu(R2, "=", FP)
    a.alu(R2, "+", _KEY)
    a.call(MAP_LOOKUP)
    a.jump_if(R0, "==", 0, "left")
    a.alu(R0, "=", taken)
    a.exit()
    a.label("left")
    a.alu(R0, "=", left)
    a.exit()
    return a.assemble()


def _link_layer(a: Assembler) -> None:
    """Falls through to IPv6."""
    a.alu(R6, "=", R1)
    a.load(R0, R6, _SKB_PKT_TYPE, Size.U32)
    a.jump_if(R0, "!=", _PACKET_HOST, "left")
    a.alu(R7, "=", ETH_HEADER)
    a.load(R8, R6, _SKB_PROTOCOL, Size.U32)
    a.jump_if(R8, "==", _ETH_IPV4, "ipv4")
    a.jump_if(R8, "!=", _ETH_IPV6, "left")


def _ipv6(a: Assembler) -> None:
    """RFC 8200, and one Destination Options header, whose length counts words of 8 bytes beyond the first."""
    load_bytes(a, _HEADER, 40, "left")
    a.load(R1, FP, _HEADER, Size.U8)
    a.alu(R1, ">>", 4)
    a.jump_if(R1, "!=", 6, "left")
    for half in (0, 8):
        a.load(R1, FP, _HEADER + 24 + half, Size.U64)
        a.store(FP, _KEY + half, R1, Size.U64)
    a.store(FP, _KEY + 16, 6, Size.U32)
    a.alu(R7, "+", 40)
    a.load(R8, FP, _HEADER + 6, Size.U8)
    a.jump_if(R8, "!=", _DEST_OPTS, "protocol")
    load_bytes(a, _HEADER, 2, "left")
    a.load(R8, FP, _HEADER, Size.U8)
    a.load(R1, FP, _HEADER + 1, Size.U8)
    a.alu(R1, "+", 1)
    a.alu(R1, "<<", 3)
    a.alu(R7, "+", R1)
    a.jump("protocol")


def _ipv4(a: Assembler) -> None:
    """RFC 791. Falls through to the protocol."""
    a.label("ipv4")
    load_bytes(a, _HEADER, 20, "left")
    a.load(R1, FP, _HEADER + 6, Size.U16)
    a.jump_if(R1, "&", _IPV4_FRAGMENT, "left")
    a.load(R1, FP, _HEADER, Size.U8)
    a.alu(R2, "=", R1)
    a.alu(R2, ">>", 4)
    a.jump_if(R2, "!=", 4, "left")
    a.alu(R1, "&", 15)
    a.alu(R1, "<<", 2)
    a.jump_if(R1, "<", 20, "left")
    a.alu(R7, "+", R1)
    a.load(R8, FP, _HEADER + 9, Size.U8)
    a.store(FP, _KEY, 0, Size.U64)
    a.store(FP, _KEY + 8, 0, Size.U32)
    a.load(R1, FP, _HEADER + 16, Size.U32)
    a.store(FP, _KEY + 12, R1, Size.U32)
    a.store(FP, _KEY + 16, 4, Size.U32)
