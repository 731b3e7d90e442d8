"""From the configuration and the states of backends to plans: afresh, and member by member when states change."""

from __future__ import annotations

from dataclasses import fields
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fastlb
from fastlb.config import Config
from fastlb.model.modes import SCHEDULERS
from fastlb.plan.backends import BackendStates
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import CLAMP_TO_PATH, Limit, Plan, plan_services, unchanged_plans, update_plan
from tests.balancers import BACKENDS, VIP, config, service

# --- plans --------------------------------------------------------------------


def plans(*services: dict[str, Any], **settings: Any) -> list[Plan]:
    return plan_services(config(*services, **settings), BackendIds(), 0.0)


def test_a_plan() -> None:
    plan = plans(service("nat", name="web", backends=[
        {"address": "10.3.0.9"},
        {"address": "10.3.0.10", "port": 8080, "weight": 7},
        {"address": "10.3.0.10", "port": 443, "weight": 0},
    ]), hash_seed=5)[0]  # fmt: skip
    assert (plan.name, plan.vip, plan.port) == ("web", ip_address(VIP[4]), 80)
    assert (plan.protocol, plan.forward, plan.no_backend) == ("tcp", "nat", "drop")
    # Sorted by key, as text; numbers by the configuration's order
    assert [(m.key, m.id, str(m.address), m.port, m.weight) for m in plan.members] == [
        ("10.3.0.10:443", 3, "10.3.0.10", 443, 0),
        ("10.3.0.10:8080", 2, "10.3.0.10", 8080, 7),
        ("10.3.0.9:80", 1, "10.3.0.9", 80, 1),
    ]
    assert plan.table is not None
    expected = fastlb.maglev_table([m.key for m in plan.members], [0, 7, 1], 251, 5)
    assert memoryview(plan.table.to_bytes()).cast("H").tolist() == list(expected)


def test_a_plan_for_any_port() -> None:
    plan = plans(service("dsr", 6, port="any"))[0]
    assert plan.port == 0
    assert [(m.key, m.port) for m in plan.members] == [(f"[{address}]:0", 0) for address in BACKENDS[6]]


@pytest.mark.parametrize("backends", [[], [{"address": "10.3.0.9", "weight": 0}]])
def test_a_plan_without_a_backend(backends: list[dict[str, Any]]) -> None:
    plan = plans(service("dsr", backends=backends))[0]
    assert plan.table is None
    assert len(plan.members) == len(backends)


def test_plans_keep_the_configuration_s_order() -> None:
    named = [service("dsr", name=name, port=port) for port, name in enumerate(["z", "a", "m"], 1)]
    assert [plan.name for plan in plans(*named)] == ["z", "a", "m"]


# what a service says, and what the plan says of it
SETTINGS: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "mss", 0),
    ({"mss_clamp": True}, "mss", CLAMP_TO_PATH),
    ({"mss_clamp": 1400}, "mss", 1400),
    ({}, "source_limit", None),
    ({"source_limit": {"rate": 10}}, "source_limit", Limit(10, 10, 32)),
    ({"source_limit": {"rate": 10, "burst": 50, "prefix": 24}}, "source_limit", Limit(10, 50, 24)),
    ({"vip": VIP[6], "backends": [], "source_limit": {"rate": 10}}, "source_limit", Limit(10, 10, 64)),
    ({}, "timeouts", None),
    ({"vip": "203.0.113.0/28"}, "network", ip_network("203.0.113.0/28")),
    ({"vip": VIP[6], "backends": []}, "network", ip_network(f"{VIP[6]}/128")),
    ({"scheduler": "maglev", "bounded_load": 1.5}, "bounded_load", 1.5),
    ({}, "bounded_load", 0.0),
    ({"deny": ["192.0.2.0/24"]}, "deny", (ip_network("192.0.2.0/24"),)),
    ({"no_backend": "reset"}, "no_backend", "reset"),
    ({}, "affinity", None),
]


