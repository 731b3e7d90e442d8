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

import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from socket import htons

from fastlb.errors import KernelError
from fastlb.kernel.ebpf.assembler import Assembler, Size
from fastlb.kernel.ebpf.frame import (
    ACT_SHOT,
    ACT_UNSPEC,
    DESTINATION,
    DESTINATION_OPTIONS,
    ETH_HEADER,
    ETH_IPV4,
    ETH_IPV6,
    FP,
    IPV4_AT,
    IPV4_FRAGMENT,
    IPV4_HEADER,
    IPV6_AT,
    IPV6_HEADER,
    NOTHING,
    R0,
    R1,
    R7,
    R8,
    UDP,
    WHOLE_FRAME,
    begin_frame,
    extension_bytes,
    if_found,
    load_bytes,
    load_version,
    skip_ipv4_header,
    widen_destination,
)
from fastlb.kernel.ebpf.syscall import SCHED_CLS, SOCKET_FILTER, HashMap, hold_program, raise_memlock_limit
from fastlb.model.modes import MODES
from fastlb.model.names import GUARD_NAME
from fastlb.model.net import Address

FILTER_NAME = "fastlb_decap"
MAX_ADDRESSES = 4096

_KEY_FAMILY, _KEY_SIZE = 16, 20  # a key: the destination as 16 bytes, and its family
_NEXT = -64  # on the stack: the beginning of what follows the IP header


def load_programs(
    modes: Iterable[str], port: int, addresses: Sequence[Address], stack: ExitStack
) -> tuple[int, int]:
    """Load both, and return the descriptors of the ring's filter and of the guard. Raises KernelError."""
    raise_memlock_limit()
    if len(addresses) > MAX_ADDRESSES:
        raise KernelError(f"{len(addresses)} addresses are more than {MAX_ADDRESSES}; choose with --address")
    ours = HashMap("fastlb_outer", _KEY_SIZE, 1, MAX_ADDRESSES)
    stack.callback(ours.close)
    for address in addresses:
        ours.put(key_of(address), b"\1")
    programs = (
        (SOCKET_FILTER, FILTER_NAME, WHOLE_FRAME, NOTHING),
        (SCHED_CLS, GUARD_NAME, ACT_SHOT, ACT_UNSPEC),
    )
    filter_fd, guard_fd = (
        hold_program(stack, kind, tunnel_filter(modes, port, ours.fd, taken, left), name)
        for kind, name, taken, left in programs
    )
    return filter_fd, guard_fd


def key_of(address: Address) -> bytes:
    """Return an address as the programs ask the map for it."""
    return address.packed.rjust(16, b"\0") + struct.pack("=I", address.version)


def tunnel_filter(modes: Iterable[str], port: int, addresses_fd: int, taken: int, left: int) -> bytes:
    """Return the program: ``taken`` for tunnel packets to one of the addresses, ``left`` for everything else.

    R6 the frame's context, R7 offset of what is read next, R8 the protocol that is there.
    """
    a = Assembler()
    begin_frame(a, ETH_HEADER)
    a.jump_if(R8, "==", ETH_IPV4, "ipv4")
    a.jump_if(R8, "!=", ETH_IPV6, "not_ours")
    _ipv6(a)
    _ipv4(a)
    _tunnel(a, sorted(modes), port)
    if_found(a, addresses_fd, DESTINATION, "ours")
    a.label("not_ours")
    a.alu(R0, "=", left)
    a.exit()
    a.label("ours")
    a.alu(R0, "=", taken)
    a.exit()
    return a.assemble()


def _ipv6(a: Assembler) -> None:
    """Put the destination in its key, and step over one Destination Options header (RFC 8200, section 4.6)."""
    load_bytes(a, IPV6_AT, IPV6_HEADER)
    load_version(a, IPV6_AT)
    a.jump_if(R1, "!=", 6, "not_ours")
    a.load(R8, FP, IPV6_AT + 6, Size.U8)
    a.store(FP, DESTINATION + _KEY_FAMILY, 6, Size.U32)
    a.alu(R7, "+", IPV6_HEADER)
    a.jump_if(R8, "!=", DESTINATION_OPTIONS, "protocol")
    load_bytes(a, _NEXT, 2)
    a.load(R8, FP, _NEXT, Size.U8)
    a.load(R1, FP, _NEXT + 1, Size.U8)
    extension_bytes(a)
    a.alu(R7, "+", R1)
    a.jump("protocol")


def _ipv4(a: Assembler) -> None:
    """Put the destination in its key (RFC 791), and fall through to the protocol."""
    a.label("ipv4")
    load_bytes(a, IPV4_AT, IPV4_HEADER)
    a.load(R1, FP, IPV4_AT + 6, Size.U16)
    a.jump_if(R1, "&", IPV4_FRAGMENT, "not_ours")
    a.load(R8, FP, IPV4_AT + 9, Size.U8)
    a.load(R1, FP, IPV4_AT, Size.U8)
    skip_ipv4_header(a)
    widen_destination(a)
    a.store(FP, DESTINATION + _KEY_FAMILY, 4, Size.U32)


def _tunnel(a: Assembler, modes: Sequence[str], port: int) -> None:
    """Fall through with what may be a tunnel's packet."""
    a.label("protocol")
    protocols = {number for mode in modes for number in (MODES[mode].outer_protocols or {}).values()}
    for protocol in sorted(protocols - {UDP}):
        a.jump_if(R8, "==", protocol, "destination")
    if UDP in protocols:
        a.jump_if(R8, "!=", UDP, "not_ours")
        load_bytes(a, _NEXT, 4)
        a.load(R1, FP, _NEXT + 2, Size.U16)
        a.jump_if(R1, "!=", htons(port), "not_ours")
    else:
        a.jump("not_ours")
    a.label("destination")
