"""`fastlb decap`: the receiving end of ipip, gre and gue on a host whose kernel has no tunnel devices.

    interface ──► ring ──► Decapsulator (fastlb/dataplane/decap.pxd) ──► TUN device ──► the host's own stack
        '──► guard: takes the same packets from the host, which would answer them with ICMP "protocol unreachable"

Ring and guard run the same small eBPF program (fastlb/kernel/ebpf/decap_filter.py).
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import structlog

from fastlb._core import TUNNEL_MODES, Decapsulator, Ring, RingMemory
from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.claim import claim
from fastlb.kernel.ebpf.decap_filter import load_programs
from fastlb.kernel.netlink import interface_index, iproute
from fastlb.kernel.tun import open_tun
from fastlb.model.net import Address
from fastlb.observe import log as log_file

MODES = tuple(TUNNEL_MODES)
BLOCK_SIZE, BLOCKS = 256 << 10, 64  # of the ring: four GSO packets a block, 16 MiB in all
BLOCK_TIMEOUT = 1  # ms that a packet waits for others at most
TICK = 1.0  # seconds between looks at the interface
END_TIMEOUT = 5.0  # seconds that the loop may take to finish its block

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
        stack.enter_context(claim(options.interface))
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
        """Return what the log says at the start."""
        options = self._options
        return {
            "interface": options.interface,
            "tun": options.tun,
            "modes": list(options.modes),
            "addresses": list(map(str, self.addresses)),
        }

    def counters(self) -> dict[str, Any]:
        """Return the counters: those of `Decapsulator`, of the drops those that happened, and the ring's own."""
        found: dict[str, Any] = dict(self._decap.counters())
        found["drops"] = {name: count for name, count in found["drops"].items() if count}
        return found | self._ring_totals()

    def _ring_totals(self) -> dict[str, int]:
        """Return the ring's counts, the last ones when it is closed."""
        with suppress(OSError):  # it is closed already
            self._totals = self._ring.statistics()
        return self._totals

    def _end(self) -> None:
        """End the thread: the ring may not be unmapped while it is read."""
        self._decap.stop()
        self._thread.join(END_TIMEOUT)
        if self._thread.is_alive():
            log.error("the receiving thread does not stop; leaving without it")
            log_file.finish()
            os._exit(1)


# --- the interface ---------------------------------------------------------------------------------------------------


def _index(interface: str) -> int:
    """Return the interface's number. Raises KernelError when it has gone."""
    try:
        return interface_index(interface)
    except OSError as error:
        raise KernelError(f"there is no interface {interface} here") from error


def interface_addresses(interface: str) -> tuple[Address, ...]:
    """Return all addresses of an interface as they are now. Raises KernelError when it has none."""
    with iproute(f"{interface}: cannot read its addresses") as route:
        found = route.get_addr(index=_index(interface))
        # IFA_LOCAL is missing for IPv6; IFA_ADDRESS is the peer's on a point-to-point link.
        addresses = [each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS") for each in found]
    if not addresses:
        raise KernelError(f"{interface} has no address; name the tunnels' destinations with --address")
    return tuple(map(ip_address, addresses))


def open_ring(interface: str, filter_fd: int, stack: ExitStack) -> Ring:
    """Open the ring, which the stack closes. Raises KernelError."""
    try:
        memory = RingMemory(1, BLOCK_SIZE, BLOCKS)
        stack.callback(memory.close)
        ring = Ring(interface, filter_fd, memory, BLOCK_TIMEOUT)
    except OSError as error:
        raise KernelError(f"cannot open a ring on {interface}: {error.strerror}") from error
    stack.callback(ring.close)
    return ring


def detach_guard(interface: str) -> None:
    """Take the guard away, on the way out: a failure is only worth a line, as the interface may have gone."""
    try:
        guard.detach(interface)
    except KernelError as error:
        log.warning("guard not detached", interface=interface, error=str(error))
