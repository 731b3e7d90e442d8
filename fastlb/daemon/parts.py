"""The parts of a balancer, in the order in which they are opened; they are taken down in reverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastlb.daemon.answers import Answers
from fastlb.daemon.backends import Backends
from fastlb.daemon.flows import Flows
from fastlb.daemon.host import Host
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.packet_path import PacketPath
from fastlb.daemon.part import Part
from fastlb.daemon.path_mtus import PathMtuErrors
from fastlb.daemon.publisher import Publisher
from fastlb.daemon.service_manager import ServiceManager
from fastlb.daemon.vips import Vips
from fastlb.daemon.world import DataPath, Marks
from fastlb.kernel import cpus


@dataclass(frozen=True)
class Parts:
    """Every part by name, and what they share of the data path."""

    data_path: DataPath
    host: Host
    flows: Flows
    publisher: Publisher
    path_mtus: PathMtuErrors
    packet_path: PacketPath
    vips: Vips
    manager: ServiceManager
    backends: Backends
    answers: Answers

    @classmethod
    def make(
        cls,
        lifecycle: Lifecycle,
        marks: Marks,
        cores: cpus.Plan,
        hand_over: Callable[[Callable[[], None]], None],
        abandon: Callable[[], None],
    ) -> Parts:
        """Make all parts; nothing is open yet. ``hand_over`` and ``abandon``: see `Host` and `PacketPath`."""
        data_path, workers = DataPath(), len(cores.workers)
        return cls(
            data_path=data_path,
            host=Host(data_path, marks, hand_over),
            flows=Flows(data_path, lifecycle, workers),
            publisher=Publisher(data_path, workers),
            path_mtus=PathMtuErrors(marks),
            packet_path=PacketPath(data_path, lifecycle, cores, abandon),
            vips=Vips(lifecycle),
            manager=ServiceManager(),
            backends=Backends(data_path, marks),
            answers=Answers(data_path),
        )

    def before_the_loop(self) -> list[Part]:
        """Return those that are opened before the event loop runs, in order."""
        return [self.host, self.flows, self.publisher, self.path_mtus, self.packet_path, self.vips, self.manager]

    def in_order(self) -> list[Part]:
        """Return all of them, in order."""
        return [*self.before_the_loop(), self.backends, self.answers]
