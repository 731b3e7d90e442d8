"""A running balancer: set up in order, watched by one event loop, torn down in reverse.

Threads: the worker (packets, without the GIL), the watcher of the kernel's tables, and this one, which does whatever
happens once a second or slower. Everything that changes the data path happens here, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import structlog

from fastlb import __version__, guard, metrics, neighbour, nexthops, reconcile
from fastlb._core import Pipeline, Ring, Worker
from fastlb.classifier import Classifier
from fastlb.config import Config, load_config
from fastlb.control import ControlServer
from fastlb.errors import ConfigError, FastlbError, KernelError
from fastlb.neighbour import KernelView, Watcher

TICK = 0.1  # seconds between looks at the worker, at clients without a MAC and at snapshots to free
JOIN_TIMEOUT = 5.0  # seconds that a worker may take to finish its block

log = structlog.get_logger()


class Engine:
    """`fastlb run`. ``run`` returns when SIGTERM or SIGINT has come and everything is taken down."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._config = load_config(path)
        self._ids = reconcile.BackendIds()
        self._plans = reconcile.plan_services(self._config, self._ids, time.monotonic())
        self._services = reconcile.services_table(self._config, self._plans)
        self._asked: set[neighbour.NextHop] = set()  # clients on our links that packets could not reach
        self._started = time.time()
        self._failure: FastlbError | None = None

    def run(self) -> None:
        """Raises FastlbError when the balancer cannot start, or fails; nothing is left behind then."""
        check_privileges()
        check_runnable(self._config)
        with ExitStack() as stack:
            self._open(stack)
            asyncio.run(self._serve())
        if self._failure is not None:
            raise self._failure
        log.info("stopped")

    # --- set-up, unwound in reverse ------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> None:
        self._open_control(stack)
        self._follow_kernel(stack)
        self._hold_vips(stack)
        self._load_classifier(stack)
        self._open_pipeline()
        self._attach_guard(stack)
        self._open_rings(stack)
        self._start_worker(stack)

    def _open_control(self, stack: ExitStack) -> None:
        self._control = ControlServer(
            self._config.control, {"status": self._status, "reload": self._reload_command}
        )
        self._control.bind()
        stack.callback(self._control.close)

    def _follow_kernel(self, stack: ExitStack) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher = Watcher(self._kernel_changed)
        stack.callback(self._watcher.close)
        self._view = self._watcher.start()
        check_interfaces(self._config, self._view)
        check_reachable(self._view, self._plans)
        self._want_next_hops()

    def _hold_vips(self, stack: ExitStack) -> None:
        self._held: Config | None = None
        stack.callback(self._change_vips, None)
        self._change_vips(self._config)

    def _load_classifier(self, stack: ExitStack) -> None:
        self._classifier = stack.enter_context(Classifier())
        self._fill_classifier()

    def _open_pipeline(self) -> None:
        self._pipeline = Pipeline(self._config.flows)
        self._publish()

    def _attach_guard(self, stack: ExitStack) -> None:
        for interface in self._config.interfaces:
            stack.callback(self._detach_guard, interface)
            guard.attach(interface, self._classifier.guard_fd)

    def _detach_guard(self, interface: str) -> None:
        try:
            guard.detach(interface)
        except KernelError as error:  # an interface that is gone took its guard with it
            log.warning("guard not detached", interface=interface, error=str(error))

    def _open_rings(self, stack: ExitStack) -> None:
        self._rings = []
        for interface in self._config.interfaces:
            ring = open_ring(interface, self._classifier.filter_fd, self._config)
            stack.callback(ring.close)
            self._rings.append(ring)

    def _start_worker(self, stack: ExitStack) -> None:
        self._worker = Worker(self._pipeline, self._rings)
        stack.callback(self._worker.close)
        self._thread = threading.Thread(target=self._worker.run, name="fastlb-worker", daemon=True)
        stack.callback(self._stop_worker)
        self._thread.start()

    def _stop_worker(self) -> None:
        self._worker.stop()
        self._thread.join(JOIN_TIMEOUT)
        if self._thread.is_alive():
            # Its rings must not be unmapped under it; the process's end closes everything but the guard.
            for interface in self._config.interfaces:
                self._detach_guard(interface)
            log.error("the worker does not stop; leaving without it")
            sys.stderr.flush()
            os._exit(1)

    # --- the event loop ------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_signal)
        await self._control.serve()
        self._on_kernel_view(self._view)  # what changed while the rest was set up
        log.info(
            "running",
            interfaces=list(self._config.interfaces),
            services=len(self._plans),
            backends=sum(len(plan.members) for plan in self._plans),
            transmit="sendmmsg",
        )
        while not stop.is_set() and self._failure is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK)
            self._tick()
        self._loop = None

    def _tick(self) -> None:
        self._pipeline.reclaim()
        if self._worker.stopped:
            self._failure = FastlbError("the worker ended by itself; see the log above")
        unresolved = self._pipeline.take_unresolved() - self._asked
        if unresolved:
            self._asked |= unresolved
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
        self._asked = {next_hop for next_hop in self._asked if view.route(next_hop[1]) is not None}
        self._classifier.set_locals(view.addresses)
        self._publish()
        self._want_next_hops()
        for line in nexthops.not_on_link(view, self._plans):
            log.warning("backend unreachable", problem=line)

    def _want_next_hops(self) -> None:
        self._watcher.want(nexthops.wanted_next_hops(self._view, self._plans) | self._asked)

    def _publish(self) -> None:
        self._pipeline.publish(self._services, nexthops.routes_table(self._view, self._plans))

    def _fill_classifier(self) -> None:
        vips, replies = reconcile.classifier_keys(self._plans)
        self._classifier.replace(vips, replies, self._view.addresses)

    def _change_vips(self, config: Config | None) -> None:
        """With vip_address: interface, put exactly the VIPs of ``config`` on the first interface."""
        add, remove = reconcile.vip_changes(self._held, config)
        interface = self._config.interfaces[0]
        for address in sorted(add, key=str):
            neighbour.add_vip(interface, address)
        for address in sorted(remove, key=str):
            try:
                neighbour.remove_vip(interface, address)
            except KernelError as error:
                log.warning("VIP not removed", vip=str(address), error=str(error))
        self._held = config

    # --- commands ------------------------------------------------------------------------------------------

    def _reload_signal(self) -> None:
        try:
            self._reload()
        except FastlbError as error:
            log.error("reload refused; nothing was changed", problems=str(error).splitlines())

    def _reload_command(self, request: Mapping[str, Any]) -> dict[str, int]:
        self._reload()
        return {"services": len(self._plans)}

    def _reload(self) -> None:
        """Go over to what the file says now, or raise FastlbError and stay with what is."""
        config = load_config(self._path)
        refused = list(reconcile.restart_reasons(self._config, config))
        if refused:
            raise FastlbError("a reload cannot change " + "; ".join(refused) + "; restart fastlb instead")
        plans = reconcile.plan_services(config, self._ids, time.monotonic())
        check_reachable(self._view, plans)
        services = reconcile.services_table(config, plans)
        self._config, self._plans, self._services = config, plans, services
        self._change_vips(config)
        # The data path knows a new VIP before the filter lets its packets in, and an old one until they stay out.
        self._publish()
        self._fill_classifier()
        self._want_next_hops()
        log.info("reloaded", services=len(plans), backends=sum(len(plan.members) for plan in plans))

    def _status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started, 1),
            "interfaces": list(self._config.interfaces),
            "transmit": "sendmmsg",
            "workers": 1,
            "counters": metrics.split_counters(self._pipeline.counters() | self._worker.counters()),
            "services": metrics.describe_services(self._pipeline, self._plans),
            "flows": metrics.describe_flows(self._pipeline),
        }


