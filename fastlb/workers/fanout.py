"""A fanout group: several rings on one interface, each frame in the ring of the worker that owns its client's shard.

    member 0        the bin: a socket that keeps nothing      frames that are not ours, and all of them while stopped
    member 1 + n    the ring of worker n, without a filter    what the steering program gives it (classifier.py)

Invariant: a member's number is its place in the order of creation. A member that leaves is replaced by the last one,
and after the link was down the kernel builds the group anew, socket by socket in the order of their creation: so the
bin's socket is made first and the rings' in the order of the workers, rings join in that order, and none is replaced
alone. Order at start:

    doorbells     before the group: taps are asked latest first, so a bell rings when the frame is in the ring already
    Group(...)    the bin, alone: it gets every frame
    rings         with a filter that keeps nothing until they have joined, or they would hold frames of other workers
    start(...)    when all have joined, as the kernel takes the result modulo the number of members: in one step each
                  frame goes to its worker

and in reverse at the end: ``stop``, the rings are closed, ``close``. Were the bin to go first, a ring without a filter
would get what is not ours.
"""

from __future__ import annotations

import errno
import socket
from types import TracebackType

from fastlb.errors import KernelError

SOL_PACKET, PACKET_FANOUT, PACKET_FANOUT_DATA = 263, 18, 22
_SO_ATTACH_BPF = 50
_ETH_P_ALL = 0x0003
_EBPF = 7  # PACKET_FANOUT_EBPF
_UNIQUE_ID = 0x2000  # the kernel finds a free number: 65,535 of them in a network namespace
_IGNORE_OUTGOING = 0x4000  # before Linux 6.2 without effect: the steering program then gives such frames to the bin

_HINTS = {
    errno.EPERM: "this needs root or CAP_NET_RAW",
    errno.EINVAL: "the interface must be up, and the kernel Linux 4.12 or later",
    errno.ENOMEM: "every number for a fanout group of this network namespace is taken",
    errno.ENODEV: "there is no such interface here",
    errno.ENXIO: "there is no such interface here",
}


class Group:
    """The group on one interface of the calling thread's network namespace, with the bin as its first member.

    A context manager. ``id`` is the kernel's number of it.
    """

    def __init__(self, interface: str, nothing_fd: int) -> None:
        """``nothing_fd``: a socket filter that keeps nothing, as of ``Classifier``. Raises KernelError."""
        self.interface = interface
        self._nothing_fd = nothing_fd
        try:
            self._bin = _open_bin(interface, nothing_fd)
        except OSError as error:
            hint = f" ({_HINTS[error.errno]})" if error.errno in _HINTS else ""
            raise KernelError(f"{interface}: cannot make a fanout group: {error.strerror}{hint}") from error

    @property
    def id(self) -> int:
        """The kernel's number of the group: 1 to 65,535, or 0."""
        return self.join_argument & 0xFFFF

    @property
    def join_argument(self) -> int:
        """The argument of setsockopt(PACKET_FANOUT) by which another socket, bound to the same interface, joins.

        As the kernel reports it: id, type, and the flags, which have to agree; without the one that finds a number.
        """
        return self._bin.getsockopt(SOL_PACKET, PACKET_FANOUT)

    def start(self, steer_fd: int) -> None:
        """Give each frame to the member that the program names. All rings have joined by now. Raises KernelError."""
        try:
            self._bin.setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, steer_fd)
        except OSError as error:
            what = f"{self.interface}: cannot set the program of the fanout group"
            raise KernelError(f"{what}: {error.strerror}") from error

    def stop(self) -> None:
        """Give every frame to the bin again. Raises KernelError."""
        self.start(self._nothing_fd)

    def close(self) -> None:
        """Take the bin out; the last member that leaves takes the group with it."""
        self._bin.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_bin(interface: str, nothing_fd: int) -> socket.socket:
    """Open a new group's first member. Raises OSError."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, nothing_fd)
        opened.bind((interface, _ETH_P_ALL))
        opened.setsockopt(SOL_PACKET, PACKET_FANOUT, (_EBPF | _UNIQUE_ID | _IGNORE_OUTGOING) << 16)
    except OSError:
        opened.close()
        raise
    return opened
