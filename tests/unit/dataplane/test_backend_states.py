"""docs/backends.md: what the state of a backend means for flows, each cell of the table by the real pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastlb.observe.explanation import Context, parse_tuple
from fastlb.observe.trace import explain
from fastlb.plan.ids import ID_QUARANTINE
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, reply_to, service
from tests.frames import ACK, RST, SYN, frame, take_apart

ROOT = Path(__file__).parents[3]
FIRST, SECOND = BACKENDS[4][:2]
SNAT = ["10.3.0.5", "fd00:3::5"]
MODES = ("nat", "fullnat", "dsr", "ipip")
DRAINED_AT = 60.0  # seconds

# state, policy, new flows, TCP flows that it has, UDP flows that it has, affinity
TABLE = [
    ("`unchecked`", "", "by weight", "stay", "stay", "kept"),
    ("`unknown`, while no other is up", "", "by weight", "stay", "stay", "kept"),
    ("`unknown`, while another is up", "", "none", "stay", "stay", "released"),
    ("`up`", "", "by weight", "stay", "stay", "kept"),
    ("weight 0", "", "none", "stay", "stay", "kept"),
    ("`draining`", "", "none", "stay", "stay", "released"),
    ("`drained`", "`on_leave: rehash`", "none", "move", "move", "released"),
    ("`drained`", "`on_leave: keep`", "none", "move", "move", "released"),
    ("`drained`", "`on_leave: reset`", "none", "reset", "move", "released"),
    ("`down`", "`on_down: auto`", "none", "stay, SYN moves", "move", "released"),
    ("`down`", "`on_down: keep`", "none", "stay, SYN moves", "stay", "released"),
    ("`down`", "`on_down: rehash`", "none", "move", "move", "released"),
    ("`down`", "`on_down: reset`", "none", "reset", "move", "released"),
    ("`removed`", "`on_leave: rehash`", "none", "move", "move", "released"),
    ("`removed`", "`on_leave: keep`", "none", "stay", "stay", "released"),
    ("`removed`", "`on_leave: reset`", "none", "reset", "move", "released"),
]


def test_the_table_stands_in_the_documentation() -> None:
    text = (ROOT / "docs/backends.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert [tuple(cell.strip() for cell in row) for row in rows[2:]] == TABLE


# --- a backend with a flow, and what becomes of both ------------------------------


class Pair:
    """A service with two backends, the first of which has a flow: an established one where it is TCP."""

    def __init__(self, forward: str, protocol: str, policy: str = "", *, checked: bool = False, **changes: Any) -> None:
        self.forward, self.protocol = forward, protocol
        self.changes = changes | ({"check": {"type": "tcp", "rise": 1, "fall": 1}} if checked else {})
        if policy:
            key, value = policy.strip("`").split(": ")
            self.changes[key] = value
        if forward == "ipip":
            self.changes["tunnel"] = {"source": ["192.0.2.0/24"]}
        self.balancer = Balancer(self.settings(FIRST))
        self.keys = [self.balancer.plans[0].members[0].key]
        self.keys.append(self.keys[0].replace(FIRST, SECOND))
        self.opened = self.client("S")[1]
        if protocol == "tcp":
            self.backend("SA")
            self.client("A")
        assert self.flows() == [self.keys[0]]
        self.balancer.reload(self.settings(FIRST, SECOND))

    def settings(self, *hosts: str, **changes: Any) -> Any:
        backends = [{"address": host} | ({"weight": changes.pop(host)} if host in changes else {}) for host in hosts]
        chosen = service(self.forward, protocol=self.protocol, name="web", backends=backends, **self.changes, **changes)
        return config(chosen, snat=SNAT)

    def client(self, letters: str, sport: int = 40000, now: float = 0.0) -> tuple[str, bytes | None, str | None]:
        raw = frame(CLIENT[4], sport, VIP[4], 80, self.protocol, flags=flags(letters), seq=77, ack=5555)
        return self.balancer.send(raw, now)

    def backend(self, letters: str, now: float = 0.0) -> str:
        """The reply to the flow's first packet, where replies pass."""
        if self.forward not in ("nat", "fullnat"):
            return "conntrack"
        assert self.opened is not None
        return self.balancer.send(reply_to(self.opened, letters), now)[0]

    def checked(self, number: int, *, passed: bool) -> None:
        web = self.balancer.settings.services[0]
        self.balancer.standings.checked(web, self.keys[number], 0.01 if passed else None, "", 0.0)
        self.balancer.plan()

    def flows(self) -> list[str | None]:
        return [self.balancer.keys.get(flow[5]) for flow in self.balancer.flows()]

    def enter(self, state: str) -> None:
        """The first backend comes into this state."""
        name = ("web", self.keys[0])
        if "another is up" in state:
            self.checked(1, passed=True)
        elif state in ("`up`", "`down`"):
            self.checked(0, passed=state == "`up`")
            self.checked(1, passed=True)
        elif state == "weight 0":
            self.balancer.reload(self.settings(FIRST, SECOND, **{FIRST: 0}))
        elif state in ("`draining`", "`drained`"):
            self.balancer.standings.drain(name, DRAINED_AT)
            self.balancer.plan(DRAINED_AT - 0.001 if state == "`draining`" else DRAINED_AT)
        elif state == "`removed`":
            self.balancer.reload(self.settings(SECOND))


