"""reasons.h and reasons.pxd: one row a reason, which everything that speaks of reasons reads."""

from __future__ import annotations

import pytest

from fastlb._core import Decapsulator, decap_reason_rows, reason_names, reason_rows, verdict_number

FORWARD, PASS, DROP = range(3)
TABLES = {"pipeline": reason_rows, "decap": decap_reason_rows}


@pytest.mark.parametrize("table", TABLES)
def test_every_reason_has_a_name_of_its_own_and_help(table: str) -> None:
    rows = TABLES[table]()
    assert len({name for name, _, _ in rows}) == len(rows)
    for name, verdict, explained in rows:
        assert name.islower()
        assert verdict in (FORWARD, PASS, DROP)
        assert len(explained) > 10
        assert not explained.endswith(".")


@pytest.mark.parametrize("table", TABLES)
def test_verdicts_follow_one_another(table: str) -> None:
    """The data path tells them apart by comparing numbers."""
    verdicts = [verdict for _, verdict, _ in TABLES[table]()]
    assert verdicts == sorted(verdicts)


def test_names_and_verdicts_are_those_of_the_rows() -> None:
    assert reason_names() == [name for name, _, _ in reason_rows()]
    assert [verdict_number(name) for name in reason_names()] == [verdict for _, verdict, _ in reason_rows()]
    assert verdict_number("conntrack") == FORWARD
    assert verdict_number("no_service") == PASS
    assert verdict_number("ip_length") == DROP
    with pytest.raises(ValueError, match="not in list"):
        verdict_number("no_such_reason")


def test_decapsulation_counts_every_reason_of_its_own() -> None:
    forwarded, *dropped = decap_reason_rows()
    assert forwarded[:2] == ("decapsulated", FORWARD)
    assert list(Decapsulator(-1).counters()["drops"]) == [name for name, verdict, _ in dropped if verdict == DROP]
