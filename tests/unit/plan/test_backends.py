"""The states of backends: health, the operator's word, slow start, and what of it reaches the tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from ipaddress import ip_address
from itertools import pairwise
from typing import Any

import pytest

from fastlb import Config
from fastlb.config import SlowStart
from fastlb.errors import FastlbError
from fastlb.plan import backends
from fastlb.plan.backends import SCALE, STEPS, BackendState, BackendStates, Share, ramp
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
    states = BackendStates()
    states.apply_config(conf, 0.0)
    return states


def listed(*numbers: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"address": BACKENDS[4][number], "port": 8080} | changes for number in numbers]


def weights(conf: Config, states: BackendStates, now: float = 0.0) -> list[int]:
    return [share.weight for share in states.shares(conf.services[0], now)]


def check(conf: Config, states: BackendStates, results: str, number: int = 0, now: float = 0.0) -> list[str]:
    """The state after each result: + passed, - failed."""
    seen = []
    for result in results:
        took, reason = (0.01, "") if result == "+" else (None, "no answer")
        states.checked(conf.services[0], KEYS[number], took, reason, now)
        seen.append(states.of("web", KEYS[number]).state)
    return seen


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
    states = following(conf)
    seen = []
    for took in (0.010, 0.110, 0.010, 0.010):
        states.checked(conf.services[0], KEYS[0], took, "", 0.0)
        seen.append(states.of("web", KEYS[0]).response)
    assert seen == pytest.approx([0.010, 0.110, 0.080, 0.059])
    states.checked(conf.services[0], KEYS[0], None, "Connection refused", 0.0)
    assert states.of("web", KEYS[0]).reason == "Connection refused"
    assert states.of("web", KEYS[0]).response > 0


def test_unknown_ones_take_flows_until_one_is_up() -> None:
    conf = settings(check=CHECK)
    states = following(conf)
    assert weights(conf, states) == [1, 1, 1]
    check(conf, states, "-", 0)
    assert weights(conf, states) == [0, 1, 1]
    check(conf, states, "+", 1)
    assert weights(conf, states) == [0, 1, 0]
    check(conf, states, "+", 2)
    assert weights(conf, states) == [0, 1, 1]


def test_without_a_check_all_count_as_working() -> None:
    conf = settings()
    states = following(conf)
    assert states.checked(conf.services[0], KEYS[0], None, "late result of a former check", 0.0) is False
    assert weights(conf, states) == [1, 1, 1]


def test_the_operator_s_word() -> None:
    conf = settings()
    states = following(conf)
    states.set_weight(("web", KEYS[1]), 7, 0.0)
    states.drain(("web", KEYS[2]))
    assert weights(conf, states) == [1, 7, 0]
    for key in KEYS:
        states.enable(("web", key), 0.0)
    assert weights(conf, states) == [1, 1, 1]


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
    states = following(conf)
    states.drain(("web", KEYS[1]), None if deadline is None else 100.0 + deadline)
    found = states.of("web", KEYS[1])
    assert (found.shown(100.0 + age), found.remaining(100.0 + age)) == (state, left)
    assert found.flow_policy(conf.services[0], 100.0 + age) == ("none" if state == "drained" else "all")
    assert weights(conf, states, 100.0 + age) == [1, 0, 1]
    states.enable(("web", KEYS[1]), 100.0 + age)
    found = states.of("web", KEYS[1])
    assert (found.shown(100.0 + age), found.remaining(100.0 + age)) == ("unchecked", None)
    assert found.flow_policy(conf.services[0], 100.0 + age) == "all"


def test_the_end_of_a_drain_is_seen_once() -> None:
    """By whoever looks again and again: since the last look, up to this one."""
    conf = settings()
    states = following(conf)
    states.drain(("web", KEYS[0]), 10.0)
    states.drain(("web", KEYS[1]), 12.0)
    states.drain(("web", KEYS[2]))
    looks = [8.0, 9.9, 10.0, 10.1, 11.9, 12.3, 99.0]
    seen = {now: ended for since, now in pairwise(looks) if (ended := states.drains_ended(since, now))}
    assert seen == {10.0: [("web", KEYS[0])], 12.3: [("web", KEYS[1])]}
    states.enable(("web", KEYS[0]), 11.0)
    assert not states.drains_ended(9.9, 10.0)


def test_another_drain_has_another_deadline_or_none() -> None:
    states = following(settings())
    for deadline in (10.0, 70.0, None):
        states.drain(("web", KEYS[0]), deadline)
        assert states.of("web", KEYS[0]).shown(11.0) == ("drained" if deadline == 10.0 else "draining")


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
    states = following(conf)
    states.drain(("web", KEYS[0]), 50.0)
    states.apply_config(fewer, 10.0)
    with pytest.raises(FastlbError, match=r'no backend "10\.3\.0\.11"; it has: 10\.3\.0\.12:8080, 10\.3\.0\.13:8080'):
        states.find("web", "10.3.0.11")
    assert states.checked(fewer.services[0], KEYS[0], 0.01, "", 11.0) is False
    assert weights(fewer, states, 60.0) == [1, 1]
    assert not states.drains_ended(10.0, 60.0)
    states.apply_config(conf, 70.0)
    assert states.of("web", KEYS[0]).shown(70.0) == "unknown"


def test_a_copy_of_states_goes_its_own_way() -> None:
    conf = settings(on_leave="keep")
    states = following(conf)
    copy = states.copy()
    copy.drain(("web", KEYS[0]))
    copy.apply_config(settings(on_leave="keep", backends=[]), 1.0)
    assert weights(conf, states) == [1, 1, 1]
    assert [states.of("web", key).shown(1.0) for key in KEYS] == ["unchecked"] * 3
    assert [copy.of("web", key).shown(1.0) for key in KEYS] == ["removed"] * 3
    again = copy.copy()
    again.drop_removed(lambda name: 0, 99.0)
    assert (list(again.removed), list(copy.removed)) == ([], ["web"])


# What is done with a copy, at second 20; web's backends are up, but for the last one, which is in slow start.
DONE: dict[str, Callable[[BackendStates], object]] = {
    "a check": lambda states: states.checked(states.services["web"], KEYS[0], None, "refused", 20.0),
    "a drain": lambda states: states.drain(("web", KEYS[0]), 30.0),
    "another weight": lambda states: states.set_weight(("web", KEYS[0]), 7, 20.0),
    "enabled": lambda states: states.enable(("web", KEYS[1]), 20.0),
    "the end of a slow start": lambda states: states.rising(500.0),
    "a removed one is forgotten": lambda states: states.drop_removed(lambda name: 0, 500.0),
    "a removed one has flows": lambda states: states.drop_removed(lambda name: 1, 500.0),
    "a reload": lambda states: states.apply_config(settings(), 20.0),
    "a reload without services": lambda states: states.apply_config(config(), 20.0),
}


@pytest.mark.parametrize("done", DONE)
def test_what_is_done_with_a_copy_is_done_with_it_alone(done: str) -> None:
    several = {"check": CHECK, "slow_start": SLOW, "on_leave": "keep"}
    states = following(settings(**several, backends=[*listed(0, 1, 2), {"address": "10.3.0.99", "port": 8080}]))
    conf = settings(**several)
    states.apply_config(conf, 0.0)
    for number in range(3):
        check(conf, states, "+", number)
    check(conf, states, "---++", 2, now=10.0)
    states.drain(("web", KEYS[1]), 15.0)
    copy, untouched = states.copy(), states.copy()
    assert copy == states
    DONE[done](copy)
    assert copy != states
    assert states == untouched
    assert (states.slow, list(states.removed), states.timed) == ({"web": {KEYS[2]}}, ["web"], {("web", KEYS[1])})


def test_no_more_removed_ones_than_a_table_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_BACKENDS", 4)
    listed = [{"address": f"10.3.1.{number}", "port": 8080} for number in range(1, 9)]
    states = following(settings(on_leave="keep", backends=listed[:4]))
    states.apply_config(settings(on_leave="keep", backends=listed[4:7]), 1.0)
    assert list(states.removed["web"]) == ["10.3.1.1:8080"]
    states.apply_config(settings(on_leave="keep", backends=listed[6:]), 2.0)
    assert list(states.removed["web"]) == ["10.3.1.1:8080", "10.3.1.5:8080"]  # the oldest stay


def test_health_and_drain_are_apart() -> None:
    conf = settings(check=CHECK)
    states = following(conf)
    for number in range(3):
        check(conf, states, "+", number)
    states.drain(("web", KEYS[0]))
    check(conf, states, "---++", 0)
    assert weights(conf, states) == [0, 1, 1]
    states.enable(("web", KEYS[0]), 0.0)
    assert weights(conf, states) == [1, 1, 1]


def test_a_reload_keeps_what_is_known() -> None:
    conf = settings(check=CHECK)
    states = following(conf)
    check(conf, states, "-", 0)
    states.drain(("web", KEYS[1]))
    states.apply_config(settings(check=CHECK | {"interval": "5s"}), 10.0)
    assert weights(conf, states) == [0, 0, 1]
    states.apply_config(settings(), 20.0)  # the check goes, and with it what it said
    assert weights(settings(), states) == [1, 0, 1]
    states.apply_config(settings(backends=[{"address": BACKENDS[4][2], "port": 8080}]), 30.0)
    assert set(states.by_backend) == {("web", KEYS[2])}


@pytest.mark.parametrize(("asked", "found"), [
    ("10.3.0.11", "10.3.0.11:8080"), ("10.3.0.12:8080", "10.3.0.12:8080"),
    ("10.3.0.14", None), ("10.3.0.1", None), ("", None),
])  # fmt: skip
def test_a_backend_by_name(asked: str, found: str | None) -> None:
    states = following(settings())
    if found is not None:
        assert states.find("web", asked) == ("web", found)
        return
    with pytest.raises(FastlbError, match=r"no backend .* it has: 10\.3\.0\.11:8080, 10"):
        states.find("web", asked)


def test_a_backend_by_an_ambiguous_name() -> None:
    states = following(settings(backends=[{"address": "10.3.0.11", "port": port} for port in (1, 2)]))
    with pytest.raises(FastlbError, match="more than one backend"):
        states.find("web", "10.3.0.11")
    with pytest.raises(FastlbError, match='no service "nat"'):
        states.find("nat", "10.3.0.11")


def test_a_backend_by_its_ipv6_address() -> None:
    states = following(config(service("nat", 6, name="web")))
    for asked in ("fd00:3::11", "[fd00:3::11]", "[fd00:3::11]:8080"):
        assert states.find("web", asked) == ("web", "[fd00:3::11]:8080")


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
    states = following(conf)
    for number in range(3):
        check(conf, states, "+", number)
    check(conf, states, "---++", 0)
    return conf, states


def test_one_that_recovers_ramps_up() -> None:
    conf, states = recovered()
    curve = {now: weights(conf, states, now) for now in (0.0, 25.0, 50.0, 95.0, 100.0)}
    assert curve == {
        0.0: [SCALE // 10, SCALE, SCALE], 25.0: [25, SCALE, SCALE], 50.0: [50, SCALE, SCALE],
        95.0: [95, SCALE, SCALE], 100.0: [1, 1, 1],
    }  # fmt: skip
    assert states.rising(50.0)
    assert states.rising(100.0)  # the last step
    assert not states.rising(100.1)


def test_a_new_one_ramps_up_from_its_first_check_on() -> None:
    fewer = settings(check=CHECK, slow_start=SLOW, backends=[{"address": BACKENDS[4][1], "port": 8080}])
    states = following(fewer)
    states.checked(fewer.services[0], KEYS[1], 0.01, "", 0.0)
    conf = settings(check=CHECK, slow_start=SLOW)
    states.apply_config(conf, 10.0)
    check(conf, states, "+", 0, now=70.0)
    assert weights(conf, states, 70.0) == [SCALE // 10, SCALE, 0]
    check(conf, states, "+", 0, now=80.0)  # the first one alone counts
    assert weights(conf, states, 120.0) == [SCALE // 2, SCALE, 0]


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
    states = following(none)
    states.set_weight(name, 1, 100.0)
    assert weights(none, states, 100.0) == ramped
    states = following(none)
    states.apply_config(some, 100.0)
    assert weights(some, states, 100.0) == ramped
    states = following(none)
    states.set_weight(name, 1, 0.0)
    states.apply_config(some, 500.0)  # the operator's weight held all the time
    assert weights(some, states, 500.0) == [1, 1, 1]
    states = following(some)
    states.set_weight(name, 0, 99.0)
    states.enable(name, 100.0)
    assert weights(some, states, 100.0) == ramped


def test_all_new_at_once_do_not_ramp() -> None:
    conf = settings(check=CHECK, slow_start=SLOW)
    states = following(conf)
    assert weights(conf, states) == [1, 1, 1]
    for number in range(3):
        check(conf, states, "+", number)
    assert weights(conf, states) == [1, 1, 1]


def test_with_nobody_else_there_is_no_ramp() -> None:
    conf, states = recovered()
    for number in (1, 2):
        check(conf, states, "---", number)
    assert weights(conf, states) == [1, 0, 0]


def test_where_none_is_through_the_first_of_them_counts_as_full() -> None:
    """All were down; one is up again at second 0, and another one at second 40."""
    conf, states = recovered()
    for number in (0, 1, 2):
        check(conf, states, "---", number, now=1.0)
    check(conf, states, "++", 0, now=0.0)
    check(conf, states, "++", 1, now=40.0)
    assert weights(conf, states, 40.0) == [SCALE, 25, 0]
    assert weights(conf, states, 80.0) == [SCALE, 50, 0]
    assert weights(conf, states, 120.0) == [SCALE, 80, 0]
    assert weights(conf, states, 140.0) == [1, 1, 0]


def test_a_new_backend_ramps_up_and_an_enabled_one() -> None:
    conf = settings(slow_start=SLOW, backends=[{"address": BACKENDS[4][1], "port": 8080}])
    states = following(conf)
    more = settings(slow_start=SLOW)
    states.apply_config(more, 10.0)
    assert weights(more, states, 10.0) == [10, SCALE, 10]
    assert weights(more, states, 200.0) == [1, 1, 1]
    states.drain(("web", KEYS[1]))
    states.enable(("web", KEYS[1]), 300.0)
    assert weights(more, states, 310.0) == [SCALE, 10, SCALE]


@pytest.mark.parametrize("scheduler", ["rr", "wrr", "random", "lc", "wlc", "lrt", "p2c", "maglev", "ketama"])
def test_every_scheduler_s_tables_follow(scheduler: str) -> None:
    conf, states = recovered(scheduler=scheduler)
    [planned] = plan_services(conf, BackendIds(), 0.0, states)
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
    states = following(conf)
    for number, result in enumerate(checks):
        check(conf, states, result.strip(), number)
    if draining:
        states.drain(("web", KEYS[0]))
    if weight != 1:
        states.set_weight(("web", KEYS[0]), weight, 0.0)
    assert states.shares(conf.services[0], 0.0)[0] == share


def test_without_a_check_all_keep_their_clients() -> None:
    conf = settings(backends=[{"address": address, "weight": 0} for address in BACKENDS[4]])
    assert following(conf).shares(conf.services[0], 0.0) == [Share(0, 0, True)] * 3


# ---- what time brings


def two(**changes: Any) -> Config:
    """Two services with a slow start each, of 100 and of 20 seconds, and one without."""
    return config(*(
        service("nat", name=name, port=port, slow_start=slow, on_leave="keep") | changes
        for port, (name, slow) in enumerate((("web", SLOW), ("dns", {"window": 20}), ("plain", None)), 80)
    ))  # fmt: skip


def restarted(states: BackendStates, name: str, now: float) -> None:
    """Let a service's first backend begin a slow start."""
    states.set_weight((name, KEYS[0]), 0, now)
    states.set_weight((name, KEYS[0]), None, now)


