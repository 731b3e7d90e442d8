"""What routers say about the tunnels' own packets: that they do not fit (RFC 1191, RFC 8201).

Such an error comes to the tunnel's source and often quotes too little of the client's packet to be passed on. So it is
kept as what it says of the way to that backend (the soft state of RFC 2003, section 5.1), and the client is told when
its next packet is too long. The kernel hands over every error that comes to an
address of this host (fastlb/kernel/icmp.py).

Anyone can send such an error. Believed is one that quotes a packet as fastlb sends them to this very backend
(addresses, protocol, port), longer than what is said to fit; and nothing below MIN_MTU, with which flows still work.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from fastlb.model.net import Address, Network

FORGET_AFTER = 600.0  # seconds until a longer packet is tried again (RFC 1191 section 6.3, RFC 8201 section 5.3)
MIN_MTU = {4: 552, 6: 1280}  # the kernel's own net.ipv4.route.min_pmtu, and RFC 8200 section 5
_UNREACHABLE, _FRAGMENTATION_NEEDED, _PACKET_TOO_BIG = 3, 4, 2


class Tunnelled(NamedTuple):
    """What is the same in the outer headers of all packets of one tunnel to one backend."""

    source: Network  # the whole of it for some flow, or one address
    protocol: int
    port: int  # where gue is received; 0 in the other modes


Tunnels = Mapping[Address, Collection[Tunnelled]]  # by backend


class _Said(NamedTuple):
    """What an error says, and the packet that it quotes."""

    mtu: int
    source: Address
    target: Address
    protocol: int
    port: int  # UDP's
    length: int

    def is_about(self, tunnel: Tunnelled) -> bool:
        return self.source in tunnel.source and (self.protocol, self.port) == (tunnel.protocol, tunnel.port)


class PathMtus:
    """MTUs of the ways to backends, by address, each until FORGET_AFTER seconds after it was last heard."""

    def __init__(self) -> None:
        self._heard: dict[Address, tuple[int, float]] = {}  # MTU, when

    def hear(self, packet: bytes, version: int, tunnels: Tunnels, now: float) -> Address | None:
        """Take in an ICMP error (IPv4: with its IP header), if it is about one of ``tunnels``.

        The backend whose way has become narrower by it, or None. ``now`` in seconds.
        """
        said = _parse4(packet) if version == 4 else _parse6(packet)
        if said is None or said.length <= said.mtu:
            return None
        backend = said.target
        if not any(said.is_about(tunnel) for tunnel in tunnels.get(backend, ())):
            return None
        mtu = max(said.mtu, MIN_MTU[version])
        before, _ = self._heard.get(backend, (mtu + 1, now))
        self._heard[backend] = min(mtu, before), now
        return backend if mtu < before else None

    def forget(self, now: float) -> bool:
        """Drop what is too old; True if there was any."""
        old = [backend for backend, (_, heard) in self._heard.items() if now - heard > FORGET_AFTER]
        for backend in old:
            del self._heard[backend]
        return bool(old)

    def known(self) -> Mapping[Address, int]:
        """Return the longest packet to each backend that was heard of, outer header included."""
        return {backend: mtu for backend, (mtu, _) in self._heard.items()}


def _parse4(packet: bytes) -> _Said | None:
    """Return what an ICMP error says; None for another one (RFC 792, RFC 1191 section 4)."""
    header = (packet[0] & 0x0F) * 4 if packet else 0
    icmp = packet[header:]
    if len(icmp) < 28 or icmp[:2] != bytes((_UNREACHABLE, _FRAGMENTATION_NEEDED)):
        return None
    quoted = icmp[8:]
    if quoted[0] >> 4 != 4 or quoted[12:16] != packet[16:20]:
        return None
    source, target = IPv4Address(quoted[12:16]), IPv4Address(quoted[16:20])
    length, mtu = int.from_bytes(quoted[2:4], "big"), int.from_bytes(icmp[6:8], "big")
    return _Said(mtu, source, target, quoted[9], _port(quoted[9], quoted[(quoted[0] & 0x0F) * 4 :]), length)


def _parse6(icmp: bytes) -> _Said | None:
    """Return what an ICMPv6 error says; None for another one (RFC 4443 section 3.2).

    Tunnels leave in fragments too, to pass what IPv6 promises.
    """
    if len(icmp) < 48 or icmp[0] != _PACKET_TOO_BIG:
        return None
    quoted = icmp[8:]
    if quoted[0] >> 4 != 6:
        return None
    source, target = IPv6Address(quoted[8:24]), IPv6Address(quoted[24:40])
    length, mtu = 40 + int.from_bytes(quoted[4:6], "big"), int.from_bytes(icmp[4:8], "big")
    protocol, behind = quoted[6], quoted[40:]
    if protocol == socket.IPPROTO_FRAGMENT and len(behind) >= 8:
        if int.from_bytes(behind[2:4], "big") & ~7:
            return None  # not the first one, which is as long
        protocol, behind = behind[0], behind[8:]
    return _Said(mtu, source, target, protocol, _port(protocol, behind), length)


def _port(protocol: int, transport: bytes) -> int:
    """UDP's destination; 0 for other protocols, and where it is cut off."""
    return int.from_bytes(transport[2:4], "big") if protocol == socket.IPPROTO_UDP and len(transport) >= 4 else 0
