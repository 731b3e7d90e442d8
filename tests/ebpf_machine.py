"""A kernel for eBPF without one: it stands for `syscall.bpf`, keeps maps and programs, and runs programs over frames.

It shares no code with the assembler, and is stricter than it must be: registers that a call has lost, and bytes of the
stack that nobody wrote, are no numbers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass, field

import pytest

from fastlb.kernel.ebpf import syscall

MASK64 = (1 << 64) - 1
CONTEXT, STACK, MAP, VALUE, FOUND = (number << 48 for number in range(1, 6))  # where pointers point
STACK_SIZE = 512
SIZES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}
JUMPS = {
    0x10: lambda a, b: a == b, 0x20: lambda a, b: a > b, 0x30: lambda a, b: a >= b, 0x40: lambda a, b: bool(a & b),
    0x50: lambda a, b: a != b, 0xA0: lambda a, b: a < b, 0xB0: lambda a, b: a <= b,
}  # fmt: skip
ALU = {
    0x00: lambda a, b: a + b, 0x10: lambda a, b: a - b, 0x20: lambda a, b: a * b, 0x40: lambda a, b: a | b,
    0x50: lambda a, b: a & b, 0x60: lambda a, b: a << b, 0x70: lambda a, b: a >> b, 0xA0: lambda a, b: a ^ b,
    0xB0: lambda a, b: b,
}  # fmt: skip
HASH, ARRAY = 1, 2


@dataclass
class FakeMap:
    """A map; the value of an array lies in the memory of its descriptor, which may be mapped."""

    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    entries: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class FakeProgram:
    """A program that was loaded."""

    name: str
    kind: int
    code: bytes


class BpfKernel:
    """What bpf(2) does. ``refused``: errno by command."""

    def __init__(self) -> None:
        self.maps: dict[int, FakeMap] = {}
        self.programs: dict[int, FakeProgram] = {}
        self.refused: dict[int, int] = {}
        self.egress: dict[int, list[int]] = {}  # ids of programs by interface, the first one first
        self.links: dict[int, tuple[int, int]] = {}  # interface and program
        self.room: list[tuple[int, int]] = []  # bytes and flags of each bpf_skb_adjust_room

    def __call__(self, command: int, attr: bytes | bytearray) -> int:
        if command in self.refused:
            raise OSError(self.refused[command], os.strerror(self.refused[command]))
        does = {
            0: self._create, 1: self._look_up, 2: self._update, 3: self._delete, 5: self._load, 15: self._describe,
            16: self._query, 28: self._link,
        }  # fmt: skip
        return does[command](bytes(attr))

    def map_named(self, name: str) -> FakeMap:
        """The only map of that name."""
        (found,) = (each for each in self.maps.values() if each.name == name)
        return found

    def _create(self, attr: bytes) -> int:
        kind, key_size, value_size, entries = struct.unpack_from("=4I", attr)
        name = attr[28:44].rstrip(b"\0").decode()
        fd = os.memfd_create(name)
        os.truncate(fd, value_size if kind == ARRAY else 0)
        self.maps[fd] = FakeMap(name, kind, key_size, value_size, entries)
        return fd

    def _entry(self, attr: bytes) -> tuple[int, FakeMap, bytes, int]:
        fd, key, value = struct.unpack_from("=I4xQQ", attr.ljust(24, b"\0"))
        return fd, self.maps[fd], ctypes.string_at(key, self.maps[fd].key_size), value

    def _look_up(self, attr: bytes) -> int:
        fd, of, _, value = self._entry(attr)
        ctypes.memmove(value, os.pread(fd, of.value_size, 0), of.value_size)
        return 0

    def _update(self, attr: bytes) -> int:
        fd, of, key, value = self._entry(attr)
        if of.kind == ARRAY:
            os.pwrite(fd, ctypes.string_at(value, of.value_size), 0)
        elif key not in of.entries and len(of.entries) == of.max_entries:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        else:
            of.entries[key] = ctypes.string_at(value, of.value_size)
        return 0

    def _delete(self, attr: bytes) -> int:
        _, of, key, _ = self._entry(attr)
        if of.entries.pop(key, None) is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return 0

    def _load(self, attr: bytes) -> int:
        kind, count, code = struct.unpack_from("=IIQ", attr)
        name = attr[48:64].rstrip(b"\0").decode()
        fd = os.memfd_create(name)
        self.programs[fd] = FakeProgram(name, kind, ctypes.string_at(code, 8 * count))
        return fd

    def _describe(self, attr: bytes) -> int:
        fd, _, into = struct.unpack_from("=IIQ", attr)
        ctypes.memmove(into, struct.pack("=II", self.programs[fd].kind, fd), 8)
        return 0

    def _query(self, attr: bytes) -> int:
        interface, into = struct.unpack_from("=I12xQ", attr)
        first = self.egress.get(interface, [0])[0]
        ctypes.memmove(into, struct.pack("=I", first), 4)
        return 0

    def _link(self, attr: bytes) -> int:
        program, interface = struct.unpack_from("=II", attr)
        self.egress.setdefault(interface, []).insert(0, program)
        fd = os.memfd_create("link")
        self.links[fd] = (interface, program)
        return fd

    def run(self, program: int | bytes, frame: bytes, network: bool = False) -> int:
        """Run a program over an Ethernet frame; ``network``: it sees the frame from the network header on."""
        code = program if isinstance(program, bytes) else self.programs[program].code
        return Run(self, code, frame, network).result()


class Run:
    """One program over one frame; ``told``: the protocol that its sender named, if not its EtherType."""

    def __init__(
        self, kernel: BpfKernel, code: bytes, frame: bytes, network: bool = False, told: int | None = None
    ) -> None:
        self.kernel = kernel
        self.code = list(struct.iter_unpack("<BBhi", code))
        self.frame = bytearray(frame[14:] if network else frame)
        protocol = frame[12:14] if told is None else told.to_bytes(2, "big")
        self.context = {4: 0 if frame[:6] == bytes(6) else 3, 16: int.from_bytes(protocol, "little")}
        self.stack: list[int | None] = [None] * STACK_SIZE
        self.registers: list[int | None] = [None, CONTEXT, *[None] * 8, STACK + STACK_SIZE]

    def result(self) -> int:
        at = 0
        for _ in range(100_000):
            opcode, registers, offset, immediate = self.code[at]
            dst, src, kind = registers & 15, registers >> 4, opcode & 7
            at += 1
            if opcode == 0x95:
                return struct.unpack("=i", struct.pack("=Q", self.get(0))[:4])[0]
            if opcode == 0x85:
                self.call(immediate)
            elif opcode == 0x18:
                base = MAP + immediate if src == 1 else VALUE + (immediate << 32) + self.code[at][3]
                self.registers[dst], at = base, at + 1
            elif kind == 5:
                value = self.get(src) if opcode & 8 else immediate & MASK64
                if opcode == 0x05 or JUMPS[opcode & 0xF0](self.get(dst), value):
                    at += offset
            elif kind == 7:
                value = self.get(src) if opcode & 8 else immediate & MASK64
                before = 0 if opcode & 0xF0 == 0xB0 else self.get(dst)
                self.registers[dst] = ALU[opcode & 0xF0](before, value) & MASK64
            elif opcode == 0xDB:
                sum_ = self.read(self.get(dst) + offset, 8) + self.get(src)
                self.write(self.get(dst) + offset, 8, sum_)
            elif kind == 1:
                self.registers[dst] = self.read(self.get(src) + offset, SIZES[opcode & 0x18])
            else:
                value = self.get(src) if kind == 3 else immediate
                self.write(self.get(dst) + offset, SIZES[opcode & 0x18], value)
        raise AssertionError("the program does not end")

    def get(self, register: int) -> int:
        value = self.registers[register]
        assert value is not None, f"r{register} has no value here"
        return value

    def bytes_at(self, pointer: int, size: int) -> bytes:
        assert STACK <= pointer <= STACK + STACK_SIZE - size, "not on the stack"
        found = self.stack[pointer - STACK : pointer - STACK + size]
        assert None not in found, f"nobody wrote what lies at fp{pointer - STACK - STACK_SIZE}"
        return bytes(byte for byte in found if byte is not None)

    def read(self, pointer: int, size: int) -> int:
        if pointer >> 48 == CONTEXT >> 48:
            return self.context[pointer - CONTEXT]
        if pointer >> 48 == VALUE >> 48:
            return int.from_bytes(os.pread(pointer - VALUE >> 32, size, pointer & 0xFFFFFFFF), "little")
        return int.from_bytes(self.bytes_at(pointer, size), "little")

    def write(self, pointer: int, size: int, value: int) -> None:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if pointer >> 48 == VALUE >> 48:
            os.pwrite(pointer - VALUE >> 32, data, pointer & 0xFFFFFFFF)
        else:
            self.put(pointer, data)

    def put(self, pointer: int, data: bytes) -> None:
        assert STACK <= pointer <= STACK + STACK_SIZE - len(data), "not on the stack"
        self.stack[pointer - STACK : pointer - STACK + len(data)] = data

    def call(self, helper: int) -> None:
        does = {1: self.look_up, 2: self.update, 3: self.delete, 9: self.store, 26: self.load, 50: self.adjust_room}
        result = does[helper]()
        self.registers[:6] = [result & MASK64, *[None] * 5]

    def map(self) -> FakeMap:
        return self.kernel.maps[self.get(1) - MAP]

    def look_up(self) -> int:
        return FOUND if self.bytes_at(self.get(2), self.map().key_size) in self.map().entries else 0

    def update(self) -> int:
        of = self.map()
        of.entries[self.bytes_at(self.get(2), of.key_size)] = self.bytes_at(self.get(3), of.value_size)
        return 0

    def delete(self) -> int:
        return 0 if self.map().entries.pop(self.bytes_at(self.get(2), self.map().key_size), None) else -errno.ENOENT

    def load(self) -> int:
        offset, size = self.get(2), self.get(4)
        if offset + size > len(self.frame):
            return -errno.EFAULT
        self.put(self.get(3), self.frame[offset : offset + size])
        return 0

    def store(self) -> int:
        offset, size = self.get(2), self.get(4)
        self.frame[offset : offset + size] = self.bytes_at(self.get(3), size)
        return 0

    def adjust_room(self) -> int:
        (size,) = struct.unpack("=i", struct.pack("=Q", self.get(2))[:4])
        self.kernel.room.append((size, self.get(4)))
        self.frame[14 : 14 - min(size, 0)] = bytes(max(size, 0))
        return 0


@pytest.fixture
def bpf_kernel(monkeypatch: pytest.MonkeyPatch) -> BpfKernel:
    """A kernel in the place of bpf(2)."""
    kernel = BpfKernel()
    monkeypatch.setattr(syscall, "bpf", kernel)
    monkeypatch.setattr(syscall, "raise_memlock_limit", lambda: None)
    return kernel
