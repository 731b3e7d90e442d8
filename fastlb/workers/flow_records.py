"""What is written into a flow file, as bytes: its head, and records that say by themselves whether they are whole.

A record: | sequence 64 | length 64 | SHA-256 of both and the JSON | JSON |. Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastlb.model.encoding import encode
from fastlb.model.steps import finish

MAGIC, VERSION = b"fastlb\0\n", 3

_HEAD = struct.Struct("<8sII Q QQQQ")  # magic, version, 0, the sequence that holds; offset and room of each list
_RECORD = struct.Struct("<QQ32s")
HEAD_BYTES = _HEAD.size + hashlib.sha256().digest_size

Place = tuple[int, int]  # offset and room of a list, in bytes; (0, 0): it was never written


class Head(NamedTuple):
    """What the beginning of a file says: which list holds, and where both are."""

    sequence: int
    lists: tuple[Place, Place]


def pack_head(sequence: int, lists: Sequence[Place]) -> bytes:
    """Return the beginning of a file."""
    head = _HEAD.pack(MAGIC, VERSION, 0, sequence, *lists[0], *lists[1])
    return head + hashlib.sha256(head).digest()


def parse_head(data: bytes) -> Head | str:
    """Return what the first HEAD_BYTES of a file say, or why they cannot be used."""
    if len(data) < HEAD_BYTES or not data.startswith(MAGIC):
        return "it is no flow file"
    _, version, _, sequence, *where = _HEAD.unpack_from(data)
    if version != VERSION:
        return f"it has version {version} of the format, not {VERSION}"
    if hashlib.sha256(data[: _HEAD.size]).digest() != data[_HEAD.size :]:
        return "its head is damaged"
    return Head(sequence, ((where[0], where[1]), (where[2], where[3])))


def seal(sequence: int, data: Mapping[str, Any]) -> bytes:
    """Return a record."""
    body = finish(encode(data))
    head = struct.pack("<QQ", sequence, len(body))
    return head + hashlib.sha256(head + body).digest() + body


def unseal(fd: int, offset: int, room: int) -> tuple[int, dict[str, Any]] | None:
    """Read the record at an offset of a file: its sequence and data; None when it is not whole.

    ``room``: bytes that it may take. Raises OSError.
    """
    size = os.fstat(fd).st_size
    if offset >= size:
        return None
    head = os.pread(fd, _RECORD.size, offset)
    if len(head) < _RECORD.size:
        return None
    sequence, length, digest = _RECORD.unpack(head)
    if length > min(room, size):
        return None
    body = os.pread(fd, length, offset + _RECORD.size)
    if hashlib.sha256(head[:16] + body).digest() != digest:
        return None
    data = json.loads(body)
    return (sequence, data) if isinstance(data, dict) else None


def lists_fit(lists: Sequence[Place], start: int, end: int) -> bool:
    """Return True if the lists lie between these bytes, and apart; one that was never written lies nowhere."""
    before = start
    for offset, room in sorted(each for each in lists if each != (0, 0)):
        if offset < before or room < _RECORD.size:
            return False
        before = offset + room
    return before <= end


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return why a file with this identity does not fit; None when it does."""
    if found.get("boot") != wanted["boot"]:
        return "it is of another boot"
    for key in ("flows", "snat", "snat_ports"):
        if found.get(key) != wanted[key]:
            return f"it is of another configuration: {key}: {_shown(found.get(key))} -> {_shown(wanted[key])}"
    if found.get("layout") != wanted["layout"]:
        return f"fastlb {found.get('fastlb')} has laid its flow table out otherwise"
    return None


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
