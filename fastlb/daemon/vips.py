"""The part that holds the VIPs on the first interface, with ``vip_address: interface``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, Protocol

from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.world import World
from fastlb.kernel.vips import HeldVips
from fastlb.model.net import Address
from fastlb.plan.keys import held_vips


class Holder(Protocol):
    """What puts VIPs on an interface and takes them back: `HeldVips`."""

    def add(self, wanted: Collection[Address]) -> None: ...
    def drop(self, keep: Collection[Address] = ()) -> None: ...
    def as_json(self) -> list[str]: ...


class Vips:
    """Holds exactly the VIPs of the world. It follows the publisher, so that packets to a VIP are taken by then."""

    def __init__(self, lifecycle: Lifecycle, holder: Callable[[str], Holder] = HeldVips) -> None:
        self._lifecycle, self._make = lifecycle, holder
        self._holder: Holder | None = None
        self._wanted: set[Address] = set()

    def open(self, stack: ExitStack, world: World) -> World:
        """Put the VIPs on the interface, and take back those that a crash left and nobody wants; raises KernelError."""
        self._holder = self._make(world.configuration.config.interfaces[0])
        stack.callback(self._leave)
        self._wanted = held_vips(world.configuration.config)
        self._holder.add(self._wanted)
        self._holder.drop(keep=self._wanted)
        return world

    def tick(self, now: float) -> None:
        """Do nothing: VIPs change with the configuration only."""

    def apply(self, world: World) -> None:
        """Hold what this world wants, now that the data path does; raises KernelError."""
        wanted = held_vips(world.configuration.config)
        if self._holder is not None and wanted != self._wanted:
            self._holder.add(wanted)
            self._holder.drop(keep=wanted)
            self._wanted = wanted

    def give_up(self) -> None:
        """Take all back at once, so that the host never answers for them."""
        if self._holder is not None:
            self._holder.drop()

    def describe(self) -> dict[str, Any]:
        """Return the VIPs that are held, for the answer to a handover."""
        return {"vips": self._holder.as_json() if self._holder is not None else []}

    def _leave(self) -> None:
        if not self._lifecycle.keeps:
            self.give_up()
