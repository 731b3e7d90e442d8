"""mirror.py: the thread that follows a kernel which is not there: events, overruns, retries and requests."""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest
import structlog

from fastlb.errors import KernelError
from fastlb.kernel import mirror, netlink
from fastlb.kernel.mirror import Watcher
from fastlb.model.hostview import KernelView
from tests.messages import MAC, REACHABLE, STALE, address, link, neighbour, route

PATIENCE = 60.0  # seconds
HOP = (2, ip_address("10.0.0.9"))


@dataclass
class Kernel:
    """What its tables hold, as messages by the request for them; and what it was asked for."""

    tables: dict[int, list[bytes]] = field(default_factory=lambda: {netlink.GETLINK: [link(2, "eth0")]})
    asked: list[bytes] = field(default_factory=list)
    dumps: int = 0
    overrun: bool = False
    broken: bool = False
    refusals: frozenset[int] = frozenset()
    change: threading.Condition = field(default_factory=threading.Condition)
    sockets: list[socket.socket] = field(default_factory=list)
    during_dump: Callable[[], object] = lambda: None  # of routes

    def open(self, groups: tuple[int, ...] = ()) -> FakeNetlink:
        return FakeNetlink(self, groups)

    def tell(self, message: bytes) -> None:
        """An event."""
        self.sockets[0].send(message)

    def until(self, holds: Callable[[], bool]) -> bool:
        with self.change:
            return self.change.wait_for(holds, PATIENCE)


class FakeNetlink:
    """Stands for `Netlink`: the first one that is opened hears events."""

    def __init__(self, kernel: Kernel, groups: tuple[int, ...]) -> None:
        self._kernel = kernel
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        kernel.sockets.append(theirs)

    def __enter__(self) -> FakeNetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def read(self, discard: bool = False) -> bytes:
        try:
            data = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        if self._kernel.overrun and not discard:
            self._kernel.overrun = False
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return data

    def send(self, requests: bytes) -> set[int]:
        with self._kernel.change:
            self._kernel.asked += [data[at:] for *_, data, at in netlink.messages(requests)]
            self._kernel.change.notify_all()
        return set(self._kernel.refusals)

    def join(self, group: int) -> None:
        """It has every group."""

    def stream(self, kind: int, body: bytes, take: Callable[[bytes], int | None]) -> None:
        if self._kernel.broken:
            raise KernelError("cannot read the kernel's network tables: Interrupted")
        self._kernel.dumps += 1
        for data in self._kernel.tables.get(kind, []):
            if data[16] == body[0]:  # the family
                take(data)
        self._kernel.during_dump()
        assert take(struct.pack("=IHHIIi", 20, 3, 0, 0, 0, 0)) == 0  # NLMSG_DONE

    def dump(self, kind: int, body: bytes) -> list[tuple[int, bytes, int]]:
        if self._kernel.broken:
            raise KernelError("cannot read the kernel's network tables: Interrupted")
        self._kernel.dumps += 1
        found = [each for data in self._kernel.tables.get(kind, []) for each in netlink.messages(data)]
        return [(number, data, at) for number, _flags, data, at in found]


