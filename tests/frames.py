"""Frames for tests: built field by field, every checksum computed whole; taken apart again, every checksum recomputed.

Nothing here knows how fastlb computes anything: it is the other side of each comparison. (tests/unit/test_frames.py
holds it against dpkt, which takes ten times as long; the tests build millions of frames.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, inet_ntoa, inet_pton
from struct import Struct

import dpkt

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
TCP, UDP = 6, 17
HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, DEST_OPTS = 0, 43, 44, 51, 60
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, DEST_OPTS)

ROUTER_MAC = "02:00:00:00:00:fe"
BALANCER_MAC = "02:00:00:00:00:01"
IP4_HEADER = Struct("!BBHHHBBH4s4s")
IP6_HEADER = Struct("!IHBB16s16s")
TCP_HEADER = Struct("!HHIIBBHHH")
UDP_HEADER = Struct("!HHHH")
DO_NOT_FRAGMENT = 0x4000
WINDOW = 0xFFFF
PADDING4 = b"\x01\x01\x01\x00"  # IPv4 options: three no-operations and the end of the list


def packed(address: str) -> bytes:
    """The bytes of an address."""
    return inet_pton(AF_INET6 if ":" in address else AF_INET, address)


@lru_cache(1 << 16)
def _text6(address: bytes) -> str:
    return str(ip_address(address))


def text_of(address: bytes) -> str:
    """The text of an address, as `ipaddress` writes it."""
    return inet_ntoa(address) if len(address) == 4 else _text6(address)


@lru_cache(1 << 10)
def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_of(address: str) -> str:
    """The MAC that the tests give to a host: its address in it."""
    parsed = ip_address(address)
    return (bytes([2, parsed.version]) + parsed.packed[-4:]).hex(":")


def checksum(data: bytes) -> int:
    """RFC 1071, over whole data: a sum of 16-bit words whose carries come back is a remainder by 2^16 - 1, never 0."""
    number = int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big")
    return 0xFFFF - (number % 0xFFFF or (0xFFFF if number else 0))


def pseudo_header(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    """RFC 9293 section 3.1, RFC 8200 section 8.1; the IPv4 form sums to the same as zero-extended fields."""
    return src + dst + length.to_bytes(4, "big") + protocol.to_bytes(4, "big")


def tcp_segment(sport: int, dport: int, flags: int, payload: bytes, seq: int, ack: int, options: bytes) -> bytes:
    """Without its checksum."""
    words = 5 + len(options) // 4
    return TCP_HEADER.pack(sport, dport, seq, ack, words << 4, flags, WINDOW, 0, 0) + options + payload


def udp_datagram(sport: int, dport: int, payload: bytes) -> bytes:
    """Without its checksum."""
    return UDP_HEADER.pack(sport, dport, 8 + len(payload), 0) + payload


def extension(following: int, kind: int, body: bytes) -> bytes:
    """One IPv6 extension header: ``body`` is what comes after its length byte, padded to whole words."""
    raw = bytes([following, 0]) + body
    if kind == FRAGMENT:
        return raw
    word, less = (4, 2) if kind == AUTH else (8, 1)
    raw += bytes(-len(raw) % 8)
    return raw[:1] + bytes([len(raw) // word - less]) + raw[2:]


def ip4_packet(
    src: str, dst: str, protocol: int, segment: bytes, *, ttl: int = 64, options: bytes = b"", df: bool = False,
    tos: int = 0,
) -> bytes:  # fmt: skip
    size = 20 + len(options)
    addresses = packed(src), packed(dst)
    header = IP4_HEADER.pack(
        0x40 | size // 4, tos, size + len(segment), 0x1234, DO_NOT_FRAGMENT if df else 0, ttl, protocol, 0, *addresses
    )
    header += options
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + segment


def ip6_packet(
    src: str, dst: str, protocol: int, segment: bytes, *, ttl: int = 64, extensions: tuple[tuple[int, bytes], ...] = (),
    tos: int = 0,
) -> bytes:  # fmt: skip
    chain, following = segment, protocol
    for kind, body in reversed(extensions):
        chain, following = extension(following, kind, body) + chain, kind
    return IP6_HEADER.pack(6 << 28 | tos << 20, len(chain), following, ttl, packed(src), packed(dst)) + chain


def ethernet(
    packet: bytes,
    *,
    tags: tuple[tuple[int, int], ...] = (),
    dst: str = BALANCER_MAC,
    src: str = ROUTER_MAC,
    ethertype: int | None = None,
) -> bytes:
    """``tags``: (EtherType, tag control information), the outer one first."""
    if ethertype is None:
        ethertype = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    types = b"".join(tpid.to_bytes(2, "big") + tci.to_bytes(2, "big") for tpid, tci in tags)
    return mac_bytes(dst) + mac_bytes(src) + types + ethertype.to_bytes(2, "big") + packet


def frame(
    src: str,
    sport: int,
    dst: str,
    dport: int,
    proto: str = "tcp",
    *,
    flags: int = SYN,
    payload: bytes = b"",
    seq: int = 1000,
    ack: int = 0,
    tcp_options: bytes = b"",
    ttl: int = 64,
    options: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
    tags: tuple[tuple[int, int], ...] = (),
    with_checksum: bool = True,
    df: bool = False,
    tos: int = 0,
) -> bytes:
    """A whole Ethernet frame; ``with_checksum=False`` sends UDP without one, ``tos`` is the traffic class too."""
    if proto == "tcp":
        protocol, at, raw = TCP, 16, tcp_segment(sport, dport, flags, payload, seq, ack, tcp_options)
    else:
        protocol, at, raw = UDP, 6, udp_datagram(sport, dport, payload)
    if with_checksum:
        total = checksum(pseudo_header(packed(src), packed(dst), protocol, len(raw)) + raw)
        raw = raw[:at] + (total or (0xFFFF if proto == "udp" else 0)).to_bytes(2, "big") + raw[at + 2 :]
    if ":" not in src:
        return ethernet(ip4_packet(src, dst, protocol, raw, ttl=ttl, options=options, df=df, tos=tos), tags=tags)
    return ethernet(ip6_packet(src, dst, protocol, raw, ttl=ttl, extensions=extensions, tos=tos), tags=tags)


@dataclass(frozen=True)
class Seen:
    """A frame taken apart."""

    eth_dst: str
    eth_src: str
    tags: tuple[tuple[int, int], ...]
    version: int
    src: str
    dst: str
    ttl: int
    protocol: int
    between: bytes  # IPv4 options or IPv6 extension headers
    segment: bytes  # from the transport header to the end of the IP packet

    @property
    def sport(self) -> int:
        return int.from_bytes(self.segment[0:2], "big")

    @property
    def dport(self) -> int:
        return int.from_bytes(self.segment[2:4], "big")

    @property
    def tcp(self) -> dpkt.tcp.TCP:
        return dpkt.tcp.TCP(self.segment)


def take_apart(raw: bytes) -> Seen:
    """The frame's fields; AssertionError when any length or checksum in it is wrong."""
    at, tags = 12, []
    while raw[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
        tags.append((int.from_bytes(raw[at : at + 2], "big"), int.from_bytes(raw[at + 2 : at + 4], "big")))
        at += 4
    packet = raw[at + 2 :]
    if raw[at : at + 2] == b"\x08\x00":
        source, target, ttl, protocol, between, segment = _open_ip4(packet)
    else:
        assert raw[at : at + 2] == b"\x86\xdd"
        source, target, ttl, protocol, between, segment = _open_ip6(packet)
    _verify_transport(source, target, protocol, segment)
    return Seen(
        raw[0:6].hex(":"), raw[6:12].hex(":"), tuple(tags), 4 if len(source) == 4 else 6, text_of(source),
        text_of(target), ttl, protocol, between, segment,
    )  # fmt: skip


Opened = tuple[bytes, bytes, int, int, bytes, bytes]


def _open_ip4(packet: bytes) -> Opened:
    header, total = (packet[0] & 0x0F) * 4, int.from_bytes(packet[2:4], "big")
    assert checksum(packet[:header]) == 0, "IPv4 header checksum"
    assert 20 <= header <= total <= len(packet), "IPv4 total length"
    return packet[12:16], packet[16:20], packet[8], packet[9], packet[20:header], packet[header:total]


def _open_ip6(packet: bytes) -> Opened:
    header = IP6_HEADER.size
    length = int.from_bytes(packet[4:6], "big")
    assert header + length <= len(packet), "IPv6 payload length"
    at, kind = header, packet[6]
    while kind in EXTENSIONS:
        size = (packet[at + 1] + 2) * 4 if kind == AUTH else (packet[at + 1] + 1) * 8
        at, kind = at + size, packet[at]
    return packet[8:24], packet[24:40], packet[7], kind, packet[header:at], packet[at : header + length]


def _verify_transport(source: bytes, target: bytes, protocol: int, segment: bytes) -> None:
    if protocol == 1:
        assert checksum(segment) == 0, "ICMP checksum"
    elif protocol == UDP and segment[6:8] == b"\0\0":
        return  # none was computed
    else:
        pseudo = pseudo_header(source, target, protocol, len(segment))
        assert checksum(pseudo + segment) == 0, "transport checksum"
