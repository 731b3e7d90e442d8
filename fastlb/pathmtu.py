"""What routers say about the tunnels' own packets: that they do not fit (RFC 1191, RFC 8201).

Such an error comes to the tunnel's source and often quotes too little of the client's packet to be passed on. So it is
kept as what it says of the way to that backend (the soft state of RFC 2003, section 5.1), and the client is told when
its next packet is too long. The kernel hands over every error that comes to an address of this host.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Container, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

from fastlb.errors import KernelError

Address = IPv4Address | IPv6Address

FORGET_AFTER = 600.0  # seconds until a longer packet is tried again (RFC 1191 section 6.3, RFC 8201 section 5.3)
MIN_MTU = {4: 552, 6: 1280}  # the kernel's own net.ipv4.route.min_pmtu, and RFC 8200 section 5
ERRORS_PER_TURN = 64  # read at once: a flood of them must not hold up the event loop
_TUNNEL_PROTOCOLS = (socket.IPPROTO_IPIP, socket.IPPROTO_IPV6, socket.IPPROTO_GRE, socket.IPPROTO_UDP)
_UNREACHABLE, _FRAGMENTATION_NEEDED, _PACKET_TOO_BIG = 3, 4, 2
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_RECEIVE_BUFFER = 64 << 10  # bytes: a flood is lost here


class PathMtus:
    """MTUs of the ways to backends, by address, each until FORGET_AFTER seconds after it was last heard."""

    def __init__(self) -> None:
        self._heard: dict[Address, tuple[int, float]] = {}  # MTU, when

    def hear(self, packet: bytes, version: int, backends: Container[Address], now: float) -> Address | None:
        """Take in an ICMP error (IPv4: with its IP header), if it is about a tunnel to one of ``backends``.

        The backend whose way has become narrower by it, or None. ``now`` in seconds.
        """
        said = _parse4(packet) if version == 4 else _parse6(packet)
        if said is None:
            return None
        backend, mtu = said
        if backend not in backends:
            return None
        mtu = max(mtu, MIN_MTU[version])
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
        """By backend: the longest packet, outer header included."""
        return {backend: mtu for backend, (mtu, _) in self._heard.items()}


def _parse4(packet: bytes) -> tuple[Address, int] | None:
    """Whom a quoted tunnel packet was for, and the MTU; None for another error (RFC 792, RFC 1191 section 4)."""
    header = (packet[0] & 0x0F) * 4 if packet else 0
    icmp = packet[header:]
    if len(icmp) < 28 or icmp[:2] != bytes((_UNREACHABLE, _FRAGMENTATION_NEEDED)):
        return None
    quoted = icmp[8:]
    if quoted[0] >> 4 != 4 or quoted[9] not in _TUNNEL_PROTOCOLS or quoted[12:16] != packet[16:20]:
        return None
    return IPv4Address(quoted[16:20]), int.from_bytes(icmp[6:8], "big")


def _parse6(icmp: bytes) -> tuple[Address, int] | None:
    """The same for ICMPv6 (RFC 4443 section 3.2)."""
    if len(icmp) < 48 or icmp[0] != _PACKET_TOO_BIG:
        return None
    quoted = icmp[8:]
    if quoted[0] >> 4 != 6 or quoted[6] not in _TUNNEL_PROTOCOLS:
        return None
    return IPv6Address(quoted[24:40]), min(int.from_bytes(icmp[4:8], "big"), 65535)


def listen(version: int) -> socket.socket | None:
    """A socket for `read`, with errors of the kinds that `PathMtus.hear` takes; None where the kernel has no IPv6.

    Raises KernelError when the kernel refuses it otherwise.
    """
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    try:
        listener = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            return None
        raise KernelError(f"cannot listen for ICMP errors about tunnels: {error.strerror}") from error
    if version == 4:
        listener.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _UNREACHABLE) & 0xFFFFFFFF))
    else:
        blocked = [0xFFFFFFFF] * 8
        blocked[_PACKET_TOO_BIG >> 5] &= ~(1 << (_PACKET_TOO_BIG & 31))
        listener.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *blocked))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    return listener


def read(listener: socket.socket) -> list[bytes]:
    """The next ERRORS_PER_TURN errors, or fewer."""
    errors: list[bytes] = []
    with suppress(BlockingIOError):
        while len(errors) < ERRORS_PER_TURN:
            errors.append(listener.recv(2048))
    return errors
