"""asks.py: which next hops are asked for, and how many at once."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from fastlb.kernel.asks import ASK_BATCH, ASK_TICK, Asks
from fastlb.model.hostview import NextHop


class Known:
    """Stands for the mirrored tables: these next hops are in doubt."""

    def __init__(self, doubtful: Callable[[NextHop], bool] = lambda hop: True) -> None:
        self.should_ask = doubtful


def hops(count: int, link: int = 2) -> list[NextHop]:
    return [(link, ip_address("10.0.0.0") + number) for number in range(count)]


def test_only_what_is_in_doubt_is_asked_for() -> None:
    asks = Asks()
    asks.want(hops(4))
    known = Known(lambda hop: int(hop[1]) % 2 == 0)
    assert asks.fill(known)
    assert set(asks.take(known, 0.0)) == set(hops(4)[::2])
    assert not asks


def test_a_batch_at_a_time_and_everybody_in_turn() -> None:
    """Filling the queue up again does not put those that were asked for in front of the others."""
    asks, known = Asks(), Known()
    asks.want(hops(3 * ASK_BATCH))
    asked = []
    for turn in range(3):
        assert asks.fill(known)
        asked += asks.take(known, float(turn))
        assert asks.allowed_at == turn + ASK_TICK
    assert len(asked) == len(set(asked)) == 3 * ASK_BATCH


def test_what_is_not_wanted_any_more_is_not_asked_for() -> None:
    asks, known = Asks(), Known()
    asks.want(hops(3))
    asks.fill(known)
    asks.want(hops(1))
    assert asks.take(known, 0.0) == hops(1)


def test_what_was_found_meanwhile_is_not_asked_for() -> None:
    asks = Asks()
    asks.want(hops(2))
    asks.fill(Known())
    assert asks.take(Known(lambda hop: False), 0.0) == []


def test_nothing_is_wanted_at_first() -> None:
    asks = Asks()
    assert not asks.fill(Known())
    assert asks.take(Known(), 0.0) == []