@pytest.mark.parametrize(("changes", "field", "expected"), SETTINGS)
def test_what_a_service_says(changes: dict[str, Any], field: str, expected: object) -> None:
    [plan] = plans(service("dsr") | changes)
    assert getattr(plan, field) == expected


def test_a_service_with_a_timeout_of_its_own_has_all_of_them() -> None:
    [plan] = plans(service("dsr", timeouts={"tcp_established": "5s"}), timeouts={"tcp_established": 60, "tcp_syn": 7})
    assert plan.timeouts is not None
    assert (plan.timeouts["tcp_established"], plan.timeouts["tcp_syn"], plan.timeouts["tcp_closing"]) == (5, 7, 30)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_which_tables_a_scheduler_has(scheduler: str) -> None:
    """The Maglev table always, for packets in mid-flow; the other two where its row says so."""
    [plan] = plans(service("nat", scheduler=scheduler))
    has = SCHEDULERS[scheduler].table
    assert (plan.table is not None, plan.ring is not None, plan.rotation is not None) == (
        True, has == "ring", has == "rotation")  # fmt: skip
    [empty] = plans(service("nat", scheduler=scheduler, backends=[]))
    assert (empty.table, empty.ring, empty.rotation, empty.takers) == (None, None, None, 0)


@pytest.mark.parametrize(("scheduler", "turns"), [("rr", 3), ("wrr", 6), ("random", 6), ("p2c", 6)])
def test_where_weights_count(scheduler: str, turns: int) -> None:
    backends = [{"address": address, "weight": weight} for weight, address in enumerate(BACKENDS[4], 1)]
    [plan] = plans(service("nat", scheduler=scheduler, backends=backends))
    assert plan.rotation is not None
    assert plan.rotation.size == turns


# --- states of backends change ----------------------------------------------------------------------------------------

KEYS = [f"{address}:8080" for address in BACKENDS[4]]
CHECK = {"type": "tcp", "rise": 1, "fall": 1}
SLOW = {"window": 100, "floor": 0.1}


def differences(plan: Plan, afresh: Plan) -> dict[str, Any]:
    """Return the fields in which two plans differ; tables by what is in them."""
    pairs = {each.name: (getattr(plan, each.name), getattr(afresh, each.name)) for each in fields(Plan)}
    one, other = pairs["table"]
    if one is not None and other is not None:
        pairs["table"] = one.to_bytes(), other.to_bytes()
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


class Kept:
    """Plans that are kept up to date beside the states of backends, as a balancer does it."""

    def __init__(self, settings: Config) -> None:
        self.ids, self.states, self.now, self.looked = BackendIds(), BackendStates(), 0.0, 0.0
        self.marks: dict[str, set[str] | None] = {}
        self.plans: list[Plan] = []
        self.reload(settings)

    def reload(self, settings: Config) -> None:
        """Go on with another configuration; what was marked before it is marked still."""
        before, known = self.states.config, dict(self.states.by_backend)
        self.states.apply_config(settings, self.now)
        after = self.states.by_backend
        differing = {name for name, _ in known.keys() ^ after.keys()} | set(self.states.removed) | set(self.marks)
        differing |= {name[0] for name, state in after.items() if state is not known.get(name)}
        unchanged = unchanged_plans(before, settings, self.plans, differing)
        self.plans = plan_services(settings, self.ids, self.now, self.states, unchanged)

    def check(self, number: int, passed: bool, response: float = 0.01) -> None:
        """Let a check of the first service pass or fail."""
        name = ("web", KEYS[number])
        if name in self.states.by_backend:
            service = self.states.services["web"]
            self.states.checked(service, name[1], response if passed else None, "" if passed else "refused", self.now)
            self.mark(number)

    def mark(self, number: int) -> None:
        """Say that the state of a backend has changed."""
        marked = self.marks.setdefault("web", set())
        if marked is not None:
            marked.add(KEYS[number])

    def pass_time(self, seconds: float) -> None:
        """Let so many seconds go by; what ends or takes a step in them is marked."""
        self.now += seconds
        self.marks |= dict.fromkeys(self.states.due(self.looked, self.now))
        self.looked = self.now

    def update(self) -> list[Plan]:
        """Bring the plans up to date with what is marked, and return them."""
        marks, self.marks = self.marks, {}
        self.plans = [
            update_plan(self.states.config, plan, self.states, self.now, marks[plan.name])[0]
            if plan.name in marks
            else plan
            for plan in self.plans
        ]
        return self.plans

    def differences(self) -> list[dict[str, Any]]:
        """Return in what the plans differ from those that are made afresh of the same states."""
        afresh = plan_services(self.states.config, self.ids.copy(), self.now, self.states.copy())
        return [differences(*pair) for pair in zip(self.plans, afresh, strict=True)]


