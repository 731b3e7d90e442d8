"""Super-frames inside tunnels that the kernel cuts, or the device: an eBPF program at a link's egress tells them how.

    | Ethernet, of OFFLOAD_TYPE | outer headers | inner IP | TCP | payload, of many segments ……………… |

A virtio_net_hdr tells where a super-frame's TCP header is, and nothing of what lies in front of it. To the kernel, what
a worker sends as above is a plain super-frame, of the IP version of the outer header, which the packet socket is told.
The program takes the outer headers out and puts them back as those of a tunnel (bpf_skb_adjust_room in
bpf-helpers(7)): from there on the kernel knows where the inner packet begins, and segments the frame as late as it can:
in the device, where its driver offers that for such a tunnel, else in software just before.

Nothing else sends a frame of OFFLOAD_TYPE as a packet of IP. One that met no program, because that was taken away a
moment ago, is refused by the kernel or ignored by whoever gets it. `apply` looks for that, and for programs in front,
which would see such frames, and could keep them from this one.

What gue sums up needs no program: the datagrams that the core has cut leave as a super-frame of UDP, which a
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
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import ETH_HEADER, load_bytes
from fastlb.model.names import OFFLOAD_LINKS, OFFLOAD_TYPE

PROGRAM_NAME = "fastlb_tunnel"
ASK_AGAIN = 60.0  # seconds

log = structlog.get_logger()


class TunnelOffload:
    """The program, on those interfaces that tunnels leave by. ``apply`` keeps it there, in front of all others."""

    def __init__(self) -> None:
        self._links: dict[int, int] = {}  # descriptors, by interface
        self._unwanted: list[int] = []  # the same of those that workers may still go by
        self._again: dict[int, float] = {}  # when interfaces without it are asked again, on the monotonic clock
        self._program: int | None = None
        self._id = 0

    def apply(self, interfaces: Iterable[int]) -> list[int]:
        """The interfaces, of those that tunnels leave by, behind which super-frames are cut: for
        ``Worker.offload_tunnels``, before this is called again.

        One that refuses, or where another program has taken the first place, is asked again after ASK_AGAIN seconds.
        """
        wanted, now = set(interfaces), time.monotonic()
        self._close_unwanted()
        self._again = {index: again for index, again in self._again.items() if index in wanted}
        for index in list(self._links):
            if index not in wanted:
                self._unwanted.append(self._links.pop(index))
            elif not self._is_first(index):
                self._unwanted.append(self._links.pop(index))
                self._tell(index, now, "its program was removed, or another one put in front of it")
        missing = sorted(index for index in wanted - self._links.keys() if self._again.get(index, 0.0) <= now)
        for index in missing[: OFFLOAD_LINKS - len(self._links)]:
            try:
                self._links[index] = syscall.link_to_egress(self._load(), index)
            except (KernelError, OSError) as error:
                self._refused(index, now, error)
        return sorted(self._links)

    def interfaces(self) -> list[int]:
        """Those that the last ``apply`` has found."""
        return sorted(self._links)

    def close(self) -> None:
        """Take the program away; no worker may run any more."""
        self._unwanted += self._links.values()
        self._links = {}
        self._close_unwanted()
        if self._program is not None:
            os.close(self._program)
        self._program = None

    def _load(self) -> int:
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
        """Once an interface, while tunnels leave by it."""
        if index not in self._again:
            name = str(index)
            with suppress(OSError):
                name = socket.if_indextoname(index)
            log.info("super-frames in tunnels are cut by fastlb", interface=name, reason=reason)
        self._again[index] = now + ASK_AGAIN

    def _close_unwanted(self) -> None:
        for descriptor in self._unwanted:
            os.close(descriptor)
        self._unwanted = []


# --- the program -----------------------------------------------------------------------------------------------------

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

_SKB_STORE_BYTES, _SKB_ADJUST_ROOM = 9, 50  # helpers
_SKB_PROTOCOL = 16  # offset in struct __sk_buff: what the packet socket was told
_ROOM_MAC = 1  # BPF_ADJ_ROOM_MAC: room behind the Ethernet header
_FIXED_GSO, _ENCAP_IP4, _ENCAP_IP6, _ENCAP_GRE, _ENCAP_UDP = 1, 2, 4, 8, 16  # BPF_F_ADJ_ROOM_*
_DECAP_IP4, _DECAP_IP6 = 128, 256
_NEXT, _DROP = -1, 2  # TCX_NEXT, TCX_DROP
_ETH_TYPE = 12  # offset in a frame
_TYPE_IP4, _TYPE_IP6, _TYPE_OFFLOAD = map(socket.htons, (0x0800, 0x86DD, OFFLOAD_TYPE))
_IP4, _IP6, _GRE, _GRE_KEY, _UDP_GUE = 20, 40, 4, 4, 12  # bytes
_LONGEST = _IP6 + _UDP_GUE
_PROTO_UDP, _PROTO_GRE = 17, 47
_GRE_HAS_KEY = 0x20  # in the first byte
_OUTER, _TYPE, _VERSION = -64, -72, -80  # on the stack: the outer headers, the EtherType, the inner packet's first byte


def describing_program() -> bytes:
    """R6 the frame's context, R7 length of the outer headers, R8 and R9 the flags for out and in again."""
    a = Assembler()
    a.alu(R6, "=", R1)
    _ours(a)
    load_bytes(a, _OUTER, _LONGEST, "lost", at=ETH_HEADER)
    _outer_ip(a)
    _behind_ip(a)
    _inner_ip(a)
    a.alu(R2, "=", 0)
    a.alu(R2, "-", R7)
    _adjust_room(a, R8)
    a.alu(R2, "=", R7)
    _adjust_room(a, R9)
    _store(a, ETH_HEADER, _OUTER, R7)
    _store(a, _ETH_TYPE, _TYPE, 2)
    a.label("others")
    a.alu(R0, "=", _NEXT)
    a.exit()
    a.label("lost")
    a.alu(R0, "=", _DROP)
    a.exit()
    return a.assemble()


