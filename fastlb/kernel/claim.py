"""Claims of interfaces: one fastlb at a time works on an interface.

Two of them with different configurations would each forward what the other has forwarded. A claim is the name of an
abstract socket (unix(7)): it belongs to a network namespace, as interfaces do, and goes with the process that has it.
"""

from __future__ import annotations

import socket

from fastlb.errors import KernelError


def claim(interface: str) -> socket.socket:
    """Keep every other fastlb off the interface until the returned socket is closed.

    Raises KernelError when another fastlb has it.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        holder.bind(f"\0fastlb on {interface}")
    except OSError as error:
        holder.close()
        raise KernelError(f"another fastlb is running on interface {interface}") from error
    return holder


def is_claimed(interface: str) -> bool:
    """Return True if a running fastlb holds the interface."""
    try:
        claim(interface).close()
    except KernelError:
        return True
    return False
