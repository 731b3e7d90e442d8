"""What the commands of the control socket need of a running balancer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastlb.config import Config
from fastlb.model.hostview import KernelView
from fastlb.model.names import BackendName
from fastlb.observe.status import Pipelines
from fastlb.plan.backends import BackendStates
from fastlb.plan.leaving import Reloaded
from fastlb.plan.plan import Plan


class Configuration(Protocol):
    """The configuration that holds, and what was planned from it."""

    @property
    def config(self) -> Config: ...
    @property
    def plans(self) -> Sequence[Plan]: ...
    def summary(self) -> dict[str, int]:
        """Return how much it is: numbers of services and of backends."""


class World(Protocol):
    """What the balancer goes by at this moment."""

    @property
    def configuration(self) -> Configuration: ...
    @property
    def view(self) -> KernelView: ...
    @property
    def states(self) -> BackendStates: ...


class Operator(Protocol):
    """Takes the operator's word about backends; `Balancer.follow` puts it in force."""

    def drain(self, name: BackendName, seconds: float | None) -> None: ...
    def enable(self, name: BackendName) -> None: ...
    def set_weight(self, name: BackendName, weight: int) -> None: ...


class Balancer(Protocol):
    """A running balancer, as `Commands` sees it. Everything here is called within its event loop."""

    @property
    def world(self) -> World: ...
    @property
    def pipelines(self) -> Pipelines: ...
    @property
    def operator(self) -> Operator: ...
    @property
    def started(self) -> float:
        """When it began, in seconds of the monotonic clock."""
    def describe(self) -> Mapping[str, Any]:
        """Return what its parts tell: ``interfaces``, ``transmit``, ``tunnel_offload``, ``open_blocks``, ``workers``,
        ``counters`` of rings and ways out, ``passed`` to the host, ``lost_lines`` of the flow log, ``flow_file``,
        ``vips``, ``event_loop``."""
    async def follow(self) -> None:
        """Have the data path follow what has changed about backends."""
    async def reload(self) -> Reloaded:
        """Go over to what the configuration's file says now, or raise FastlbError.

        Returns warnings about it, and the flows of the backends that it takes out.
        """
    def stop(self, handover: bool) -> None:
        """Begin to stop; with ``handover``, what stays over a crash stays."""