def web(**changes: Any) -> dict[str, Any]:
    return service("nat", name="web") | changes


def listed(*numbers: int, weight: int = 1) -> list[dict[str, Any]]:
    return [{"address": BACKENDS[4][number], "port": 8080, "weight": weight} for number in numbers]


def act(kept: Kept, step: str) -> None:
    """Take steps, apart by blanks: "0+" and "0-" are checks of backend 0, "0d", "0e", "0=7" the operator's word, "@5"
    five seconds, "!" a plan."""
    for word in step.split():
        number = int(word[0]) if word[0].isdigit() else 0
        name = ("web", KEYS[number])
        if word[0] == "@":
            kept.pass_time(float(word[1:]))
        elif word == "!":
            kept.update()
        elif word[1] in "+-":
            kept.check(number, word[1] == "+")
        else:
            kept.mark(number)
            if word[1] == "d":
                kept.states.drain(name, kept.now + 30)
            elif word[1] == "e":
                kept.states.enable(name, kept.now)
            else:
                kept.states.set_weight(name, int(word[2:]), kept.now)


# What happens; the weights in the end, with a check, and with a check and slow start
CHANGES: dict[str, tuple[str, list[int], list[int]]] = {
    "nothing is known": ("!", [1, 1, 1], [1, 1, 1]),
    "the first that is up takes all": ("! 1+ !", [0, 1, 0], [0, 1, 0]),
    "and then the second": ("! 1+ ! 2+ !", [0, 1, 1], [0, 1, 1]),
    "all come up together": ("! 0+ 1+ 2+ !", [1, 1, 1], [1, 1, 1]),
    "one goes down": ("0+ 1+ 2+ ! 1- !", [1, 0, 1], [1, 0, 1]),
    "the last goes down": ("0+ 1+ 2+ ! 1- ! 2- ! 0- !", [0, 0, 0], [0, 0, 0]),
    "the only one that is up goes down, and the unknown ones are asked": ("0+ ! 0- !", [0, 1, 1], [0, 1, 1]),
    "one comes back": ("0+ 1+ 2+ ! 1- ! 1+ !", [1, 1, 1], [100, 10, 100]),
    "and is through": ("0+ 1+ 2+ ! 1- ! 1+ ! @50 ! @50 !", [1, 1, 1], [1, 1, 1]),
    "another one goes down meanwhile": ("0+ 1+ 2+ ! 1- ! 1+ ! @50 2- !", [1, 1, 0], [100, 50, 0]),
    "all but the slow one go down": ("0+ 1+ 2+ ! 1- ! 1+ ! 0- 2- !", [0, 1, 0], [0, 1, 0]),
    "one goes as another comes": ("0+ ! 0- 1+ !", [0, 1, 0], [0, 1, 0]),
    "drained": ("0+ 1+ 2+ ! 0d !", [0, 1, 1], [0, 1, 1]),
    "all are drained": ("0+ 1+ 2+ ! 0d ! 1d 2d !", [0, 0, 0], [0, 0, 0]),
    "the only one that is up is drained": ("0+ ! 0d !", [0, 1, 1], [0, 1, 1]),
    "the drain ends": ("0+ 1+ 2+ ! 0d ! @31 !", [0, 1, 1], [0, 1, 1]),
    "enabled": ("0+ 1+ 2+ ! 0d ! @1 0e !", [1, 1, 1], [10, 100, 100]),
    "another weight": ("0+ 1+ 2+ ! 0=7 !", [7, 1, 1], [7, 1, 1]),
    "no weight": ("0+ 1+ 2+ ! 0=0 !", [0, 1, 1], [0, 1, 1]),
    "the only one that is up has no weight": ("0+ ! 0=0 !", [0, 1, 1], [0, 1, 1]),
    "a weight again": ("0+ 1+ 2+ ! 0=0 ! 0=3 !", [3, 1, 1], [30, 100, 100]),
    "while it is down": ("0+ 1+ 2+ ! 0- ! 0=3 ! 0d !", [0, 1, 1], [0, 1, 1]),
}


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "slowly"])
@pytest.mark.parametrize("happens", CHANGES)
def test_a_plan_follows_what_happens(happens: str, slow: bool) -> None:
    steps, at_once, slowly = CHANGES[happens]
    kept = Kept(config(web(check=CHECK, slow_start=SLOW if slow else None), service("dsr", port=81)))
    other = kept.plans[1]
    act(kept, steps)
    assert [member.weight for member in kept.plans[0].members] == (slowly if slow else at_once)
    assert kept.differences() == [{}, {}]
    assert kept.plans[1] is other


