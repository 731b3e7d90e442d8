"""Mirror of the kernel's links, addresses, routes and neighbours, followed live: where next hops come from.

Invariant: nothing here resolves an address. fastlb asks the kernel to resolve (`Watcher.want`; asks.py), and copies
what it finds out (host_tables.py).

Two netlink sockets (netlink.py), read by one thread:

    events    multicast groups; what they say is applied one by one. Routes are dumped again only when an event leaves
              in doubt what the kernel has: IPv4 drops routes of a dead link without telling anybody
    requests  dumps, and the requests to resolve
"""

from __future__ import annotations

import errno
import math
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import structlog

from fastlb.errors import KernelError
from fastlb.kernel import netlink
from fastlb.kernel.agenda import Agenda, WakeUp
from fastlb.kernel.asks import ASK_INTERVAL, Asks
from fastlb.kernel.host_routes import MainTable
from fastlb.kernel.host_tables import FAMILIES, Change, HostTables
from fastlb.kernel.netlink import Netlink, messages, use_request
from fastlb.model.hostview import KernelView, NextHop

DEBOUNCE = 0.02  # seconds in which changes are gathered before on_change hears of them
ROUTE_REST = 4  # times the duration of a route dump or count without another: at most 20 % of a core goes there
ROUTE_COUNT_REST = 0.25  # seconds at least between two counts of routes, each of which others have to plan with
RETRY = 1.0  # seconds until tables that could not be read are read again
EVENTS_PER_TURN = 64  # datagrams read before timers and close() get their turn
LATE_EVENTS = 50_000  # that wait at most when a dump has ended, by the size of the socket's buffer

_GROUPS = (1, 3, 5, 7, 9, 11)  # RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_DUMPS = ((netlink.GETLINK, 16), (netlink.GETADDR, 8), (netlink.GETNEIGH, 12))  # with the bytes of their headers
_NEXTHOP_GROUP = 32  # RTNLGRP_NEXTHOP, from Linux 5.3 on
_TABLE_MAIN = 254  # RT_TABLE_MAIN

_log = structlog.get_logger()


@dataclass
class _Allowed:
    """When routes may be dumped and counted again, in monotonic seconds."""

    dump: float = 0.0
    count: float = 0.0