def test_services_with_a_slow_start_are_named_until_it_is_over() -> None:
    """And once more at its end, so that the last step is planned."""
    states = following(two())
    assert states.rising(0.0) == set()
    for name in ("web", "dns", "plain"):
        restarted(states, name, 10.0)
    seen = {now: states.rising(now) for now in (10.0, 29.9, 30.0, 30.1, 109.0, 110.0, 110.1)}
    assert seen == {
        10.0: {"web", "dns"}, 29.9: {"web", "dns"}, 30.0: {"web", "dns"}, 30.1: {"web"}, 109.0: {"web"},
        110.0: {"web"}, 110.1: set(),
    }  # fmt: skip
    assert states.slow == {}
    assert all(state.slow_since is None for state in states.by_backend.values())


def test_a_slow_start_lasts_as_long_as_the_last_backend_in_it() -> None:
    states = following(two())
    restarted(states, "web", 0.0)
    states.drain(("web", KEYS[1]))
    states.enable(("web", KEYS[1]), 60.0)
    assert states.rising(100.0) == {"web"}
    assert states.slow == {"web": {KEYS[1]}}
    assert (states.rising(160.0), states.rising(161.0)) == ({"web"}, set())


# When it was last looked, and now; the services for which something is due: web's steps take 5 s, dns' take 1 s.
DUE = [
    ("web", 10.0, 10.0, set()),
    ("web", 10.0, 14.9, set()),
    ("web", 10.0, 15.0, {"web"}),
    ("web", 40.0, 46.0, {"web"}),
    ("web dns", 10.0, 10.9, set()),
    ("web dns", 10.0, 11.0, {"web", "dns"}),
    ("plain", 10.0, 99.0, set()),
    ("", 10.0, 99.0, set()),
]