def pair_in(state: str, policy: str, forward: str, protocol: str, **changes: Any) -> Pair:
    checked = state in ("`up`", "`down`") or "unknown" in state
    pair = Pair(forward, protocol, policy, checked=checked, **changes)
    pair.enter(state)
    return pair


every_state = pytest.mark.parametrize(("state", "policy", "new", "tcp", "udp", "affinity"), TABLE)
every_mode = pytest.mark.parametrize("forward", MODES)


@every_state
@every_mode
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_new_flows(
    state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str, protocol: str
) -> None:
    pair = pair_in(state, policy, forward, protocol)
    placed = {pair.client("S", sport)[2] for sport in range(41000, 41100)}
    assert placed == ({pair.keys[1]} if new == "none" else set(pair.keys))


@every_state
@every_mode
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_new_flows_of_a_client_that_is_bound_to_it(
    state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str, protocol: str
) -> None:
    pair = pair_in(state, policy, forward, protocol, affinity={"timeout": "1h"}, scheduler="rr")
    placed = {pair.client("S", sport)[2] for sport in range(41000, 41020)}
    assert placed == {pair.keys[0] if affinity == "kept" else pair.keys[1]}


@every_state
@every_mode
def test_tcp_flows(state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str) -> None:
    pair = pair_in(state, policy, forward, "tcp")
    reason, sent, key = pair.client("A")
    first, second = pair.keys
    if tcp.startswith("stay"):
        assert (reason, key, pair.flows()) == ("conntrack", first, [first])
    elif tcp == "reset":
        assert (reason, key, pair.flows()) == ("reset", None, [])
        assert_reset(sent)
    elif forward == "fullnat":  # a flow is nothing there without its source port
        assert (reason, pair.flows()) == ("rejected", [])
    else:
        assert (reason, key, pair.flows()) == ("maglev", second, [second])
    assert pair.balancer.counts_agree()


@every_state
@every_mode
def test_udp_flows(state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str) -> None:
    pair = pair_in(state, policy, forward, "udp")
    reason, _, key = pair.client("")
    stays = udp == "stay"
    assert (reason, key) == (("conntrack", pair.keys[0]) if stays else ("scheduled", pair.keys[1]))
    assert pair.flows() == [key]
    assert pair.balancer.counts_agree()


@every_state
@every_mode
def test_a_syn_on_an_established_flow(
    state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str
) -> None:
    """Where the flow stays, it is the backend's matter; else it is a new flow, and never answered with RST."""
    pair = pair_in(state, policy, forward, "tcp")
    reason, _, key = pair.client("S")
    expected = ("conntrack", pair.keys[0]) if tcp == "stay" else ("scheduled", pair.keys[1])
    assert (reason, key) == expected
    assert pair.flows() == [key]
    assert pair.balancer.counts_agree()


@every_state
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_replies_before_the_client_s_next_packet(
    state: str, policy: str, new: str, tcp: str, udp: str, affinity: str, forward: str, protocol: str
) -> None:
    """They pass from every backend that is known."""
    pair = pair_in(state, policy, forward, protocol)
    known = state != "`removed`" or "rehash" not in policy
    assert pair.backend("A") == ("conntrack" if known else "no_service")


def assert_reset(sent: bytes | None) -> None:
    """The RST that the client's packet (ACK 5555) deserves, from the VIP."""
    assert sent is not None
    seen = take_apart(sent)
    assert (seen.src, seen.sport, seen.dst, seen.dport) == (VIP[4], 80, CLIENT[4], 40000)
    assert (seen.tcp.flags, seen.tcp.seq) == (RST, 5555)


# --- reset ------------------------------------------------------------------------


