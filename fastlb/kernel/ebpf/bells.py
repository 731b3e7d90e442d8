"""Doorbells: each sleeping worker's word in memory that it shares with the kernel, and the program that watches it.

A worker that finds nothing to do stores 1 into its word, looks once more, and sleeps. Its bell, the socket filter of
one more packet socket, keeps one byte of the next frame that is the worker's, which wakes it, and stores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from fastlb.errors import KernelError
from fastlb.kernel.ebpf.classification import CACHE_LINE, Maps, bell_program
from fastlb.kernel.ebpf.syscall import SOCKET_FILTER, SharedValue, hold_program

BELL_NAME = "fastlb_bell"


class Bells:
    """The bells of all workers. ``fault``: why this kernel (before Linux 5.5) has none; None: it has."""

    def __init__(self, maps: Maps, workers: int, owners_fd: int | None, undo: ExitStack) -> None:
        """``owners_fd``: the map with the worker of each shard; None with a single worker. Raises KernelError."""
        self.fault: str | None = None
        self._fds: Sequence[int] = ()
        try:
            self._asleep = SharedValue("fastlb_asleep", workers * CACHE_LINE)
        except KernelError as error:
            self.fault = str(error)
            return
        undo.callback(self._asleep.close)
        codes = [bell_program(maps, worker, self._asleep.fd, owners_fd) for worker in range(workers)]
        self._fds = [hold_program(undo, SOCKET_FILTER, code, BELL_NAME) for code in codes]

    def fd(self, worker: int) -> int | None:
        """Return the program for SO_ATTACH_BPF on the worker's doorbell sockets (SOCK_RAW); None without bells.

        The program keeps one byte of the first frame that is the worker's after its word became 1, and then stores 0.
        It may ring twice when two cores receive at once. Taps are asked latest first: a bell that was bound before the
        ring rings when the frame is in it already.
        """
        return None if self.fault else self._fds[worker]

    def asleep(self, worker: int) -> memoryview | None:
        """Return the worker's word, 4 writable bytes: 1 makes its bells ring. On a cache line of its own.

        It stays in place for as long as it is in use, even when the bells are closed before. None without bells.
        """
        return None if self.fault else self._asleep.view(worker * CACHE_LINE, 4)
