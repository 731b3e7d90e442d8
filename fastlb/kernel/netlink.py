"""rtnetlink as plain blocking sockets: asking for tables, hearing events. pyroute2 decodes the messages.

Invariant: a socket either hears groups or asks, and one that asks is empty again when ``send`` or ``dump``
returns. So whatever is read next answers the last request, and no request needs a sequence number.

pyroute2's own sockets are not used here: they tie an asyncio loop to the thread that opened them, queue
events without bound and report an overrun as a made-up message, while a thread that follows the kernel needs
a prompt stop and has to see ENOBUFS itself. What changes things does use them: by `iproute`, and within an event loop
by `run_in_thread`.

Nothing in here knows what the tables mean. A datagram holds messages (RFC 3549, section 2.2), each at a
multiple of 4 bytes; numbers are in host order, addresses as on the wire:

    length:32 | type:16 flags:16 | sequence:32 | port:32 | header of the family of types | attributes

A message is handed on as its type, the datagram, and the offset of its header in there, because not every one
is worth decoding.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from fastlb.errors import KernelError

RECEIVE_BUFFER = 8 << 20  # bytes: thousands of events fit; more at once is an overrun and a fresh dump
DUMP_ATTEMPTS = 5  # a table that changes while it is dumped is read again; the rest arrives as events

NEWLINK, DELLINK, GETLINK = 16, 17, 18  # RTM_*
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWNEXTHOP, DELNEXTHOP = 104, 105
DECODERS = {
    NEWLINK: ifinfmsg,
    DELLINK: ifinfmsg,
    NEWADDR: ifaddrmsg,
    DELADDR: ifaddrmsg,
    NEWROUTE: rtmsg,
    NEWNEIGH: ndmsg,
    DELNEIGH: ndmsg,
}

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ERROR, _DONE = 2, 3  # NLMSG_*; both carry a negative errno
_REQUEST, _CREATE, _DUMP, _INTERRUPTED = 0x001, 0x400, 0x300, 0x010  # NLM_F_*
_SOL_NETLINK, _ADD_MEMBERSHIP, _STRICT_CHECK, _SO_RCVBUFFORCE = 270, 1, 12, 33

_NTF_USE = 0x01
_USE = {  # nlmsghdr, ndmsg (family, 3 pad, ifindex, state, flags, type), NDA_DST (length, type, address)
    4: struct.Struct("=IHHII B3xiHBB HH4s"),
    6: struct.Struct("=IHHII B3xiHBB HH16s"),
}
_FAMILY: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}


P = ParamSpec("P")
T = TypeVar("T")


def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread of its own, and wait for its result.

    pyroute2's sockets run an event loop, which cannot be inside another one.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()


@contextmanager
def iproute(what: str, hints: Mapping[int, str] = MappingProxyType({})) -> Iterator[IPRoute]:
    """Open a socket of pyroute2's; what the kernel refuses meanwhile becomes a KernelError that begins with ``what``.

    ``hints``: what would help, by errno.
    """
    try:
        with IPRoute() as route:
            yield route
    except (NetlinkError, OSError) as error:
        code = error_code(error)
        hint = f" ({hints[code]})" if code in hints else ""
        raise KernelError(f"{what}: {os.strerror(code)}{hint}") from error


def error_code(error: NetlinkError | OSError) -> int:
    """Return the errno of what the kernel refused; 0 where there is none."""
    return int((error.code if isinstance(error, NetlinkError) else error.errno) or 0)


def interface_index(name: str) -> int:
    """Return the number of an interface of this network namespace. Raises OSError, ENODEV, when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error


