"""Mirror of the kernel's links, addresses, routes and neighbours, followed live: where next hops come from.

Invariant: nothing here resolves an address. ARP and ND (RFC 826, RFC 4861) stay with the kernel; fastlb
asks it to resolve (``Watcher.want``) and copies what it finds out. fastlb's own packets bypass the kernel's
neighbour table, so without being asked the kernel would neither resolve a backend nor notice that it moved.

Two netlink sockets (netlink.py), read by one thread:

    events    multicast groups; neighbours, links and addresses are applied one by one, a route event only
              marks the routes stale, because IPv4 drops routes of a dead link without telling anybody
    requests  dumps, and the requests to resolve

What is not mirrored: policy rules, VRFs and any table but main, routes by TOS or by source, a route's tunnel
encapsulation, IPv6 router preference, nexthop objects when net.ipv4.nexthop_compat_mode is 0.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Flag, auto
from ipaddress import ip_address, ip_network
from types import MappingProxyType
from typing import Any

import structlog

from fastlb.errors import KernelError
from fastlb.kernel import netlink
from fastlb.kernel.netlink import Netlink, decode, messages, use_request
from fastlb.model.hostview import KernelView, Link, NextHop, Route
from fastlb.model.net import Address, Network

ASK_INTERVAL = 2.0
"""Seconds between requests (NTF_USE) to resolve a wanted next hop that is missing, FAILED or STALE.

