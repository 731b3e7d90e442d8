"""Which way frames leave an interface: AF_XDP from the ring's own memory where it can be had, else sendmmsg.

The worker chooses for each frame (dataplane/transmit.pxd). This module opens the sockets, and opens them again after a
link was down. What is refused for good is asked for once; a queue that is in use, and a socket that keeps failing, are
asked for ever more rarely.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from fastlb._core import Worker
from fastlb.errors import KernelError
from fastlb.model.hostview import KernelView

START_PATIENCE = 1.0  # seconds at the start: the kernel frees a queue some time after its last socket was closed
ASK_SOON, ASK_LATE = 0.1, 30.0  # seconds after a failure until a socket is asked for again: at first, and at most
LINK_GONE = (errno.ENETDOWN, errno.ENODEV)  # the link has moved on since the kernel's tables were looked at

log = structlog.get_logger()


@dataclass
class _Failures:
    """Failures of one interface, since its socket last worked for long."""

    again: float = 0.0  # when to ask again, on the monotonic clock
    delay: float = ASK_SOON
    lost: bool = False  # a socket that was open has ended, and is not open again
    told: bool = False  # that frames leave by sendmmsg meanwhile

    def add(self, now: float) -> None:
        """Ask again later, each time twice as late."""
        if now - self.again > ASK_LATE:
            self.delay = ASK_SOON
        self.again = now + self.delay
        self.delay = min(2 * self.delay, ASK_LATE)


class TransmitPaths:
    """Keeps an AF_XDP socket of one worker on every interface that frames may leave by.

    ``mode``: the configuration's ``transmit``: auto, xdp (a refusal at the start is an error), sendmmsg (never AF_XDP).
    ``number``: of the worker among ``workers``, and of the queue that it sends by.
    """

    def __init__(self, worker: Worker, mode: str, number: int = 0, workers: int = 1) -> None:
        self._worker = worker
        self._mode = mode
        self._queue = number
        self._log = log.bind(worker=number) if workers > 1 else log
        self._failures: dict[int, _Failures] = {}  # by interface index

    def open(self, view: KernelView, links: Iterable[int]) -> None:
        """Open sockets on ``links``, which are up, at the start. Raises KernelError in mode xdp when one is refused."""
        deadline = time.monotonic() + START_PATIENCE
        for index in sorted(links) if self._mode != "sendmmsg" else ():
            error = self._ask(index)
            while error is not None and error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.02)
                error = self._ask(index)
            if error is None:
                continue
            if self._mode == "xdp" and error.errno not in LINK_GONE:
                raise KernelError(f"transmit: xdp cannot be had on {view.links[index].name}: {self._reason(error)}")
            self._refused(view, index, error)

    def poll(self, view: KernelView, links: Iterable[int]) -> None:
        """Open what is missing on ``links``, and forget interfaces that are gone; called several times a second."""
        if self._mode == "sendmmsg":
            return
        sockets = self._worker.xsks()
        self._forget(view, sockets)
        for index, ended in sockets.items():
            if ended is not None and index in view.links:
                self._lost(view, index, ended)
                self._worker.close_xsk(index)
        now = time.monotonic()
        for index in sorted(links):
            if sockets.get(index, 0) is not None and self._failures.setdefault(index, _Failures()).again <= now:
                self._open_again(view, index)

    def describe(self, view: KernelView, links: Iterable[int]) -> dict[str, str]:
        """Return the path, "xdp" or "sendmmsg", of each interface that frames may leave by, by name."""
        sockets = self._worker.xsks()
        indices = sorted(view.links.keys() & {*links, *sockets})
        return {view.links[index].name: "xdp" if sockets.get(index, 0) is None else "sendmmsg" for index in indices}

    def _ask(self, index: int) -> OSError | None:
        """Open a socket; returns the refusal."""
        try:
            self._worker.open_xsk(index, self._queue)
        except OSError as error:
            return error
        return None

    def _open_again(self, view: KernelView, index: int) -> None:
        error = self._ask(index)
        if error is not None:
            self._refused(view, index, error)
            return
        failures = self._failures[index]
        if failures.lost or failures.told:
            self._log.info("AF_XDP socket open", interface=view.links[index].name)
        failures.lost = failures.told = False

    def _refused(self, view: KernelView, index: int, error: OSError) -> None:
        """Log a refusal, once; ask again only where time may help."""
        failures = self._failures.setdefault(index, _Failures())
        failures.add(time.monotonic())
        if error.errno in LINK_GONE:
            return
        if error.errno != errno.EBUSY:
            failures.again = math.inf
        told, failures.told = failures.told, True
        if not told and not (failures.lost and error.errno == errno.EBUSY):  # by the one just lost
            reason = self._reason(error)
            self._log.info("AF_XDP refused; sending by sendmmsg", interface=view.links[index].name, reason=reason)

    def _lost(self, view: KernelView, index: int, ended: int) -> None:
        failures = self._failures.setdefault(index, _Failures())
        failures.lost = True
        failures.add(time.monotonic())
        reason = os.strerror(ended) if ended else "the link stopped sending"
        self._log.warning("AF_XDP socket lost; sending by sendmmsg", interface=view.links[index].name, reason=reason)

    def _forget(self, view: KernelView, sockets: Iterable[int]) -> None:
        """Drop what is known of interfaces that have gone: one that comes back is another one to the kernel."""
        for index in {*sockets, *self._failures} - view.links.keys():
            self._worker.close_xsk(index)
            self._failures.pop(index, None)

    def _reason(self, error: OSError) -> str:
        """Say why the kernel refuses a socket."""
        if error.errno == errno.EBUSY:
            return "its queue is in use by another AF_XDP socket"
        if error.errno == errno.EINVAL and self._queue > 0:
            return f"it has no queue {self._queue}: each worker sends by a queue of its own"
        return f"{error.strerror} ({os.strerror(error.errno or 0)})"
