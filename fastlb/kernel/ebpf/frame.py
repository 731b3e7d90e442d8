"""What the classification's code (programs.py, datagrams.py) has in common: registers, the stack, calls.

Other programs on frames, decap.py's and tunneloffload.py's, have R6 and `load_bytes` in common with it.

Two keys lie on the stack and overlap. An IPv6 header, loaded to fp-48 with the four bytes behind it, has both in place;
an IPv4 header is loaded so that its destination and the ports fall on the same places, and the source is moved:

    fp-48    fp-40                  fp-24                  fp-8         fp-4
      | rest   | source (16)          | destination (16)     | ports (4)  | number (4) of a datagram
                                      '---- key of the destination -------'
               '---- key of the source (20) -----'       (completed when the other is not needed)
               '---- key of a datagram (40) --------------------------------------------'

    R6 the frame's context    R7 offset of the next header, later the ports    R8 protocol, flags above it    R9 family
"""

from __future__ import annotations

from typing import NamedTuple

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.model.match import MAX_MASKS

R0, R1, R2, R3, R4, _, R6, R7, R8, R9, FP = Reg

SOURCE, DESTINATION, PORTS, NUMBER = -40, -24, -8, -4
MASKED, COUNT = -72, -80  # the key of a mask, and how many masks have been tried
DATAGRAM = -120  # its key, where nothing else is done to it
KEY_PORT, KEY_PROTOCOL, KEY_FAMILY = 16, 18, 19  # in a key

ETH_HEADER, VLAN_TAG = 14, 4  # bytes
TCP, UDP = 6, 17
FIRST, AGAIN = 0x100, 0x200  # above it: a first fragment; one that is asked about as a later one

KEY_SIZE = 20
MASK_SHIFT = 3  # above the family in a key's last byte: the number of its mask
SLOT_SHIFT = 5  # of a mask: the masks of address and port, laid out like a key, and a key's last byte
LAST, SLOTS_AT = 0, 8  # in the value that holds a map's masks: the number of the last one in use; slot 1
_SLOT_KIND = 18  # of a slot: a key's last byte

MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, SKB_LOAD_BYTES = 1, 2, 3, 26  # helpers; none is for GPL programs only


class Lookup(NamedTuple):
    """File descriptors, as the program's instructions name maps: the entries, and the slots of their masks."""

    map: int
    masks: int


def complete_key(a: Assembler, key: int, port: Reg) -> None:
    """Behind the address: the port, the protocol in R8, the family in R9."""
    a.store(FP, key + KEY_PORT, port, Size.U16)
    a.store(FP, key + KEY_PROTOCOL, R8, Size.U8)
    a.store(FP, key + KEY_FAMILY, R9, Size.U8)


def call_with_key(a: Assembler, helper: int, map_fd: int, key: int) -> None:
    """A helper of maps; R3 and R4, which some want, are the caller's. R1 to R5 are lost."""
    a.map(R1, map_fd)
    a.alu(R2, "=", FP)
    a.alu(R2, "+", key)
    a.call(helper)


def if_found(a: Assembler, map_fd: int, key: int, label: str) -> None:
    """Jump when the map has it."""
    call_with_key(a, MAP_LOOKUP, map_fd, key)
    a.jump_if(R0, "!=", 0, label)


def load_bytes(a: Assembler, stack: int, length: int, otherwise: str = "not_ours", at: Reg | int = R7) -> None:
    """Copy from an offset in the frame to the stack, wherever the frame's bytes are; cut short: go to ``otherwise``."""
    a.alu(R1, "=", R6)
    a.alu(R2, "=", at)
    a.alu(R3, "=", FP)
    a.alu(R3, "+", stack)
    a.alu(R4, "=", length)
    a.call(SKB_LOAD_BYTES)
    a.jump_if(R0, "!=", 0, otherwise)


def widen_addresses(a: Assembler, source: Reg) -> None:
    """Both addresses as in a key; the destination's four bytes are in place already."""
    a.store(FP, SOURCE, 0, Size.U64)
    a.store(FP, SOURCE + 8, 0, Size.U32)
    a.store(FP, SOURCE + 12, source, Size.U32)
    a.store(FP, DESTINATION, 0, Size.U64)
    a.store(FP, DESTINATION + 8, 0, Size.U32)


def if_masked(a: Assembler, lookup: Lookup, key: int, found: str, name: str) -> None:
    """Jump when the map has the whole ``key``, which stays as it is, under one of its masks; else fall through.

    A loop (Linux 5.3): written out for each mask, a program is larger than what kernels before 6.8 let a socket have.
    """
    a.alu(R1, "=", 0)
    a.store(FP, COUNT, R1, Size.U64)
    a.label(f"{name}_mask")
    a.load(R4, FP, COUNT, Size.U64)
    a.jump_if(R4, ">=", MAX_MASKS, f"{name}_unmasked")
    a.map_value(R3, lookup.masks)
    a.load(R1, R3, LAST, Size.U32)
    a.jump_if(R1, "<=", R4, f"{name}_unmasked")
    a.alu(R1, "=", R4)
    a.alu(R1, "<<", SLOT_SHIFT)
    a.alu(R3, "+", R1)
    a.alu(R4, "+", 1)
    a.store(FP, COUNT, R4, Size.U64)
    a.load(R4, R3, SLOTS_AT + _SLOT_KIND, Size.U8)
    a.alu(R1, "=", R4)
    a.alu(R1, "&", (1 << MASK_SHIFT) - 1)
    a.jump_if(R1, "!=", R9, f"{name}_mask")
    for at, size in ((0, Size.U64), (8, Size.U64), (KEY_PORT, Size.U16)):
        a.load(R1, FP, key + at, size)
        a.load(R2, R3, SLOTS_AT + at, size)
        a.alu(R1, "&", R2)
        a.store(FP, MASKED + at, R1, size)
    a.store(FP, MASKED + KEY_PROTOCOL, R8, Size.U8)
    a.store(FP, MASKED + KEY_FAMILY, R4, Size.U8)
    if_found(a, lookup.map, MASKED, found)
    a.jump(f"{name}_mask")
    a.label(f"{name}_unmasked")
