"""The part that brings a world to the data path: what the classifier takes, services and routes of the pipelines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from fastlb.daemon.world import DataPath, World
from fastlb.kernel.ebpf.classifier import Classifier, Sources
from fastlb.model.match import Keys


class Publisher:
    """Keeps the classifier and the published snapshots in step.

    The filter keeps an old VIP's packets out before the data path forgets it, and lets in those of a new one after the
    data path has learnt it.
    """

    def __init__(
        self, data_path: DataPath, workers: int, classifier: Callable[[int, Sources | None], Classifier] = Classifier
    ) -> None:
        self._data_path, self._workers, self._make = data_path, workers, classifier
        self._applied: World | None = None
        self._keys = Keys()

    def open(self, stack: ExitStack, world: World) -> World:
        """Load the classifier for the first world, and publish it; raises KernelError."""
        config = world.configuration.config
        sources = Sources(frozenset(config.snat), *config.snat_ports) if config.snat else None
        self._data_path.classifier = stack.enter_context(self._make(self._workers, sources))
        self._keys = world.configuration.keys
        self._data_path.programs.replace(self._keys, world.view.addresses)
        self._publish(world)
        return world

    def tick(self, now: float) -> None:
        """Free the snapshots that no worker uses any more."""
        for pipeline in self._data_path.pipelines:
            pipeline.reclaim()

    def apply(self, world: World) -> None:
        """Bring to the data path what is new in this world; raises KernelError."""
        before = self._applied
        assert before is not None, "it was opened"
        if world.configuration.ids is not before.configuration.ids:
            self._install(world)
            return
        if world.view is not before.view:
            self._data_path.programs.set_locals(world.view.addresses)
        if world.configuration.services is not before.configuration.services or world.ways is not before.ways:
            self._publish(world)
        self._applied = world

    def _install(self, world: World) -> None:
        """Go over to other services or backends, step by step, so that no packet meets a half of each."""
        ids, keys, addresses = world.configuration.ids, world.configuration.keys, world.view.addresses
        for pipeline in self._data_path.pipelines:
            pipeline.renew(ids.reused, ids.services.reused)
        ids.reused.clear()  # once: going back to this configuration must not forget what is in use
        ids.services.reused.clear()
        both = self._keys & keys
        self._data_path.programs.replace(both, addresses)
        self._keys = both
        self._publish(world)
        self._data_path.programs.replace(keys, addresses)
        self._keys = keys

    def _publish(self, world: World) -> None:
        self._applied = world
        for pipeline in self._data_path.pipelines:
            pipeline.publish(world.configuration.services, world.ways.routes)
