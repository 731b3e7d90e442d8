"""names.py: numbers that the core has too are the same there."""

from __future__ import annotations

from fastlb import _core
from fastlb.model import names


def test_numbers_of_tunnel_offload_are_those_of_the_core() -> None:
    assert (names.OFFLOAD_TYPE, names.OFFLOAD_LINKS) == (_core.OFFLOAD_TYPE, _core.OFFLOAD_LINKS)


def test_each_worker_owns_a_shard_and_each_shard_has_one_owner() -> None:
    for workers in (1, 2, 3, 63, names.MAX_WORKERS):
        owners = [names.owner_of_shard(shard, workers) for shard in range(names.SHARDS)]
        assert owners == sorted(owners)
        assert set(owners) == set(range(workers))
