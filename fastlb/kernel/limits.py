"""How many files this process may have open: what a balancer needs, and the limits that a process starts with.

The soft limit is 1,024 mostly, for the sake of programs that call select(), which breaks above. A balancer needs a
descriptor for each health check that is running, and may raise its soft limit to the hard one; its children get
back what this process had.
"""

from __future__ import annotations

import resource

BASE_FILES = 64  # standard streams, the event loop, netlink, eBPF maps and programs, the control socket and its clients
FILES_PER_RING = 4  # the packet socket, the AF_XDP socket, and an eventfd and an interface's claim at most


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; return what it was, for `restore_file_limit`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def restore_file_limit(soft: int, process: int = 0) -> None:
    """Give a process its soft limit back: a child by its id, or this process, before it starts another program.

    Raises ProcessLookupError when there is no such process any more.
    """
    _, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (min(soft, hard), hard))


def hard_file_limit() -> int:
    """Return the number of files that this process may have open at most."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def file_need(targets: int, rings: int) -> int:
    """Return the open files that a balancer may need: one for each check, of which all may be running, and its own.

    ``targets``: checks that differ on the wire; ``rings``: workers times interfaces.
    """
    return BASE_FILES + FILES_PER_RING * rings + targets


def file_shortage(need: int, limit: int) -> str | None:
    """Return what to say when the hard limit is too low for what may be needed; None when it is not."""
    if need <= limit:
        return None
    return (
        f"health checks may need {need} open files at once, and this process may open {limit} (the hard limit): some "
        f"checks would wait for others to end; raise it, with LimitNOFILE={need} for systemd, or ulimit -Hn {need}"
    )
