"""tables.py: which entries are written and in which order, and the slots of their masks."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf import tables
from fastlb.kernel.ebpf.frame import KEY_SIZE, SLOT_SHIFT, SLOTS_AT
from fastlb.kernel.ebpf.tables import MirroredMap, Sources, Tables, masks_of, pack_slots, replace
from fastlb.model.match import LATER, MAX_MASKS, Key, Keys, Mask
from tests.ebpf_machine import BpfKernel

TCP = 6


class Log(list[tuple[str, str, bytes]]):
    """What was written where, in order."""


class Entries:
    """A map that writes down what it is told."""

    def __init__(self, name: str, log: Log, max_entries: int = 100) -> None:
        self.name, self.max_entries, self.fd, self._log = name, max_entries, 7, log

    def put(self, key: bytes, value: bytes) -> None:
        self._log.append(("put", self.name, key))

    def delete(self, key: bytes) -> None:
        self._log.append(("delete", self.name, key))


class Slots:
    """The same of the map of masks."""

    def __init__(self, name: str, log: Log) -> None:
        self.fd, self._name, self._log = 8, name, log

    def write(self, value: bytes) -> None:
        self._log.append(("write", self._name, value))


def key(address: str, port: int = 80, prefix: int | None = None, port_bits: int | None = None) -> Key:
    return Key(ip_address(address), port, TCP, prefix, port_bits)


def whole(address: str, port: int = 80) -> bytes:
    """An entry of a whole address and port."""
    packed = ip_address(address).packed
    return packed.rjust(16, b"\0") + struct.pack("!HBB", port, TCP, 4 if len(packed) == 4 else 6)


def test_only_differences_are_written() -> None:
    log = Log()
    mirrored = MirroredMap(Entries("a", log))
    replace({mirrored: {key("10.0.0.1"), key("fd00::1")}})
    assert sorted(log) == [("put", "a", whole("10.0.0.1")), ("put", "a", whole("fd00::1"))]
    log.clear()
    replace({mirrored: {key("10.0.0.1"), key("10.0.0.2")}})
    assert log == [("put", "a", whole("10.0.0.2")), ("delete", "a", whole("fd00::1"))]
    log.clear()
    replace({mirrored: {key("10.0.0.1"), key("10.0.0.2")}})
    assert log == []


def test_new_before_old_and_in_the_opposite_order() -> None:
    log = Log()
    first, second = MirroredMap(Entries("a", log)), MirroredMap(Entries("b", log))
    replace({first: {key("10.0.0.1")}, second: {key("10.0.0.1")}})
    log.clear()
    replace({first: {key("10.0.0.2")}, second: {key("10.0.0.2")}})
    assert [entry[:2] for entry in log] == [("put", "a"), ("put", "b"), ("delete", "b"), ("delete", "a")]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({key("10.0.0.2"), key("10.0.0.3")}, "the map b would have to hold 3 entries at once: its limit is 2"),
        (
            {key("10.0.0.0", 80, length) for length in range(MAX_MASKS)} | {key("fd00::", 80, 8)},
            "the map b would have to hold 3[0-9]+ entries at once",
        ),
    ],
)
def test_too_much_changes_nothing(wanted: set[Key], message: str) -> None:
    log = Log()
    first, second = MirroredMap(Entries("a", log)), MirroredMap(Entries("b", log, 2), Slots("masks", log))
    replace({first: set(), second: {key("10.0.0.1")}})
    log.clear()
    with pytest.raises(KernelError, match=message):
        replace({first: {key("10.0.0.9")}, second: wanted})
    assert log == []


def test_too_many_masks_change_nothing() -> None:
    log = Log()
    mirrored = MirroredMap(Entries("a", log), Slots("masks", log))
    with pytest.raises(KernelError, match=f"32 kinds of prefixes and port ranges at once: its limit is {MAX_MASKS}"):
        replace({mirrored: {key("10.0.0.0", 80, length) for length in range(MAX_MASKS + 1)}})
    assert log == []


def test_a_mask_is_there_while_a_key_has_it() -> None:
    log = Log()
    mirrored = MirroredMap(Entries("a", log), Slots("masks", log))
    replace({mirrored: {key("10.0.0.0", 80, 8)}})
    assert [entry[:2] for entry in log] == [("write", "masks"), ("put", "a")]
    assert log[0][2] == pack_slots({Mask(4, 8, 16): 1})
    assert log[1][2][-1] == 4 | 1 << 3
    log.clear()
    replace({mirrored: {key("10.0.0.0", 80, 8), key("11.0.0.0", 80, 8)}})
    assert [entry[:2] for entry in log] == [("put", "a")]
    log.clear()
    replace({mirrored: {key("12.0.0.0", 80, 16)}})
    assert [entry[:2] for entry in log] == [
        ("write", "masks"), ("put", "a"), ("delete", "a"), ("delete", "a"), ("write", "masks"),
    ]  # fmt: skip
    assert log[0][2] == pack_slots({Mask(4, 8, 16): 1, Mask(4, 16, 16): 2})
    assert log[-1][2] == pack_slots({Mask(4, 16, 16): 2})
    log.clear()
    replace({mirrored: {key("12.0.0.0", 80, 16), key("13.0.0.0", 80, 24)}})
    assert log[0][2] == pack_slots({Mask(4, 16, 16): 2, Mask(4, 24, 16): 1}), "a number that is free is given again"


def test_slots() -> None:
    packed = pack_slots({Mask(4, 24, 16): 1, Mask(6, 20, 12): 3})
    assert packed[:4] == struct.pack("=I", 3)
    slots = [packed[SLOTS_AT + (number << SLOT_SHIFT) :][:KEY_SIZE].hex(" ", 4) for number in range(3)]
    assert slots == [
        "00000000 00000000 00000000 ffffff00 ffff0c00",
        "00000000 00000000 00000000 00000000 00000000",
        "fffff000 00000000 00000000 00000000 fff01e00",
    ]


@pytest.mark.parametrize(
    ("of", "mask"),
    [
        (key("10.0.0.1"), None),
        (key("10.0.0.1", 80, 32, 16), None),
        (key("10.0.0.0", 80, 8), Mask(4, 8, 16)),
        (key("fd00::", 80, 64, 4), Mask(6, 64, 4)),
        (key("10.0.0.1", 0), Mask(4, 32, 0)),  # any port
        (Key(ip_address("10.0.0.1"), 0, 0), None),  # echo requests
        (Key(ip_address("10.0.0.1"), 0, LATER | TCP), None),  # fragments without ports
    ],
)
def test_masks_that_are_not_whole(of: Key, mask: Mask | None) -> None:
    assert masks_of([of]) == ({mask} if mask else set())


def test_the_maps_of_a_classifier(bpf_kernel: BpfKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ENTRIES", 3)
    source = ip_address("10.3.0.5")
    with ExitStack() as undo:
        made = Tables(Sources(frozenset({source}), 1024, 32767), undo)
        assert made.maps.source_ports == (1024, 32767)
        made.replace(Keys({key("10.0.0.1")}, {key("10.0.0.2")}, {key("10.0.0.3")}), [ip_address("10.0.0.4")])
        held = {each.name: sorted(each.entries) for each in bpf_kernel.maps.values() if each.entries}
        portless = struct.pack("!HBB", 0, 0, 4)
        assert held == {
            "fastlb_vips": [whole("10.0.0.1")],
            "fastlb_replies": [whole("10.0.0.2")],
            "fastlb_full": [whole("10.0.0.3")],
            "fastlb_sources": [source.packed.rjust(16, b"\0") + portless],
            "fastlb_locals": [ip_address("10.0.0.4").packed.rjust(16, b"\0") + portless],
        }
        made.set_locals([])
        assert not bpf_kernel.map_named("fastlb_locals").entries
        with pytest.raises(KernelError, match="fastlb_locals would have to hold 4 entries"):
            made.set_locals(map(ip_address, range(4)))
