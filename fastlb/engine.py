"""A running balancer: set up in order, watched by one event loop, torn down in reverse.

Threads: the worker (packets, without the GIL), the watcher of the kernel's tables, and this one, which does whatever
happens once a second or slower. Everything that changes the data path happens here, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import structlog

from fastlb import __version__, guard, leftovers, metrics, neighbour, nexthops, reconcile
from fastlb._core import Pipeline, Ring, RingMemory, Services, Worker
from fastlb.classifier import Classifier
from fastlb.config import Address, Config, load_config
from fastlb.control import ControlServer
from fastlb.errors import ConfigError, FastlbError, KernelError
from fastlb.neighbour import KernelView, Watcher
from fastlb.paths import TransmitPaths

TICK = 0.1  # seconds between looks at the worker, at clients without a MAC and at snapshots to free
ASKED_FOR = 60.0  # seconds that a client without a MAC is asked for
MAX_ASKED = 1024  # such clients at a time: forged addresses must not fill the kernel's table
FIRST_NEIGHBOURS = 1.0  # seconds that the start waits for next hops to be resolved
FLOW_BYTES = 75  # of the flow table, hot and cold, for each of config.flows
JOIN_TIMEOUT = 5.0  # seconds that a worker may take to finish its block

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True)
class Generation:
    """A configuration and everything that follows from it alone."""

    config: Config
    ids: reconcile.BackendIds
    plans: list[reconcile.Plan]
    services: Services

    @classmethod
    def load(cls, path: str, ids: reconcile.BackendIds) -> Generation:
        """Read the file; ``ids`` are those of the generation before and are not changed. Raises ConfigError."""
        config = load_config(path)
        ids = ids.copy()
        plans = reconcile.plan_services(config, ids, time.monotonic())
        return cls(config, ids, plans, reconcile.services_table(config, plans))

    def summary(self) -> dict[str, int]:
        return {"services": len(self.plans), "backends": sum(len(plan.members) for plan in self.plans)}


class Engine:
    """`fastlb run`. ``run`` returns when SIGTERM or SIGINT has come and everything is taken down."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._now = Generation.load(path, reconcile.BackendIds())
        self._held_vips: set[Address] = set()
        self._asked: dict[neighbour.NextHop, float] = {}  # clients on our links that packets could not reach
        self._reported: list[str] = []
        self._gone: set[str] = set()  # configured interfaces that do not exist at the moment
        self._started = time.time()
        self._failure: FastlbError | None = None

    def run(self) -> None:
        """Raises FastlbError when the balancer cannot start, or fails; nothing is left behind then."""
        check_runnable(self._path, self._now.config)
        check_privileges()
        check_memory(self._now.config)
        on_stop_signals(stop_before_running)
        with ExitStack() as stack:
            try:
                self._open(stack)
                asyncio.run(self._serve())
            finally:
                on_stop_signals(signal.SIG_IGN)  # another one must not cut the taking down short
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self._failure is not None:
            raise self._failure
        log.info("stopped")

    # --- set-up, unwound in reverse ------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> None:
        self._open_control(stack)
        self._claim_interfaces(stack)
        self._follow_kernel(stack)
        self._hold_vips(stack)
        self._load_classifier(stack)
        self._open_pipeline()
        self._attach_guard(stack)
        self._packet_path = ExitStack()
        stack.callback(lambda: self._packet_path.close())
        self._open_packet_path()

    def _open_packet_path(self) -> None:
        self._links = self._interface_links(self._view)
        self._open_rings(self._packet_path)
        self._start_worker(self._packet_path)

    def _reopen_packet_path(self) -> None:
        """An interface was deleted and made again: its ring and its guard went with the old one. Flows stay."""
        log.warning("an interface was replaced; opening the rings again", interfaces=sorted(self._links))
        self._packet_path.close()
        for interface in self._interface_links(self._view):
            outside_the_loop(guard.attach, interface, self._classifier.guard_fd)
        self._open_packet_path()

    def _interface_links(self, view: KernelView) -> dict[str, int]:
        """The configured interfaces that exist, with their indices."""
        links = {link.name: link.index for link in view.links.values()}
        return {name: links[name] for name in self._now.config.interfaces if name in links}

    def _open_control(self, stack: ExitStack) -> None:
        self._control = ControlServer(
            self._now.config.control, {"status": self._status, "reload": self._reload_command}
        )
        stack.callback(self._control.close)
        self._control.bind()

    def _claim_interfaces(self, stack: ExitStack) -> None:
        for interface in self._now.config.interfaces:
            stack.enter_context(leftovers.claim(interface))

    def _follow_kernel(self, stack: ExitStack) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher = Watcher(self._kernel_changed)
        stack.callback(self._watcher.close)
        self._view = self._watcher.start()
        check_interfaces(self._now.config, self._view)
        check_reachable(self._view, self._now.plans)
        self._want_next_hops()

    def _hold_vips(self, stack: ExitStack) -> None:
        interface = self._now.config.interfaces[0]
        self._held_vips = {vip for name, vip in outside_the_loop(neighbour.marked_vips) if name == interface}
        stack.callback(self._drop_vips)
        self._add_vips()
        self._drop_vips(keep=frozenset(reconcile.held_vips(self._now.config)))  # what a crash left

    def _load_classifier(self, stack: ExitStack) -> None:
        self._classifier = stack.enter_context(Classifier())
        self._fill_classifier()

    def _open_pipeline(self) -> None:
        self._pipeline = Pipeline(self._now.config.flows)
        self._publish()

    def _attach_guard(self, stack: ExitStack) -> None:
        for interface in self._now.config.interfaces:
            stack.callback(self._detach_guard, interface)
            guard.attach(interface, self._classifier.guard_fd)

    def _detach_guard(self, interface: str) -> None:
        try:
            guard.detach(interface)
        except KernelError as error:  # an interface that is gone took its guard with it
            log.warning("guard not detached", interface=interface, error=str(error))

    def _open_rings(self, stack: ExitStack) -> None:
        self._rings = []
        config = self._now.config
        memory = RingMemory(len(self._links), int(config.ring.block_size), config.ring.blocks)
        stack.callback(memory.close)
        for interface in self._links:
            ring = open_ring(interface, self._classifier.filter_fd, memory, config)
            stack.callback(ring.close)
            self._rings.append(ring)

    def _start_worker(self, stack: ExitStack) -> None:
        config = self._now.config
        self._worker = Worker(self._pipeline, self._rings)
        stack.callback(self._worker.close)
        self._transmit = TransmitPaths(self._worker, config.transmit)
        self._transmit.open(self._view, self._links_out())
        self._thread = threading.Thread(target=self._worker.run, name="fastlb-worker", daemon=True)
        stack.callback(self._stop_worker)
        self._thread.start()

    def _stop_worker(self) -> None:
        self._worker.stop()
        if self._thread.ident is None:  # stopped before it was started
            return
        self._thread.join(JOIN_TIMEOUT)
        if self._thread.is_alive():
            # Its rings must not be unmapped under it; the process's end closes everything but the guard.
            for interface in self._now.config.interfaces:
                self._detach_guard(interface)
            log.error("the worker does not stop; leaving without it")
            sys.stderr.flush()
            os._exit(1)

    # --- the event loop ------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        on_stop_signals(lambda *_: loop.call_soon_threadsafe(stop.set))
        self._on_kernel_view(self._view)  # what changed while the rest was set up
        await self._first_neighbours()
        self._warn(self._view)
        await self._control.serve()
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(self._reload_signal))
        log.info(
            "running",
            interfaces=list(self._now.config.interfaces),
            transmit=self._paths(),
            **self._now.summary(),
        )
        while not stop.is_set() and self._failure is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK)
            self._tick()
        self._loop = None

    def _warn(self, view: KernelView) -> None:
        """Log what is allowed, because it may be meant, but mostly is a mistake."""
        for line in nexthops.replies_elsewhere(view, self._now.plans, self._now.config.interfaces):
            log.warning("replies will not be seen", problem=line)
        for leftover in outside_the_loop(leftovers.show):
            if not leftover.in_use:
                log.warning("a crash left a guard on an interface that this configuration does not use; "
                            "fastlb guard remove removes it", interface=leftover.interface)

    async def _first_neighbours(self) -> None:
        """Wait a little for the kernel to resolve the next hops, so that the first packets find them."""
        until = time.monotonic() + FIRST_NEIGHBOURS
        wanted = nexthops.wanted_next_hops(self._view, self._now.plans)
        while wanted - self._view.neighbours.keys() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def _tick(self) -> None:
        self._pipeline.reclaim()
        if self._worker.stopped:
            self._failure = FastlbError("the worker ended by itself; see the log above")
        self._ask_for_clients()
        self._transmit.follow(self._view, self._links_out())

    def _ask_for_clients(self) -> None:
        """Have the kernel resolve clients on our own links; each is forgotten after ASKED_FOR, when it is in use."""
        now = time.monotonic()
        unresolved = self._pipeline.take_unresolved() - self._asked.keys()
        expired = [next_hop for next_hop, since in self._asked.items() if now - since > ASKED_FOR]
        for next_hop in expired:
            del self._asked[next_hop]
        for next_hop in sorted(unresolved, key=str)[: MAX_ASKED - len(self._asked)]:
            self._asked[next_hop] = now
        if expired or unresolved:
            self._want_next_hops()

    # --- the kernel's tables -------------------------------------------------------------------------------

    def _kernel_changed(self, view: KernelView) -> None:
        """In the watcher's thread: hand the view over."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._on_kernel_view, view)
        else:
            self._view = view

    def _on_kernel_view(self, view: KernelView) -> None:
        self._view = view
        self._classifier.set_locals(view.addresses)
        self._publish()
        self._follow_links(view)
        self._want_next_hops()
        unreachable = nexthops.not_on_link(view, self._now.plans)
        if unreachable != self._reported:
            for line in unreachable:
                log.warning("backend unreachable", problem=line)
            if not unreachable:
                log.info("every dsr backend is on-link again")
            self._reported = unreachable

    def _follow_links(self, view: KernelView) -> None:
        links = self._interface_links(view)
        for name in sorted(self._links.keys() - links.keys()):
            log.warning("interface is gone; waiting for it", interface=name)
            del self._links[name]
            self._gone.add(name)
        if any(self._links.get(name, index) != index for name, index in links.items()) or self._gone & links.keys():
            self._gone -= links.keys()
            try:
                self._reopen_packet_path()
            except FastlbError as error:
                self._failure = error

    def _want_next_hops(self) -> None:
        self._watcher.want(nexthops.wanted_next_hops(self._view, self._now.plans) | self._asked.keys())

    def _links_out(self) -> set[int]:
        return nexthops.outgoing_links(self._view, self._now.plans, self._now.config.interfaces)

    def _paths(self) -> dict[str, str]:
        return self._transmit.describe(self._view, self._links_out())

    def _publish(self) -> None:
        self._pipeline.publish(self._now.services, nexthops.routes_table(self._view, self._now.plans))

    def _fill_classifier(self) -> None:
        vips, replies = reconcile.classifier_keys(self._now.plans)
        self._classifier.replace(vips, replies, self._view.addresses)

    def _add_vips(self) -> None:
        """With vip_address: interface, put what is missing of the VIPs on the first interface."""
        for address in sorted(reconcile.held_vips(self._now.config) - self._held_vips, key=str):
            if outside_the_loop(neighbour.add_vip, self._now.config.interfaces[0], address):
                self._held_vips.add(address)  # else it is the administrator's, and stays his

    def _drop_vips(self, keep: frozenset[Address] = frozenset()) -> None:
        for address in sorted(self._held_vips - keep, key=str):
            self._held_vips.discard(address)
            try:
                outside_the_loop(neighbour.remove_vip, self._now.config.interfaces[0], address)
            except KernelError as error:  # an interface that is gone took its addresses with it
                log.warning("VIP not removed", vip=str(address), error=str(error))

    # --- commands --------------------------------------------------------------------------------------------

    def _reload_signal(self) -> None:
        with contextlib.suppress(FastlbError):
            self._reload()

    def _reload_command(self, request: Mapping[str, Any]) -> dict[str, int]:
        self._reload()
        return self._now.summary()

    def _reload(self) -> None:
        """Go over to what the file says now; a refusal is logged and raised."""
        try:
            self._load_and_install()
        except FastlbError as error:
            log.error("reload refused; nothing was changed", problems=str(error).splitlines())
            raise
        log.info("reloaded", **self._now.summary())

    def _load_and_install(self) -> None:
        """Go over to what the file says now, or raise FastlbError and stay with what is."""
        before, after = self._now, Generation.load(self._path, self._now.ids)
        refused = list(reconcile.restart_reasons(before.config, after.config))
        if refused:
            raise FastlbError("a reload cannot change " + "; ".join(refused) + "; restart fastlb instead")
        check_reachable(self._view, after.plans)
        try:
            self._install(after)
        except FastlbError:
            self._install(before)
            raise

    def _install(self, generation: Generation) -> None:
        """The filter keeps an old VIP's packets out before the data path forgets it, and lets in those of a new one
        after the data path has learnt it."""
        old, new = reconcile.classifier_keys(self._now.plans), reconcile.classifier_keys(generation.plans)
        self._now = generation
        self._add_vips()
        self._pipeline.renew(generation.ids.reused)
        generation.ids.reused.clear()  # once: going back to this generation must not forget what is in use
        self._classifier.replace(old[0] & new[0], old[1] & new[1], self._view.addresses)
        self._publish()
        self._fill_classifier()
        self._drop_vips(keep=frozenset(reconcile.held_vips(generation.config)))
        self._want_next_hops()

    def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started, 1),
            "interfaces": list(self._now.config.interfaces),
            "transmit": self._paths(),
            "workers": 1,
            "counters": metrics.split_counters(self._pipeline.counters() | self._worker.counters()),
            "services": metrics.describe_services(self._pipeline, self._now.plans),
            "flows": metrics.describe_flows(self._pipeline),
        }


def outside_the_loop(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a thread of its own and wait: pyroute2 runs an event loop, which cannot be inside ours."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()


# --- being stopped -----------------------------------------------------------------------------------------


def on_stop_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """What SIGTERM and SIGINT do from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def stop_before_running(number: int, frame: FrameType | None) -> None:
    """While things are set up: they are taken down again by the exception, and that is a clean stop."""
    raise SystemExit(0)


