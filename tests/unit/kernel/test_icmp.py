"""icmp.py: what the kernel is told to let in, and how much is read at once."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from fastlb.errors import KernelError
from fastlb.kernel import icmp
from fastlb.kernel.icmp import MAX_ERRORS, filter4, filter6, listen, read


def passed(words: tuple[int, ...]) -> list[int]:
    """The types that a filter lets in: bits that are not set."""
    return [32 * at + bit for at, word in enumerate(words) for bit in range(32) if not word >> bit & 1]


def test_one_type_is_let_in() -> None:
    assert passed(struct.unpack("=I", filter4())) == [3]  # destination unreachable (RFC 792)
    assert passed(struct.unpack("=8I", filter6())) == [2]  # packet too big (RFC 4443)


def test_no_more_than_so_many_are_read_at_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        assert read(ours) == []
        sent = 0
        while sent < 3 * MAX_ERRORS:  # as many as the socket holds, and again
            try:
                theirs.send(bytes([sent % 256]) * 10)
                sent += 1
            except BlockingIOError:
                break
        seen = []
        while errors := read(ours):
            assert len(errors) <= MAX_ERRORS
            seen += errors
        assert seen == [bytes([number % 256]) * 10 for number in range(sent)]


@pytest.mark.parametrize(("refused", "message"), [(errno.EAFNOSUPPORT, None), (errno.EPERM, "not permitted")])
def test_refusals(monkeypatch: pytest.MonkeyPatch, refused: int, message: str | None) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(refused, "Operation not permitted")

    monkeypatch.setattr(icmp.socket, "socket", refuse)
    if message is None:
        assert listen(6) is None
    else:
        with pytest.raises(KernelError, match=f"cannot listen for ICMP errors about tunnels: .*{message}"):
            listen(6)
