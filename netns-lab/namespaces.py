"""What the lab needs of network namespaces: step into one, set its sysctls, be root.

Invariant: a namespace belongs to a thread, not to a process. Everything here works on the calling thread
and puts it back, so that other threads of the process never notice.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import netns


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Move the calling thread into a named namespace for the length of a ``with`` block.

    Sockets, threads and child processes made meanwhile belong to that namespace for good, which saves a
    fork hook for children and a helper process for netlink sockets. Raises FileNotFoundError when there
    is no such namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        netns.setns(namespace, flags=0)
        try:
            yield
        finally:
            netns.setns(home)
    finally:
        os.close(home)


def write_sysctl(key: str, value: int | str) -> None:
    """Set one sysctl of the calling thread's namespace; dots in the key, as in ``net.ipv4.ip_forward``."""
    Path("/proc/sys", *key.split(".")).write_text(f"{value}\n")


def identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of a namespace file, the kernel's own name for a namespace; None when it is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def become_root() -> None:
    """Start this very command again through sudo, unless it runs as root already; exits 1 without sudo."""
    if os.geteuid() == 0:
        return
    sudo = shutil.which("sudo")
    if sudo is None:
        sys.exit(f"{sys.argv[0]}: network namespaces need root, and there is no sudo here: run this as root")
    os.execv(sudo, [sudo, sys.executable, *sys.argv])