@pytest.mark.parametrize(("slow", "looked", "now", "due"), DUE)
def test_steps_of_slow_starts_are_due(slow: str, looked: float, now: float, due: set[str]) -> None:
    states = following(two())
    for name in slow.split():
        restarted(states, name, 10.0)
    assert states.due(looked, now) == due


@pytest.mark.parametrize(("looked", "now", "due"), [
    (10.0, 19.9, set()), (10.0, 20.0, {"plain"}), (20.0, 20.5, set()), (19.9, 31.0, {"plain", "dns"}),
    (20.0, 30.0, {"dns"}), (30.0, 99.0, set()),
])  # fmt: skip
def test_ends_of_drains_are_due(looked: float, now: float, due: set[str]) -> None:
    """Of every service, with a slow start or without."""
    states = following(two())
    states.drain(("plain", KEYS[0]), 20.0)
    states.drain(("dns", KEYS[1]), 30.0)
    states.drain(("web", KEYS[1]))
    assert states.due(looked, now) == due


def test_a_drain_that_ends_is_due_between_two_steps_of_a_slow_start() -> None:
    states = following(two())
    restarted(states, "web", 10.0)
    states.drain(("plain", KEYS[0]), 12.0)
    assert states.due(10.0, 13.0) == {"plain"}


# ---- backends that were removed


