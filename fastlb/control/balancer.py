"""What the commands of the control socket need of a running balancer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastlb.config import Config
from fastlb.model.hostview import KernelView
from fastlb.observe.status import Pipelines
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import Plan


class Current(Protocol):
    """The configuration that holds, and what was planned from it."""

    @property
    def config(self) -> Config: ...
    @property
    def plans(self) -> Sequence[Plan]: ...
    def summary(self) -> dict[str, int]:
        """Return how much it is: numbers of services and of backends."""


class Workers(Protocol):
    """The threads that move packets."""

    def counters(self) -> dict[str, int]: ...
    def describe(self, pipelines: Pipelines, view: KernelView, links_out: set[int]) -> list[dict[str, Any]]: ...


class Guard(Protocol):
    """The programs that keep VIPs' packets from the host."""

    def host_counters(self) -> Mapping[str, int]: ...


class TunnelOffload(Protocol):
    """What wraps tunnels' packets in the kernel."""

    def interfaces(self) -> Sequence[int]: ...


class Vips(Protocol):
    """The VIPs that are addresses of an interface."""

    def as_json(self) -> list[str]: ...


class FlowFile(Protocol):
    """The flow table's file."""

    @property
    def path(self) -> Path: ...


class Balancer(Protocol):
    """A running balancer, as `Commands` sees it. Everything here is called within its event loop."""

    @property
    def now(self) -> Current: ...
    @property
    def standings(self) -> BackendStates: ...
    @property
    def pipelines(self) -> Pipelines: ...
    @property
    def count(self) -> int: ...
    @property
    def view(self) -> KernelView: ...
    @property
    def workers(self) -> Workers: ...
    @property
    def classifier(self) -> Guard: ...
    @property
    def tunnel_offload(self) -> TunnelOffload: ...
    @property
    def open_blocks(self) -> bool: ...
    @property
    def flow_file(self) -> FlowFile | None: ...
    @property
    def vips(self) -> Vips: ...
    @property
    def started(self) -> float:
        """When it began, in seconds of the monotonic clock."""
    def paths(self) -> dict[str, str]:
        """Return the way out by interface."""
    def links_out(self) -> set[int]:
        """Return the interfaces by which packets leave."""
    def plan_again(self) -> None:
        """Have the data path follow what was changed about backends."""
    def reload(self) -> object:
        """Go over to what the configuration's file says now, or raise FastlbError; may return an awaitable."""
    def stop(self, handover: bool) -> None:
        """Begin to stop; with ``handover``, what stays over a crash stays."""
