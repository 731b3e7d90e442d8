"""The assembler's encodings, as literal bytes: opcode, registers (src << 4 | dst), offset, immediate."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from fastlb.kernel.ebpf.assembler import Assembler, Reg, Size

R0, R1, R2, R3, R6, R10 = Reg.R0, Reg.R1, Reg.R2, Reg.R3, Reg.R6, Reg.R10

ENCODINGS: list[tuple[str, Callable[[Assembler], None], str]] = [
    ("r1 = 5", lambda a: a.alu(R1, "=", 5), "b7 01 0000 05000000"),
    ("r6 = r1", lambda a: a.alu(R6, "=", R1), "bf 16 0000 00000000"),
    ("r0 = -1", lambda a: a.alu(R0, "=", -1), "b7 00 0000 ffffffff"),
    ("r2 += -24", lambda a: a.alu(R2, "+", -24), "07 02 0000 e8ffffff"),
    ("r1 += r2", lambda a: a.alu(R1, "+", R2), "0f 21 0000 00000000"),
    ("r1 -= 1", lambda a: a.alu(R1, "-", 1), "17 01 0000 01000000"),
    ("r1 *= 3", lambda a: a.alu(R1, "*", 3), "27 01 0000 03000000"),
    ("r1 *= r2", lambda a: a.alu(R1, "*", R2), "2f 21 0000 00000000"),
    ("r1 |= r2", lambda a: a.alu(R1, "|", R2), "4f 21 0000 00000000"),
    ("r1 &= 15", lambda a: a.alu(R1, "&", 15), "57 01 0000 0f000000"),
    ("r1 <<= 2", lambda a: a.alu(R1, "<<", 2), "67 01 0000 02000000"),
    ("r1 >>= 4", lambda a: a.alu(R1, ">>", 4), "77 01 0000 04000000"),
    ("r1 ^= r3", lambda a: a.alu(R1, "^", R3), "af 31 0000 00000000"),
    ("r0 = *(u32 *)(r6 + 4)", lambda a: a.load(R0, R6, 4, Size.U32), "61 60 0400 00000000"),
    ("r1 = *(u16 *)(r10 - 8)", lambda a: a.load(R1, R10, -8, Size.U16), "69 a1 f8ff 00000000"),
    ("r1 = *(u8 *)(r10 - 28)", lambda a: a.load(R1, R10, -28, Size.U8), "71 a1 e4ff 00000000"),
    ("r1 = *(u64 *)(r2 + 0)", lambda a: a.load(R1, R2, 0, Size.U64), "79 21 0000 00000000"),
    ("*(u64 *)(r10 - 40) = 0", lambda a: a.store(R10, -40, 0, Size.U64), "7a 0a d8ff 00000000"),
    ("*(u32 *)(r10 - 4) = 7", lambda a: a.store(R10, -4, 7, Size.U32), "62 0a fcff 07000000"),
    ("*(u16 *)(r10 - 8) = r1", lambda a: a.store(R10, -8, R1, Size.U16), "6b 1a f8ff 00000000"),
    ("*(u8 *)(r10 - 6) = r6", lambda a: a.store(R10, -6, R6, Size.U8), "73 6a faff 00000000"),
    ("lock *(u64 *)(r1 + 8) += r2", lambda a: a.atomic_add(R1, 8, R2), "db 21 0800 00000000"),
    ("call 26", lambda a: a.call(26), "85 00 0000 1a000000"),
    ("r1 = map 9", lambda a: a.map(R1, 9), "18 11 0000 09000000 00 00 0000 00000000"),
    ("r1 = value of map 9", lambda a: a.map_value(R1, 9), "18 21 0000 09000000 00 00 0000 00000000"),
    ("r2 = 64 bytes into it", lambda a: a.map_value(R2, 9, 64), "18 22 0000 09000000 00 00 0000 40000000"),
    ("exit", lambda a: a.exit(), "95 00 0000 00000000"),
]

# Each is "the condition, then to the label", with one instruction between the jump and the label.
JUMPS: list[tuple[str, Callable[[Assembler], None], str]] = [
    ("always", lambda a: a.jump("there"), "05 00 0100 00000000"),
    ("r1 == 69", lambda a: a.jump_if(R1, "==", 0x45, "there"), "15 01 0100 45000000"),
    ("r1 != 4", lambda a: a.jump_if(R1, "!=", 4, "there"), "55 01 0100 04000000"),
    ("r1 < 5", lambda a: a.jump_if(R1, "<", 5, "there"), "a5 01 0100 05000000"),
    ("r1 <= 5", lambda a: a.jump_if(R1, "<=", 5, "there"), "b5 01 0100 05000000"),
    ("r1 > r2", lambda a: a.jump_if(R1, ">", R2, "there"), "2d 21 0100 00000000"),
    ("r1 >= r2", lambda a: a.jump_if(R1, ">=", R2, "there"), "3d 21 0100 00000000"),
    ("r1 & 65343", lambda a: a.jump_if(R1, "&", 0xFF3F, "there"), "45 01 0100 3fff0000"),
]


@pytest.mark.parametrize(("emit", "code"), [row[1:] for row in ENCODINGS], ids=[row[0] for row in ENCODINGS])
def test_encoding(emit: Callable[[Assembler], None], code: str) -> None:
    assembler = Assembler()
    emit(assembler)
    assert assembler.assemble() == bytes.fromhex(code)


@pytest.mark.parametrize(("emit", "code"), [row[1:] for row in JUMPS], ids=[row[0] for row in JUMPS])
def test_jump(emit: Callable[[Assembler], None], code: str) -> None:
    assembler = Assembler()
    emit(assembler)
    assembler.alu(R0, "=", 0)
    assembler.label("there")
    assembler.exit()
    assert assembler.assemble() == bytes.fromhex(code + "b7 00 0000 00000000" + "95 00 0000 00000000")


def test_jumps_count_both_halves_of_a_map_and_may_go_back() -> None:
    assembler = Assembler()
    assembler.label("start")
    assembler.jump("end")
    assembler.map(R1, 3)
    assembler.jump("start")
    assembler.label("end")
    assembler.exit()
    offsets = [at[0] for at in struct.iter_unpack("<2xh4x", assembler.assemble())]
    assert offsets == [3, 0, 0, -4, 0]


def test_labels_must_be_placed_once() -> None:
    assembler = Assembler()
    assembler.jump("nowhere")
    with pytest.raises(ValueError, match="'nowhere' is nowhere placed"):
        assembler.assemble()
    assembler.label("here")
    with pytest.raises(ValueError, match="'here' is placed twice"):
        assembler.label("here")


@pytest.mark.parametrize(
    ("emit", "error"),
    [
        (lambda a: a.alu(R1, "**", 2), KeyError),
        (lambda a: a.jump_if(R1, "=", 2, "x"), KeyError),
        (lambda a: a.alu(R1, "=", 1 << 31), struct.error),
        (lambda a: a.load(R1, R10, -40_000, Size.U8), struct.error),
    ],
    ids=["no such operation", "no such condition", "immediate over 32 bits", "offset over 16 bits"],
)
def test_misuse(emit: Callable[[Assembler], None], error: type[Exception]) -> None:
    assembler = Assembler()

    def assemble() -> None:
        emit(assembler)
        assembler.assemble()

    with pytest.raises(error):
        assemble()
