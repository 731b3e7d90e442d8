"""netlink.py: datagrams taken apart, a table read until it holds still, and refusals that say what would help."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from pyroute2 import NetlinkError

from fastlb.errors import KernelError
from fastlb.kernel import netlink
from fastlb.kernel.netlink import (
    DUMP_ATTEMPTS,
    GETNEIGH,
    NEWLINK,
    NEWNEIGH,
    Netlink,
    error_code,
    error_number,
    interface_index,
    iproute,
    messages,
    run_in_thread,
    use_request,
)
from tests.fake_route import FakeRoute

ERROR, DONE, INTERRUPTED = 2, 3, 0x10


def message(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body
    return data + bytes(-len(data) % 4)


def ended(kind: int, code: int = 0) -> bytes:
    return message(kind, struct.pack("=i", -code))


def neighbour(family: int, number: int) -> bytes:
    return message(NEWNEIGH, struct.pack("=B3xiHBB", family, number, 0, 0, 0))


def test_messages_of_a_datagram() -> None:
    data = message(20, b"abcde", 2) + message(28) + b"\1\2"
    assert [(kind, flags, offset) for kind, flags, _, offset in messages(data)] == [(20, 2, 0), (28, 0, 24)]
    assert list(messages(b"")) == []


def test_a_message_that_lies_about_its_length_ends_nothing() -> None:
    data = struct.pack("=IHHII", 0, 20, 0, 0, 0) + message(28)
    assert [kind for kind, *_ in messages(data)] == [20, 28]


def test_errors_carry_a_number() -> None:
    assert [error_number(ended(ERROR, code), 0) for code in (0, 1, 95)] == [0, 1, 95]


@pytest.mark.parametrize(("address", "family"), [("10.0.0.9", socket.AF_INET), ("fd00::9", socket.AF_INET6)])
def test_a_request_to_resolve(address: str, family: int) -> None:
    request = use_request(7, ip_address(address))
    ((kind, flags, data, offset),) = messages(request)
    assert (kind, flags, len(request)) == (NEWNEIGH, 0x401, len(data))
    decoded = netlink.decode(kind, data, offset)
    shown = decoded["family"], decoded["ifindex"], decoded["flags"], decoded.get_attr("NDA_DST")
    assert shown == (family, 7, 1, address)


def test_kinds_that_nobody_decodes() -> None:
    with pytest.raises(KeyError):
        netlink.decode(999, message(999), 0)


class Kernel:
    """Answers what a socket asks: one datagram a line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: Callable[[bytes], list[bytes]]) -> None:
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with monkeypatch.context() as patch:
            patch.setattr(netlink.socket, "socket", lambda *_: _Quiet(fileno=ours.detach()))
            self.netlink = Netlink()
        self.requests: list[bytes] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while request := self.theirs.recv(1 << 16):
            self.requests.append(request)
            for answer in self._answers(request):
                self.theirs.send(answer)


class _Quiet(socket.socket):
    """A socket that takes every option and address for granted."""

    def setsockopt(self, *_: object) -> None:  # type: ignore[override]
        """Nothing to set."""

    def bind(self, *_: object) -> None:
        """Nothing to bind to."""


def test_a_dump_of_several_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of other kinds and families are passed over."""
    parts = [neighbour(2, 1) + neighbour(10, 2), message(NEWLINK, bytes(16)) + neighbour(2, 3), ended(DONE)]
    kernel = Kernel(monkeypatch, lambda request: parts)
    found = kernel.netlink.dump(GETNEIGH, bytes((socket.AF_INET,)) + bytes(11))
    assert [struct.unpack_from("=4xi", data, offset + 16)[0] for _, data, offset in found] == [1, 3]


def test_a_table_that_changes_meanwhile_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(1, 100))

    def answers(request: bytes) -> list[bytes]:
        turn = next(turns)
        return [neighbour(2, turn), message(DONE, bytes(4), INTERRUPTED if turn < 3 else 0)]

    kernel = Kernel(monkeypatch, answers)
    ((_, data, offset),) = kernel.netlink.dump(GETNEIGH, bytes(12))
    assert struct.unpack_from("=4xi", data, offset + 16) == (3,)


def test_a_table_that_never_holds_still_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, lambda _: [neighbour(2, 1), message(DONE, bytes(4), INTERRUPTED)])
    assert len(kernel.netlink.dump(GETNEIGH, bytes(12))) == 1
    assert len(kernel.requests) == DUMP_ATTEMPTS


@pytest.mark.parametrize(("code", "message_"), [(errno.ENOENT, None), (errno.EPERM, "Operation not permitted")])
def test_a_dump_that_is_refused(monkeypatch: pytest.MonkeyPatch, code: int, message_: str | None) -> None:
    """A table that does not exist is empty."""
    kernel = Kernel(monkeypatch, lambda _: [ended(ERROR, code)])
    if message_ is None:
        assert kernel.netlink.dump(GETNEIGH, bytes(12)) == []
    else:
        with pytest.raises(KernelError, match=f"cannot read the kernel's network tables: {message_}"):
            kernel.netlink.dump(GETNEIGH, bytes(12))


def test_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, lambda _: [])
    assert kernel.netlink.read() == b""
    assert kernel.netlink.send(b"") == set()


@pytest.mark.parametrize(
    ("error", "message_"),
    [
        (NetlinkError(errno.EPERM, "x"), "cannot do it: Operation not permitted (ask root)"),
        (OSError(errno.EPERM, "x"), "cannot do it: Operation not permitted (ask root)"),
        (NetlinkError(errno.EBUSY, "x"), "cannot do it: Device or resource busy"),
    ],
)
def test_refusals_become_one_error(fake_route: FakeRoute, error: Exception, message_: str) -> None:
    with pytest.raises(KernelError) as raised, iproute("cannot do it", {errno.EPERM: "ask root"}):
        raise error
    assert str(raised.value) == message_


def test_error_codes() -> None:
    assert [error_code(each) for each in (NetlinkError(5, "x"), OSError(6, "x"), OSError("x"))] == [5, 6, 0]


def test_an_interface_s_number() -> None:
    assert interface_index("lo") > 0
    with pytest.raises(OSError, match="No such device") as raised:
        interface_index("no such thing")
    assert raised.value.errno == errno.ENODEV


def test_a_thread_of_its_own() -> None:
    assert run_in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        run_in_thread(lambda: 1 // 0)
