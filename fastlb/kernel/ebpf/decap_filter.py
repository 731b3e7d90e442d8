"""The two eBPF programs of `fastlb decap`: the filter of its ring, and the guard that keeps the host from answering.

Both are the same classification. Its rules, in order:

    not PACKET_HOST, or not IPv4 or IPv6                                    not ours
    a fragment (whole packets only: the host's own reassembly is not ours)  not ours
    protocol 4 or 41 (ipip), 47 (gre), or UDP to the port (gue)             ours, if the destination is
    anything else                                                           not ours

An IPv6 header may have one Destination Options header in front of that, which is where RFC 2473 puts the limit of
encapsulation; with any other extension a packet is left to the host.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import syscall
from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import ETH_HEADER, MAP_LOOKUP, load_bytes
from fastlb.kernel.ebpf.syscall import SCHED_CLS, SOCKET_FILTER
from fastlb.model.names import GUARD_NAME
from fastlb.model.net import Address

FILTER_NAME = "fastlb_decap"
MAX_ADDRESSES = 4096

R0, R1, R2, _, _, _, R6, R7, R8, _, FP = Reg

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
    syscall.raise_memlock_limit()
    if len(addresses) > MAX_ADDRESSES:
        raise KernelError(f"{len(addresses)} addresses are more than {MAX_ADDRESSES}; choose with --address")
    ours = syscall.HashMap("fastlb_outer", _KEY_SIZE, 1, MAX_ADDRESSES)
    stack.callback(ours.close)
    for address in addresses:
        ours.put(address.packed.rjust(16, b"\0") + struct.pack("=I", address.version), b"\1")
    programs = (
        (SOCKET_FILTER, FILTER_NAME, _WHOLE_FRAME, _NOTHING),
        (SCHED_CLS, GUARD_NAME, _ACT_SHOT, _ACT_UNSPEC),
    )
    fds = []
    for kind, name, taken, left in programs:
        fds.append(syscall.load_program(kind, tunnel_filter(modes, port, ours.fd, taken, left), name))
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