def leaving(policy: str, forward: str = "nat", protocol: str = "tcp") -> Pair:
    return pair_in("`removed`", f"`on_leave: {policy}`", forward, protocol)


@every_mode
def test_after_its_reset_a_flow_is_as_any_that_is_not_known(forward: str) -> None:
    pair = leaving("reset", forward)
    reasons = [pair.client(letters)[0] for letters in ("A", "A", "S")]
    assert reasons == ["reset", "rejected" if forward == "fullnat" else "maglev", "scheduled"]


@every_mode
@pytest.mark.parametrize("letters", ["R", "RA"])
def test_a_reset_of_the_client_s_own_goes_to_the_backend(forward: str, letters: str) -> None:
    pair = leaving("reset", forward)
    reason, _, key = pair.client(letters)
    assert (reason, key) == ("conntrack", pair.keys[0])
    assert [flow[6] for flow in pair.balancer.flows()] == ["reset"]


def test_resets_are_rate_limited_and_the_flow_waits() -> None:
    """A thousand at once; the flow whose answer was not to be had gets it a moment later."""
    pair = leaving("reset")
    pair.balancer.reload(pair.settings(FIRST))
    for sport in range(1000, 2001):
        pair.client("S", sport)
    pair.balancer.reload(pair.settings(SECOND))
    reasons = [pair.client("A", sport)[0] for sport in range(1000, 2001)]
    assert reasons == ["reset"] * 1000 + ["reject_limit"]
    assert pair.client("A", 2000, now=0.01)[0] == "reset"
    assert pair.client("A", 2000, now=0.01)[0] == "maglev"


def test_what_cannot_be_answered_is_dropped() -> None:
    source = "127.0.0.9"
    pair = leaving("reset", "dsr")
    pair.balancer.reload(pair.settings(FIRST))
    pair.balancer.send(frame(source, 40000, VIP[4], 80, flags=SYN))
    pair.balancer.reload(pair.settings(SECOND))
    assert pair.balancer.send(frame(source, 40000, VIP[4], 80, flags=ACK))[0] == "backend_left"
    assert pair.flows() == [pair.keys[0]]  # the other one
    assert pair.balancer.counts_agree()


def test_a_reset_in_ipv6() -> None:
    hosts = [{"address": host} for host in BACKENDS[6][:2]]
    both, one = (config(service("nat", 6, name="web", backends=each, on_leave="reset")) for each in (hosts, hosts[1:]))
    balancer = Balancer(both)
    flows = {sport: balancer.send(frame(CLIENT[6], sport, VIP[6], 80))[2] for sport in range(1000, 1020)}
    balancer.reload(one)
    for sport, key in flows.items():
        reason, sent, _ = balancer.send(frame(CLIENT[6], sport, VIP[6], 80, flags=ACK, seq=9, ack=12345))
        assert reason == ("conntrack" if key == "[fd00:3::12]:80" else "reset")
        assert sent is not None
        if reason == "reset":
            assert (take_apart(sent).dst, take_apart(sent).tcp.seq) == (CLIENT[6], 12345)


# --- removed, and known on ----------------------------------------------------------


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_a_removed_backend_is_known_until_its_last_flow_is_over(policy: str) -> None:
    pair = leaving(policy)
    name, standings = ("web", pair.keys[0]), pair.balancer.standings
    assert standings.of(*name).shown(0.0) == "removed"
    assert [(each.key, each.weight, each.removed) for each in pair.balancer.plans[0].members] == [
        (pair.keys[0], 0, True), (pair.keys[1], 1, False),
    ]  # fmt: skip
    number = pair.balancer.ids.by_name[name]
    looks = [(0.0, 1), (500.0, 1), (501.0, 0), (520.0, 2), (521.0, 0), (549.9, 0), (550.0, 0), (551.0, 0)]
    gone = [(now, standings.drop_removed({name: flows}.__getitem__, now)) for now, flows in looks]
    assert [now for now, names in gone if names] == [550.0]  # 30 seconds, tcp_closing, after its last flow was seen
    pair.balancer.plan(now=551.0)
    assert [each.key for each in pair.balancer.plans[0].members] == [pair.keys[1]]
    assert pair.balancer.ids.resting == [(551.0, number)]
    assert pair.client("A", now=551.0)[0] == "maglev"


def test_one_with_a_closing_time_of_its_own() -> None:
    pair = Pair("nat", "tcp", "`on_leave: keep`")
    pair.changes["timeouts"] = {"tcp_closing": 3}
    pair.enter("`removed`")
    assert pair.balancer.standings.drop_removed(lambda name: 0, 2.9) == []
    assert pair.balancer.standings.drop_removed(lambda name: 0, 3.0) == [("web", pair.keys[0])]