SETTLED = [  # what happens; is each member's share its own affair?
    ("!", False),  # those that are unknown take flows until one is up
    ("0+ !", True),
    ("0- !", False),
    ("0- 1- 2- !", False),
    ("0+ 1- !", True),
    ("0+ 0d !", False),
    ("0+ 0=0 !", False),
    ("0+ 1+ 0- ! 0+ !", False),  # a slow start
    ("0+ 1+ 0- ! 0+ ! @100 !", True),
    ("0+ 0- ! 0+ !", True),  # nobody else is there: no slow start
]


@pytest.mark.parametrize(("steps", "settled"), SETTLED)
def test_whether_shares_depend_on_one_another(steps: str, settled: bool) -> None:
    kept = Kept(config(web(check=CHECK, slow_start=SLOW)))
    act(kept, steps)
    [plan] = kept.plans
    assert (plan.settled, plan.takers) == (settled, sum(member.weight > 0 for member in plan.members))


def test_without_a_check_shares_are_their_own_from_the_start() -> None:
    assert Kept(config(web())).plans[0].settled
    assert not Kept(config(web(backends=listed(0, 1, weight=0)))).plans[0].settled
    assert not Kept(config(web(backends=[]))).plans[0].settled


def test_of_a_settled_plan_only_what_changed_is_looked_at() -> None:
    """The other members are the same objects, and their states are not even asked for."""
    kept = Kept(config(web(check=CHECK)))
    act(kept, "0+ 1+ 2+ ! 1-")
    [before] = kept.plans
    for number in (0, 2):
        del kept.states.by_backend["web", KEYS[number]], kept.states.configured["web", KEYS[number]]
    [after] = kept.update()
    assert [member.weight for member in after.members] == [1, 0, 1]
    assert after.members[0] is before.members[0]
    assert after.members[2] is before.members[2]


def test_members_of_whom_nothing_changed_are_the_same_objects() -> None:
    kept = Kept(config(web(check=CHECK)))
    act(kept, "0+ 1+ 2+ !")
    [before] = kept.plans
    after, _ = update_plan(kept.states.config, before, kept.states, 0.0)
    assert all(one is other for one, other in zip(after.members, before.members, strict=True))
    assert after.table is before.table


