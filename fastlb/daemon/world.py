"""What a balancer goes by at one moment, and the marks of what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastlb._core import Pipeline
from fastlb.daemon.configuration import Configuration
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.model.hostview import KernelView
from fastlb.model.names import BackendName
from fastlb.model.net import Address
from fastlb.plan.backends import BackendStates
from fastlb.plan.ways import Ways


@dataclass(frozen=True)
class World:
    """The configuration, the kernel's view of the host, and what follows from both. Replaced as a whole.

    ``states`` alone is not frozen: it takes in what checks and the operator say; `Marks` say for whom a plan is due.
    """

    configuration: Configuration
    view: KernelView
    states: BackendStates
    path_mtus: Mapping[Address, int]  # by backend: what routers said of the way to it
    ways: Ways  # next hops, links and the data path's routes


@dataclass
class Marks:
    """What has changed since the world was last planned. Parts mark; the planner takes."""

    backends: dict[str, set[str] | None] = field(default_factory=dict)  # by service; None: perhaps all of it
    removed: set[str] = field(default_factory=set)  # services that forgot a backend: ids change
    view: KernelView | None = None
    path_mtus: Mapping[Address, int] | None = None
    wake: Callable[[], object] = lambda: None  # ends the rest until the next tick; called within the event loop

    def mark(self, name: BackendName) -> None:
        """Note that a backend has another state."""
        keys = self.backends.setdefault(name[0], set())
        if keys is not None:
            keys.add(name[1])

    def mark_service(self, service: str) -> None:
        """Note that perhaps all backends of a service have other shares."""
        self.backends[service] = None

    def take(self) -> Marks:
        """Return what is marked, and begin anew. What is returned is never marked again, and wakes nobody."""
        taken = Marks(self.backends, self.removed, self.view, self.path_mtus)
        self.backends, self.removed, self.view, self.path_mtus = {}, set(), None, None
        return taken

    @property
    def due(self) -> bool:
        """True if anything is marked, so that a plan is due."""
        return bool(self.backends or self.removed or self.view is not None or self.path_mtus is not None)


@dataclass
class DataPath:
    """What parts share of the data path. Each is set once, by the part that opens it, before others use it."""

    pipelines: list[Pipeline] = field(default_factory=list)  # one a worker
    classifier: Classifier | None = None

    @property
    def programs(self) -> Classifier:
        """The classifier, which is open."""
        assert self.classifier is not None, "the classifier was opened"
        return self.classifier

    def flows_of(self, backend: int) -> int:
        """Return how many flows a backend has that are not over, by its id."""
        return sum(pipeline.backend_stats(backend)["active_flows"] for pipeline in self.pipelines)
