"""What programs on frames have in common: registers, the stack, steps over headers, and look-ups in maps.

Two keys lie on the stack and overlap. An IPv6 header, loaded to fp-48 with the four bytes behind it, has both in place;
an IPv4 header is loaded so that its destination and the ports fall on the same places, and the source is moved:

    fp-48    fp-40                  fp-24                  fp-8         fp-4
      | rest   | source (16)          | destination (16)     | ports (4)  | number (4) of a datagram
                                      '---- key of the destination -------'
               '---- key of the source (20) -----'       (completed when the other is not needed)
               '---- key of a datagram (40) --------------------------------------------'

    R6 the frame's context    R7 offset of the next header, later the ports    R8 protocol, flags above it    R9 family

Each function adds instructions to a program. Where they take the label ``otherwise``, the program goes there with a
frame that is cut short or makes no sense.
"""

from __future__ import annotations

from socket import htons
from typing import NamedTuple

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size
from fastlb.model.match import MAX_MASKS

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

SOURCE, DESTINATION, PORTS, NUMBER = -40, -24, -8, -4
IPV4_AT, IPV6_AT = -28, -48  # where a header is loaded to, so that the addresses come to lie there
MASKED, COUNT = -72, -80  # a key under a mask, and how many masks have been tried
DATAGRAM = -120  # its key, where nothing else is done to it
KEY_PORT, KEY_PROTOCOL, KEY_FAMILY = 16, 18, 19  # in a key

ETH_HEADER, VLAN_TAG, IPV4_HEADER, IPV6_HEADER = 14, 4, 20, 40  # bytes, without options or extensions
ETH_IPV4, ETH_IPV6, ETH_8021Q, ETH_8021AD = map(htons, (0x0800, 0x86DD, 0x8100, 0x88A8))
TCP, UDP, GRE = 6, 17, 47
DESTINATION_OPTIONS = 60
IPV4_FRAGMENT = htons(0x3FFF)  # bits of the IPv4 header: more fragments, or an offset
FIRST, AGAIN = 0x100, 0x200  # above the protocol: a first fragment; one that is asked about as a later one

KEY_SIZE = 20
MASK_SHIFT = 3  # a key's last byte: the family, and above it the number of the key's mask
SLOT_SHIFT = 5  # a mask's slot: the masks of address and port, laid out like a key, and the last byte of its keys
LAST, SLOTS_AT = 0, 8  # in the value that holds a map's masks: the number of the last one in use; slot 1
_SLOT_KIND = 18  # in a slot: the last byte of its keys

WHOLE_FRAME, NOTHING = 0x7FFFFFFF, 0  # a socket filter returns how many bytes to keep
ACT_SHOT, ACT_UNSPEC = 2, -1  # a tc program: drop the frame; let the filters behind have their say

MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, SKB_LOAD_BYTES = 1, 2, 3, 26  # helpers; none is for GPL programs only
SKB_PKT_TYPE, SKB_PROTOCOL = 4, 16  # offsets in struct __sk_buff
_PACKET_HOST = 0


class Lookup(NamedTuple):
    """File descriptors, as the program's instructions name maps: the entries, and the slots of their masks."""

    map: int
    masks: int


# --- headers --------------------------------------------------------------------------------------------------------


def load_bytes(a: Assembler, stack: int, length: int, otherwise: str = "not_ours", at: Reg | int = R7) -> None:
    """Copy from an offset in the frame to the stack, wherever the frame's bytes are."""
    a.alu(R1, "=", R6)
    a.alu(R2, "=", at)
    a.alu(R3, "=", FP)
    a.alu(R3, "+", stack)
    a.alu(R4, "=", length)
    a.call(SKB_LOAD_BYTES)
    a.jump_if(R0, "!=", 0, otherwise)


def begin_frame(a: Assembler, network: int, otherwise: str = "not_ours") -> None:
    """Set R6, R7 to the offset of the network header and R8 to the EtherType; frames for other hosts leave at once."""
    a.alu(R6, "=", R1)
    a.load(R0, R6, SKB_PKT_TYPE, Size.U32)
    a.jump_if(R0, "!=", _PACKET_HOST, otherwise)
    a.alu(R7, "=", network)
    a.load(R8, R6, SKB_PROTOCOL, Size.U32)


