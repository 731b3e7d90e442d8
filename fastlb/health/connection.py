"""One running check: a non-blocking connection that is looked at when something has come, or time is up.

The time of a check is taken where its answer arrives, by the kernel (TCP_INFO), and not when somebody looks. A process
that is late to look thus finds the same answer in the same time:

    SYN ─────► SYN-ACK            request ─────► answer
     │ connect │    ╎ late to look ╎   │ answer  │   ╎ late to look
     └─ counts ┘    ╎              ╎   └─ counts ┘   ╎

What passes between the SYN-ACK and the request is the balancer's own time, and moves the deadline.

The SYN-ACK is not acknowledged at once (TCP_QUICKACK is off), but with the request. Where there is none the RST of
closing comes first, so that the server's application never sees a check that only connects: half of the work for both.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

from fastlb.health.protocol import MAX_ANSWER, Judge
from fastlb.health.target import Target
from fastlb.health.types import CONVERSATIONS

SYN_SENT, CLOSED = 2, 7  # of the kernel's TCP states, enum in linux/tcp.h
TCP_INFO = struct.Struct("=B51xII8xI28xI")  # state, last_data_recv, last_ack_recv (ms), rtt (µs), total_retrans
GRANULARITY = 0.005  # seconds: the kernel counts those two in ticks, of 4 ms mostly
RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends RST, and no TIME-WAIT keeps the port
AFTER_CONNECTING = (errno.ECONNRESET, errno.EPIPE)  # a refused connection has ECONNREFUSED

LOCAL_ERRORS = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EAGAIN,
    errno.EPERM, errno.EAFNOSUPPORT, errno.EINTR, errno.ENOSPC,
})  # fmt: skip
"""What this host lacks or forbids (EPERM: a filter for sockets); no verdict about a backend, as it was not asked."""


class Outcome(NamedTuple):
    """How a check ended: the seconds that the backend took, or None and why the check failed."""

    seconds: float | None
    reason: str = ""


class Connection:
    """A check on its way to one target. ``deadline`` by the clock that gives ``now``; it may move."""

    __slots__ = ("_connect_seconds", "_judge", "_received", "_sent_at", "_unsent", "deadline", "socket", "target")

    def __init__(self, target: Target, now: float) -> None:
        """Send the SYN. Raises OSError when the host, or the way there, does not allow it."""
        self.target, self.deadline = target, now + target.timeout
        self._judge = CONVERSATIONS[target.type].judge
        self._unsent, self._received = target.request, b""
        self._connect_seconds: float | None = None
        self._sent_at = now
        family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            error = self.socket.connect_ex((target.address, target.port))
            if error not in (0, errno.EINPROGRESS):
                raise os_error(error)
        except BaseException:
            self.socket.close()
            raise

    def advance(self, now: float) -> Outcome | None:
        """Do what can be done by now; return how the check ended, None while it has not. Raises OSError."""
        if self._connect_seconds is None:
            self._connect_seconds = self._connected_after(now)
            if self._connect_seconds is None:
                return None
            self.deadline += max(0.0, now - self._sent_at - self._connect_seconds)
            self._sent_at = now
        if self._judge is None:
            return self._in_time(self._connect_seconds)
        try:
            if self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            return None if self._unsent else self._answer(self._judge, now)
        except BlockingIOError:
            return None

    @property
    def reads(self) -> bool:
        """True if the check goes on when something comes; False if it does when the socket takes something."""
        return self._connect_seconds is not None and not self._unsent

    def close(self) -> None:
        """Reset the connection, in whatever state it is."""
        self.socket.close()

    def _connected_after(self, now: float) -> float | None:
        """Return the seconds that connecting took; None while it goes on."""
        state, _, since_ack, rtt, retransmitted = self._info()
        if state == SYN_SENT:
            return None
        if state == CLOSED:
            error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error not in AFTER_CONNECTING:
                raise os_error(error or errno.ECONNABORTED)
        if rtt and not retransmitted:
            return float(rtt) / 1e6
        return max(0.0, now - self._sent_at - since_ack / 1000)

    def _answer(self, judge: Judge, now: float) -> Outcome | None:
        """Read what has come of the answer, and judge it. Raises BlockingIOError when nothing has."""
        data = self.socket.recv(MAX_ANSWER)
        self._received += data
        reason = judge(self._received, not data)
        if reason is None:
            return None
        if reason:
            return Outcome(None, reason)
        _, since_data, *_ = self._info()
        return self._in_time((self._connect_seconds or 0.0) + max(0.0, now - self._sent_at - since_data / 1000))

    def _in_time(self, seconds: float) -> Outcome:
        """Return the outcome of a good answer that took so many seconds."""
        if seconds > self.target.timeout + GRANULARITY:
            return no_answer(self.target)
        return Outcome(min(seconds, self.target.timeout))

    def _info(self) -> tuple[int, int, int, int, int]:
        """Return what TCP_INFO names."""
        found = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        return TCP_INFO.unpack(found)


def no_answer(target: Target) -> Outcome:
    """Return the outcome of a check whose time is up."""
    return Outcome(None, f"no answer within {target.timeout:g} s")


def os_error(number: int) -> OSError:
    """Return the exception for an error number, of the class that Python has for it."""
    return OSError(number, os.strerror(number))
