"""The guard on an interface: takes from the host stack what the ring has taken (see ``fastlb.kernel.ebpf.classifier``).

It is a cls_bpf filter in direct-action mode at clsact ingress, behind the packet taps and before
everything else of the host. It belongs to the interface, not to the process: it stays over a crash or a
restart, since without it the host would answer the live connections' packets with resets. A clean stop,
or ``fastlb guard remove``, takes it away.

Everything here acts on the network namespace of the calling thread and needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from fastlb.errors import KernelError
from fastlb.kernel.netlink import interface_index, iproute
from fastlb.model.names import GUARD_NAME

# The first preference, so that no filter decides before the guard; a handle that no one gets by chance.
_PREFERENCE, _HANDLE = 1, 0xFA571B
_ETH_P_ALL = 0x0003
_INGRESS, _EGRESS = 0xFFFF_FFF2, 0xFFFF_FFF3  # the two places of a clsact qdisc
_CLSACT_HANDLE = 0xFFFF_0000
_TCA_BPF_ID = 11  # pyroute2 knows the attributes only up to 8

_HINTS = {
    errno.EPERM: "this needs root or CAP_NET_ADMIN",
    errno.ENOENT: "the kernel must have CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF",
    errno.EINVAL: f"does a filter of another kind hold preference {_PREFERENCE} at ingress? Move that",
    errno.ENODEV: "there is no such interface here",
}


@dataclass(frozen=True)
class GuardInfo:
    """A guard that is in place."""

    interface: str
    program_id: int  # of the eBPF program, as in BPF_PROG_GET_FD_BY_ID


def attach(interface: str, program_fd: int) -> None:
    """Put the guard on an interface, in one step in place of an older one: no frame passes in between.

    Other people's filters stay. Raises KernelError; then the interface is as it was.
    """
    with iproute(f"{interface}: cannot attach the guard", _HINTS) as ipr:
        index = interface_index(interface)
        made_clsact = _add_clsact(ipr, index)
        try:
            ipr.tc("replace-filter", fd=program_fd, name=GUARD_NAME, direct_action=True, **_filter_location(index))
        except NetlinkError:
            if made_clsact:
                ipr.tc("del", "clsact", index)
            raise


def detach(interface: str) -> bool:
    """Take the guard away, and the clsact qdisc unless something else hangs on it.

    Returns whether there was a guard; an interface that is gone has none. Raises KernelError.
    """
    with iproute(f"{interface}: cannot remove the guard", _HINTS) as ipr:
        try:
            index = interface_index(interface)
        except OSError:
            return False
        if _guard_program(ipr, index) is None:
            return False
        ipr.tc("del-filter", **_filter_location(index))
        if _qdiscs(ipr).get(index) == "clsact" and not _filters(ipr, index, _INGRESS, _EGRESS):
            ipr.tc("del", "clsact", index)
        return True


def show() -> list[GuardInfo]:
    """Return every guard of this network namespace, whichever process put it there. Raises KernelError."""
    with iproute("cannot list the guards", _HINTS) as ipr:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ipr.get_links()}
        programs = {index: _guard_program(ipr, index) for index in _qdiscs(ipr)}
        return [GuardInfo(names[at], program) for at, program in programs.items() if program and at in names]


def _filter_location(index: int) -> dict[str, Any]:
    """Return what identifies the guard of an interface, for replacing and deleting it."""
    return {
        "kind": "bpf",
        "index": index,
        "handle": _HANDLE,
        "parent": _INGRESS,
        "prio": _PREFERENCE,
        "protocol": _ETH_P_ALL,
    }


def _add_clsact(ipr: IPRoute, index: int) -> bool:
    """Add the clsact qdisc; False if it was there, or an older ``ingress`` qdisc, which serves as well."""
    try:
        ipr.tc("add", "clsact", index)
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            return False
        raise
    return True


def _qdiscs(ipr: IPRoute) -> dict[int, str]:
    """Return the interfaces with an ingress hook: index to the kind of qdisc, "clsact" or "ingress"."""
    return {q["index"]: q.get_attr("TCA_KIND") for q in ipr.get_qdiscs() if q["handle"] == _CLSACT_HANDLE}


def _filters(ipr: IPRoute, index: int, *parents: int) -> list[Any]:
    """Return the filters of an interface at these hooks."""
    return [each for parent in parents for each in ipr.get_filters(index=index, parent=parent)]


def _guard_program(ipr: IPRoute, index: int) -> int | None:
    """Return the id of the program of an interface's guard; None without one."""
    for each in _filters(ipr, index, _INGRESS):
        options = each.get_attr("TCA_OPTIONS")
        if each["handle"] == _HANDLE and options and options.get_attr("TCA_BPF_NAME") == GUARD_NAME:
            return _program_id(options)
    return None


def _program_id(options: Any) -> int:
    """Return TCA_BPF_ID, from the raw attribute: u16 length, u16 type, u32 value."""
    for name, attribute in options["attrs"]:
        if name == "UNKNOWN" and attribute["header"]["type"] == _TCA_BPF_ID:
            (identity,) = struct.unpack_from("=4xI", attribute.data, attribute.offset)
            return int(identity)
    raise KernelError("the kernel does not tell the id of a filter's program (Linux 4.13 and later do)")
