"""A worker of its own in this process, without `fastlb run` around it: what it holds while it runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from fastlb._core import Pipeline, Ring, RingMemory, Routes, Services, Worker
from fastlb.kernel.ebpf.classifier import Classifier
from tests.netns.balancer import until
from tests.netns.namespaces import Namespace, veth

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

TIMEOUTS = dict.fromkeys(("tcp_syn", "tcp_established", "tcp_half_closed", "tcp_closing", "udp"), 1)


def publish(pipeline: Pipeline) -> None:
    pipeline.publish(Services([], hash_seed=0, timeouts=TIMEOUTS), Routes([], [], {}, {}))


@pytest.fixture
def idle() -> Iterator[Pipeline]:
    """The pipeline of a worker that has nothing to do."""
    pipeline, memory = Pipeline(64), RingMemory(1, 128 << 10, 2)
    publish(pipeline)
    with Namespace("worker") as here, Namespace("peer") as there, Classifier() as ours:
        veth(here, "eth0", there, "eth0")
        ring = here.run(lambda: Ring("eth0", ours.filter_fd, memory, 1))
        worker = here.run(lambda: Worker(pipeline, [ring]))
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert until(lambda: pipeline.running)
        yield pipeline
        worker.stop()
        thread.join()
        worker.close()
        ring.close()
        memory.close()


def test_a_snapshot_stays_until_the_worker_has_passed_it(idle: Pipeline) -> None:
    """An idle worker sleeps up to 100 ms, and all that time holds what it picked up before."""
    kept = []
    for _ in range(5):
        assert until(lambda: idle.reclaim() == 1)
        publish(idle)
        kept.append(idle.reclaim())
    assert max(kept) == 2, "never was the old snapshot kept for the worker"


def test_a_running_pipeline_is_the_workers(idle: Pipeline) -> None:
    with pytest.raises(RuntimeError, match="a worker runs this pipeline"):
        idle.process([b""], 0)