# --- what must hold before anything is opened --------------------------------------------------------------


def check_privileges() -> None:
    """Raw sockets, traffic control and eBPF need root, or CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF."""
    needed = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    missing = [name for name, bit in needed.items() if not effective >> bit & 1]
    if missing:
        raise KernelError(f"fastlb run needs root: {' and '.join(missing)} missing")


def check_runnable(path: str, config: Config) -> None:
    """What an embedded configuration may leave out, a running balancer needs."""
    if not config.interfaces:
        raise ConfigError.at(path, "interfaces", "fastlb run needs at least one interface, as in interfaces: [eth0]")


def check_memory(config: Config) -> None:
    """The kernel hands out memory for rings until none is left for anybody else: refuse what there is not."""
    rings = config.ring.block_size * config.ring.blocks * len(config.interfaces) >> 20
    table = config.flows * FLOW_BYTES >> 20
    with open("/proc/meminfo") as meminfo:
        free = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:")) >> 10
    if rings > free:
        raise KernelError(f"the receive rings take {rings} MiB, and {free} MiB are free; try fewer ring.blocks")
    if rings + table > free:
        raise KernelError(f"a full flow table takes {table} MiB, and {free} MiB are free; try fewer flows")


def check_interfaces(config: Config, view: KernelView) -> None:
    """Every interface must exist, and have Ethernet addresses."""
    links = {link.name: link for link in view.links.values()}
    for name in config.interfaces:
        if name not in links:
            raise KernelError(f"interface {name} does not exist; there are: {', '.join(sorted(links))}")
        if not any(links[name].mac):  # lo has one, of zeros
            raise KernelError(f"interface {name} has no MAC address; fastlb works on Ethernet interfaces")
        if not links[name].up:
            log.warning("interface is down", interface=name)


def check_reachable(view: KernelView, plans: list[reconcile.Plan]) -> None:
    """A dsr backend must be on-link, as the host's routes stand now, and none may be this host."""
    problems = nexthops.own_addresses(view, plans) + nexthops.not_on_link(view, plans)
    if problems:
        raise FastlbError("\n".join(problems))


def open_ring(interface: str, filter_fd: int, memory: RingMemory, config: Config) -> Ring:
    """A receive ring; raises KernelError with what would help."""
    ring = config.ring
    try:
        return Ring(interface, filter_fd, memory, max(1, round(ring.timeout * 1000)))
    except OSError as error:
        size = ring.block_size * ring.blocks >> 20
        hint = f"; it takes {size} MiB, try fewer ring.blocks" if error.errno in (errno.ENOMEM, errno.ENOBUFS) else ""
        raise KernelError(f"cannot open a receive ring on {interface}: {error.strerror}{hint}") from error


