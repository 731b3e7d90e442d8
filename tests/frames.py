"""Frames for tests: built by dpkt, every checksum computed whole; and taken apart again, every checksum recomputed.

Nothing here knows how fastlb computes anything: it is the other side of each comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import dpkt

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
TCP, UDP = 6, 17
HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, DEST_OPTS = 0, 43, 44, 51, 60
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, DEST_OPTS)

ROUTER_MAC = "02:00:00:00:00:fe"
BALANCER_MAC = "02:00:00:00:00:01"
PADDING4 = b"\x01\x01\x01\x00"  # IPv4 options: three no-operations and the end of the list


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_of(address: str) -> str:
    """The MAC that the tests give to a host: its address in it."""
    parsed = ip_address(address)
    return (bytes([2, parsed.version]) + parsed.packed[-4:]).hex(":")


def checksum(data: bytes) -> int:
    """RFC 1071, over whole data."""
    result: int = dpkt.in_cksum(data)
    return result


def pseudo_header(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    """RFC 9293 section 3.1, RFC 8200 section 8.1; the IPv4 form sums to the same as zero-extended fields."""
    return src + dst + length.to_bytes(4, "big") + protocol.to_bytes(4, "big")


def tcp_segment(sport: int, dport: int, flags: int, payload: bytes, seq: int, ack: int, options: bytes) -> dpkt.tcp.TCP:
    segment = dpkt.tcp.TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack, data=payload, opts=options)
    segment.off = 5 + len(options) // 4
    return segment


def udp_datagram(sport: int, dport: int, payload: bytes) -> dpkt.udp.UDP:
    return dpkt.udp.UDP(sport=sport, dport=dport, data=payload, ulen=8 + len(payload))


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
    header = dpkt.ip.IP(
        src=IPv4Address(src).packed, dst=IPv4Address(dst).packed, p=protocol, ttl=ttl, id=0x1234, opts=options,
        hl=5 + len(options) // 4, len=20 + len(options) + len(segment), sum=0, df=df, tos=tos,
    )  # fmt: skip
    raw = bytearray(header.pack_hdr() + options)
    raw[10:12] = checksum(bytes(raw)).to_bytes(2, "big")
    return bytes(raw) + segment


def ip6_packet(
    src: str, dst: str, protocol: int, segment: bytes, *, ttl: int = 64, extensions: tuple[tuple[int, bytes], ...] = (),
    tos: int = 0,
) -> bytes:  # fmt: skip
    chain, following = segment, protocol
    for kind, body in reversed(extensions):
        chain, following = extension(following, kind, body) + chain, kind
    header = dpkt.ip6.IP6(
        src=IPv6Address(src).packed, dst=IPv6Address(dst).packed, nxt=following, hlim=ttl, plen=len(chain), fc=tos,
    )  # fmt: skip
    return bytes(header.pack_hdr()) + chain


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
        protocol, at, segment = TCP, 16, tcp_segment(sport, dport, flags, payload, seq, ack, tcp_options)
    else:
        protocol, at, segment = UDP, 6, udp_datagram(sport, dport, payload)
    raw = bytearray(segment.pack_hdr() + getattr(segment, "opts", b"") + payload)
    raw[at : at + 2] = bytes(2)
    if with_checksum:
        pseudo = pseudo_header(ip_address(src).packed, ip_address(dst).packed, protocol, len(raw))
        total = checksum(pseudo + bytes(raw))
        raw[at : at + 2] = (total or (0xFFFF if proto == "udp" else 0)).to_bytes(2, "big")
    if ip_address(src).version == 4:
        return ethernet(ip4_packet(src, dst, protocol, bytes(raw), ttl=ttl, options=options, df=df, tos=tos), tags=tags)
    return ethernet(ip6_packet(src, dst, protocol, bytes(raw), ttl=ttl, extensions=extensions, tos=tos), tags=tags)


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
        raw[0:6].hex(":"), raw[6:12].hex(":"), tuple(tags), 4 if len(source) == 4 else 6, str(ip_address(source)),
        str(ip_address(target)), ttl, protocol, between, segment,
    )  # fmt: skip


Opened = tuple[bytes, bytes, int, int, bytes, bytes]


def _open_ip4(packet: bytes) -> Opened:
    ip = dpkt.ip.IP(packet)
    header = ip.hl * 4
    assert checksum(packet[:header]) == 0, "IPv4 header checksum"
    assert header <= ip.len <= len(packet), "IPv4 total length"
    return ip.src, ip.dst, ip.ttl, ip.p, packet[20:header], packet[header : ip.len]


def _open_ip6(packet: bytes) -> Opened:
    header = dpkt.ip6.IP6.__hdr_len__
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
