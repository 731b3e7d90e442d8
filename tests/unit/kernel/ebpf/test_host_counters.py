"""host_counters.py: what the guard leaves to the host though it was sent to a VIP, by reason."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fastlb._core import reason_names
from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.host_counters import REASONS
from fastlb.model.match import Keys
from tests.ebpf_machine import BpfKernel
from tests.netns import test_classifier as table


def test_reasons_are_names_of_the_core() -> None:
    assert set(REASONS) <= set(reason_names())


@pytest.mark.parametrize(
    ("frame", "reason"), [row[1:] for row in table.LEFT_TO_HOST], ids=[row[0] for row in table.LEFT_TO_HOST]
)
def test_the_guard_alone_counts(bpf_kernel: BpfKernel, frame: bytes, reason: str | None) -> None:
    vips, replies = table.keys(table.VIPS) | table.SHAPED | table.LATER_SHAPED, table.keys(table.REPLIES)
    with Classifier() as classifier:
        classifier.replace(Keys(vips, replies), map(ip_address, table.LOCALS))
        assert set(classifier.host_counters()) == set(REASONS)
        bpf_kernel.run(classifier.filter_fd, frame)
        assert not any(classifier.host_counters().values())
        bpf_kernel.run(classifier.guard_fd, frame)
        bpf_kernel.run(classifier.guard_fd, frame)
        seen = {name: count for name, count in classifier.host_counters().items() if count}
        assert seen == ({reason: 2} if reason else {})
