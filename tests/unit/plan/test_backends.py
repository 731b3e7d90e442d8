"""The states of backends: health, the operator's word, slow start, and what of it reaches the tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from fastlb import Config
from fastlb.config import SlowStart
from fastlb.errors import FastlbError
from fastlb.plan import backends
from fastlb.plan.backends import SCALE, STEPS, BackendStates, Share, ramp
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, config, service

KEYS = [f"{address}:8080" for address in BACKENDS[4]]
CHECK = {"type": "tcp", "rise": 2, "fall": 3}
SLOW = {"window": 100, "floor": 0.1}


def settings(**changes: Any) -> Config:
    return config(service("nat", **{"name": "web", **changes}))


def following(conf: Config) -> BackendStates:
    standings = BackendStates()
    standings.apply_config(conf, 0.0)
    return standings


def weights(conf: Config, standings: BackendStates, now: float = 0.0) -> list[int]:
    return [share.weight for share in standings.shares(conf.services[0], now)]


def check(conf: Config, standings: BackendStates, results: str, number: int = 0, now: float = 0.0) -> list[str]:
    """The state after each result: + passed, - failed."""
    states = []
    for result in results:
        took, reason = (0.01, "") if result == "+" else (None, "no answer")
        standings.checked(conf.services[0], KEYS[number], took, reason, now)
        states.append(standings.of("web", KEYS[number]).state)
    return states


@pytest.mark.parametrize(("results", "states"), [
    ("+", "up"),
    ("-", "down"),  # the first one decides by itself
    ("+--", "up up up"),
    ("+---", "up up up down"),
    ("+--+--+---", "up up up up up up up up up down"),  # in a row
    ("-+", "down down"),
    ("-++", "down down up"),
    ("-+-++", "down down down down up"),
])  # fmt: skip
def test_rise_and_fall(results: str, states: str) -> None:
    conf = settings(check=CHECK)
    assert check(conf, following(conf), results)[: len(states.split())] == states.split()


def test_response_times_are_peaks_that_are_forgotten_and_a_reason_is_kept() -> None:
    conf = settings(check=CHECK)
    standings = following(conf)
    seen = []
    for took in (0.010, 0.110, 0.010, 0.010):
        standings.checked(conf.services[0], KEYS[0], took, "", 0.0)
        seen.append(standings.of("web", KEYS[0]).response)
    assert seen == pytest.approx([0.010, 0.110, 0.080, 0.059])
    standings.checked(conf.services[0], KEYS[0], None, "Connection refused", 0.0)
    assert standings.of("web", KEYS[0]).reason == "Connection refused"
    assert standings.of("web", KEYS[0]).response > 0


def test_unknown_ones_take_flows_until_one_is_up() -> None:
    conf = settings(check=CHECK)
    standings = following(conf)
    assert weights(conf, standings) == [1, 1, 1]
    check(conf, standings, "-", 0)
    assert weights(conf, standings) == [0, 1, 1]
    check(conf, standings, "+", 1)
    assert weights(conf, standings) == [0, 1, 0]
    check(conf, standings, "+", 2)
    assert weights(conf, standings) == [0, 1, 1]


def test_without_a_check_all_count_as_working() -> None:
    conf = settings()
    standings = following(conf)
    assert standings.checked(conf.services[0], KEYS[0], None, "late result of a former check", 0.0) is False
    assert weights(conf, standings) == [1, 1, 1]


def test_the_operator_s_word() -> None:
    conf = settings()
    standings = following(conf)
    standings.set_weight(("web", KEYS[1]), 7, 0.0)
    standings.drain(("web", KEYS[2]))
    assert weights(conf, standings) == [1, 7, 0]
    for key in KEYS:
        standings.enable(("web", key), 0.0)
    assert weights(conf, standings) == [1, 1, 1]


# Seconds since `fastlb drain` at second 100; its deadline, in seconds from then; the state, and what is left.
DRAINS = [
    (0, None, "draining", None),
    (10_000, None, "draining", None),
    (0, 60, "draining", 60),
    (59.9, 60, "draining", pytest.approx(0.1)),
    (60, 60, "drained", 0),
    (600, 60, "drained", 0),
    (0, 0, "drained", 0),
]


@pytest.mark.parametrize(("age", "deadline", "state", "left"), DRAINS)
def test_a_drain_and_its_deadline(age: float, deadline: float | None, state: str, left: float | None) -> None:
    conf = settings()
    standings = following(conf)
    standings.drain(("web", KEYS[1]), None if deadline is None else 100.0 + deadline)
    standing = standings.of("web", KEYS[1])
    assert (standing.shown(100.0 + age), standing.remaining(100.0 + age)) == (state, left)
    assert standing.flow_policy(conf.services[0], 100.0 + age) == ("none" if state == "drained" else "all")
    assert weights(conf, standings, 100.0 + age) == [1, 0, 1]
    standings.enable(("web", KEYS[1]), 100.0 + age)
    standing = standings.of("web", KEYS[1])
    assert (standing.shown(100.0 + age), standing.remaining(100.0 + age)) == ("unchecked", None)
    assert standing.flow_policy(conf.services[0], 100.0 + age) == "all"


def test_the_end_of_a_drain_is_seen_once() -> None:
    """By whoever looks again and again: since the last look, up to this one."""
    conf = settings()
    standings = following(conf)
    standings.drain(("web", KEYS[0]), 10.0)
    standings.drain(("web", KEYS[1]), 12.0)
    standings.drain(("web", KEYS[2]))
    looks = [8.0, 9.9, 10.0, 10.1, 11.9, 12.3, 99.0]
    seen = {now: ended for since, now in pairwise(looks) if (ended := standings.drains_ended(since, now))}
    assert seen == {10.0: [("web", KEYS[0])], 12.3: [("web", KEYS[1])]}
    standings.enable(("web", KEYS[0]), 11.0)
    assert not standings.drains_ended(9.9, 10.0)


def test_another_drain_has_another_deadline_or_none() -> None:
    standings = following(settings())
    for deadline in (10.0, 70.0, None):
        standings.drain(("web", KEYS[0]), deadline)
        assert standings.of("web", KEYS[0]).shown(11.0) == ("drained" if deadline == 10.0 else "draining")


# on_leave, on_down, protocol; leaves, down; the policy
POLICIES = [
    ("rehash", "auto", "tcp", False, False, "keep"),
    ("reset", "reset", "tcp", False, False, "keep"),
    ("rehash", "auto", "tcp", True, False, "rehash"),
    ("keep", "auto", "tcp", True, False, "keep"),
    ("reset", "auto", "tcp", True, False, "reset"),
    ("reset", "auto", "udp", True, False, "rehash"),
    ("keep", "auto", "udp", True, False, "keep"),
    ("rehash", "auto", "tcp", False, True, "keep"),
    ("rehash", "auto", "udp", False, True, "rehash"),
    ("rehash", "reset", "tcp", False, True, "reset"),
    ("rehash", "reset", "udp", False, True, "rehash"),
    ("rehash", "keep", "udp", False, True, "keep"),
    ("keep", "auto", "tcp", True, True, "keep"),
    ("keep", "auto", "udp", True, True, "rehash"),
    ("keep", "reset", "tcp", True, True, "reset"),
    ("rehash", "reset", "tcp", True, True, "rehash"),
    ("reset", "rehash", "tcp", True, True, "reset"),
]


@pytest.mark.parametrize(("on_leave", "on_down", "protocol", "leaves", "down", "policy"), POLICIES)
def test_policies(on_leave: str, on_down: str, protocol: str, leaves: bool, down: bool, policy: str) -> None:
    [web] = settings(on_leave=on_leave, on_down=on_down, protocol=protocol).services
    assert web.policy(leaves=leaves, down=down) == policy


def test_a_removed_backend_is_nobody_s_business() -> None:
    """Neither the operator's, nor the checks', nor that of those that share the weight."""
    conf, fewer = settings(check=CHECK, on_leave="keep"), settings(
        check=CHECK, on_leave="keep", backends=[{"address": address, "port": 8080} for address in BACKENDS[4][1:]])
    standings = following(conf)
    standings.drain(("web", KEYS[0]), 50.0)
    standings.apply_config(fewer, 10.0)
    with pytest.raises(FastlbError, match=r'no backend "10\.3\.0\.11"; it has: 10\.3\.0\.12:8080, 10\.3\.0\.13:8080'):
        standings.find("web", "10.3.0.11")
    assert standings.checked(fewer.services[0], KEYS[0], 0.01, "", 11.0) is False
    assert weights(fewer, standings, 60.0) == [1, 1]
    assert not standings.drains_ended(10.0, 60.0)
    standings.apply_config(conf, 70.0)
    assert standings.of("web", KEYS[0]).shown(70.0) == "unknown"


def test_a_copy_of_standings_goes_its_own_way() -> None:
    conf = settings(on_leave="keep")
    standings = following(conf)
    copy = standings.copy()
    copy.drain(("web", KEYS[0]))
    copy.apply_config(settings(on_leave="keep", backends=[]), 1.0)
    assert weights(conf, standings) == [1, 1, 1]
    assert [standings.of("web", key).shown(1.0) for key in KEYS] == ["unchecked"] * 3
    assert [copy.of("web", key).shown(1.0) for key in KEYS] == ["removed"] * 3
    again = copy.copy()
    again.drop_removed(lambda name: 0, 99.0)
    assert (list(again.removed), list(copy.removed)) == ([], ["web"])


def test_no_more_removed_ones_than_a_table_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_BACKENDS", 4)
    listed = [{"address": f"10.3.1.{number}", "port": 8080} for number in range(1, 9)]
    standings = following(settings(on_leave="keep", backends=listed[:4]))
    standings.apply_config(settings(on_leave="keep", backends=listed[4:7]), 1.0)
    assert list(standings.removed["web"]) == ["10.3.1.1:8080"]
    standings.apply_config(settings(on_leave="keep", backends=listed[6:]), 2.0)
    assert list(standings.removed["web"]) == ["10.3.1.1:8080", "10.3.1.5:8080"]  # the oldest stay


def test_health_and_drain_are_apart() -> None:
    conf = settings(check=CHECK)
    standings = following(conf)
    for number in range(3):
        check(conf, standings, "+", number)
    standings.drain(("web", KEYS[0]))
    check(conf, standings, "---++", 0)
    assert weights(conf, standings) == [0, 1, 1]
    standings.enable(("web", KEYS[0]), 0.0)
    assert weights(conf, standings) == [1, 1, 1]


def test_a_reload_keeps_what_is_known() -> None:
    conf = settings(check=CHECK)
    standings = following(conf)
    check(conf, standings, "-", 0)
    standings.drain(("web", KEYS[1]))
    standings.apply_config(settings(check=CHECK | {"interval": "5s"}), 10.0)
    assert weights(conf, standings) == [0, 0, 1]
    standings.apply_config(settings(), 20.0)  # the check goes, and with it what it said
    assert weights(settings(), standings) == [1, 0, 1]
    standings.apply_config(settings(backends=[{"address": BACKENDS[4][2], "port": 8080}]), 30.0)
    assert set(standings.by_backend) == {("web", KEYS[2])}


@pytest.mark.parametrize(("asked", "found"), [
    ("10.3.0.11", "10.3.0.11:8080"), ("10.3.0.12:8080", "10.3.0.12:8080"),
    ("10.3.0.14", None), ("10.3.0.1", None), ("", None),
])  # fmt: skip
def test_a_backend_by_name(asked: str, found: str | None) -> None:
    standings = following(settings())
    if found is not None:
        assert standings.find("web", asked) == ("web", found)
        return
    with pytest.raises(FastlbError, match=r"no backend .* it has: 10\.3\.0\.11:8080, 10"):
        standings.find("web", asked)


def test_a_backend_by_an_ambiguous_name() -> None:
    standings = following(settings(backends=[{"address": "10.3.0.11", "port": port} for port in (1, 2)]))
    with pytest.raises(FastlbError, match="more than one backend"):
        standings.find("web", "10.3.0.11")
    with pytest.raises(FastlbError, match='no service "nat"'):
        standings.find("nat", "10.3.0.11")


def test_a_backend_by_its_ipv6_address() -> None:
    standings = following(config(service("nat", 6, name="web")))
    for asked in ("fd00:3::11", "[fd00:3::11]", "[fd00:3::11]:8080"):
        assert standings.find("web", asked) == ("web", "[fd00:3::11]:8080")


# ---- slow start


@pytest.mark.parametrize(("age", "aggression", "part"), [
    (0, 1, 0.1), (9, 1, 0.1), (25, 1, 0.25), (50, 1, 0.5), (95, 1, 0.95), (100, 1, 1), (-5, 1, 0.1),
    (25, 2, 0.5), (25, 0.5, 0.1), (50, 0.5, 0.25),
])  # fmt: skip
def test_the_ramp(age: float, aggression: float, part: float) -> None:
    assert ramp(SlowStart(window=100, aggression=aggression, floor=0.1), age) == pytest.approx(part)


def test_the_ramp_has_few_steps() -> None:
    slow = SlowStart(window=30, floor=0.01)
    assert len({ramp(slow, ms / 1000) for ms in range(31_000)}) <= STEPS + 1


def recovered(**changes: Any) -> tuple[Config, BackendStates]:
    """The first of three backends has come up again at second 0."""
    conf = settings(check=CHECK, slow_start=SLOW, **changes)
    standings = following(conf)
    for number in range(3):
        check(conf, standings, "+", number)
    check(conf, standings, "---++", 0)
    return conf, standings


def test_one_that_recovers_ramps_up() -> None:
    conf, standings = recovered()
    curve = {now: weights(conf, standings, now) for now in (0.0, 25.0, 50.0, 95.0, 100.0)}
    assert curve == {
        0.0: [SCALE // 10, SCALE, SCALE], 25.0: [25, SCALE, SCALE], 50.0: [50, SCALE, SCALE],
        95.0: [95, SCALE, SCALE], 100.0: [1, 1, 1],
    }  # fmt: skip
    assert standings.rising(50.0)
    assert standings.rising(100.0)  # the last step
    assert not standings.rising(100.1)


def test_a_new_one_ramps_up_from_its_first_check_on() -> None:
    fewer = settings(check=CHECK, slow_start=SLOW, backends=[{"address": BACKENDS[4][1], "port": 8080}])
    standings = following(fewer)
    standings.checked(fewer.services[0], KEYS[1], 0.01, "", 0.0)
    conf = settings(check=CHECK, slow_start=SLOW)
    standings.apply_config(conf, 10.0)
    check(conf, standings, "+", 0, now=70.0)
    assert weights(conf, standings, 70.0) == [SCALE // 10, SCALE, 0]
    check(conf, standings, "+", 0, now=80.0)  # the first one alone counts
    assert weights(conf, standings, 120.0) == [SCALE // 2, SCALE, 0]


def test_a_new_one_ramps_up_however_late_its_first_check_is() -> None:
    """Its window of time begins with the check, so none is over before it."""
    states = following(settings(check=CHECK, slow_start=SLOW, backends=[{"address": BACKENDS[4][1], "port": 8080}]))
    conf = settings(check=CHECK, slow_start=SLOW)
    states.apply_config(conf, 10.0)
    check(conf, states, "+", 1, now=10.0)
    assert states.due(10.0, 500.0) == set()
    check(conf, states, "+", 0, now=500.0)
    assert weights(conf, states, 550.0) == [SCALE // 2, SCALE, 0]
    assert states.due(500.0, 550.0) == {"web"}


def test_one_that_had_no_weight_ramps_up() -> None:
    """Whoever gave it none, and whoever gives it one."""
    some = settings(slow_start=SLOW)
    none = settings(slow_start=SLOW, backends=[
        {"address": address, "port": 8080, "weight": int(address != BACKENDS[4][0])} for address in BACKENDS[4]
    ])  # fmt: skip
    ramped = [SCALE // 10, SCALE, SCALE]
    name = ("web", KEYS[0])
    standings = following(none)
    standings.set_weight(name, 1, 100.0)
    assert weights(none, standings, 100.0) == ramped
    standings = following(none)
    standings.apply_config(some, 100.0)
    assert weights(some, standings, 100.0) == ramped
    standings = following(none)
    standings.set_weight(name, 1, 0.0)
    standings.apply_config(some, 500.0)  # the operator's weight held all the time
    assert weights(some, standings, 500.0) == [1, 1, 1]
    standings = following(some)
    standings.set_weight(name, 0, 99.0)
    standings.enable(name, 100.0)
    assert weights(some, standings, 100.0) == ramped


def test_all_new_at_once_do_not_ramp() -> None:
    conf = settings(check=CHECK, slow_start=SLOW)
    standings = following(conf)
    assert weights(conf, standings) == [1, 1, 1]
    for number in range(3):
        check(conf, standings, "+", number)
    assert weights(conf, standings) == [1, 1, 1]


def test_with_nobody_else_there_is_no_ramp() -> None:
    conf, standings = recovered()
    for number in (1, 2):
        check(conf, standings, "---", number)
    assert weights(conf, standings) == [1, 0, 0]


def test_where_none_is_through_the_first_of_them_counts_as_full() -> None:
    """All were down; one is up again at second 0, and another one at second 40."""
    conf, standings = recovered()
    for number in (0, 1, 2):
        check(conf, standings, "---", number, now=1.0)
    check(conf, standings, "++", 0, now=0.0)
    check(conf, standings, "++", 1, now=40.0)
    assert weights(conf, standings, 40.0) == [SCALE, 25, 0]
    assert weights(conf, standings, 80.0) == [SCALE, 50, 0]
    assert weights(conf, standings, 120.0) == [SCALE, 80, 0]
    assert weights(conf, standings, 140.0) == [1, 1, 0]


def test_a_new_backend_ramps_up_and_an_enabled_one() -> None:
    conf = settings(slow_start=SLOW, backends=[{"address": BACKENDS[4][1], "port": 8080}])
    standings = following(conf)
    more = settings(slow_start=SLOW)
    standings.apply_config(more, 10.0)
    assert weights(more, standings, 10.0) == [10, SCALE, 10]
    assert weights(more, standings, 200.0) == [1, 1, 1]
    standings.drain(("web", KEYS[1]))
    standings.enable(("web", KEYS[1]), 300.0)
    assert weights(more, standings, 310.0) == [SCALE, 10, SCALE]


@pytest.mark.parametrize("scheduler", ["rr", "wrr", "random", "lc", "wlc", "lrt", "p2c", "maglev", "ketama"])
def test_every_scheduler_s_tables_follow(scheduler: str) -> None:
    conf, standings = recovered(scheduler=scheduler)
    [planned] = plan_services(conf, BackendIds(), 0.0, standings)
    assert [member.weight for member in planned.members] == [10, SCALE, SCALE]
    assert [member.unweighted for member in planned.members] == [10, SCALE, SCALE]
    services_table(conf, [planned])


@pytest.mark.parametrize(("checks", "draining", "weight", "share"), [
    # of the first of three, and how its other two stand
    ("   ", False, 1, Share(1, 1, True)),  # nothing is known of any
    ("   ", False, 0, Share(0, 0, True)),
    ("   ", True, 1, Share(0, 0, False)),
    ("+  ", False, 1, Share(1, 1, True)),
    ("+  ", False, 0, Share(0, 0, True)),
    ("+  ", True, 1, Share(0, 0, False)),
    (" + ", False, 1, Share(0, 0, False)),  # another one is known to be up
    ("-  ", False, 1, Share(0, 0, False)),
    ("---", False, 1, Share(0, 0, False)),
])  # fmt: skip
def test_who_keeps_its_clients(checks: str, draining: bool, weight: int, share: Share) -> None:
    conf = settings(check=CHECK)
    standings = following(conf)
    for number, result in enumerate(checks):
        check(conf, standings, result.strip(), number)
    if draining:
        standings.drain(("web", KEYS[0]))
    if weight != 1:
        standings.set_weight(("web", KEYS[0]), weight, 0.0)
    assert standings.shares(conf.services[0], 0.0)[0] == share


def test_without_a_check_all_keep_their_clients() -> None:
    conf = settings(backends=[{"address": address, "weight": 0} for address in BACKENDS[4]])
    assert following(conf).shares(conf.services[0], 0.0) == [Share(0, 0, True)] * 3