def test_kept_flows_go_on_until_they_end() -> None:
    """Both ways, over further reloads, for longer than ids rest."""
    pair = leaving("keep")
    for now in (10.0, ID_QUARANTINE * 2, ID_QUARANTINE * 4):
        pair.balancer.reload(pair.settings(SECOND, BACKENDS[4][2]), now=now)
        assert pair.client("A", now=now)[::2] == ("conntrack", pair.keys[0])
        assert pair.backend("A", now=now) == "conntrack"
    assert pair.backend("FA", now=241.0) == "conntrack"
    assert pair.client("FA", now=241.0)[0] == "conntrack"
    assert pair.client("S", now=241.0)[::2] != ("conntrack", pair.keys[0])
    assert pair.balancer.pipeline.backend_stats(pair.balancer.ids.by_name["web", pair.keys[0]])["active_flows"] == 0


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_one_that_comes_back_in_time_has_its_flows_still(policy: str) -> None:
    pair = leaving(policy)
    pair.balancer.reload(pair.settings(FIRST, SECOND), now=30.0)
    assert pair.balancer.standings.of("web", pair.keys[0]).shown(30.0) == "unchecked"
    assert pair.client("A", now=30.0)[::2] == ("conntrack", pair.keys[0])
    placed = {pair.client("S", sport, now=30.0)[2] for sport in range(41000, 41100)}
    assert placed == set(pair.keys)


