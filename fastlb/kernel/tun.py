"""A TUN device that brings packets into the host's own stack, each behind a virtio_net_hdr."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from fastlb.errors import KernelError
from fastlb.kernel.netlink import interface_index, iproute

log = structlog.get_logger()

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x0001, 0x1000, 0x4000, 0x8000
_TUN_HINTS = {
    errno.ENOENT: "the kernel must have CONFIG_TUN, and /dev/net/tun must exist",
    errno.ENODEV: "the kernel must have CONFIG_TUN",
    errno.EPERM: "this needs root or CAP_NET_ADMIN",
    errno.EACCES: "this needs root or CAP_NET_ADMIN",
    errno.EBUSY: "there is an interface of that name; choose another with --tun",
    errno.EINVAL: "is that a name for an interface?",
}


@contextmanager
def open_tun(name: str) -> Iterator[int]:
    """Make a TUN device that takes packets behind a virtio_net_hdr; it goes when its descriptor is closed.

    It is up and has no address: it brings packets in, and none is to leave by it. Raises KernelError.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _tun_error(name, error) from error
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        except OSError as error:
            raise _tun_error(name, error) from error
        set_up_tun(name)
        yield fd
    finally:
        os.close(fd)


def _tun_error(name: str, error: OSError) -> KernelError:
    hint = f" ({_TUN_HINTS[error.errno]})" if error.errno in _TUN_HINTS else ""
    return KernelError(f"cannot make the TUN device {name}: {error.strerror}{hint}")


def set_up_tun(name: str) -> None:
    """Set a device up, without a reverse-path filter and without packets of its own.

    Clients' addresses, from which its packets come, are routed elsewhere.
    """
    _set("net/ipv4/conf", name, "rp_filter", 0)
    _set("net/ipv6/conf", name, "addr_gen_mode", 1)  # none: no router solicitations, nothing to join
    _warn_of_rp_filter()
    with iproute(f"cannot set {name} up") as route:
        route.link("set", index=interface_index(name), state="up", txqlen=1)  # nobody reads what is sent to it


def _warn_of_rp_filter() -> None:
    """Say that the reverse-path filter is on for all interfaces.

    The kernel takes the larger of the device's ``rp_filter`` and that of ``all`` (ip-sysctl), and "loose" does not help
    a device without an address.
    """
    with suppress(OSError, ValueError):
        if number := int(Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text()):
            log.warning(
                "net.ipv4.conf.all.rp_filter is on: IPv4 out of tunnels will be dropped; "
                "set it to 0, and that of each other interface to what this is",
                value=number,
            )


def _set(directory: str, name: str, key: str, value: int) -> None:
    """Write a sysctl of an interface; one that cannot be written is logged."""
    path = Path("/proc/sys", directory, name, key)
    try:
        path.write_text(str(value))
    except FileNotFoundError:
        pass  # without IPv6
    except OSError as error:
        log.warning("cannot set a sysctl", path=str(path), value=value, error=error.strerror)
