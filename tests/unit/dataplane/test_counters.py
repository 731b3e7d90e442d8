"""counters.pxi: one row a counter, with the keys of what counts them."""

from __future__ import annotations

from fastlb._core import Decapsulator, Pipeline, counter_descriptions, reason_names


def names(group: str) -> list[str]:
    return [name for name, _, _, _ in counter_descriptions()[group]]


def test_every_counter_is_described() -> None:
    pipeline = Pipeline(64)
    assert sorted(names("pipeline")) == sorted(set(pipeline.counters()) - set(reason_names()))
    assert names("events") == list(pipeline.service_events(1))
    assert names("backend") == list(pipeline.backend_stats(1))
    assert sorted(names("decap")) == sorted(set(Decapsulator(-1).counters()) - {"drops"})


def test_a_description_is_whole() -> None:
    for rows in counter_descriptions().values():
        assert len({name for name, _, _, _ in rows}) == len(rows)
        for name, kind, unit, explained in rows:
            assert name.islower()
            assert kind in ("counter", "gauge")
            assert unit in ("packets", "bytes", "flows", "lines", "blocks", "sleeps", "times", "writes")
            assert len(explained) > 10
            assert not explained.endswith(".")
