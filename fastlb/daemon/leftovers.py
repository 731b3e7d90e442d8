"""What stays in the kernel when fastlb crashes, and how one tells that from what a running fastlb uses.

The guard stays on purpose: without it the host would answer clients with RST. With vip_address: interface the VIPs stay
too, and without the guard they would have the host answer. So both are taken over by the next start, with the file of
the flow table (fastlb/workers/flow_file.py), or removed together by `fastlb guard remove`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastlb.config import Config
from fastlb.errors import KernelError
from fastlb.kernel import guard
from fastlb.kernel.claim import is_claimed
from fastlb.kernel.vips import marked_vips, remove_vip
from fastlb.model.net import Address
from fastlb.workers.flow_places import LeftFile, left_files, remove_files


@dataclass(frozen=True)
class Leftover:
    """What fastlb has put on one interface."""

    interface: str
    program_id: int | None  # of the guard; None: there is none
    vips: tuple[str, ...]
    in_use: bool  # a running fastlb holds the interface


def show(config: Config | None = None) -> tuple[list[Leftover], list[LeftFile]]:
    """Return every interface of this network namespace with something of fastlb's on it, and the flow files.

    These are those of this namespace in /dev/shm, and those that ``config`` names. Raises KernelError.
    """
    return interfaces(), left_files(config)


def interfaces() -> list[Leftover]:
    """Return every interface of this network namespace with something of fastlb's on it. Raises KernelError."""
    guards = {info.interface: info.program_id for info in guard.show()}
    vips = _by_interface(marked_vips())
    return [
        Leftover(name, guards.get(name), tuple(map(str, vips.get(name, ()))), is_claimed(name))
        for name in sorted(guards.keys() | vips.keys())
    ]


def remove(config: Config | None = None) -> tuple[list[Leftover], list[LeftFile]]:
    """Remove all of it, and return what there was, as `show` does.

    Raises KernelError, and removes nothing, while any of it is in use.
    """
    found, files = show(config)
    used = [leftover.interface for leftover in found if leftover.in_use]
    used = used or [file.path for file in files if file.state == "in use"]
    if used:
        raise KernelError(f"a running fastlb uses {', '.join(used)}; stop it, which removes everything by itself")
    for name, address in marked_vips():  # first, so that the host never answers for them
        remove_vip(name, address)
    for leftover in found:
        guard.detach(leftover.interface)
    remove_files(files)
    return found, files


def _by_interface(vips: Iterable[tuple[str, Address]]) -> dict[str, list[Address]]:
    """Group VIPs by the name of their interface."""
    found: dict[str, list[Address]] = {}
    for name, address in vips:
        found.setdefault(name, []).append(address)
    return found