def without(*numbers: int, **changes: Any) -> Config:
    return settings(on_leave="keep", backends=listed(*({0, 1, 2} - set(numbers))), **changes)


def test_a_removed_backend_is_forgotten_when_its_flows_are_long_over() -> None:
    """As long as closed flows are remembered, from when it was last seen to have any."""
    states = following(without())
    states.apply_config(without(0, 1, timeouts={"tcp_closing": 10}), 100.0)
    flows = {KEYS[0]: 5, KEYS[1]: 0}
    dropped = {}
    for now in (100.0, 109.9, 110.0, 118.0, 119.9, 120.0, 130.0):
        dropped[now] = states.drop_removed(lambda name: flows[name[1]], now)
        if now == 110.0:
            flows[KEYS[0]] = 0
    assert {now: names for now, names in dropped.items() if names} == {
        110.0: [("web", KEYS[1])], 120.0: [("web", KEYS[0])]}  # fmt: skip
    assert states.removed == {}


def test_the_time_is_that_of_all_services_where_one_has_none() -> None:
    states = BackendStates()
    for numbers in ((0, 1, 2), ()):
        web = service("nat", name="web", on_leave="keep", backends=listed(*numbers))
        states.apply_config(config(web, timeouts={"tcp_closing": 7}), 0.0)
    assert states.drop_removed(lambda name: 0, 6.9) == []
    assert sorted(key for _, key in states.drop_removed(lambda name: 0, 7.0)) == KEYS


