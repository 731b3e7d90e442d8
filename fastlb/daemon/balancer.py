"""A running balancer: set up in order, watched by one event loop, torn down in reverse.

It may leave guard, VIPs and flow table to the next process (`fastlb stop --handover`), as a crash does. The next one
takes them over; when it fails before it runs, it leaves them in its turn.

Threads: the workers (packets, without the GIL), the watcher of the kernel's tables, and this one, which does whatever
happens once a second or slower. Everything that changes the data path happens here, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, NoReturn

import structlog

from fastlb._core import FlowMemory, Pipeline
from fastlb.config import Service
from fastlb.control.commands import Commands
from fastlb.control.server import ControlServer
from fastlb.daemon import leftovers
from fastlb.daemon.generation import Generation
from fastlb.daemon.preflight import (
    check_host,
    check_memory,
    check_privileges,
    check_reachable,
    check_runnable,
    host_warnings,
    open_blocks,
)
from fastlb.errors import FastlbError, KernelError
from fastlb.health.checker import Checker
from fastlb.health.results import CheckResult
from fastlb.kernel import cpus, guard, icmp
from fastlb.kernel.claim import claim
from fastlb.kernel.ebpf.classifier import Classifier, Sources
from fastlb.kernel.ebpf.tunnel_offload import TunnelOffload
from fastlb.kernel.mirror import Watcher
from fastlb.kernel.netlink import run_in_thread
from fastlb.kernel.vips import HeldVips
from fastlb.model.hostview import KernelView, NextHop
from fastlb.model.names import BackendName
from fastlb.model.net import Address
from fastlb.observe.flow_log import FlowLog
from fastlb.plan import pathmtu, routes
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.keys import held_vips
from fastlb.plan.reachability import not_on_link
from fastlb.plan.restart import restart_reasons
from fastlb.plan.saved import restored_states, saved_states
from fastlb.workers import flow_file
from fastlb.workers.flow_file import FlowFileError
from fastlb.workers.workers import Workers, open_pipelines

TICK = 0.1  # seconds between looks at the workers, at clients without a MAC and at snapshots to free
ASKED_FOR = 60.0  # seconds that a client without a MAC is asked for
MAX_ASKED = 1024  # such clients at a time: forged addresses must not fill the kernel's table
FIRST_NEIGHBOURS = 1.0  # seconds that the start waits for next hops to be resolved
REOPENED_WITHIN = 10.0  # seconds in which the rings must be open again; then fastlb stops
FORGOTTEN_AT_ONCE = 4096  # buckets, of up to four flows each, that end before the flow log is written
LET_GO_EVERY = 1.0  # seconds between looks at the flows of removed backends
RESPONSES_EVERY = 5.0  # seconds between looks at the response times of checks
REPLACEMENTS, REPLACED_WITHIN = 3, 60.0  # so many workers may be replaced in so many seconds; then fastlb stops

log = structlog.get_logger()


class Engine:
    """`fastlb run`. ``run`` returns when SIGTERM or SIGINT has come and everything is taken down.

    Attributes without an underscore are what `Commands` uses.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.standings = BackendStates()
        self.now = Generation.load(path, BackendIds(), self.standings)
        self._checker = Checker(self._checked, could_not_check)
        self._planned = time.monotonic()  # when it was last looked at how backends stand
        self._let_go_at = 0.0  # when removed backends were last looked at
        self._path_mtus = pathmtu.PathMtus()
        self._narrower: set[Address] = set()  # backends the way to which has become so since the last tick
        self._tunnels: pathmtu.Tunnels | None = None  # as now published; None: not asked for yet
        self._asked: dict[NextHop, float] = {}  # clients on our links that packets could not reach
        self._reported: list[str] = []
        self._links: dict[str, int] = {}  # the interfaces whose rings are open
        self._down: set[str] = set()  # the interfaces that exist and are down
        self._gone: set[str] = set()  # those that do not exist, or were never up
        self._replaced: list[float] = []  # when workers were replaced, lately
        self.flow_file: flow_file.FlowFile | None = None
        self._flow_log: FlowLog | None = None
        self._flow_log_fails = False
        self.pipelines: Sequence[Pipeline] = ()
        self._closed_since: float | None = None  # that the rings could not be opened again
        self.started = time.monotonic()
        self._failure: FastlbError | None = None
        self._handover = False  # what stays over a crash stays: for the next process, or because this one took it over
        self._stop: asyncio.Event | None = None
        self._asked_to_stop = False  # before the event loop ran

    def run(self) -> None:
        """Raises FastlbError when the balancer cannot start, or fails; nothing is left behind then that it has made."""
        check_runnable(self._path, self.now.config)
        check_privileges()
        self._plan_cores()
        check_memory(self.now.config, self.count)
        on_stop_signals(self._ask_to_stop)
        with ExitStack() as stack:
            try:
                if self._open(stack):
                    asyncio.run(self._serve())
                else:
                    self._handover = False
            finally:
                on_stop_signals(signal.SIG_IGN)  # another one must not cut the taking down short
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self._failure is not None:
            raise self._failure
        log.info("stopped; guard, VIPs and flows stay" if self._handover else "stopped")

    def stop(self, handover: bool) -> None:
        """Have ``run`` return; with ``handover``, what stays over a crash stays. Called within the event loop."""
        assert self._stop is not None, "there is no event loop yet"
        self._handover = handover
        self._stop.set()

    def _plan_cores(self) -> None:
        allowed = os.sched_getaffinity(0)
        self.count = cpus.count_workers(self.now.config.workers, len(allowed))
        self._cores = cpus.plan(allowed, self.count)
        if self.count > len(allowed):
            log.warning("workers share cores", workers=self.count, cores=len(allowed))

    # --- set-up, unwound in reverse ------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> bool:
        """False when it has been asked meanwhile to stop, which is looked at between steps: none is left half done."""
        for step in (
            self._open_control, self._claim_interfaces, self._follow_kernel, self._hold_vips, self._load_classifier,
            self._open_flow_log, self._open_pipelines, self._listen_for_errors, self._attach_guard,
            self._open_packet_path,
        ):  # fmt: skip
            step(stack)
            if self._asked_to_stop:
                return False
        return True

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """What SIGTERM and SIGINT do until the event loop runs."""
        self._asked_to_stop = True

    def _open_packet_path(self, stack: ExitStack) -> None:
        self.open_blocks = open_blocks(self.now.config, self.classifier)
        self.tunnel_offload = TunnelOffload()
        stack.callback(self.tunnel_offload.close)
        self._open_workers(earlier=())
        stack.callback(lambda: self.workers.close())
        self.workers.start(self.view, self.links_out())
        self._offload_tunnels()

    def _open_workers(self, earlier: Sequence[Mapping[str, int]]) -> None:
        self._links = self._interface_links(self.view)
        self._gone = set(self.now.config.interfaces) - self._links.keys()
        self.workers = Workers(
            self.now.config, self.pipelines, self.classifier, self._cores, self._links, self.open_blocks,
            self._leave_without, earlier,
        )  # fmt: skip

    def _reopen_packet_path(self) -> None:
        """Rings of an interface that was deleted and made again are gone, and so is its guard. Flows stay."""
        self.workers.close()
        self.pipelines[0].release_fragments()
        try:
            for interface in self._interface_links(self.view):
                run_in_thread(guard.attach, interface, self.classifier.guard_fd)
            self._open_workers(earlier=self.workers.totals())
            self.workers.start(self.view, self.links_out())
            self._closed_since = None
        except KernelError as error:
            self._not_reopened(error)

    def _not_reopened(self, error: KernelError) -> None:
        """Mostly an interface went away meanwhile: tried again at each tick, with what is known of the links then."""
        now = time.monotonic()
        if self._closed_since is None:
            self._closed_since = now
            log.warning("the rings cannot be opened; trying again", reason=str(error))
        if now - self._closed_since > REOPENED_WITHIN:
            self._failure = error

    def _interface_links(self, view: KernelView) -> dict[str, int]:
        """The configured interfaces that exist, with their indices; for several workers, those that were up once."""
        links = {link.name: link for link in view.links.values()}
        return {
            name: links[name].index
            for name in self.now.config.interfaces
            if name in links and (self.count == 1 or links[name].up or name in self._links)
        }

    def _leave_without(self, numbers: Sequence[int]) -> NoReturn:
        """The process's end closes the rest. The event loop may be running."""
        log.error("workers do not stop; leaving without them", workers=list(numbers))
        self._handover = False
        try:
            self.vips.drop()  # first, so that the host never answers for them
            for interface in self.now.config.interfaces:
                run_in_thread(self._detach_guard, interface)
            self._close_flow_file()
            self._control.close()
            sys.stderr.flush()
        finally:
            os._exit(1)

    def _open_control(self, stack: ExitStack) -> None:
        self._control = ControlServer(self.now.config.control, Commands(self).by_name())
        stack.callback(self._control.close)
        self._control.bind()

    def _claim_interfaces(self, stack: ExitStack) -> None:
        for interface in self.now.config.interfaces:
            stack.enter_context(claim(interface))

    def _follow_kernel(self, stack: ExitStack) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher = Watcher(self._kernel_changed)
        stack.callback(self._watcher.close)
        self.view = self._watcher.start()
        check_host(self.now.config, self.now.plans, self.view)
        self._want_next_hops()

    def _hold_vips(self, stack: ExitStack) -> None:
        wanted = held_vips(self.now.config)
        self.vips = HeldVips(self.now.config.interfaces[0])
        stack.callback(self._leave_vips)
        self.vips.add(wanted)
        self.vips.drop(keep=wanted)  # what a crash left

    def _leave_vips(self) -> None:
        if not self._handover:
            self.vips.drop()

    def _load_classifier(self, stack: ExitStack) -> None:
        config = self.now.config
        sources = Sources(frozenset(config.snat), *config.snat_ports) if config.snat else None
        self.classifier = stack.enter_context(Classifier(self.count, sources))
        self._fill_classifier()

    def _open_pipelines(self, stack: ExitStack) -> None:
        self.flow_file = flow_file.open_file(self.now.config, self._saved(self.now, self.standings))
        stack.callback(self._close_flow_file)
        memory = None
        if self.flow_file is not None:
            memory = self._take_over(self.flow_file) or self.flow_file.memory(self.now.config)
        self.pipelines = open_pipelines(self.now.config, self.count, memory)
        self._publish()

    def _take_over(self, file: flow_file.FlowFile) -> FlowMemory | None:
        """The flows that another process has left, as if this one's configuration came by a reload of that one."""
        if file.found is None:
            return None
        config, now = self.now.config, time.monotonic()
        ids = BackendIds.restored(file.found["ids"], now)
        self.standings = restored_states(file.found, now)
        self.standings.apply_config(config, now)
        self.now = Generation.of(config, ids, self.standings, now)
        memory = file.take_over(config, self.now.services, ids.highest)
        if self._flow_log is not None and memory is not None:
            self._flow_log.know_names(ids.by_name)
            self._flow_log.know(self.now.plans)
            while self._write_flow_log([memory]):
                pass
            if memory.unlogged:
                log.error("flow log not written", error="more flows end than fit", lines=memory.unlogged)
        self._save(self.now, self.standings)
        self._handover = memory is not None
        return memory

    def _saved(self, generation: Generation, standings: BackendStates) -> dict[str, Any]:
        return {"ids": generation.ids.saved(), **saved_states(standings)}

    def _save(self, generation: Generation, standings: BackendStates) -> None:
        """Tell the next process; before the data path hears of new ids. Raises FlowFileError."""
        if self.flow_file is not None:
            self.flow_file.save(self._saved(generation, standings))

    def _save_again(self) -> None:
        """The same where there are no new ids: what cannot be written costs no more than what it says."""
        try:
            self._save(self.now, self.standings)
        except FlowFileError as error:
            log.error("the next process will not know how backends stand", error=str(error))

    def _close_flow_file(self) -> None:
        if self.flow_file is not None:
            self.flow_file.close(keep=self._handover)

    def _listen_for_errors(self, stack: ExitStack) -> None:
        self._listeners = {}
        for version in (4, 6):
            listener = icmp.listen(version)
            if listener is not None:
                self._listeners[version] = stack.enter_context(listener)

    def _open_flow_log(self, stack: ExitStack) -> None:
        if self.now.config.flow_log is not None:
            self._flow_log = FlowLog(self.now.config.flow_log)
            stack.callback(self._close_flow_log)
            self._flow_log.know(self.now.plans)

    def _close_flow_log(self) -> None:
        """With what came last; and with this process all flows end, unless another one goes on with them."""
        assert self._flow_log is not None, "it was opened"
        while self._write_flow_log(self.pipelines):
            pass
        for pipeline in () if self._handover and self.flow_file is not None else self.pipelines:
            bucket: int | None = 0
            while bucket is not None:
                bucket = pipeline.forget_flows(bucket, FORGOTTEN_AT_ONCE)
                self._write_flow_log([pipeline])
        self._flow_log.close()

    def _attach_guard(self, stack: ExitStack) -> None:
        for interface in self.now.config.interfaces:
            stack.callback(self._detach_guard, interface)
            guard.attach(interface, self.classifier.guard_fd)

    def _detach_guard(self, interface: str) -> None:
        if self._handover:
            return
        try:
            guard.detach(interface)
        except KernelError as error:  # an interface that is gone took its guard with it
            log.warning("guard not detached", interface=interface, error=str(error))

    # --- the event loop ------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = self._loop = asyncio.get_running_loop()
        stop = self._stop = asyncio.Event()
        self._handover = False
        on_stop_signals(lambda *_: loop.call_soon_threadsafe(stop.set))
        if self._asked_to_stop:
            stop.set()
        self._on_kernel_view(self.view)  # what changed while the rest was set up
        await self._first_neighbours()
        self._warn(self.view)
        await self._control.serve()
        for version, listener in self._listeners.items():
            loop.add_reader(listener, self._hear_errors, version)
        signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(self._reload_signal))
        self._checker.apply_config(self.now.config)
        log.info(
            "running",
            interfaces=list(self.now.config.interfaces),
            workers=self.count,
            open_blocks=self.open_blocks,
            transmit=self.paths(),
            flow_file=self.flow_file and str(self.flow_file.path),
            **self.now.summary(),
        )
        while not stop.is_set() and self._failure is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK)
            self._tick()
        self._checker.close()
        self._loop = None

    def _warn(self, view: KernelView) -> None:
        """Log what is allowed, because it may be meant, but mostly is a mistake."""
        for event, problem in host_warnings(self.now.config, self.now.plans, view):
            log.warning(event, problem=problem)
        for leftover in run_in_thread(leftovers.interfaces):
            if not leftover.in_use:
                log.warning("a crash left a guard on an interface that this configuration does not use; "
                            "fastlb guard remove removes it", interface=leftover.interface)

    async def _first_neighbours(self) -> None:
        """Wait a little for the kernel to resolve the next hops, so that the first packets find them."""
        until = time.monotonic() + FIRST_NEIGHBOURS
        wanted = routes.wanted_next_hops(self.view, self.now.plans)
        while wanted - self.view.neighbours.keys() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def _tick(self) -> None:
        for pipeline in self.pipelines:
            pipeline.reclaim()
        if self._closed_since is not None:
            self._reopen_packet_path()
        self._look_after_workers()
        self._ask_for_clients()
        self._follow_path_mtus()
        self._plan_in_time()
        self._let_go_of_removed()
        self._write_flow_log(self.pipelines)
        self.workers.poll(self.view, self.links_out())
        self._offload_tunnels()

    def _write_flow_log(self, whose: Sequence[Pipeline | FlowMemory]) -> int:
        """How many lines it was. A full disk costs lines, and is logged once."""
        if self._flow_log is None:
            return 0
        try:
            lines = self._flow_log.write(whose)
            self._flow_log_fails = False
        except OSError as error:
            if not self._flow_log_fails:
                log.error("flow log not written", error=str(error))
            self._flow_log_fails = True
            return 0
        return lines

    def _look_after_workers(self) -> None:
        """Replace workers that died, all of them together; stop when that happens again and again, or one is stuck."""
        if stuck := self.workers.stuck():
            self._failure = FastlbError(f"worker {', '.join(map(str, stuck))} is stuck; stopping")
            log.error("a worker is stuck; stopping", workers=stuck)  # now: it may never come to the failure's report
        dead = self.workers.dead()
        if not dead:
            return
        now = time.monotonic()
        self._replaced = [*(when for when in self._replaced if now - when < REPLACED_WITHIN), now]
        if len(self._replaced) > REPLACEMENTS:
            self._failure = FastlbError(
                f"a worker has died {len(self._replaced)} times within {REPLACED_WITHIN:.0f} s; stopping")
            return
        log.error("a worker has died; starting the workers again", workers=dead)
        self._reopen_packet_path()

    def _ask_for_clients(self) -> None:
        """Have the kernel resolve clients on our own links; each is forgotten after ASKED_FOR, when it is in use."""
        now = time.monotonic()
        unresolved = set().union(*(each.take_unresolved() for each in self.pipelines)) - self._asked.keys()
        expired = [next_hop for next_hop, since in self._asked.items() if now - since > ASKED_FOR]
        for next_hop in expired:
            del self._asked[next_hop]
        for next_hop in sorted(unresolved, key=str)[: MAX_ASKED - len(self._asked)]:
            self._asked[next_hop] = now
        if expired or unresolved:
            self._want_next_hops()

    def _hear_errors(self, version: int) -> None:
        """A router says that a tunnel's packet did not fit: clients are told from the next tick on."""
        if self._tunnels is None:
            self._tunnels = routes.tunnels(self.view, self.now.plans)
        for error in icmp.read(self._listeners[version]):
            backend = self._path_mtus.hear(error, version, self._tunnels, time.monotonic())
            if backend is not None:
                self._narrower.add(backend)

    def _follow_path_mtus(self) -> None:
        """Once a tick, whatever routers say, or somebody in their name."""
        known = self._path_mtus.known()
        for backend in sorted(self._narrower, key=str):
            log.info("the way to a backend is narrower", backend=str(backend), mtu=known[backend])
        if self._path_mtus.forget(time.monotonic()) or self._narrower:
            self._narrower.clear()
            self._publish()

    # --- how backends stand ----------------------------------------------------------------------------------

    def _checked(self, results: Sequence[CheckResult]) -> None:
        """Health checks have ended."""
        services = {service.name: service for service in self.now.config.services}
        changes = [self._has_changed(services.get(result.backend[0]), result) for result in results]
        if any(changes):
            self.plan_again()

    def _has_changed(self, service: Service | None, result: CheckResult) -> bool:
        """Whether a backend stands otherwise after this check; the log says so."""
        name, response, reason = result
        if service is None or not self.standings.checked(service, name[1], response, reason, time.monotonic()):
            return False
        state = self.standings.of(*name).state
        why = {"reason": reason} if reason else {}
        (log.info if state == "up" else log.warning)(f"backend {state}", service=name[0], backend=name[1], **why)
        if state == "up":
            self._forget_response(name)
        return True

    def _forget_response(self, name: BackendName) -> None:
        found = {(plan.name, member.key): member.id for plan in self.now.plans for member in plan.members}
        for pipeline in self.pipelines if name in found else ():
            pipeline.forget_response(found[name])

    def plan_again(self) -> None:
        """Backends stand otherwise than before."""
        before, self._planned = self._planned, time.monotonic()
        for service, backend in self.standings.drains_ended(before, self._planned):
            log.info("drained", service=service, backend=backend)
        self.now = Generation.of(self.now.config, self.now.ids, self.standings, self._planned)
        self._publish()
        self._save_again()

    def _plan_in_time(self) -> None:
        """Steps of slow starts, ends of drains, and response times of checks, where a scheduler goes by them."""
        now = time.monotonic()
        timed = any(service.check and service.scheduler in ("lrt", "p2c") for service in self.now.config.services)
        if self.standings.due(self._planned, now) or (timed and now - self._planned >= RESPONSES_EVERY):
            self.plan_again()

    def _let_go_of_removed(self) -> None:
        """Backends that the configuration gave up are known until the last of their flows is over."""
        now = time.monotonic()
        if now - self._let_go_at < LET_GO_EVERY:
            return
        self._let_go_at = now
        over = self.standings.drop_removed(self._flows_of, now)
        if over:
            self._install(Generation.of(self.now.config, self.now.ids, self.standings, now))
            self._save_again()
            log.info("removed backends have no flows any more", backends=[" ".join(name) for name in over])

    def _flows_of(self, name: BackendName) -> int:
        number = self.now.ids.by_name[name]
        return sum(pipeline.backend_stats(number)["active_flows"] for pipeline in self.pipelines)

    # --- the kernel's tables -------------------------------------------------------------------------------

    def _kernel_changed(self, view: KernelView) -> None:
        """In the watcher's thread: hand the view over."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._on_kernel_view, view)
        else:
            self.view = view

    def _on_kernel_view(self, view: KernelView) -> None:
        self.view = view
        self.classifier.set_locals(view.addresses)
        self._publish()
        self._tell_of_links(view)
        self._follow_links(view)
        self._want_next_hops()
        unreachable = not_on_link(view, self.now.plans)
        if unreachable != self._reported:
            for line in unreachable:
                log.warning("backend unreachable", problem=line)
            if not unreachable:
                log.info("every dsr backend is on-link again")
            self._reported = unreachable

    def _tell_of_links(self, view: KernelView) -> None:
        """Of those that go down and come up again; one that is gone is told of by `_follow_links`."""
        up = {link.name: link.up for link in view.links.values() if link.name in self.now.config.interfaces}
        for name in sorted(up):
            if not up[name] and name not in self._down:
                log.warning("interface is down", interface=name)
            elif up[name] and name in self._down:
                log.info("interface is up", interface=name)
        self._down = {name for name in up if not up[name]}

    def _follow_links(self, view: KernelView) -> None:
        links = self._interface_links(view)
        for name in sorted(self._links.keys() - links.keys()):
            log.warning("interface is gone; waiting for it", interface=name)
            del self._links[name]
            self._gone.add(name)
        if any(self._links.get(name, index) != index for name, index in links.items()) or self._gone & links.keys():
            log.warning("an interface is new; opening the rings again", interfaces=sorted(links))
            self._reopen_packet_path()

    def _want_next_hops(self) -> None:
        self._watcher.want(routes.wanted_next_hops(self.view, self.now.plans) | self._asked.keys())

    def links_out(self) -> set[int]:
        return routes.outgoing_links(self.view, self.now.plans, self.now.config.interfaces)

    def _offload_tunnels(self) -> None:
        links = routes.tunnel_links(self.view, self.now.plans) if self.now.config.tunnel_offload else set()
        self.workers.offload_tunnels(self.tunnel_offload.apply(links))

    def paths(self) -> dict[str, str]:
        return self.workers.transmit_paths(self.view, self.links_out())

    def _publish(self) -> None:
        self._tunnels = None
        published = routes.routes_table(self.view, self.now.plans, self._path_mtus.known())
        for pipeline in self.pipelines:
            pipeline.publish(self.now.services, published)

    def _fill_classifier(self) -> None:
        self.classifier.replace(self.now.classifier_keys(), self.view.addresses)

    # --- reload --------------------------------------------------------------------------------------------

    def _reload_signal(self) -> None:
        with contextlib.suppress(FastlbError):
            self.reload()

    def reload(self) -> None:
        """Go over to what the file says now; a refusal is logged and raised."""
        try:
            self._load_and_install()
        except FastlbError as error:
            log.error("reload refused; nothing was changed", problems=str(error).splitlines())
            raise
        log.info("reloaded", **self.now.summary())

    def _load_and_install(self) -> None:
        """Go over to what the file says now, or raise FastlbError and stay with what is."""
        standings = self.standings.copy()
        before, after = self.now, Generation.load(self._path, self.now.ids, standings)
        refused = list(restart_reasons(before.config, after.config))
        if refused:
            raise FastlbError("a reload cannot change " + "; ".join(refused) + "; restart fastlb instead")
        check_reachable(self.view, after.plans)
        if self._flow_log is not None:
            self._flow_log.reopen()
        try:
            self._save(after, standings)
            self._install(after)
        except FastlbError:
            self._install(before)
            self._save_again()
            raise
        self.standings = standings
        self._checker.apply_config(after.config)

    def _install(self, generation: Generation) -> None:
        """The filter keeps an old VIP's packets out before the data path forgets it, and lets in those of a new one
        after the data path has learnt it."""
        old, new = self.now.classifier_keys(), generation.classifier_keys()
        self.now = generation
        if self._flow_log is not None:
            self._flow_log.know(generation.plans)
        vips = held_vips(generation.config)
        self.vips.add(vips)
        for pipeline in self.pipelines:
            pipeline.renew(generation.ids.reused, generation.ids.services.reused)
        generation.ids.reused.clear()  # once: going back to this generation must not forget what is in use
        generation.ids.services.reused.clear()
        self.classifier.replace(old & new, self.view.addresses)
        self._publish()
        self._fill_classifier()
        self.vips.drop(keep=vips)
        self._want_next_hops()

def could_not_check(error: Exception, count: int) -> None:
    """Say that this host could not ask backends, how often, and why the last time."""
    log.error("backends could not be checked; their states stay", times=count, error=str(error))


# --- being stopped -----------------------------------------------------------------------------------------


def on_stop_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """What SIGTERM and SIGINT do from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
