"""The part that moves packets: guards, rings, workers. It is opened anew as a whole when one of them is another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import structlog

from fastlb.config.load import Config
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.preflight import open_blocks
from fastlb.daemon.world import DataPath, World
from fastlb.errors import FastlbError, KernelError
from fastlb.kernel import cpus, guard
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.tunnel_offload import TunnelOffload
from fastlb.kernel.netlink import run_in_thread
from fastlb.observe import log as log_file
from fastlb.workers.workers import Workers

REOPENED_WITHIN = 10.0  # seconds in which the rings must be open again; then fastlb stops
MAX_REPLACEMENTS, REPLACED_WITHIN = 3, 60.0  # so many workers may be replaced in so many seconds; then fastlb stops

log = structlog.get_logger()


class PacketPath:
    """Keeps guards attached and workers running on the interfaces that exist.

    ``abandon``: what must be done before the process is left without workers that do not stop. ``leave`` ends it.
    """

    def __init__(
        self,
        data_path: DataPath,
        lifecycle: Lifecycle,
        cores: cpus.Plan,
        abandon: Callable[[], None],
        workers: Callable[..., Workers] = Workers,
        open_blocks: Callable[[Config, Classifier], bool] = open_blocks,
        leave: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._data_path, self._lifecycle, self._cores, self._abandon = data_path, lifecycle, cores, abandon
        self._make, self._can_open_blocks, self._leave = workers, open_blocks, leave
        self._offload = TunnelOffload()
        self._links: dict[str, int] = {}  # the interfaces whose rings are open
        self._gone: set[str] = set()  # those that do not exist, or were never up
        self._closed_since: float | None = None  # that the rings could not be opened again
        self._replaced: list[float] = []  # when workers were replaced, lately
        self._open_blocks = False
        self._workers: Workers | None = None
        self._world: World | None = None

    def open(self, stack: ExitStack, world: World) -> World:
        """Attach the guards and start the workers; raises KernelError."""
        self._world, config = world, world.configuration.config
        for interface in config.interfaces:
            stack.callback(self._detach_guard, interface)
            guard.attach(interface, self._data_path.programs.guard_fd)
        self._open_blocks = self._can_open_blocks(config, self._data_path.programs)
        stack.callback(self._offload.close)
        stack.callback(self._close_workers)  # first: workers that cannot be started are closed, too
        self._open_workers(world)
        self._follow(world)
        return world

    def tick(self, now: float) -> None:
        """Open again what could not be opened, replace workers that died, keep sockets on the links out."""
        if self._world is None:
            return
        if self._closed_since is not None:
            self._tell_of_trouble(self._reopen(self._world))
        self._look_after_workers(now)
        self._follow(self._world)

    def apply(self, world: World) -> None:
        """Go over to another view of the links."""
        before, self._world = self._world, world
        if before is not None and world.view is before.view:
            return
        links = self._interface_links(world)
        gone = sorted(self._links.keys() - links.keys())
        for name in gone:
            del self._links[name]
            self._gone.add(name)
        is_new = any(self._links.get(name, index) != index for name, index in links.items())
        reopens = is_new or bool(self._gone & links.keys())
        trouble = self._reopen(world) if reopens else None
        for name in gone:
            log.warning("interface is gone; waiting for it", interface=name)
        if reopens:
            log.warning("an interface is new; opening the rings again", interfaces=sorted(links))
        self._tell_of_trouble(trouble)

    def describe(self, world: World) -> dict[str, Any]:
        """Return ways out, workers and their counters, for `fastlb status`."""
        workers, view, links_out = self._running, world.view, set(world.ways.links_out)
        names = [view.links[index].name for index in self._offload.interfaces() if index in view.links]
        return {
            "transmit": workers.transmit_paths(view, links_out),
            "tunnel_offload": names,
            "open_blocks": self._open_blocks,
            "workers": workers.describe(self._data_path.pipelines, view, links_out),
            "counters": workers.counters(),
            "passed": self._data_path.programs.host_counters(),
        }

    def _close_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()

    @property
    def _running(self) -> Workers:
        assert self._workers is not None, "the workers were opened"
        return self._workers

    def _open_workers(self, world: World, earlier: Sequence[Mapping[str, int]] = ()) -> None:
        config = world.configuration.config
        self._links = self._interface_links(world)
        self._gone = set(config.interfaces) - self._links.keys()
        self._workers = self._make(
            config, self._data_path.pipelines, self._data_path.programs, self._cores, self._links, self._open_blocks,
            self._exit_with_stuck_workers, earlier,
        )  # fmt: skip
        self._workers.start(world.view, set(world.ways.links_out))
        self._closed_since = None

    def _reopen(self, world: World) -> KernelError | None:
        """Open the rings again, and attach guards; flows stay. An interface that was deleted took both with it.

        Returns what has begun to keep it from that.
        """
        self._running.close()
        self._data_path.pipelines[0].release_fragments()
        try:
            for interface in self._interface_links(world):
                run_in_thread(guard.attach, interface, self._data_path.programs.guard_fd)
            self._open_workers(world, earlier=self._running.totals())
        except KernelError as error:
            return error if self._not_reopened(error, time.monotonic()) else None
        return None

    def _not_reopened(self, error: KernelError, now: float) -> bool:
        """Try again at each tick, with what is known of the links then: mostly an interface went away meanwhile.

        Returns whether this was the first time.
        """
        is_first, self._closed_since = self._closed_since is None, self._closed_since or now
        if now - self._closed_since > REOPENED_WITHIN:
            self._lifecycle.fail(error)
        return is_first

    def _tell_of_trouble(self, error: KernelError | None) -> None:
        if error is not None:
            log.warning("the rings cannot be opened; trying again", reason=str(error))

    def _interface_links(self, world: World) -> dict[str, int]:
        """Return the configured interfaces that exist, with their indices; for several workers, those that were up."""
        links = {link.name: link for link in world.view.links.values()}
        return {
            name: links[name].index
            for name in world.configuration.config.interfaces
            if name in links and (len(self._data_path.pipelines) == 1 or links[name].up or name in self._links)
        }

    def _follow(self, world: World) -> None:
        self._running.poll(world.view, set(world.ways.links_out))
        self._running.offload_tunnels(self._offload.apply(set(world.ways.tunnel_links)))

    def _look_after_workers(self, now: float) -> None:
        """Replace workers that died, all of them together; stop when that happens often, or when one is stuck."""
        if stuck := self._running.stuck():
            self._lifecycle.fail(FastlbError(f"worker {', '.join(map(str, stuck))} is stuck; stopping"))
            log.error("a worker is stuck; stopping", workers=stuck)  # now: it may never come to the failure's report
        dead = self._running.dead()
        if not dead:
            return
        self._replaced = [*(when for when in self._replaced if now - when < REPLACED_WITHIN), now]
        if len(self._replaced) > MAX_REPLACEMENTS:
            times = f"{len(self._replaced)} times within {REPLACED_WITHIN:.0f} s"
            self._lifecycle.fail(FastlbError(f"a worker has died {times}; stopping"))
            return
        if self._world is not None:
            log.error("a worker has died; starting the workers again", workers=dead)  # another one may not stop now
            self._tell_of_trouble(self._reopen(self._world))

    def _exit_with_stuck_workers(self, numbers: Sequence[int]) -> NoReturn:
        """End the process, which closes the rest: a ring must not be unmapped under a worker that runs on."""
        log.error("workers do not stop; leaving without them", workers=list(numbers))
        self._lifecycle.keeps = False
        try:
            self._abandon()
            self._detach_guards(self._world.configuration.config if self._world is not None else None)
        finally:
            log_file.finish()
            self._leave(1)

    def _detach_guards(self, config: Config | None) -> None:
        interfaces: Iterable[str] = config.interfaces if config is not None else ()
        for interface in interfaces:
            run_in_thread(self._detach_guard, interface)

    def _detach_guard(self, interface: str) -> None:
        if self._lifecycle.keeps:
            return
        try:
            guard.detach(interface)
        except KernelError as error:  # an interface that is gone took its guard with it
            log.warning("guard not detached", interface=interface, error=str(error))
