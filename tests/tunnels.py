"""Tunnels for tests: a packet in ipip, gre or gue as dpkt and the RFCs have it, every checksum computed whole."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Any

from tests.frames import UDP, checksum, ethernet, ip4_packet, ip6_packet, pseudo_header, udp_datagram

LB = {4: "10.3.0.2", 6: "fd00:3::2"}
HOST = {4: "10.3.0.11", 6: "fd00:3::11"}
PROTOCOL = {4: 4, 6: 41}
ETHERTYPE = {4: 0x0800, 6: 0x86DD}
GRE = 47
MODES = ("ipip", "gre", "gue", "gue1")  # gue1: variant 1, without a header of its own
PORT = 6080
WAYS = [(mode, outer, inner) for mode in MODES for outer in (4, 6) for inner in (4, 6)]


def outer_packet(version: int, protocol: int, payload: bytes, tos: int = 0, **headers: Any) -> bytes:
    make = ip4_packet if version == 4 else ip6_packet
    return with_tos(make(LB[version], HOST[version], protocol, payload, **headers), tos)


def with_tos(packet: bytes, tos: int) -> bytes:
    """The same with another TOS or traffic class, and a right checksum."""
    if packet[0] >> 4 == 6:
        return bytes([packet[0] & 0xF0 | tos >> 4, packet[1] & 0x0F | (tos & 0x0F) << 4]) + packet[2:]
    return with_ip4_checksum(packet[:1] + bytes([tos]) + packet[2:])


def with_ip4_checksum(packet: bytes) -> bytes:
    header = (packet[0] & 15) * 4
    total = checksum(packet[:10] + bytes(2) + packet[12:header])
    return packet[:10] + total.to_bytes(2, "big") + packet[12:]


def udp_segment(version: int, payload: bytes, port: int = PORT, with_checksum: bool = True) -> bytes:
    raw = udp_datagram(33333, port, payload)
    if with_checksum:
        pseudo = pseudo_header(ip_address(LB[version]).packed, ip_address(HOST[version]).packed, UDP, len(raw))
        total = checksum(pseudo + raw) or 0xFFFF
        raw = raw[:6] + total.to_bytes(2, "big") + raw[8:]
    return raw


def gue_header(inner: int, *, words: int = 0, control: int = 0, variant: int = 0, flags: int = 0) -> bytes:
    first = variant << 6 | control << 5 | words
    return struct.pack("!BBH", first, PROTOCOL[inner], flags) + bytes(range(1, 4 * words + 1))


def gre_header(inner: int, *, key: int | None = None, flags: int = 0) -> bytes:
    start = struct.pack("!HH", flags | (0x2000 if key is not None else 0), ETHERTYPE[inner])
    return start + (b"" if key is None else struct.pack("!I", key))


def tunnel(
    mode: str, outer: int, packet: bytes, *, key: int | None = None, port: int = PORT, **headers: Any
) -> bytes:
    """The packet in a tunnel, as an Ethernet frame."""
    inner = packet[0] >> 4
    if mode == "ipip":
        return ethernet(outer_packet(outer, PROTOCOL[inner], packet, **headers))
    if mode == "gre":
        return ethernet(outer_packet(outer, GRE, gre_header(inner, key=key) + packet, **headers))
    payload = (gue_header(inner) if mode == "gue" else b"") + packet
    return ethernet(outer_packet(outer, UDP, udp_segment(outer, payload, port), **headers))
