"""parts.py: which parts there are, in which order, and what they share."""

from __future__ import annotations

from fastlb.daemon.answers import Answers
from fastlb.daemon.backends import Backends
from fastlb.daemon.flows import Flows
from fastlb.daemon.host import Host
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.packet_path import PacketPath
from fastlb.daemon.parts import Parts
from fastlb.daemon.path_mtus import PathMtuErrors
from fastlb.daemon.publisher import Publisher
from fastlb.daemon.service_manager import ServiceManager
from fastlb.daemon.vips import Vips
from fastlb.daemon.world import DataPath, Marks
from fastlb.kernel import cpus

ORDER = [Host, Flows, Publisher, PathMtuErrors, PacketPath, Vips, ServiceManager, Backends, Answers]


def made(marks: Marks | None = None) -> Parts:
    cores = cpus.plan([0, 1], 1)
    return Parts.make(Lifecycle(), marks or Marks(), cores, lambda function: function(), lambda: None)


def test_the_order() -> None:
    """Flows before those who publish to them, VIPs when packets to them are taken, checks within the event loop."""
    parts = made()
    assert [type(part) for part in parts.in_order()] == ORDER
    assert parts.in_order()[:-2] == parts.before_the_loop()
    assert parts.in_order()[-2:] == [parts.backends, parts.answers]


def test_every_part_is_in_the_order() -> None:
    parts = made()
    named = [value for value in vars(parts).values() if not isinstance(value, DataPath)]
    assert len(named) == len(ORDER)
    assert all(any(each is part for part in parts.in_order()) for each in named)


def test_one_data_path_for_all() -> None:
    parts = made()
    sharing = [parts.host, parts.flows, parts.publisher, parts.packet_path, parts.backends, parts.answers]
    for part in sharing:
        assert [value for value in vars(part).values() if isinstance(value, DataPath)] == [parts.data_path]


def test_nothing_is_open_yet() -> None:
    parts = made()
    assert parts.data_path == DataPath()
    assert parts.path_mtus.listeners == {}
    assert parts.flows.describe() == {"flow_file": None, "lost_lines": {"flow_log_lost": 0}}
    assert parts.vips.describe() == {"vips": []}