class Watcher:
    """Follows the kernel of the namespace in which `start` was called, from one thread.

    ``on_change`` gets the new view in that thread, at most every DEBOUNCE seconds and only when it differs
    from the last one it took. It may call `want`. When it raises, that is logged and it is called again.
    """

    def __init__(self, on_change: Callable[[KernelView], None]) -> None:
        self.on_change = on_change
        self.overruns = 0  # times that the kernel dropped events because this thread was too slow
        self.route_dumps = 0
        self._tables = HostTables()
        self._view = self._tables.view()
        self._asks = Asks()
        self._refusals: set[int] = set()
        self._allowed = _Allowed()
        self._agenda = Agenda(
            [self._reload, self._read_routes, self._count_routes, self._publish, self._find_missing, self._ask]
        )
        self._wake: WakeUp | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._opened = ExitStack()

    def start(self) -> KernelView:
        """Read everything once, start to follow it, and return the first view.

        Raises KernelError when the kernel refuses netlink; nothing is left open then.
        """
        try:
            wake = self._open()
        except OSError as error:
            raise KernelError(f"cannot follow the kernel by netlink: {error.strerror}") from error
        self._view = self._tables.view()
        self._agenda.add(self._find_missing, 0.0)
        self._thread = threading.Thread(target=self._run, args=(wake,), name="fastlb-neighbour", daemon=True)
        self._thread.start()
        return self._view

    def want(self, next_hops: Iterable[NextHop]) -> None:
        """Keep exactly these next hops resolved. From any thread; returns at once.

        Those that are missing, failed or stale are asked for right away and then every ASK_INTERVAL seconds,
        ASK_BATCH every ASK_TICK. On-link next hops beyond net.ipv4.neigh.default.gc_thresh3 (1024 by default)
        are refused by the kernel, which is logged.
        """
        self._asks.want(next_hops)
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

    def _open(self) -> WakeUp:
        with ExitStack() as opened:
            self._events = opened.enter_context(Netlink(_GROUPS))  # before the dump: no change is lost
            with suppress(OSError):
                self._events.join(_NEXTHOP_GROUP)
            self._requests = opened.enter_context(Netlink())
            self._wake = wake = WakeUp()
            opened.callback(wake.close)
            self._load()
            self._opened = opened.pop_all()
        return wake

    def _wake_up(self) -> None:
        if self._wake is not None:
            self._wake.ring()

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self, wake: WakeUp) -> None:
        poll = select.poll()
        poll.register(self._events.socket, select.POLLIN)
        poll.register(wake.fd, select.POLLIN)
        while not self._closing:
            try:
                self._turn(poll, wake)
            except Exception:  # a mirror that stops without a word sends packets to where nobody is
                _log.exception("neighbour_watch_failed", retry_seconds=RETRY)
                select.select([wake.fd], [], [], RETRY)  # a rest that close() ends
                self._agenda.add(self._reload, 0.0)

    def _turn(self, poll: select.poll, wake: WakeUp) -> None:
        """Wait for an event, a wake-up or a timer, and serve what is due."""
        rest = self._agenda.rest(time.monotonic())
        for descriptor, _ in poll.poll(None if rest == math.inf else math.ceil(rest * 1000)):
            if descriptor == wake.fd:
                wake.clear()
                self._agenda.add(self._find_missing, 0.0)
            else:
                self._read_events()
        self._serve()

    def _serve(self) -> None:
        """Run what is due, each action once."""
        for action in self._agenda.due(time.monotonic):
            if self._closing:
                return
            action()

    def _read_events(self) -> None:
        change = Change.NOTHING
        try:
            change = self._take_events(EVENTS_PER_TURN)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            self._agenda.add(self._reload, max(time.monotonic() + DEBOUNCE, self._allowed.dump))
        self._plan(change)

    def _take_events(self, limit: int) -> Change:
        """Apply the datagrams that wait, or some of them. Raises OSError."""
        change = Change.NOTHING
        for _ in range(limit):
            data = self._events.read()
            if not data:
                break
            for kind, _flags, _data, offset in messages(data):
                change |= self._tables.apply(kind, data, offset)
        return change

    def _plan(self, change: Change) -> None:
        """Note what is due after events."""
        due = time.monotonic() + DEBOUNCE
        if Change.VIEW in change:
            self._agenda.add(self._publish, due)
        if Change.ROUTES in change:
            self._agenda.add(self._count_routes, max(due, self._allowed.count))
        if Change.DOUBT in change:
            self._agenda.add(self._read_routes, max(due, self._allowed.dump))

    def _reload(self) -> None:
        """Start again from fresh dumps. An overrun socket takes new events only once it has been emptied."""
        while self._events.read(discard=True):
            pass
        self._load()
        self._agenda.add(self._publish, 0.0)

    def _load(self) -> None:
        """Read every table anew."""
        tables = HostTables()
        for kind, size in _DUMPS:
            for message in self._requests.dump(kind, bytes(size)):
                tables.apply(*message)
        self._tables = tables
        self._read_routes()

    def _read_routes(self) -> None:
        """Dump the routes, and apply the events that came meanwhile: the dump may have them or not."""
        began = time.monotonic()
        self.route_dumps += 1
        table = MainTable()
        for family in FAMILIES:
            body = struct.pack("=8BI", family, 0, 0, 0, _TABLE_MAIN, 0, 0, 0, 0)  # rtmsg
            self._requests.stream(netlink.GETROUTE, body, partial(table.load, family=family))
        self._tables.table = table
        self._take_late_events()
        self._count_routes()
        ended = time.monotonic()
        self._allowed.dump = ended + ROUTE_REST * (ended - began)

    def _take_late_events(self) -> None:
        self._tables.late = True
        try:
            self._plan(self._take_events(LATE_EVENTS))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            self._agenda.add(self._reload, self._allowed.dump)
        finally:
            self._tables.late = False

    def _count_routes(self) -> None:
        """Find out what the routes amount to."""
        began = time.monotonic()
        self._tables.count_routes()
        ended = time.monotonic()
        self._allowed.count = ended + max(ROUTE_COUNT_REST, ROUTE_REST * (ended - began))
        self._agenda.add(self._publish, 0.0)

    def _publish(self) -> None:
        view = self._tables.view()
        if view == self._view:
            return
        self._agenda.add(self._find_missing, 0.0)
        try:
            self.on_change(view)
            self._view = view
        except Exception:
            _log.exception("neighbour_change_not_taken", retry_seconds=RETRY)
            self._agenda.add(self._publish, time.monotonic() + RETRY)

    def _find_missing(self) -> None:
        self._agenda.add(self._find_missing, time.monotonic() + ASK_INTERVAL)
        if self._asks.fill(self._tables):
            self._agenda.add(self._ask, self._asks.allowed_at)

    def _ask(self) -> None:
        """Have the kernel resolve or confirm some of the next hops that are missing."""
        asked = self._asks.take(self._tables, time.monotonic())
        for refusal in self._requests.send(b"".join(use_request(*hop) for hop in asked)) - self._refusals:
            self._refusals.add(refusal)  # said once; a link that has just gone is refused too, and harmless
            _log.warning("neighbour_request_refused", reason=os.strerror(refusal))
        if self._asks:
            self._agenda.add(self._ask, self._asks.allowed_at)
