"""fragment.pxd: a worker may die while it has a note, and another takes its place."""

from __future__ import annotations

from types import ModuleType

from tests.balancers import config, service
from tests.ext.case import OneLink
from tests.unit.dataplane.test_fragments import cut, datagram


def test_what_a_dead_worker_had_claimed_is_everybodys_again(held: ModuleType) -> None:
    pipeline = OneLink(config(service("dsr", protocol="udp"))).pipeline

    def reasons(number: int, now: int) -> list[str]:
        return [each[1] for each in pipeline.process(cut(datagram(4), [1400, 1400], number), now)]

    assert reasons(1, 0) == ["scheduled", "fragment", "fragment"]
    held.claim_notes(pipeline)
    assert reasons(2, 1) == ["conntrack", "held", "held"]
    pipeline.release_fragments()
    assert reasons(3, 600) == ["conntrack", "fragment", "fragment"]
    assert pipeline.counters()["fragment_unknown"] == 2
