"""Which way frames leave an interface: AF_XDP from the ring's own memory where it can be had, else sendmmsg.

The worker chooses for each frame (dataplane/transmit.pxd). This module opens the sockets, and opens them again after a
link was down; what a kernel or device refuses for good is asked for once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import structlog

from fastlb._core import Worker
from fastlb.errors import KernelError
from fastlb.neighbour import KernelView

log = structlog.get_logger()


class TransmitPaths:
    """Keeps an AF_XDP socket on every interface that frames may leave by.

    ``mode``: the configuration's ``transmit``: auto, xdp (refusal is an error at the start), sendmmsg (never AF_XDP).
    """

    def __init__(self, worker: Worker, mode: str) -> None:
        self._worker = worker
        self._mode = mode
        self._refused: dict[int, str] = {}  # interface index: why
        self._lost: set[int] = set()  # interfaces whose socket ended, until it is open again

    def follow(self, view: KernelView, links: Iterable[int]) -> None:
        """Open what is missing on ``links``, which are up. Raises KernelError in mode xdp when one is refused."""
        if self._mode == "sendmmsg":
            return
        known = self._worker.xsks()
        for index in sorted(links):
            ended = known.get(index, -1)
            if ended is None or index in self._refused:
                continue
            if ended >= 0 and index not in self._lost:
                self._lost.add(index)
                log.warning("AF_XDP socket lost", interface=view.links[index].name, reason=_reason(ended))
            self._open(view, index)

    def _open(self, view: KernelView, index: int) -> None:
        name = view.links[index].name
        try:
            self._worker.open_xsk(index)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENETDOWN, errno.ENODEV):
                return  # a socket that is still being closed, or a link that moved on: asked again
            if self._mode == "xdp":
                raise KernelError(f"transmit: xdp cannot be had on {name}: {error.strerror}") from error
            self._refused[index] = str(error.strerror)
            log.info("AF_XDP refused; sending by sendmmsg", interface=name, reason=error.strerror)
        else:
            if index in self._lost:
                self._lost.discard(index)
                log.info("AF_XDP socket open again", interface=name)

    def describe(self, view: KernelView) -> dict[str, str]:
        """The path of each interface that frames may leave by, by name."""
        found = {
            view.links[index].name: "xdp" if ended is None else "sendmmsg"
            for index, ended in self._worker.xsks().items()
            if index in view.links
        }
        return found or {"all": "sendmmsg"}


def _reason(ended: int) -> str:
    return errno.errorcode.get(ended, str(ended)) if ended else "the link stopped sending"
