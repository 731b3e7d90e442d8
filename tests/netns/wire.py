"""One end of a cable, for tests: frames go out with the offloads that they are given, and come in as the wire has them.

    wire.send(*leave_to_device(frame(...), "partial"))
    wire.receive().seen.dport
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import ExitStack
from ipaddress import ip_address
from typing import NamedTuple

from tests.frames import BALANCER_MAC, TCP, UDP, Seen, checksum, mac_bytes, pseudo_header, take_apart
from tests.netns.balancer import PATIENCE
from tests.netns.namespaces import Namespace

SOL_PACKET, PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 8, 15, 23
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3
VLAN_VALID = 1 << 4  # tp_status
VNET_HDR = 10  # bytes
NEEDS_CSUM = 1  # virtio_net_hdr.flags
NO_GSO, GSO_TCP4, GSO_UFO, GSO_TCP6, GSO_UDP = 0, 1, 3, 4, 5  # virtio_net_hdr.gso_type


class Offload(NamedTuple):
    """struct virtio_net_hdr: what of a frame is left to the device."""

    flags: int = 0
    gso_type: int = NO_GSO
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        return struct.pack("<BBHHHH", *self)


PLAIN = Offload()
OFFLOADS = ("plain", "partial", "gso")
SEGMENT = 1300  # bytes of payload in each segment of a GSO packet


def l4_offset(raw: bytes) -> int:
    """Of frames as ``frame`` builds them: tags, but neither options nor extensions."""
    at = 12
    while raw[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    return at + 2 + (20 if raw[at : at + 2] == b"\x08\x00" else 40)


def leave_to_device(raw: bytes, offload: str) -> tuple[Offload, bytes]:
    """The frame as a host hands it to a device that computes checksums, and cuts segments of SEGMENT bytes."""
    if offload == "plain":
        return PLAIN, raw
    seen, start = take_apart(raw), l4_offset(raw)
    field = 16 if seen.protocol == TCP else 6
    pseudo = pseudo_header(
        ip_address(seen.src).packed, ip_address(seen.dst).packed, seen.protocol, len(seen.segment)
    )
    open_sum = (~checksum(pseudo) & 0xFFFF).to_bytes(2, "big")
    raw = raw[: start + field] + open_sum + raw[start + field + 2 :]
    if offload == "partial":
        return Offload(NEEDS_CSUM, NO_GSO, 0, 0, start, field), raw
    kind = GSO_UDP if seen.protocol == UDP else GSO_TCP4 if seen.version == 4 else GSO_TCP6
    return Offload(NEEDS_CSUM, kind, start + (20 if field == 16 else 8), SEGMENT, start, field), raw


def finish(offload: Offload, raw: bytes) -> bytes:
    """What a device does with the checksum that is left to it."""
    if not offload.flags & NEEDS_CSUM:
        return raw
    at = offload.csum_start + offload.csum_offset
    return raw[:at] + checksum(raw[offload.csum_start :]).to_bytes(2, "big") + raw[at + 2 :]


class Arrival(NamedTuple):
    """A frame that was received: as it came, and with its checksum finished and its tag put back."""

    offload: Offload
    raw: bytes
    seen: Seen


class Wire:
    """One end of a cable: frames go out here, and what fastlb sends there is seen here."""

    def __init__(self, namespace: Namespace, interface: str, undo: ExitStack) -> None:
        self._sender = undo.enter_context(namespace.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._sender.bind((interface, 0))
        self._receiver = undo.enter_context(namespace.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0))
        for option in (PACKET_VNET_HDR, PACKET_AUXDATA, PACKET_IGNORE_OUTGOING):
            self._receiver.setsockopt(SOL_PACKET, option, 1)
        self._receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._receiver.bind((interface, ETH_P_ALL))
        self._receiver.settimeout(PATIENCE)

    def send(self, raw: bytes, offload: Offload = PLAIN) -> None:
        self._sender.send(offload.pack() + raw)

    def receive(self) -> Arrival:
        """The next frame from fastlb; what the kernels say to each other is passed over."""
        while True:
            data, ancillary, _, _ = self._receiver.recvmsg(1 << 17, socket.CMSG_SPACE(20))
            offload, raw = Offload(*struct.unpack_from("<BBHHHH", data)), data[VNET_HDR:]
            whole = finish(offload, raw)
            status, *_, tci, tpid = struct.unpack("=IIIHHHH", ancillary[0][2])
            if status & VLAN_VALID:
                whole = whole[:12] + struct.pack("!HH", tpid, tci) + whole[12:]
            if whole[6:12] in FASTLB and (seen := _ip_of(whole)) and seen.protocol in (TCP, UDP):
                return Arrival(offload, raw, seen)

    def receive_packet(self, protocol: int) -> bytes:
        """The IP packet in the next frame with fastlb's MAC address that carries this protocol; fragments too."""
        return self.receive_frame(protocol)[1][14:]

    def receive_frame(self, protocol: int) -> tuple[Offload, bytes]:
        """The whole of that frame, and what of it is left to the device."""
        while True:
            data = self._receiver.recv(1 << 17)
            raw = data[VNET_HDR:]
            kind = {b"\x08\x00": raw[23:24], b"\x86\xdd": raw[20:21]}.get(raw[12:14])
            if raw[6:12] in FASTLB and kind == bytes([protocol]):
                return Offload(*struct.unpack_from("<BBHHHH", data)), raw

    def arrived(self) -> list[bytes]:
        """The frames that are here by now, as they came. A link that was down meanwhile says so once, as an error."""
        found = []
        self._receiver.setblocking(False)
        while True:
            try:
                found.append(self._receiver.recv(1 << 17)[VNET_HDR:])
            except BlockingIOError:
                self._receiver.settimeout(PATIENCE)
                return found
            except OSError as error:
                if error.errno != errno.ENETDOWN:
                    raise


FASTLB = {mac_bytes(BALANCER_MAC)}  # all of the host's interfaces have this MAC


def _ip_of(raw: bytes) -> Seen | None:
    at = 12
    while raw[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    return take_apart(raw) if raw[at : at + 2] in (b"\x08\x00", b"\x86\xdd") else None


def payload(size: int) -> bytes:
    return bytes(at * 7 % 251 for at in range(size))