A host that moved to another MAC without saying so is noticed after what remains of REACHABLE (15 to 45 s by
default, RFC 4861 section 6.3.2), this interval, the kernel's DELAY (5 s) and three probes (1 s each).
"""
ASK_BATCH = 128  # requests a tick: thousands of next hops must not meet the wire at once
ASK_TICK = 0.02  # seconds: 6,400 requests a second
DEBOUNCE = 0.02  # seconds in which changes are gathered before on_change hears of them
ROUTE_DUMP_REST = 4  # times a route dump's duration without another: at most 20 % of a core goes there
RETRY = 1.0  # seconds until tables that could not be read are read again
EVENTS_PER_TURN = 64  # datagrams read before timers and close() get their turn

_GROUPS = (1, 3, 5, 7, 9, 11)  # RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_TABLE_MAIN, _UNICAST = 254, 1  # RT_TABLE_MAIN, RTN_UNICAST
_REFUSING = (6, 7, 8, 9)  # RTN_BLACKHOLE, UNREACHABLE, PROHIBIT, THROW
_NEXTHOP_DEAD = 0x01 | 0x10  # RTNH_F_DEAD | RTNH_F_LINKDOWN
_UP = 0x1 | 0x10000  # IFF_UP | IFF_LOWER_UP: switched on, and with carrier
_CONFIRMED = 0x02 | 0x08 | 0x10 | 0x40 | 0x80  # NUD_REACHABLE, DELAY, PROBE, NOARP, PERMANENT: no need to ask
_USABLE = _CONFIRMED | 0x04  # NUD_STALE: good until the kernel knows better
_NTF_PROXY = 0x08
_ANYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}

_log = structlog.get_logger()


class Watcher:
    """Follows the kernel of the namespace in which ``start`` was called, from one thread.

    ``on_change`` gets the new view in that thread, at most every DEBOUNCE seconds and only when it differs
    from the last one it took. It may call ``want``. When it raises, that is logged and it is called again.
    """

    def __init__(self, on_change: Callable[[KernelView], None]) -> None:
        self.overruns = 0  # times that the kernel dropped events because this thread was too slow
        self._on_change = on_change
        self._mirror = _Mirror()
        self._view = self._mirror.view()
        self._wanted: frozenset[NextHop] = frozenset()
        self._to_ask: dict[NextHop, None] = {}  # a queue without doubles: refilling cannot starve its tail
        self._refusals: set[int] = set()
        self._route_dump_allowed = self._ask_allowed = 0.0  # monotonic seconds, not earlier than
        self._agenda: dict[Callable[[], None], float] = {}  # action -> when it is due (monotonic seconds)
        self._actions = (self._reload, self._read_routes, self._publish, self._find_missing, self._ask)
        self._wake_lock = threading.Lock()  # guards _wake against a want() that races with close()
        self._wake = -1
        self._closing = False
        self._thread: threading.Thread | None = None
        self._opened = ExitStack()

    def start(self) -> KernelView:
        """Read everything once, start to follow it, and return the first view.

        Raises KernelError when the kernel refuses netlink; nothing is left open then.
        """
        try:
            self._open()
        except OSError as error:
            raise KernelError(f"cannot follow the kernel by netlink: {error.strerror}") from error
        self._view = self._mirror.view()
        self._soon(self._find_missing, 0.0)
        self._thread = threading.Thread(target=self._run, name="fastlb-neighbour", daemon=True)
        self._thread.start()
        return self._view

    def want(self, next_hops: Iterable[NextHop]) -> None:
        """Keep exactly these next hops resolved. From any thread; returns at once.

        Those that are missing, failed or stale are asked for right away and then every ASK_INTERVAL seconds,
        ASK_BATCH every ASK_TICK. On-link next hops beyond net.ipv4.neigh.default.gc_thresh3 (1024 by default)
        are refused by the kernel, which is logged.
        """
        self._wanted = frozenset(next_hops)
        self._wake_up()

    def close(self) -> None:
        """Stop the thread and close the sockets; returns when both are gone. Closing twice is fine.

        Not to be called with a lock held that ``on_change`` takes. Called from ``on_change`` itself it only
        asks the thread to stop; the sockets go when it is called again from outside.
        """
        self._closing = True
        self._wake_up()
        if threading.current_thread() is self._thread:
            return
        if self._thread is not None:
            self._thread.join()
        self._opened.close()

    def _open(self) -> None:
        with ExitStack() as opened:
            self._events = opened.enter_context(Netlink(_GROUPS))  # before the dump: no change is lost
            self._requests = opened.enter_context(Netlink())
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(self._close_wake)
            self._load()
            self._opened = opened.pop_all()

    def _wake_up(self) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _close_wake(self) -> None:
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._events.socket, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            try:
                self._turn(poll)
            except Exception:  # a mirror that stops without a word sends packets to where nobody is
                _log.exception("neighbour_watch_failed", retry_seconds=RETRY)
                select.select([self._wake], [], [], RETRY)  # a rest that close() ends
                self._soon(self._reload, 0.0)

    def _turn(self, poll: select.poll) -> None:
        """Wait for an event, a wake-up or a timer, and serve what is due."""
        rest = min(self._agenda.values()) - time.monotonic()
        for descriptor, _ in poll.poll(max(0, math.ceil(rest * 1000))):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
                self._soon(self._find_missing, 0.0)
            else:
                self._read_events()
        for action in self._actions:
            if self._agenda.get(action, math.inf) <= time.monotonic() and not self._closing:
                del self._agenda[action]
                action()

    def _soon(self, action: Callable[[], None], at: float) -> None:
        self._agenda[action] = min(at, self._agenda.get(action, math.inf))

    def _read_events(self) -> None:
        change = _Change.NOTHING
        try:
            for _ in range(EVENTS_PER_TURN):
                for kind, _flags, data, offset in messages(self._events.read()):
                    change |= self._mirror.apply(kind, data, offset)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            self._soon(self._reload, 0.0)
        due = time.monotonic() + DEBOUNCE
        if _Change.VIEW in change:
            self._soon(self._publish, due)
        if _Change.ROUTES in change:
            self._soon(self._read_routes, max(due, self._route_dump_allowed))

    def _reload(self) -> None:
        """Start again from fresh dumps. An overrun socket takes new events only once it has been emptied."""
        while self._events.read(discard=True):
            pass
        self._load()
        self._soon(self._publish, 0.0)

    def _load(self) -> None:
        mirror = _Mirror()
        for kind, body in ((netlink.GETLINK, 16), (netlink.GETADDR, 8), (netlink.GETNEIGH, 12)):
            for message in self._requests.dump(kind, bytes(body)):
                mirror.apply(*message)
        self._mirror = mirror
        self._read_routes()

    def _read_routes(self) -> None:
        began = time.monotonic()
        routes: list[Any] = []
        for family in _ANYWHERE:
            body = struct.pack("=8BI", family, 0, 0, 0, _TABLE_MAIN, 0, 0, 0, 0)  # rtmsg
            routes += (decode(*message) for message in self._requests.dump(netlink.GETROUTE, body))
        self._mirror.routes = _best_routes(routes, self._mirror.links)
        ended = time.monotonic()
        self._route_dump_allowed = ended + ROUTE_DUMP_REST * (ended - began)
        self._soon(self._publish, 0.0)

    def _publish(self) -> None:
        view = self._mirror.view()
        if view == self._view:
            return
        self._soon(self._find_missing, 0.0)
        try:
            self._on_change(view)
            self._view = view
        except Exception:
            _log.exception("neighbour_change_not_taken", retry_seconds=RETRY)
            self._soon(self._publish, time.monotonic() + RETRY)

    def _find_missing(self) -> None:
        self._soon(self._find_missing, time.monotonic() + ASK_INTERVAL)
        self._to_ask.update((hop, None) for hop in self._wanted if self._mirror.should_ask(hop))
        if self._to_ask:
            self._soon(self._ask, self._ask_allowed)

    def _ask(self) -> None:
        """Have the kernel resolve or confirm the next ASK_BATCH next hops."""
        batch = list(self._to_ask)[:ASK_BATCH]
        for hop in batch:
            del self._to_ask[hop]
        asks = (use_request(*hop) for hop in batch if hop in self._wanted and self._mirror.should_ask(hop))
        for refusal in self._requests.send(b"".join(asks)) - self._refusals:
            self._refusals.add(refusal)  # said once; a link that has just gone is refused too, and harmless
            _log.warning("neighbour_request_refused", reason=os.strerror(refusal))
        self._ask_allowed = time.monotonic() + ASK_TICK
        if self._to_ask:
            self._soon(self._ask, self._ask_allowed)


class _Change(Flag):
    NOTHING = 0
    VIEW = auto()
    ROUTES = auto()


@dataclass(frozen=True)
class _Neighbour:
    state: int  # NUD_*
    mac: bytes  # b"": none, or not an Ethernet one

    @property
    def usable_mac(self) -> bytes:
        return self.mac if self.state & _USABLE else b""


_UNKNOWN = _Neighbour(0, b"")


@dataclass
class _Mirror:
    """The tables as they stand, without any socket: ``apply`` is the one step function."""

    links: dict[int, Link] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    neighbours: dict[NextHop, _Neighbour] = field(default_factory=dict)
    addresses: set[tuple[int, int, Address]] = field(default_factory=set)  # link, prefix length, address

    def view(self) -> KernelView:
        macs = {hop: known.usable_mac for hop, known in self.neighbours.items() if known.usable_mac}
        return KernelView(
            links=MappingProxyType(dict(self.links)),
            routes=self.routes,
            neighbours=MappingProxyType(macs),
            addresses=frozenset(address for _, _, address in self.addresses),
            placed=frozenset(self.addresses),
        )

    def should_ask(self, hop: NextHop) -> bool:
        link = self.links.get(hop[0])
        return link is not None and link.up and not self.neighbours.get(hop, _UNKNOWN).state & _CONFIRMED

    def apply(self, kind: int, data: bytes, offset: int) -> _Change:
        """Take in one message; says what may differ now."""
        if kind in (netlink.NEWROUTE, netlink.DELROUTE):
            return _Change.ROUTES
        if kind in (netlink.NEWLINK, netlink.DELLINK):
            return self._apply_link(kind, decode(kind, data, offset))
        if kind in (netlink.NEWADDR, netlink.DELADDR):
            return self._apply_address(kind, decode(kind, data, offset))
        if kind in (netlink.NEWNEIGH, netlink.DELNEIGH):
            return self._apply_neighbour(kind, decode(kind, data, offset))
        return _Change.NOTHING

    def _apply_link(self, kind: int, message: Any) -> _Change:
        mtu = message.get_attr("IFLA_MTU")
        if message["family"] != socket.AF_UNSPEC or mtu is None:
            return _Change.NOTHING  # a bridge port (its DELLINK means "left the bridge"), or a wireless event
        index = message["index"]
        if kind == netlink.NEWLINK:
            name, mac = message.get_attr("IFLA_IFNAME"), _mac(message.get_attr("IFLA_ADDRESS"))
            self.links[index] = Link(index, name, mac, mtu, up=message["flags"] & _UP == _UP)
        else:
            self.links.pop(index, None)
            self.neighbours = {hop: known for hop, known in self.neighbours.items() if hop[0] != index}
            self.addresses = {entry for entry in self.addresses if entry[0] != index}
        return _Change.VIEW | _Change.ROUTES

    def _apply_address(self, kind: int, message: Any) -> _Change:
        if message["family"] not in _ANYWHERE:
            return _Change.NOTHING
        own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")  # ADDRESS may be the peer's
        entry = (message["index"], message["prefixlen"], ip_address(own))
        if kind == netlink.NEWADDR:
            self.addresses.add(entry)
        else:
            self.addresses.discard(entry)
        return _Change.VIEW | _Change.ROUTES

    def _apply_neighbour(self, kind: int, message: Any) -> _Change:
        address = message.get_attr("NDA_DST")
        if message["family"] not in _ANYWHERE or message["flags"] & _NTF_PROXY or address is None:
            return _Change.NOTHING  # a bridge's forwarding entry comes through the same group
        hop = (message["ifindex"], ip_address(address))
        before = self.neighbours.pop(hop, _UNKNOWN)
        after = _UNKNOWN
        if kind == netlink.NEWNEIGH:
            after = self.neighbours[hop] = _Neighbour(message["state"], _mac(message.get_attr("NDA_LLADDR")))
        return _Change.NOTHING if before.usable_mac == after.usable_mac else _Change.VIEW


def _best_routes(routes: Iterable[Any], links: Mapping[int, Link]) -> tuple[Route, ...]:
    """One route a prefix: a live link before a dead one, then the lowest metric, then the first named."""
    best: dict[Network, tuple[tuple[bool, int], Route]] = {}
    for message in routes:
        for rank, route in _candidates(message, links):
            held = best.get(route.prefix)
            if held is None or rank < held[0]:
                best[route.prefix] = rank, route
    return tuple(route for _, route in best.values())


def _candidates(message: Any, links: Mapping[int, Link]) -> Iterator[tuple[tuple[bool, int], Route]]:
    """Every next hop of one RTM_NEWROUTE, each as a route of its own with its rank (lower is better)."""
    if message["tos"] or message["src_len"]:
        return
    prefix = ip_network((message.get_attr("RTA_DST") or _ANYWHERE[message["family"]], message["dst_len"]))
    metric = message.get_attr("RTA_PRIORITY") or 0
    if message["type"] in _REFUSING:
        yield (False, metric), Route(prefix, None, 0)
    if message["type"] != _UNICAST:
        return
    mtu = message.get_nested("metrics", "mtu") or 0
    for hop in message.get_attr("RTA_MULTIPATH") or [message]:
        index = hop["oif"] if hop is not message else message.get_attr("RTA_OIF")
        link = links.get(index)
        if link is not None:
            dead = not link.up or bool(hop["flags"] & _NEXTHOP_DEAD)
            yield (dead, metric), Route(prefix, _gateway(hop), link.index, mtu)


def _gateway(hop: Any) -> Address | None:
    via = hop.get_attr("RTA_VIA")  # an IPv4 route through an IPv6 gateway (RFC 5549)
    text = via["addr"] if via else hop.get_attr("RTA_GATEWAY")
    return ip_address(text) if text else None


def _mac(text: str | None) -> bytes:
    """The 6 bytes of "02:00:00:00:00:01"; b"" for none and for the addresses of tunnels."""
    return bytes.fromhex(text.replace(":", "")) if text and len(text) == 17 and text[2] == ":" else b""
