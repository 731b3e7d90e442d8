"""What must hold before a balancer opens anything: rights, memory, and what the configuration asks of this host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from fastlb.config import Config
from fastlb.control import server
from fastlb.daemon import leftovers
from fastlb.daemon.memory import check_memory, check_plans
from fastlb.errors import ConfigError, FastlbError, KernelError
from fastlb.health.target import targets_of
from fastlb.kernel import cpus
from fastlb.kernel.capabilities import missing_capabilities, needed_capabilities
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.limits import file_need, file_shortage, hard_file_limit
from fastlb.kernel.mirror import Watcher
from fastlb.kernel.netlink import run_in_thread
from fastlb.kernel.source_ports import check_source_ports
from fastlb.model.hostview import KernelView
from fastlb.model.names import listed
from fastlb.observe import flow_log
from fastlb.plan.ids import BackendIds
from fastlb.plan.keys import vips_of_this_host
from fastlb.plan.plan import Plan, plan_services
from fastlb.plan.reachability import (
    narrow_tunnels,
    nobody_answers,
    not_on_link,
    own_addresses,
    replies_by_a_router,
    replies_elsewhere,
    replies_lost_here,
    replies_over_another_link,
    too_narrow,
    without_route,
)
from fastlb.workers import flow_places, selftest

log = structlog.get_logger()


def check_privileges() -> None:
    """Raw sockets, traffic control and eBPF need root, or some capabilities; raises KernelError."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    with open("/proc/sys/kernel/cap_last_cap") as highest:
        last = int(highest.read())
    if missing := missing_capabilities(effective, last):
        needed = listed(needed_capabilities(last))
        raise KernelError(f"fastlb run needs root: {listed(missing)} missing (without root it needs {needed})")


def check_runnable(path: str, config: Config) -> None:
    """Raise ConfigError where there is not what a running balancer needs, and an embedded one may leave out."""
    if not config.interfaces:
        raise ConfigError.at(path, "interfaces", "fastlb run needs at least one interface, as in interfaces: [eth0]")


def check_this_host(path: str, config: Config) -> list[str]:
    """Return notes on what is allowed, and mostly a mistake; raises FastlbError where `fastlb run` would fail here."""
    check_runnable(path, config)
    watcher = Watcher(lambda _: None)
    view = watcher.start()
    watcher.close()
    check_plans(config)
    plans = plan_services(config, BackendIds(), 0.0)
    check_host(config, plans, view)
    allowed = len(os.sched_getaffinity(0))
    workers = cpus.count_workers(config.workers, allowed)
    check_memory(config, workers)
    check_paths(config)
    notes = [
        f"interface is down: {link.name}"
        for link in view.links.values()
        if link.name in config.interfaces and not link.up
    ]
    if workers > allowed:
        notes.append(f"workers share cores: {workers} on {allowed}")
    notes += check_files(config, workers)
    return notes + [f"{event}: {problem}" for event, problem in host_warnings(config, plans, view)]


def plan_cores(config: Config) -> cpus.Plan:
    """Return which core each worker has; several workers on one are told of."""
    allowed = os.sched_getaffinity(0)
    workers = cpus.count_workers(config.workers, len(allowed))
    if workers > len(allowed):
        log.warning("workers share cores", workers=workers, cores=len(allowed))
    return cpus.plan(allowed, workers)


def check_files(config: Config, workers: int) -> list[str]:
    """Return a line when health checks may need more open files than this process may have."""
    targets = {target for service in config.services if service.check for _, target in targets_of(service)}
    need = file_need(len(targets), workers * len(config.interfaces))
    shortage = file_shortage(need, hard_file_limit())
    return [] if shortage is None else [f"too few open files: {shortage}"]


def warn(config: Config, plans: Sequence[Plan], view: KernelView, workers: int) -> None:
    """Log what is allowed, because it may be meant, but mostly is a mistake."""
    for event, problem in host_warnings(config, plans, view):
        log.warning(event, problem=problem)
    for line in check_files(config, workers):
        log.warning("health checks may wait", problem=line)
    for leftover in run_in_thread(leftovers.interfaces):
        if not leftover.in_use:
            log.warning("a crash left a guard on an interface that this configuration does not use; "
                        "fastlb guard remove removes it", interface=leftover.interface)


def check_paths(config: Config) -> None:
    """Files that the configuration names: where they shall be must be there."""
    if config.flow_file not in ("auto", "none"):
        flow_places.check_path(Path(config.flow_file))
    if config.flow_log is not None:
        flow_log.check_path(config.flow_log)
    server.check_path(Path(config.control))


def host_warnings(config: Config, plans: Sequence[Plan], view: KernelView) -> list[tuple[str, str]]:
    """Return what is allowed, because it may be meant, but mostly is a mistake; as event and problem."""
    holds_vips = config.vip_address == "interface"
    elsewhere = [*replies_over_another_link(view, plans, config.interfaces), *replies_by_a_router(view, plans)]
    narrow = narrow_tunnels(view, plans)
    foreign = [address for address in config.snat if address not in view.addresses]
    return [
        *(("backend unreachable", problem) for problem in without_route(view, plans)),
        *(("answers must be routed here", f"snat: {address} is no address of this host") for address in foreign),
        *(("replies will not be seen", problem) for problem in elsewhere),
        *(("replies may be lost", problem) for problem in replies_lost_here(view, plans, holds_vips)),
        *(("nobody answers for a VIP", problem) for problem in nobody_answers(view, plans, holds_vips)),
        *(("a tunnel is narrow", problem) for problem in narrow),
    ]


def check_host(config: Config, plans: Sequence[Plan], view: KernelView) -> None:
    """Raise FastlbError unless the host has the links, addresses, routes and ports that are asked of it."""
    check_interfaces(config, view)
    check_reachable(view, plans, config.interfaces)
    check_source_ports(config.snat, config.snat_ports, view.addresses)


def missing_interfaces(config: Config, view: KernelView) -> list[str]:
    """Return the configured interfaces that do not exist."""
    there = {link.name for link in view.links.values()}
    return [name for name in config.interfaces if name not in there]


def check_interfaces(config: Config, view: KernelView) -> None:
    """Every interface must exist, and have Ethernet addresses."""
    links = {link.name: link for link in view.links.values()}
    for name in missing_interfaces(config, view):
        raise KernelError(f"interface {name} does not exist; there are: {', '.join(sorted(links))}")
    for name in config.interfaces:
        if not any(links[name].mac):  # lo has one, of zeros
            raise KernelError(f"interface {name} has no MAC address; fastlb works on Ethernet interfaces")


def check_reachable(view: KernelView, plans: Sequence[Plan], interfaces: Sequence[str]) -> None:
    """Raise FastlbError unless the host's routes allow the plans: dsr backends on-link, no way too narrow, replies by
    one of the interfaces, and no backend or VIP prefix that is this host."""
    problems = own_addresses(view, plans) + not_on_link(view, plans)
    problems += replies_elsewhere(view, plans, interfaces)
    problems += too_narrow(view, plans)
    problems += vips_of_this_host(plans, view.addresses)
    if problems:
        raise FastlbError("\n".join(problems))


def open_blocks(config: Config, classifier: Classifier) -> bool:
    """Return whether to read open blocks. Raises KernelError when the configuration insists and it does not work."""
    if config.ring.open_blocks is False:
        return False
    fault = classifier.no_bells or selftest.open_blocks_fault()
    if fault is not None and config.ring.open_blocks is True:
        raise KernelError(f"ring.open_blocks: true, but {fault}")
    if fault is not None:
        log.warning("open blocks are not read; a lone packet waits for its block", reason=fault)
    return fault is None