def messages(data: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield (type, flags, data, offset of the header) of every netlink message in one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        yield kind, flags, data, offset
        offset += max(length + 3 & ~3, _HEADER.size)


def decode(kind: int, data: bytes, offset: int) -> Any:
    """Return the message there as pyroute2 presents it. KeyError: a type that DECODERS does not name."""
    message = DECODERS[kind](data, offset=offset)
    message.decode()
    return message


def error_number(data: bytes, offset: int) -> int:
    """Return the errno that an NLMSG_ERROR or NLMSG_DONE carries; 0: it went well."""
    number: int = struct.unpack_from("=i", data, offset + _HEADER.size)[0]
    return -number


def use_request(link: int, address: IPv4Address | IPv6Address) -> bytes:
    """Return an RTM_NEWNEIGH with NTF_USE, upon which the kernel behaves as if a packet went there.

    It is packed by hand, because thousands may be due at once.
    """
    layout, raw = _USE[address.version], address.packed
    header = (layout.size, NEWNEIGH, _REQUEST | _CREATE, 0, 0)
    return layout.pack(*header, _FAMILY[address.version], link, 0, _NTF_USE, 0, 4 + len(raw), 1, raw)


class Netlink:
    """A blocking rtnetlink socket in the namespace of the calling thread.

    ``groups`` (RTNLGRP_*) makes it one that hears events; without any it is one that asks. Raises OSError.
    """

    def __init__(self, groups: Iterable[int] = ()) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._set_up(groups)
        except BaseException:
            self.socket.close()
            raise

    def _set_up(self, groups: Iterable[int]) -> None:
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self.socket.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)  # the kernel then honours the table of a dump
        self.socket.bind((0, 0))
        for group in groups:
            self.join(group)

    def join(self, group: int) -> None:
        """Hear a group's events (RTNLGRP_*). Raises OSError where the kernel does not have it."""
        self.socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def read(self, discard: bool = False) -> bytes:
        """Return one datagram; b"" when none waits. OSError ENOBUFS tells of an overrun, unless ``discard``."""
        try:
            return self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            if discard and error.errno == errno.ENOBUFS:
                return self.read(discard)
            raise

    def send(self, requests: bytes) -> set[int]:
        """Send requests that are answered only if refused; returns the errnos of those that were."""
        if not requests:
            return set()
        self.socket.send(requests)  # the kernel serves them before this returns
        refused = set()
        while data := self.read(discard=True):
            for kind, _flags, _, offset in messages(data):
                if kind == _ERROR:
                    refused.add(error_number(data, offset))
        return refused

    def dump(self, kind: int, body: bytes) -> list[tuple[int, bytes, int]]:
        """Return a whole table as (type, data, offset). Raises KernelError; a table that does not exist is empty."""
        request = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 0, 0) + body
        for _ in range(DUMP_ATTEMPTS):
            self.socket.send(request)
            found, consistent = self._read_dump(kind - 2, body[0])  # RTM_GETx is RTM_NEWx + 2
            if consistent:
                break
        return found

    def stream(self, kind: int, body: bytes, take: Callable[[bytes], int | None]) -> None:
        """Ask for a table, and hand on its datagrams until ``take`` returns the errno that the last one carries.

        Raises KernelError; a table that does not exist is empty. What changes meanwhile may be missing or twice.
        """
        self.socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 0, 0) + body)
        try:
            while (number := take(self.socket.recv(1 << 16))) is None:
                pass
        finally:
            while self.read(discard=True):
                pass
        if number not in (0, errno.ENOENT):
            raise KernelError(f"cannot read the kernel's network tables: {os.strerror(number)}")

    def _read_dump(self, wanted: int, family: int) -> tuple[list[tuple[int, bytes, int]], bool]:
        found: list[tuple[int, bytes, int]] = []
        consistent = True
        while True:
            for kind, flags, data, offset in messages(self.socket.recv(1 << 16)):
                consistent = consistent and not flags & _INTERRUPTED
                if kind in (_DONE, _ERROR):
                    number = error_number(data, offset)
                    if number not in (0, errno.ENOENT):
                        raise KernelError(f"cannot read the kernel's network tables: {os.strerror(number)}")
                    return found, consistent
                if kind == wanted and family in (0, data[offset + _HEADER.size]):  # no IPv6: it dumps IPv4
                    found.append((kind, data, offset))
