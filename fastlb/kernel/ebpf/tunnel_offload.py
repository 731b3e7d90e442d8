"""Tunnels' GSO packets that the kernel or the device segments: a program at a link's egress tells them how.

    | Ethernet, of OFFLOAD_TYPE | outer headers | inner IP | TCP | payload, of many segments ……………… |

A virtio_net_hdr tells where a GSO packet's TCP header is, and nothing of what lies in front of it. To the kernel, what
a worker sends as above is a plain GSO packet, of the IP version of the outer header, which the packet socket is told.
The program (tunnel_program.py) takes the outer headers out and puts them back as those of a tunnel
(bpf_skb_adjust_room in bpf-helpers(7)): from there on the kernel knows where the inner packet begins, and segments the
frame as late as it can: in the device, where its driver offers that for such a tunnel, else in software just before.

Nothing else sends a frame of OFFLOAD_TYPE as a packet of IP. One that met no program, because that was taken away a
moment ago, is refused by the kernel or ignored by whoever gets it. `TunnelOffload.apply` looks for that, and for
programs in front, which would see such frames, and could keep them from this one.

What gue sums up needs no program: the datagrams that the core has cut leave as a GSO packet of UDP, which a
virtio_net_hdr can describe (`enqueue_joined` in dataplane/sendmmsg.pxd), by the same interfaces.

The program hangs on a link of the kernel (tcx, Linux 6.6) that ends with this process, however that ends. Where it
cannot be had the core cuts, as it does with what the kernel could not: see `is_offloadable` in dataplane/transmit.pxd.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

import structlog

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.tunnel_program import describing_program
from fastlb.model.names import OFFLOAD_LINKS

PROGRAM_NAME = "fastlb_tunnel"
ASK_AGAIN = 60.0  # seconds

log = structlog.get_logger()


class TunnelOffload:
    """The program, on those interfaces that tunnels leave by. `apply` keeps it there, in front of all others."""

    def __init__(self) -> None:
        self._links: dict[int, int] = {}  # descriptors of the kernel's links, by interface
        self._unwanted: list[int] = []  # the same of interfaces that workers may still count on
        self._ask_again: dict[int, float] = {}  # when interfaces without it are tried again, on the monotonic clock
        self._program: int | None = None
        self._id = 0

    def apply(self, interfaces: Iterable[int]) -> list[int]:
        """Put the program on the interfaces that tunnels leave by, and take it away from all others.

        Returns those behind which GSO packets are segmented: they are for `Worker.offload_tunnels`, before this is
        called again. One that refuses, or where another program has taken the first place, is tried again after
        ASK_AGAIN seconds.
        """
        wanted, now = set(interfaces), time.monotonic()
        self._close_unwanted()
        self._ask_again = {index: again for index, again in self._ask_again.items() if index in wanted}
        self._drop_lost(wanted, now)
        missing = sorted(index for index in wanted - self._links.keys() if self._ask_again.get(index, 0.0) <= now)
        for index in missing[: OFFLOAD_LINKS - len(self._links)]:
            try:
                self._links[index] = syscall.link_to_egress(self._load(), index)
            except (KernelError, OSError) as error:
                self._refused(index, now, error)
        return self.interfaces()

    def interfaces(self) -> list[int]:
        """Return the interfaces that have the program since the last `apply`."""
        return sorted(self._links)

    def close(self) -> None:
        """Take the program away; no worker may run any more."""
        self._unwanted += self._links.values()
        self._links = {}
        self._close_unwanted()
        if self._program is not None:
            os.close(self._program)
        self._program = None

    def _drop_lost(self, wanted: set[int], now: float) -> None:
        """Give up the links that are not wanted any more, or of no use."""
        for index in list(self._links):
            if index not in wanted:
                self._unwanted.append(self._links.pop(index))
            elif not self._is_first(index):
                self._unwanted.append(self._links.pop(index))
                self._tell(index, now, "its program was removed, or another one put in front of it")

    def _load(self) -> int:
        """Return the program's descriptor; it is loaded when it is first wanted."""
        if self._program is None:
            self._program = syscall.load_program(syscall.SCHED_CLS, describing_program(), PROGRAM_NAME)
            self._id = syscall.program_id(self._program)
        return self._program

    def _is_first(self, index: int) -> bool:
        with suppress(OSError):  # the interface has gone
            return syscall.first_at_egress(index) == self._id
        return False

    def _refused(self, index: int, now: float, error: KernelError | OSError) -> None:
        if isinstance(error, OSError) and error.errno == errno.ENODEV:
            return  # it has gone since the kernel's tables were looked at
        reason = str(error) if isinstance(error, KernelError) else os.strerror(error.errno or 0)
        self._tell(index, now, f"this kernel refuses the program, which needs Linux 6.6: {reason}")

    def _tell(self, index: int, now: float, reason: str) -> None:
        """Log why an interface has no program: once, for as long as tunnels leave by it."""
        if index not in self._ask_again:
            name = str(index)
            with suppress(OSError):
                name = socket.if_indextoname(index)
            log.info("GSO packets in tunnels are segmented by fastlb", interface=name, reason=reason)
        self._ask_again[index] = now + ASK_AGAIN

    def _close_unwanted(self) -> None:
        for descriptor in self._unwanted:
            os.close(descriptor)
        self._unwanted = []