def test_a_mark_of_a_backend_that_was_removed_changes_nothing() -> None:
    """It came before the reload that took the backend away, whether its flows are kept or not."""
    for on_leave in ("rehash", "keep"):
        kept = Kept(config(web(check=CHECK, on_leave=on_leave)))
        act(kept, "0+ 1+ 2+ ! 1-")
        kept.reload(config(web(check=CHECK, on_leave=on_leave, backends=listed(0, 2))))
        assert kept.marks == {"web": {KEYS[1]}}
        [plan] = kept.update()
        assert {member.key: member.weight for member in plan.members if member.weight} == {KEYS[0]: 1, KEYS[2]: 1}
        assert [member.key for member in plan.members if member.removed] == ([KEYS[1]] if on_leave == "keep" else [])
        assert kept.differences() == [{}]


def test_a_removed_backend_that_was_up_takes_no_flow_for_a_mark() -> None:
    kept = Kept(config(web(check=CHECK, on_leave="keep")))
    act(kept, "0+ 1+ 2+ ! 1+")
    kept.reload(config(web(check=CHECK, on_leave="keep", backends=listed(0, 2))))
    [plan] = kept.update()
    assert [(member.weight, member.removed) for member in plan.members] == [(1, False), (0, True), (1, False)]
    assert kept.differences() == [{}]


# --- whatever happens -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, len(KEYS) - 1)
EVENTS = st.one_of(
    st.tuples(st.just("check"), NUMBERS, st.booleans(), st.sampled_from([0.0, 0.01, 0.5])),
    st.tuples(st.just("drain"), NUMBERS, st.sampled_from([None, 0.0, 10.0, 60.0])),
    st.tuples(st.just("enable"), NUMBERS),
    st.tuples(st.just("weight"), NUMBERS, st.sampled_from([None, 0, 1, 5, 65535])),
    st.tuples(st.just("time"), st.sampled_from([0.5, 5.0, 20.0, 100.0])),
    st.tuples(st.just("plan")),
    st.tuples(st.just("reload"), st.lists(NUMBERS, unique=True), st.sampled_from([0, 1, 3])),
    st.tuples(st.just("drop")),
)
SERVICES = st.fixed_dictionaries({
    "check": st.sampled_from([None, CHECK, {"type": "tcp", "rise": 2, "fall": 2}]),
    "slow_start": st.sampled_from([None, SLOW, {"window": 10, "aggression": 2}]),
    "on_leave": st.sampled_from(["keep", "rehash", "reset"]),
    "on_down": st.sampled_from(["auto", "keep", "rehash", "reset"]),
    "protocol": st.sampled_from(["tcp", "udp"]),
    "affinity": st.sampled_from([None, {"by": "client-ip", "timeout": 60}]),
})  # fmt: skip


def take(kept: Kept, changes: dict[str, Any], event: tuple[Any, ...]) -> None:
    """Let one event happen; those that concern a backend that is not there do not."""
    what, *rest = event
    if what == "time":
        kept.pass_time(rest[0])
    elif what == "plan":
        kept.update()
    elif what == "reload":
        kept.reload(settings_of(changes, listed(*sorted(rest[0]), weight=rest[1])))
    elif what == "drop":
        if kept.states.drop_removed(lambda name: 0, kept.now):
            kept.plans = plan_services(kept.states.config, kept.ids, kept.now, kept.states)
    elif what == "check":
        kept.check(*rest)
    elif (name := ("web", KEYS[rest[0]])) in kept.states.by_backend:
        kept.mark(rest[0])
        if what == "drain":
            kept.states.drain(name, None if rest[1] is None else kept.now + rest[1])
        elif what == "enable":
            kept.states.enable(name, kept.now)
        else:
            kept.states.set_weight(name, rest[1], kept.now)