# --- what must hold before anything is opened --------------------------------------------------------------


def check_privileges() -> None:
    """Raw sockets, traffic control and eBPF need root, or CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF."""
    needed = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    missing = [name for name, bit in needed.items() if not effective >> bit & 1]
    if missing:
        raise KernelError(f"fastlb run needs root: {' and '.join(missing)} missing")


def check_runnable(config: Config) -> None:
    """What an embedded configuration may leave out, a running balancer needs."""
    if not config.interfaces:
        raise ConfigError.at("interfaces", "fastlb run needs at least one interface, as in interfaces: [eth0]")


def check_interfaces(config: Config, view: KernelView) -> None:
    """Every interface must exist, and have Ethernet addresses."""
    links = {link.name: link for link in view.links.values()}
    for name in config.interfaces:
        if name not in links:
            raise KernelError(f"interface {name} does not exist; there are: {', '.join(sorted(links))}")
        if not links[name].mac:
            raise KernelError(f"interface {name} has no MAC address; fastlb works on Ethernet interfaces")
        if not links[name].up:
            log.warning("interface is down", interface=name)


def check_reachable(view: KernelView, plans: list[reconcile.Plan]) -> None:
    """A dsr backend must be on-link, as the host's routes stand now."""
    problems = nexthops.not_on_link(view, plans)
    if problems:
        raise FastlbError("\n".join(problems))


def open_ring(interface: str, filter_fd: int, config: Config) -> Ring:
    """A receive ring; raises KernelError with what would help."""
    ring = config.ring
    try:
        return Ring(interface, filter_fd, int(ring.block_size), ring.blocks, max(1, round(ring.timeout * 1000)))
    except OSError as error:
        size = ring.block_size * ring.blocks >> 20
        hint = f"; it takes {size} MiB, try fewer ring.blocks" if error.errno in (12, 105) else ""
        raise KernelError(f"cannot open a receive ring on {interface}: {error.strerror}{hint}") from error


