"""A small eBPF assembler: methods for instructions, jumps to labels, and the bytes that the kernel loads.

Nothing in here knows about fastlb, and nothing asks the kernel for anything. An instruction is 8 bytes, little-endian
(RFC 9669, section 3.1):

    opcode:8 | dst:4 src:4 | offset:16 signed | immediate:32 signed

Operands that may be a register or a number are told apart by their type: a ``Reg`` is a register.
"""

from __future__ import annotations

import struct
from enum import IntEnum


class Reg(IntEnum):
    """R0 result, R1-R5 arguments (lost over a call), R6-R9 kept, R10 frame pointer (stack grows down)."""

    R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)


class Size(IntEnum):
    """Width of a load or store, as the bits that the opcode wants."""

    U32 = 0x00
    U16 = 0x08
    U8 = 0x10
    U64 = 0x18


_ALU = {"+": 0x00, "-": 0x10, "*": 0x20, "|": 0x40, "&": 0x50, "<<": 0x60, ">>": 0x70, "^": 0xA0, "=": 0xB0}
_JUMP = {"==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "<": 0xA0, "<=": 0xB0}
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE = 1, 2


class Assembler:
    """Collects instructions; jumps go to labels, which may be placed before or after them.

    Misuse (an unknown operator, a label missing or placed twice, a number that does not fit) raises
    KeyError, ValueError or struct.error: it is a fault of the program's author, not of the kernel.
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, str | int, int]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the next instruction."""
        if name in self._labels:
            raise ValueError(f"label {name!r} is placed twice")
        self._labels[name] = len(self._code)

    def load(self, dst: Reg, base: Reg, offset: int, size: Size) -> None:
        """dst = *(size *)(base + offset), zero-extended."""
        self._emit(0x61 | size, dst, base, offset, 0)

    def store(self, base: Reg, offset: int, value: Reg | int, size: Size) -> None:
        """*(size *)(base + offset) = value."""
        if isinstance(value, Reg):
            self._emit(0x63 | size, base, value, offset, 0)
        else:
            self._emit(0x62 | size, base, 0, offset, value)

    def atomic_add(self, base: Reg, offset: int, value: Reg) -> None:
        """*(u64 *)(base + offset) += value, in one step for all processors."""
        self._emit(0xDB, base, value, offset, 0)

    def alu(self, dst: Reg, operator: str, value: Reg | int) -> None:
        """dst = dst operator value, in 64 bits; "=" moves (a number is sign-extended)."""
        self._operate(0x07 | _ALU[operator], dst, value, 0)

    def jump(self, label: str) -> None:
        """Go to the label."""
        self._emit(0x05, 0, 0, label, 0)

    def jump_if(self, dst: Reg, operator: str, value: Reg | int, label: str) -> None:
        """Go to the label if it holds, unsigned, in 64 bits; "&" means: any of these bits is set."""
        self._operate(0x05 | _JUMP[operator], dst, value, label)

    def call(self, helper: int) -> None:
        """R0 = helper(R1, ..., R5)."""
        self._emit(0x85, 0, 0, 0, helper)

    def map(self, dst: Reg, fd: int) -> None:
        """dst = the map behind a file descriptor (a 64-bit immediate: two instructions)."""
        self._emit(0x18, dst, _PSEUDO_MAP_FD, 0, fd)
        self._emit(0x00, 0, 0, 0, 0)

    def map_value(self, dst: Reg, fd: int, offset: int = 0) -> None:
        """dst = address of a byte of an array map's only value (likewise two instructions; Linux 5.2)."""
        self._emit(0x18, dst, _PSEUDO_MAP_VALUE, 0, fd)
        self._emit(0x00, 0, 0, 0, offset)

    def exit(self) -> None:
        """Return R0."""
        self._emit(0x95, 0, 0, 0, 0)

    def is_wanted(self, label: str) -> bool:
        """Whether a jump to the label has been added. Code that nothing leads to is refused by the kernel."""
        return any(offset == label for _, _, offset, _ in self._code)

    def assemble(self) -> bytes:
        """The instructions with every label resolved."""
        return b"".join(
            struct.pack("<BBhi", opcode, registers, self._distance(at, offset), immediate)
            for at, (opcode, registers, offset, immediate) in enumerate(self._code)
        )

    def _distance(self, at: int, offset: str | int) -> int:
        if isinstance(offset, int):
            return offset
        if offset not in self._labels:
            raise ValueError(f"label {offset!r} is nowhere placed")
        return self._labels[offset] - at - 1

    def _operate(self, opcode: int, dst: Reg, value: Reg | int, offset: str | int) -> None:
        if isinstance(value, Reg):
            self._emit(opcode | 0x08, dst, value, offset, 0)
        else:
            self._emit(opcode, dst, 0, offset, value)

    def _emit(self, opcode: int, dst: int, src: int, offset: str | int, immediate: int) -> None:
        self._code.append((opcode, src << 4 | dst, offset, immediate))
