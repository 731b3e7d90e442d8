"""The part that follows the host: interfaces are claimed, the kernel's tables mirrored, next hops kept resolved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import structlog

from fastlb.daemon.world import DataPath, Marks, World
from fastlb.kernel.claim import claim
from fastlb.kernel.mirror import Watcher
from fastlb.model.hostview import KernelView, NextHop

ASKED_FOR = 60.0  # seconds that a client without a MAC is asked for
MAX_ASKED = 1024  # such clients at a time: forged addresses must not fill the kernel's table

log = structlog.get_logger()


class Mirror(Protocol):
    """What follows the kernel: a `Watcher`."""

    def start(self) -> KernelView: ...
    def want(self, next_hops: Iterable[NextHop]) -> None: ...
    def close(self) -> None: ...


class Host:
    """Marks each new view of the kernel, asks it to resolve next hops and on-link clients, and tells of links.

    ``hand_over`` runs a function within the event loop; the mirror's thread calls it.
    """

    def __init__(
        self,
        data_path: DataPath,
        marks: Marks,
        hand_over: Callable[[Callable[[], None]], None],
        mirror: Callable[[Callable[[KernelView], None]], Mirror] = Watcher,
        claimed: Callable[[str], Any] = claim,
    ) -> None:
        self._data_path, self._marks, self._hand_over, self._claim = data_path, marks, hand_over, claimed
        self._mirror = mirror(self._changed)
        self._ways: object = None
        self._wanted: frozenset[NextHop] = frozenset()
        self._asked: dict[NextHop, float] = {}  # clients on our links that packets could not reach, and since when
        self._reported: list[str] = []
        self._down: set[str] = set()  # the configured interfaces that exist and are down

    def claim_interfaces(self, stack: ExitStack, interfaces: Iterable[str]) -> None:
        """Keep a second fastlb off these interfaces; raises KernelError when another one has one."""
        for interface in interfaces:
            stack.enter_context(self._claim(interface))

    def start(self, stack: ExitStack) -> KernelView:
        """Begin to follow the kernel; return what it knows now. Raises KernelError."""
        stack.callback(self._mirror.close)
        return self._mirror.start()

    def open(self, stack: ExitStack, world: World) -> World:
        """Ask for the next hops of the first world, and tell of links that are down already."""
        self._follow(world)
        self._tell_of_links(world)
        return world

    def tick(self, now: float) -> None:
        """Have the kernel resolve clients on our own links; each is forgotten after ASKED_FOR, when it is in use."""
        found = (each.take_unresolved() for each in self._data_path.pipelines)
        unresolved: set[NextHop] = set().union(*found) - self._asked.keys()
        expired = [next_hop for next_hop, since in self._asked.items() if now - since > ASKED_FOR]
        for next_hop in expired:
            del self._asked[next_hop]
        for next_hop in sorted(unresolved, key=str)[: MAX_ASKED - len(self._asked)]:
            self._asked[next_hop] = now
        if expired or unresolved:
            self._want()

    def apply(self, world: World) -> None:
        """Ask for the next hops of this world, and tell of links and of backends that went out of reach."""
        if world.ways is not self._ways:
            self._follow(world)
            self._tell_of_links(world)
            self._tell_of_unreachable(world)

    def _changed(self, view: KernelView) -> None:
        """Hand a view over to the event loop; called in the mirror's thread."""

        def mark() -> None:
            self._marks.view = view
            self._marks.wake()

        self._hand_over(mark)

    def _follow(self, world: World) -> None:
        self._ways, self._wanted = world.ways, world.ways.next_hops
        self._want()

    def _want(self) -> None:
        self._mirror.want(self._wanted | self._asked.keys())

    def _tell_of_links(self, world: World) -> None:
        """Log configured interfaces that go down and come up again; the packet path tells of those that are gone."""
        wanted = world.configuration.config.interfaces
        up = {link.name: link.up for link in world.view.links.values() if link.name in wanted}
        before, self._down = self._down, {name for name in up if not up[name]}
        for name in sorted(up):
            if not up[name] and name not in before:
                log.warning("interface is down", interface=name)
            elif up[name] and name in before:
                log.info("interface is up", interface=name)

    def _tell_of_unreachable(self, world: World) -> None:
        unreachable = list(world.ways.unreachable)
        if unreachable == self._reported:
            return
        self._reported = unreachable
        for line in unreachable:
            log.warning("backend unreachable", problem=line)
        if not unreachable:
            log.info("every dsr backend is on-link again")