def until(holds: Callable[[], bool]) -> bool:
    """Whether it holds within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds()


class Seen:
    """Takes views, and waits for one."""

    def __init__(self) -> None:
        self.views: list[KernelView] = []
        self._change = threading.Condition()

    def __call__(self, view: KernelView) -> None:
        with self._change:
            self.views.append(view)
            self._change.notify_all()

    def until(self, holds: Callable[[KernelView], Any]) -> bool:
        with self._change:
            return self._change.wait_for(lambda: bool(self.views) and bool(holds(self.views[-1])), PATIENCE)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(mirror, "Netlink", made.open)
    monkeypatch.setattr(mirror, "RETRY", 0.01)
    return made


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def watcher(kernel: Kernel, seen: Seen) -> Iterator[Watcher]:
    made = Watcher(seen)
    yield made
    made.close()


def test_the_first_view_comes_with_the_start(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    kernel.tables[netlink.GETADDR] = [address(2, "10.0.0.1", 24)]
    kernel.tables[netlink.GETNEIGH] = [neighbour(2, "10.0.0.9", STALE)]
    view = watcher.start()
    assert (set(view.links), view.addresses, set(view.neighbours)) == ({2}, {ip_address("10.0.0.1")}, {HOP})
    assert seen.views == []


def test_events_become_views(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    kernel.tell(neighbour(2, "10.0.0.9", REACHABLE))
    assert seen.until(lambda view: view.neighbours == {HOP: bytes.fromhex(MAC.replace(":", ""))})
    kernel.tell(link(3, "eth1"))
    assert seen.until(lambda view: 3 in view.links)


def test_an_event_that_changes_nothing_is_no_view(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    kernel.tell(link(2, "eth0"))
    kernel.tell(link(3, "eth1"))
    assert seen.until(lambda view: 3 in view.links)
    assert len(seen.views) == 1


def test_after_an_overrun_all_is_read_again(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    kernel.tables[netlink.GETLINK].append(link(4, "eth2"))  # the event of which is lost
    kernel.overrun = True
    kernel.tell(link(3, "eth1"))
    assert seen.until(lambda view: 4 in view.links)
    assert watcher.overruns == 1


def test_routes_that_change_during_the_dump(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    """One that comes is known; one that the dump no longer has, gone by the event, is no reason for another dump."""
    there, comes, gone = "10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"
    kernel.tables[netlink.GETROUTE] = [route(there, gateway="10.0.0.9")]
    kernel.during_dump = lambda: [kernel.tell(each) for each in (
        route(comes, gateway="10.0.0.9"), route(gone, gateway="10.0.0.9", event=netlink.DELROUTE))]  # fmt: skip
    view = watcher.start()
    assert [str(each.prefix) for each in view.routes] == [there, comes]
    kernel.tell(route(there, gateway="10.0.0.9", event=netlink.DELROUTE))
    assert seen.until(lambda view: [str(each.prefix) for each in view.routes] == [comes])
    assert watcher.route_dumps == 1


def test_tables_that_cannot_be_read_are_read_again(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    with structlog.testing.capture_logs() as logs:
        kernel.broken = kernel.overrun = True
        kernel.tell(link(3, "eth1"))
        kernel.tables[netlink.GETLINK].append(link(3, "eth1"))
        assert until(lambda: any(line["event"] == "neighbour_watch_failed" for line in logs))
        kernel.broken = False
        assert seen.until(lambda view: 3 in view.links)


def test_who_does_not_take_a_view_is_called_again(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    fails = iter([True, True])

    def take(view: KernelView) -> None:
        if next(fails, False):
            raise RuntimeError("not now")
        seen(view)

    watcher.on_change = take
    with structlog.testing.capture_logs() as logs:
        kernel.tell(link(3, "eth1"))
        assert seen.until(lambda view: 3 in view.links)
    assert [line["event"] for line in logs] == ["neighbour_change_not_taken"] * 2


def test_what_is_wanted_is_asked_for(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    kernel.refusals = frozenset({errno.ENOBUFS})
    kernel.tables[netlink.GETNEIGH] = [neighbour(2, "10.0.0.1", REACHABLE)]
    watcher.start()
    with structlog.testing.capture_logs() as logs:
        watcher.want([HOP, (2, ip_address("10.0.0.1")), (9, HOP[1])])
        assert kernel.until(lambda: len(kernel.asked) == 1)
        watcher.want([HOP])
        assert kernel.until(lambda: len(kernel.asked) >= 2)
    assert set(kernel.asked) == {netlink.use_request(*HOP)}
    assert [line["reason"] for line in logs] == ["No buffer space available"], "a refusal is said once"


def test_a_kernel_without_netlink(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(groups: tuple[int, ...] = ()) -> FakeNetlink:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(mirror, "Netlink", refuse)
    with pytest.raises(KernelError, match="cannot follow the kernel by netlink: Protocol not supported"):
        watcher.start()
    watcher.want([HOP])


def test_the_end_closes_everything_and_may_come_from_within(kernel: Kernel, watcher: Watcher, seen: Seen) -> None:
    watcher.start()
    closed = threading.Event()

    def close(view: KernelView) -> None:
        watcher.close()
        closed.set()

    watcher.on_change = close
    kernel.tell(link(3, "eth1"))
    assert closed.wait(PATIENCE)
    watcher.close()
    watcher.close()
    watcher.want([HOP])
    with pytest.raises(OSError, match=r"Connection refused|Broken pipe|not connected"):
        kernel.tell(link(4, "eth2"))
