"""Fragments, in the classification: the first one of a datagram decides for all of them.

A later fragment has no ports. What is ours by its addresses alone may be a part of a datagram whose first fragment
went to the host: a backend's own traffic, or an answer to one of the host's sockets. So such datagrams are noted in a
map that all programs share. Each program that meets a first fragment writes, and each comes to the same; for later
fragments the map is only read. A key is 40 bytes (frame.py), in network order but for IPv4's number:

    source (16) | destination (16) | 0 (2) | protocol (1) | family (1) | number (4)

In it are only datagrams of which the later fragments would otherwise be ours, and of those the MAX_NOTED that were
used last. One leaves when a datagram that is ours has its number again. A later fragment that overtakes its first is
judged before anything is known of it, so by its addresses: the ring takes it, holds it, and drops it by name. (One that
another processor receives in the very moment of its first may be taken by the ring and left to the host as well; the
ring's is dropped.) Notes know no time: only Linux 5.8 and later give it to programs of any licence.
"""

from __future__ import annotations

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.kernel.ebpf.frame import (
    AGAIN,
    DATAGRAM,
    DESTINATION,
    FIRST,
    MAP_DELETE,
    MAP_UPDATE,
    SOURCE,
    TCP,
    UDP,
    call_with_key,
    complete_key,
    if_found,
)
from fastlb.kernel.ebpf.syscall import RecentMap
from fastlb.model.match import LATER

_, R1, _, R3, R4, _, R6, R7, R8, _, FP = Reg

KEY_SIZE = 40
MAX_NOTED = 16_384  # 2 MB; fragments of one datagram leave their sender back to back
MAP_NAME = "fastlb_datagram"

_VALUE_SIZE = 4  # of no meaning


def new_map() -> RecentMap:
    """Make the map, which is empty at first. Raises KernelError."""
    return RecentMap(MAP_NAME, KEY_SIZE, _VALUE_SIZE, MAX_NOTED)


def ask_of_fragment(a: Assembler, noted_fd: int) -> None:
    """Note the datagram of a first fragment, and ask for that of a later one.

    A fragment comes to "first", or falls in, or to "later", with both addresses and the number in place. Anything but
    TCP and UDP may be another header, which a later fragment would not show: then none is ours.
    """
    a.label("first")
    a.jump_if(R8, "==", TCP, "ported")
    a.jump_if(R8, "!=", UDP, "last_header")
    a.label("ported")
    _complete_datagram(a)
    a.alu(R8, "|", FIRST)
    a.jump("load_ports")
    a.label("later")
    a.jump_if(R8, "==", TCP, "portless")
    a.jump_if(R8, "!=", UDP, "last_header")
    a.label("portless")
    _complete_datagram(a)
    if_found(a, noted_fd, DATAGRAM, "not_ours")
    a.alu(R8, "|", LATER)
    a.label("by_address")
    a.alu(R7, "=", 0)
    a.alu(R1, "=", 0)
    a.jump("asked")


def _complete_datagram(a: Assembler) -> None:
    """Copy what names the datagram to DATAGRAM."""
    a.alu(R1, "=", 0)
    complete_key(a, DESTINATION, R1)
    for at in range(0, KEY_SIZE, 8):
        a.load(R1, FP, SOURCE + at, Size.U64)
        a.store(FP, DATAGRAM + at, R1, Size.U64)


def jump_if_first(a: Assembler, answer: str) -> None:
    """Send a first fragment to `settle_first`, away from the straight way of all others; ``answer``: whose it is."""
    a.jump_if(R8, "&", FIRST | AGAIN, f"first_{answer}")


def settle_first(a: Assembler, noted_fd: int, taken: dict[str, str]) -> None:
    """Place "first_…" for each answer in ``taken``, all of which mean ours: forget the datagram, and go on there.

    What is "first_nobody" is asked about once more, as a later fragment would be. What is ours then is noted, and left
    to the host. R6: the first four bytes of the destination, which are lost on the stack.
    """
    for answer, onwards in taken.items():
        a.label(f"first_{answer}")
        a.jump_if(R8, "&", AGAIN, "note")
        call_with_key(a, MAP_DELETE, noted_fd, DATAGRAM)
        a.jump(onwards)
    a.label("note")
    a.alu(R3, "=", FP)
    a.alu(R3, "+", DATAGRAM)
    a.alu(R4, "=", 0)
    call_with_key(a, MAP_UPDATE, noted_fd, DATAGRAM)
    a.jump("not_ours")
    a.label("first_nobody")
    a.jump_if(R8, "&", AGAIN, "not_ours")
    a.store(FP, DESTINATION, R6, Size.U32)
    a.alu(R8, "^", FIRST | AGAIN | LATER)
    a.jump("by_address")