def _ours(a: Assembler) -> None:
    """Goes on with frames of OFFLOAD_TYPE whose sender says that they are IP, as only a packet socket can. The
    EtherType of that to R8 and to the stack."""
    a.load(R7, R6, _SKB_PROTOCOL, Size.U32)
    a.jump_if(R7, "==", _TYPE_IP4, "ip")
    a.jump_if(R7, "!=", _TYPE_IP6, "others")
    a.label("ip")
    load_bytes(a, _TYPE, 2, "others", at=_ETH_TYPE)
    a.load(R1, FP, _TYPE, Size.U16)
    a.jump_if(R1, "!=", _TYPE_OFFLOAD, "others")
    a.store(FP, _TYPE, R7, Size.U16)
    a.alu(R8, "=", R7)


def _outer_ip(a: Assembler) -> None:
    """The protocol of what follows to R1."""
    a.alu(R7, "=", _IP4)
    a.alu(R9, "=", _FIXED_GSO | _ENCAP_IP4)
    a.load(R1, FP, _OUTER + 9, Size.U8)
    a.jump_if(R8, "==", _TYPE_IP4, "behind_ip")
    a.alu(R7, "=", _IP6)
    a.alu(R9, "=", _FIXED_GSO | _ENCAP_IP6)
    a.load(R1, FP, _OUTER + 6, Size.U8)


def _behind_ip(a: Assembler) -> None:
    """gue, gre with a key or without, or nothing."""
    a.label("behind_ip")
    a.jump_if(R1, "==", _PROTO_UDP, "udp")
    a.jump_if(R1, "!=", _PROTO_GRE, "inner_ip")
    a.alu(R9, "|", _ENCAP_GRE)
    a.alu(R1, "=", FP)
    a.alu(R1, "+", R7)
    a.load(R1, R1, _OUTER, Size.U8)
    a.alu(R7, "+", _GRE)
    a.jump_if(R1, "!=", _GRE_HAS_KEY, "inner_ip")
    a.alu(R7, "+", _GRE_KEY)
    a.jump("inner_ip")
    a.label("udp")
    a.alu(R9, "|", _ENCAP_UDP)
    a.alu(R7, "+", _UDP_GUE)


def _inner_ip(a: Assembler) -> None:
    a.label("inner_ip")
    a.alu(R2, "=", R7)
    a.alu(R2, "+", ETH_HEADER)
    load_bytes(a, _VERSION, 1, "lost", at=R2)
    a.load(R1, FP, _VERSION, Size.U8)
    a.alu(R1, ">>", 4)
    a.alu(R8, "=", _FIXED_GSO | _DECAP_IP6)
    a.jump_if(R1, "==", 6, "described")
    a.alu(R8, "=", _FIXED_GSO | _DECAP_IP4)
    a.label("described")


def _adjust_room(a: Assembler, flags: Reg) -> None:
    """By R2 bytes."""
    a.alu(R1, "=", R6)
    a.alu(R3, "=", _ROOM_MAC)
    a.alu(R4, "=", flags)
    a.call(_SKB_ADJUST_ROOM)
    a.jump_if(R0, "!=", 0, "lost")


def _store(a: Assembler, offset: int, stack: int, length: Reg | int) -> None:
    """Copy from the stack to the frame."""
    a.alu(R1, "=", R6)
    a.alu(R2, "=", offset)
    a.alu(R3, "=", FP)
    a.alu(R3, "+", stack)
    a.alu(R4, "=", length)
    a.alu(R5, "=", 0)
    a.call(_SKB_STORE_BYTES)
    a.jump_if(R0, "!=", 0, "lost")
