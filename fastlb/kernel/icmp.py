"""Raw sockets that hear one kind of ICMP error: that a packet was too long for the way (RFC 1191, RFC 8201).

The kernel hands over every error that comes to an address of this host. What one says, and whether it is believed, is
decided in `fastlb.plan.pathmtu`.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress

from fastlb.errors import KernelError

MAX_ERRORS = 64  # read at once: a flood of them must not hold up the event loop
DEST_UNREACHABLE, PACKET_TOO_BIG = 3, 2  # the types that are let in, of ICMP and of ICMPv6

_MAX_LENGTH = 2048  # bytes of an error that are read
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_RECEIVE_BUFFER = 64 << 10  # bytes: a flood is lost here


def listen(version: int) -> socket.socket | None:
    """Open a non-blocking socket for `read`; None where the kernel has no IPv6.

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
        listener.setsockopt(_SOL_RAW, _ICMP_FILTER, filter4())
    else:
        listener.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, filter6())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
    return listener


def read(listener: socket.socket) -> list[bytes]:
    """Return the errors that wait, MAX_ERRORS at most: of IPv4 with the IP header, of IPv6 without it."""
    errors: list[bytes] = []
    with suppress(BlockingIOError):
        while len(errors) < MAX_ERRORS:
            errors.append(listener.recv(_MAX_LENGTH))
    return errors


def filter4() -> bytes:
    """Return a struct icmp_filter, in which a bit that is set blocks a type."""
    return struct.pack("=I", ~(1 << DEST_UNREACHABLE) & 0xFFFFFFFF)


def filter6() -> bytes:
    """Return a struct icmp6_filter: eight words, in which a bit that is set blocks a type."""
    blocked = [0xFFFFFFFF] * 8
    blocked[PACKET_TOO_BIG >> 5] &= ~(1 << (PACKET_TOO_BIG & 31))
    return struct.pack("=8I", *blocked)