def test_what_is_known_of_a_removed_backend() -> None:
    states = following(without())
    states.drain(("web", KEYS[0]), 500.0)
    states.set_weight(("web", KEYS[0]), 9, 1.0)
    states.apply_config(without(0), 100.0)
    assert ("web", KEYS[0]) not in states.by_backend
    assert states.of("web", KEYS[0]) == BackendState(weight=9, deadline=500.0, left=100.0)
    assert states.backend("web", KEYS[0]).address == ip_address(BACKENDS[4][0])
    assert states.timed == set()
    with pytest.raises(KeyError):
        states.backend("web", "10.9.9.9:80")
    assert states.of("web", "10.9.9.9:80") == BackendState()


@pytest.mark.parametrize(("changes", "kept"), [
    ({}, True), ({"scheduler": "rr"}, True), ({"check": CHECK}, True), ({"on_leave": "reset"}, True),
    ({"on_leave": "rehash"}, False), ({"vip": "203.0.113.11"}, False), ({"port": 81}, False),
    ({"protocol": "udp"}, False), ({"name": "www"}, False),
])  # fmt: skip
def test_whose_removed_backends_matter(changes: dict[str, Any], kept: bool) -> None:
    """Those of a service that still has its flows and does not give them to others at once; also later on."""
    states = following(without())
    states.apply_config(without(0), 1.0)
    assert list(states.removed["web"]) == [KEYS[0]]
    later = config(service("nat", name="web", on_leave="keep", backends=listed(1, 2)) | changes)
    states.apply_config(later, 2.0)
    assert list(states.removed.get(later.services[0].name, {})) == ([KEYS[0]] if kept else [])