def settings_of(changes: dict[str, Any], backends: list[dict[str, Any]]) -> Config:
    return config(web(**changes, backends=backends), service("dsr", port=81), timeouts={"tcp_closing": 5})


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@hypothesis_settings(deadline=None, max_examples=40)
@given(changes=SERVICES, events=st.lists(EVENTS, min_size=1, max_size=25))
def test_an_updated_plan_is_the_plan_that_is_made_afresh(
    scheduler: str, changes: dict[str, Any], events: list[tuple[Any, ...]]
) -> None:
    changes = changes | {"scheduler": scheduler} | ({"protocol": "tcp"} if SCHEDULERS[scheduler].needs_response else {})
    kept = Kept(settings_of(changes, listed(0, 1, 2)))
    for event in events:
        take(kept, changes, event)
        if event[0] == "plan":
            assert kept.differences() == [{}, {}]
    kept.update()
    assert kept.differences() == [{}, {}]


# --- from one configuration to the next -------------------------------------------------------------------------------

# What changes in the configuration, and in the states; the services that keep their plans. Before: web and dns.
KEPT: list[tuple[dict[str, Any], dict[str, dict[str, Any]], set[str], set[str]]] = [
    ({}, {}, set(), {"web", "dns"}),
    ({}, {}, {"web"}, {"dns"}),
    ({}, {}, {"web", "dns"}, set()),
    ({}, {"web": {"scheduler": "rr"}}, set(), {"dns"}),
    ({}, {"web": {"backends": []}}, set(), {"dns"}),
    ({}, {"web": {"deny": ["192.0.2.0/24"]}, "dns": {"port": 53}}, set(), set()),
    ({}, {"web": {"name": "www"}}, set(), {"dns"}),
    ({"hash_seed": 1}, {}, set(), set()),
    ({"maglev_size": 509}, {}, set(), set()),
    ({"ring_points": 7}, {}, set(), set()),
    ({"timeouts": {"udp": 5}}, {}, set(), set()),
    ({"icmp_echo": False}, {}, set(), {"web", "dns"}),
]


def both(changes: dict[str, dict[str, Any]], **settings: Any) -> Config:
    names = {"web": 80, "dns": 81}
    return config(*(service("nat", name=name, port=port) | changes.get(name, {}) for name, port in names.items()),
                  **settings)  # fmt: skip


@pytest.mark.parametrize(("settings", "changes", "differing", "kept"), KEPT)
def test_which_plans_a_reload_keeps(
    settings: dict[str, Any], changes: dict[str, dict[str, Any]], differing: set[str], kept: set[str]
) -> None:
    before, after = both({}), both(changes, **settings)
    ids = BackendIds()
    plans = plan_services(before, ids, 0.0)
    known = unchanged_plans(before, after, plans, differing)
    assert {name for name, plan in known.items() if plan in plans} == set(known) == kept
    again = plan_services(after, ids, 1.0, known=known)
    assert {plan.name for plan in again if any(plan is each for each in plans)} == kept
    assert [differences(*pair) for pair in zip(again, plan_services(after, ids.copy(), 1.0), strict=True)] == [{}, {}]


def test_a_service_that_comes_beside_others_is_planned_and_they_are_not() -> None:
    before = config(service("dsr", name="a"))
    after = config(service("dsr", name="b", port=81), service("dsr", name="a"))
    ids = BackendIds()
    plans = plan_services(before, ids, 0.0)
    again = plan_services(after, ids, 1.0, known=unchanged_plans(before, after, plans, set()))
    assert [plan.name for plan in again] == ["b", "a"]
    assert again[1] is plans[0]


def test_with_affinity_a_plan_is_made_anew() -> None:
    """What else there is at a backend's address depends on the other services of its group."""
    sticky = {"by": "client-ip", "timeout": 60, "group": "site"}
    first = service("dsr", name="a", affinity=sticky)
    before = config(first)
    after = config(first, service("dsr", name="b", port=81, affinity=sticky))
    ids = BackendIds()
    plans = plan_services(before, ids, 0.0)
    again = plan_services(after, ids, 1.0, known=unchanged_plans(before, after, plans, set()))
    assert [len(member.same_address) for member in plans[0].members] == [0, 0, 0]
    assert [len(member.same_address) for member in again[0].members] == [1, 1, 1]