def load_version(a: Assembler, at: int) -> None:
    """Set R1 to the IP version of the header that begins there on the stack."""
    a.load(R1, FP, at, Size.U8)
    a.alu(R1, ">>", 4)


def skip_ipv4_header(a: Assembler, otherwise: str = "not_ours") -> None:
    """Add to R7 the length of the IPv4 header whose first byte is in R1 (RFC 791, section 3.1)."""
    a.alu(R2, "=", R1)
    a.alu(R2, ">>", 4)
    a.jump_if(R2, "!=", 4, otherwise)
    a.alu(R1, "&", 15)
    a.jump_if(R1, "<", IPV4_HEADER >> 2, otherwise)
    a.alu(R1, "<<", 2)
    a.alu(R7, "+", R1)


def extension_bytes(a: Assembler) -> None:
    """Turn R1, an extension header's length in units of 8 bytes beyond the first 8, into bytes (RFC 8200, 4)."""
    a.alu(R1, "+", 1)
    a.alu(R1, "<<", 3)


def widen_source(a: Assembler, source: Reg) -> None:
    """Put an IPv4 source as in a key: 12 bytes of zeros, then the four of the address."""
    a.store(FP, SOURCE, 0, Size.U64)
    a.store(FP, SOURCE + 8, 0, Size.U32)
    a.store(FP, SOURCE + 12, source, Size.U32)


def widen_destination(a: Assembler) -> None:
    """Complete an IPv4 destination as in a key: its four bytes are in place already."""
    a.store(FP, DESTINATION, 0, Size.U64)
    a.store(FP, DESTINATION + 8, 0, Size.U32)


def widen_addresses(a: Assembler, source: Reg) -> None:
    """Put both addresses of an IPv4 header as in a key."""
    widen_source(a, source)
    widen_destination(a)


# --- look-ups -------------------------------------------------------------------------------------------------------


def complete_key(a: Assembler, key: int, port: Reg) -> None:
    """Put behind the address of a key: the port, the protocol in R8, the family in R9."""
    a.store(FP, key + KEY_PORT, port, Size.U16)
    a.store(FP, key + KEY_PROTOCOL, R8, Size.U8)
    a.store(FP, key + KEY_FAMILY, R9, Size.U8)


def call_with_key(a: Assembler, helper: int, map_fd: int, key: int) -> None:
    """Call a helper of maps; R3 and R4, which some want, are the caller's. R1 to R5 are lost."""
    a.map(R1, map_fd)
    a.alu(R2, "=", FP)
    a.alu(R2, "+", key)
    a.call(helper)


def if_found(a: Assembler, map_fd: int, key: int, label: str) -> None:
    """Jump when the map has the key."""
    call_with_key(a, MAP_LOOKUP, map_fd, key)
    a.jump_if(R0, "!=", 0, label)


def if_masked(a: Assembler, lookup: Lookup, key: int, found: str, name: str) -> None:
    """Jump when the map has the key under one of its masks; else fall through. The key stays as it is.

    ``name`` makes labels of its own. A loop (Linux 5.3): written out for each mask, a program is larger than what
    kernels before 6.8 let a socket have.
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
    _store_masked(a, key)
    if_found(a, lookup.map, MASKED, found)
    a.jump(f"{name}_mask")
    a.label(f"{name}_unmasked")


def _store_masked(a: Assembler, key: int) -> None:
    """Put at MASKED the key under the mask in the slot at R3; R4 is the last byte of such keys."""
    for at, size in ((0, Size.U64), (8, Size.U64), (KEY_PORT, Size.U16)):
        a.load(R1, FP, key + at, size)
        a.load(R2, R3, SLOTS_AT + at, size)
        a.alu(R1, "&", R2)
        a.store(FP, MASKED + at, R1, size)
    a.store(FP, MASKED + KEY_PROTOCOL, R8, Size.U8)
    a.store(FP, MASKED + KEY_FAMILY, R4, Size.U8)