def test_one_that_comes_back_is_a_new_one() -> None:
    states = following(without(slow_start=SLOW))
    states.set_weight(("web", KEYS[0]), 9, 1.0)
    states.apply_config(without(0, slow_start=SLOW), 2.0)
    states.apply_config(without(slow_start=SLOW), 50.0)
    assert states.of("web", KEYS[0]) == BackendState(slow_since=50.0)
    assert states.removed == {}


# ---- who is known to take flows


@pytest.mark.parametrize(("checks", "draining", "known"), [
    ("   ", [], False), ("+  ", [], True), ("-  ", [], False), ("+  ", [0], False), ("++ ", [0], True),
    ("---", [], False),
])  # fmt: skip
def test_whether_one_is_known_to_take_flows(checks: str, draining: list[int], known: bool) -> None:
    conf = settings(check=CHECK)
    states = following(conf)
    for number, result in enumerate(checks):
        check(conf, states, result.strip(), number)
    for number in draining:
        states.drain(("web", KEYS[number]))
    assert states.any_takes_flows(conf.services[0]) is known


def test_an_immutable_state_is_a_new_object_with_each_change() -> None:
    """So that a copy of the dictionaries is a copy of the states."""
    conf = settings(check=CHECK)
    states = following(conf)
    seen = [states.of("web", KEYS[0])]
    check(conf, states, "+")
    seen.append(states.of("web", KEYS[0]))
    states.drain(("web", KEYS[0]))
    seen.append(states.of("web", KEYS[0]))
    assert [(each.state, each.draining) for each in seen] == [("unknown", False), ("up", False), ("up", True)]
    with pytest.raises(FrozenInstanceError):
        seen[0].state = "up"  # type: ignore[misc]