@pytest.mark.parametrize(
    "changes",
    [{"on_leave": "rehash"}, {"port": 81}, {"forward": "fullnat"}, {"vip": "203.0.113.20"}, {"name": "other"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_ends_it(changes: dict[str, Any]) -> None:
    pair = leaving("keep")
    pair.balancer.reload(config(service(**{
        "forward": "nat", "name": "web", "backends": [{"address": SECOND}], "on_leave": "keep", **changes,
    }), snat=SNAT))  # fmt: skip
    assert [each.removed for each in pair.balancer.plans[0].members] == [False]
    assert pair.balancer.standings.removed == {}


def test_one_that_was_down_keeps_nothing_that_a_dead_one_would_not() -> None:
    """Removed while it is down: TCP flows stay, but for a SYN; UDP flows are gone already."""
    for protocol, flow_policy in (("tcp", "except_syn"), ("udp", "none")):
        pair = Pair("nat", protocol, "`on_leave: keep`", checked=True)
        pair.checked(0, passed=False)
        pair.checked(1, passed=True)
        pair.enter("`removed`")
        assert [each.flow_policy for each in pair.balancer.plans[0].members] == [flow_policy, "all"]


def test_tables_do_not_know_a_removed_backend() -> None:
    """Every other balancer of the fleet, which may never have known it, places as this one."""
    for scheduler in ("maglev", "ketama", "source-hash"):
        hosts = [{"address": host} for host in BACKENDS[4]]
        before, after = (
            config(service("dsr", name="web", scheduler=scheduler, backends=each, on_leave="keep"))
            for each in (hosts, hosts[1:])
        )
        fresh, old = Balancer(after), Balancer(before)
        old.reload(after)
        assert len(old.plans[0].members) == 3
        for sport in range(1000, 1300):
            raw = frame(f"10.1.{sport % 250}.{sport // 250}", sport, VIP[4], 80)
            assert old.send(raw)[2] == fresh.send(raw)[2]


# state, policy, what `fastlb trace` says of the flow, where a SYN would go
TRACES = [
    ("`draining`", "", "idle for 0.0 s", "conntrack"),
    ("`drained`", "`on_leave: rehash`", "has left, or is down, and keeps no flows, so a new flow", "scheduled"),
    ("`down`", "`on_down: keep`", "is down, so a SYN begins a new flow; what else comes still goes there", "scheduled"),
    ("`down`", "`on_down: reset`", "has left, or is down: answered with RST; a SYN begins a new flow", "scheduled"),
    ("`removed`", "`on_leave: keep`", "idle for 0.0 s", "conntrack"),
    ("`removed`", "`on_leave: reset`", "has left, or is down: answered with RST; a SYN begins a new flow", "scheduled"),
]


@pytest.mark.parametrize(("state", "policy", "flow", "reason"), TRACES)
def test_the_tool_tells_of_it(state: str, policy: str, flow: str, reason: str) -> None:
    pair = pair_in(state, policy, "nat", "tcp")
    balancer, now = pair.balancer, 0.0 if state == "`draining`" else DRAINED_AT
    context = Context(balancer.plans, balancer.settings.services, balancer.standings, hops_known=False, now=now)
    told = explain(balancer.pipeline, parse_tuple(f"{CLIENT[4]}:40000", f"{VIP[4]}:80/tcp"), context, 0)
    steps = {step.stage: step.says for step in told.steps}
    assert steps["flow"].endswith(flow)
    assert told.reason == reason
    if reason == "conntrack":
        assert steps["backend"].startswith(f"{pair.keys[0]} is {state.strip('`')}, weight")
        assert steps["backend"].endswith("no new flows")
    else:
        assert told.backend == pair.keys[1]
    assert pair.client("S")[2] == told.backend


# --- a client that uses its port again ------------------------------------------------


@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_port_reuse_while_the_backend_has_the_old_connection(forward: str) -> None:
    """RFC 9293 section 3.5.1: SYN, challenge ACK, RST; and the next SYN is a flow like any other. None is held up."""
    pair = Pair(forward, "tcp")
    pair.balancer.reload(pair.settings(FIRST, SECOND, **{FIRST: 0}))
    assert pair.client("S")[::2] == ("conntrack", pair.keys[0])
    assert pair.backend("A") == "conntrack"
    assert pair.client("R")[::2] == ("conntrack", pair.keys[0])
    assert pair.client("S")[::2] == ("scheduled", pair.keys[1])


@every_mode
def test_port_reuse_once_the_flow_s_time_is_up(forward: str) -> None:
    """Idle for longer than its timeout, and not yet swept: at the SYN itself."""
    pair = Pair(forward, "tcp")
    pair.balancer.reload(pair.settings(FIRST, SECOND, **{FIRST: 0}))
    pair.balancer.pipeline.process([], 899_900)
    assert pair.flows() == [pair.keys[0]]
    assert pair.client("S", now=900.001)[::2] == ("scheduled", pair.keys[1])
    assert pair.balancer.counts_agree()


# --- timeouts of a service --------------------------------------------------------------

OWN = {"tcp_syn": 3, "tcp_established": 20, "tcp_half_closed": 9, "tcp_closing": 2}
COMMON = {"tcp_syn": 15, "tcp_established": 900, "tcp_half_closed": 300, "tcp_closing": 30}
LIVES = [
    ("", "tcp_syn"), ("A", "tcp_established"), ("A F", "tcp_half_closed"), ("A R", "tcp_closing"),
]  # fmt: skip


@pytest.mark.parametrize(("letters", "timed"), LIVES)
@pytest.mark.parametrize("own", [OWN, {"tcp_half_closed": 9}, {}])
def test_timeouts_by_service(letters: str, timed: str, own: dict[str, int]) -> None:
    """Beside a service that has none of its own, to the very millisecond."""
    one = [{"address": FIRST}]
    services = [
        service("nat", name="own", backends=one, timeouts=own), service("nat", name="common", port=81, backends=one),
    ]  # fmt: skip
    for port, timeout in ((80, (COMMON | own)[timed]), (81, COMMON[timed])):
        for late, reason in ((0.0, "conntrack"), (0.001, "maglev")):
            balancer = Balancer(config(*services))
            _, sent, _ = balancer.send(frame(CLIENT[4], 40000, VIP[4], port))
            if letters:
                assert sent is not None
                balancer.send(reply_to(sent))
            for each in letters.split():
                balancer.send(frame(CLIENT[4], 40000, VIP[4], port, flags=flags(each)))
            assert balancer.send(frame(CLIENT[4], 40000, VIP[4], port, flags=ACK), now=timeout + late)[0] == reason


def test_services_share_kinds_of_timeouts_and_reloads_change_them() -> None:
    ports = range(1, 50)
    services = [
        service("dsr", protocol="udp", name=f"s{port}", port=port, timeouts={"udp": port % 3 + 1}) for port in ports
    ]
    balancer = Balancer(config(*services))

    def forgotten(now: float) -> list[int]:
        reasons = {port: balancer.send(frame(CLIENT[4], 40000, VIP[4], port, "udp"), now)[0] for port in ports}
        return [port for port in ports if reasons[port] == "scheduled"]

    assert forgotten(0.0) == list(ports)
    assert forgotten(1.5) == [port for port in ports if port % 3 == 0]
    assert forgotten(4.0) == [port for port in ports if port % 3 != 2]
    balancer.reload(config(*(each | {"timeouts": {}} for each in services), timeouts={"udp": 60}))
    assert forgotten(64.0) == []
