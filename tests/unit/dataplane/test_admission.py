"""admission.pxd: whom a service lets in, how many flows a source may begin, how many are remembered; counters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb._core import FlowMemory, Pipeline
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import frame, take_apart
from tests.unit.dataplane.test_encap import MODES, tunnel
from tests.unit.dataplane.test_fragments import cut
from tests.unit.dataplane.test_icmperror import ROUTER, error
from tests.unit.dataplane.test_schedule import EVERY

FORWARDS = ["nat", "fullnat", "dsr", *MODES]
SNAT = ["10.3.0.5", "fd00:3::5"]


def first(client: str, port: int = 40000, proto: str = "tcp", letters: str = "S") -> bytes:
    return frame(client, port, VIP[ip_address(client).version], 80, proto, flags=flags(letters))


def of_mode(forward: str, version: int = 4, protocol: str = "tcp", **changes: Any) -> dict[str, Any]:
    if forward in MODES:
        return tunnel(forward, version, 4, protocol) | changes
    return service(forward, version, protocol, **changes)


# --- lists ------------------------------------------------------------------------------------------------------------

# allow, deny, the clients that are let in, those that are not
LISTS: list[tuple[Sequence[str], Sequence[str], Sequence[str], Sequence[str]]] = [
    ([], ["10.1.0.0/16"], ["10.2.0.1", "10.0.255.255"], ["10.1.0.0", "10.1.255.255"]),
    (["10.1.0.0/16"], [], ["10.1.0.0", "10.1.255.255"], ["10.2.0.1", "10.0.255.255", "192.0.2.1"]),
    (["10.1.2.0/24"], ["10.1.0.0/16"], ["10.1.2.3"], ["10.1.3.3", "192.0.2.1"]),
    (["10.1.0.0/16"], ["10.1.2.0/24"], ["10.1.3.3"], ["10.1.2.3", "192.0.2.1"]),
    (["10.1.0.0/16", "10.1.2.3"], ["10.1.2.0/24"], ["10.1.3.3", "10.1.2.3"], ["10.1.2.4", "10.2.0.1"]),
    (["0.0.0.0/0"], ["10.1.2.3/32"], ["10.1.2.4", "192.0.2.1"], ["10.1.2.3"]),
    (["10.1.2.3"], ["0.0.0.0/0"], ["10.1.2.3"], ["10.1.2.4", "192.0.2.1"]),
    (["fd00:1::/32"], ["fd00:1:2::/48"], ["fd00:1::1", "fd00:1:3::1"], ["fd00:1:2::1", "2001:db8::1"]),
    ([], ["fd00:1::/65"], ["fd00:1::8000:0:0:1"], ["fd00:1::7000:0:0:1"]),
    ([], ["::/0"], [], ["fd00:1::1"]),
    (["fd00:1::1"], [], ["fd00:1::1"], ["fd00:1::2", "fd00:2::1"]),
]


@pytest.mark.parametrize(("allow", "deny", "let_in", "kept_out"), LISTS)
def test_lists(allow: list[str], deny: list[str], let_in: list[str], kept_out: list[str]) -> None:
    version = ip_network([*allow, *deny][0]).version
    dp = datapath(service("dsr", version, allow=allow, deny=deny))
    assert [dp.process(first(client)).reason for client in let_in] == ["scheduled"] * len(let_in)
    assert [dp.process(first(client)).reason for client in kept_out] == ["denied"] * len(kept_out)
    assert dp.stats()["flows"]["active"] == len(let_in)


NEAR = st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 128, 255]), st.sampled_from([0, 1, 127, 255]))


@given(
    prefixes=st.dictionaries(st.tuples(NEAR, st.integers(0, 32)), st.booleans(), max_size=12),
    clients=st.lists(NEAR, min_size=1, max_size=10),
)
def test_the_longest_prefix_decides(
    prefixes: dict[tuple[tuple[int, int, int], int], bool], clients: list[tuple[int, int, int]]
) -> None:
    """Against a walk over all prefixes."""
    listed = {
        ip_network(f"10.{a}.{b}.{c}/{length}", strict=False): allowed
        for ((a, b, c), length), allowed in prefixes.items()
    }
    lists = {name: [str(net) for net, allowed in listed.items() if allowed == (name == "allow")]
             for name in ("allow", "deny")}  # fmt: skip
    dp = datapath(service("dsr", **lists))
    for a, b, c in clients:
        client = f"10.{a}.{b}.{c}"
        holding = [network for network in listed if ip_address(client) in network]
        let_in = listed[max(holding, key=lambda network: network.prefixlen)] if holding else not lists["allow"]
        assert (dp.process(first(client)).reason != "denied") == let_in


def test_each_service_has_its_own_lists() -> None:
    dp = datapath(
        service("dsr", name="a", deny=["10.1.0.2"]), service("dsr", name="b", port=81, allow=["10.1.0.2"]),
        service("dsr", name="c", port=82),
    )  # fmt: skip
    reasons = [
        [dp.process(frame(client, 40000, VIP[4], port)).reason for port in (80, 81, 82)]
        for client in ("10.1.0.2", "10.1.0.3")
    ]
    assert reasons == [["denied", "scheduled", "scheduled"], ["scheduled", "denied", "scheduled"]]


@pytest.mark.parametrize("forward", FORWARDS)
def test_packets_of_established_flows_are_judged_too(forward: str) -> None:
    settings = {"snat": SNAT}
    dp = datapath(of_mode(forward), **settings)
    assert dp.process(first(CLIENT[4])).reason == "scheduled"
    dp.reload(config(of_mode(forward, deny=[CLIENT[4]]), **settings))
    assert dp.process(first(CLIENT[4], letters="A")).reason == "denied"
    dp.reload(config(of_mode(forward), **settings))
    assert dp.process(first(CLIENT[4], letters="A")).reason == "conntrack"


@pytest.mark.parametrize("version", [4, 6])
def test_errors_are_judged_by_the_client_of_their_flow(version: int) -> None:
    """A router has any address; but one that is denied by name is not heard."""
    network = f"{CLIENT[version]}/{ {4: 24, 6: 64}[version] }"
    allow = [str(ip_network(network, strict=False))]
    spec = service("nat", version, allow=allow)
    dp = datapath(spec)
    sent = dp.process(first(CLIENT[version])).frames[0]
    answer = dp.process(reply_to(sent)).frames[0][14:]
    from_router = error(answer, "too big", ROUTER[version])
    assert dp.process(from_router).reason == "icmp"
    dp.reload(config(spec | {"deny": [ROUTER[version]]}))
    assert dp.process(from_router).reason == "denied"
    dp.reload(config(spec | {"allow": [], "deny": [CLIENT[version]]}))
    assert dp.process(from_router).reason == "denied"


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_are_judged(version: int) -> None:
    """A later one by the service that its first one had; after a reload in between, anew."""
    spec = service("dsr", version, "udp")
    whole = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=bytes(3000))
    head, middle, tail = cut(whole, [1024, 1024])
    dp = datapath(spec)
    assert dp.process(head).reason == "scheduled"
    assert dp.process(middle).reason == "fragment"
    dp.reload(config(spec | {"deny": [CLIENT[version]]}))
    assert dp.process(tail).reason == "denied"
    head, tail = cut(whole, [1504], number=78)
    assert [result.reason for result in dp.process_batch([head, tail])] == ["denied", "fragment_unknown"]


def test_pings_are_nobody_s() -> None:
    """They are to a VIP, not to a service."""
    dp = datapath(service("dsr", deny=["0.0.0.0/0"]))
    assert dp.process(first(CLIENT[4])).reason == "denied"
    assert dp.stats()["counters"]["drops"]["denied"] == 1


# --- new flows by source ----------------------------------------------------------------------------------------------


def limited(version: int = 4, protocol: str = "tcp", **limit: Any) -> Balancer:
    return Balancer(config(service("dsr", version, protocol, source_limit=limit), flows=65536))


def begin(balancer: Balancer, clients: Iterable[str], now: float, proto: str = "tcp", port: int = 1000) -> list[bool]:
    """Whether each of these clients may begin a flow of another port than those before."""
    frames = [first(client, port + at, proto) for at, client in enumerate(clients)]
    reasons = [result[1] for result in balancer.pipeline.process(frames, round(now * 1000))]
    assert set(reasons) <= {"scheduled", "source_limit"}
    return [reason == "scheduled" for reason in reasons]


@pytest.mark.parametrize(("rate", "burst"), [(1, 1), (1, 5), (10, 1), (10, 30), (7, None), (1000, 100)])
def test_a_source_may_begin_a_burst_and_then_by_its_rate(rate: int, burst: int | None) -> None:
    """Against a bucket that is counted here, asked at times that no one chose."""
    balancer = limited(rate=rate, **({} if burst is None else {"burst": burst}))
    full = burst or rate
    tokens, before = float(full), 0
    dice = random.Random(rate)
    at = 0
    for step in range(400):
        now = before + dice.choice([0, 0, 1, 3, 400 // rate, 1500 // rate])
        tokens = min(full, tokens + (now - before) * rate / 1000)
        [got] = begin(balancer, [CLIENT[4]], now / 1000, port=1000 + step)
        if abs(tokens - round(tokens)) > 0.01 or tokens >= full:  # else it lies on the edge of a token
            assert got == (tokens >= 1), (step, tokens)
        tokens -= got
        before = now
        at += got
    assert at > full


@pytest.mark.parametrize(("version", "prefix", "same", "other"), [
    (4, None, "10.1.0.2", "10.1.0.3"), (4, 24, "10.1.0.3", "10.1.1.2"), (4, 1, "127.0.0.1", "128.0.0.1"),
    (6, None, "fd00:1::3", "fd00:1:0:1::2"), (6, 128, "fd00:1::2", "fd00:1::3"),
    (6, 48, "fd00:1:0:1::2", "fd00:1:1::2"),
])  # fmt: skip
def test_what_a_source_is(version: int, prefix: int | None, same: str, other: str) -> None:
    balancer = limited(version, rate=1, burst=2, **({} if prefix is None else {"prefix": prefix}))
    assert begin(balancer, [CLIENT[version], same, same, other, other, other], 1.0) == [True, True, False] * 2


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_only_fresh_flows_count(protocol: str) -> None:
    balancer = limited(protocol=protocol, rate=1, burst=1)
    assert begin(balancer, [CLIENT[4]], 0, protocol) == [True]
    again = [balancer.send(first(CLIENT[4], 1000, protocol, letters))[0] for letters in ("S", "A", "AP")]
    assert again == ["conntrack"] * 3
    assert begin(balancer, [CLIENT[4]], 0, protocol, port=2000) == [False]
    if protocol == "tcp":  # in mid-flow: not one that begins
        assert balancer.send(first(CLIENT[4], 3000, letters="A"))[0] == "maglev"


def test_all_workers_share_a_limit() -> None:
    settings = config(service("dsr", source_limit={"rate": 10, "burst": 20}))
    memory = FlowMemory(settings.flows)
    workers = [Balancer(settings) for _ in range(2)]
    for number, each in enumerate(workers):
        each.pipeline = Pipeline(memory, shards=range(number * 32, number * 32 + 32))
        each.reload(settings)
    frames = [first(CLIENT[4], port) for port in range(1000, 1200)]
    reasons = Counter(result[1] for each in workers for result in each.pipeline.process(frames, 0))
    assert reasons == {"scheduled": 20, "source_limit": 180, "wrong_worker": 200}


def test_each_service_counts_for_itself_and_goes_on_over_a_reload() -> None:
    one, two = (service("dsr", name=name, port=port, source_limit={"rate": 1, "burst": 1}) for name, port in
                (("one", 80), ("two", 81)))  # fmt: skip
    balancer = Balancer(config(one, two))

    def reasons(*ports: int) -> list[str]:
        return [balancer.send(frame(CLIENT[4], next(ports_used), VIP[4], port))[0] for port in ports]

    ports_used = iter(range(1000, 2000))
    assert reasons(80, 80, 81, 81) == ["scheduled", "source_limit"] * 2
    balancer.reload(config(two, one))
    assert reasons(80, 81) == ["source_limit"] * 2


def test_400_000_sources_leave_one_at_its_limit_there() -> None:
    """The table has 262,144 slots: whoever has just begun one flow is forgotten before who has begun many."""
    balancer = limited(rate=1, burst=50)
    assert begin(balancer, [CLIENT[4]] * 60, 0) == [True] * 50 + [False] * 10
    for part in range(40):
        assert reasons_of(balancer, flood(10_000, part), 0.001)["scheduled"] > 9_900  # a few come twice
    assert not any(begin(balancer, [CLIENT[4]] * 5, 0.002, port=30_000))


def test_the_clock_of_limits_wraps() -> None:
    """In 19 hours: no source is taken for one that has just begun flows, at whatever time it comes back."""
    balancer = limited(rate=1, burst=2)
    for hours in range(0, 1100, 7):
        now = hours * 3600.0
        assert begin(balancer, [CLIENT[4]] * 3, now, port=1000 + hours * 5) == [True, True, False]


# --- entries by time --------------------------------------------------------------------------------------------------


def flood(count: int, seed: int, proto: str = "tcp", version: int = 4) -> list[bytes]:
    """First packets from random sources: a frame as a template, with other addresses and ports."""
    dice = random.Random(seed)
    made = bytearray(first(CLIENT[version], 1, proto))
    address, width, port = (26, 4, 34) if version == 4 else (22, 16, 54)
    frames = []
    for _ in range(count):
        made[address : address + width] = bytes([100 if version == 4 else 0xFD]) + dice.randbytes(width - 1)
        made[port : port + 2] = dice.randbytes(2)
        frames.append(bytes(made))
    return frames


def reasons_of(balancer: Balancer, frames: Iterable[bytes], now: float) -> Counter[str]:
    return Counter(result[1] for result in balancer.pipeline.process(frames, round(now * 1000)))


# rate, flows, the entries that may be made at once, and a second later
BUDGETS = [
    ("auto", 3000, 1500, 100),  # half of the table at once, and in 15 s
    ("auto", 64, 32, 2),
    (200, 100_000, 3000, 200),
    (1, 100_000, 15, 1),
]


@pytest.mark.parametrize(("rate", "flows", "at_once", "a_second"), BUDGETS)
def test_so_many_entries_are_made(rate: int | str, flows: int, at_once: int, a_second: int) -> None:
    balancer = Balancer(config(service("dsr"), new_flow_rate=rate, flows=flows, timeouts={"tcp_syn": 15}))
    assert reasons_of(balancer, flood(5000, 1), 0) == {"scheduled": at_once, "overload": 5000 - at_once}
    assert reasons_of(balancer, flood(5000, 2), 1) == {"scheduled": a_second, "overload": 5000 - a_second}
    assert reasons_of(balancer, flood(5000, 3), 3)["scheduled"] == 2 * a_second
    assert reasons_of(balancer, flood(5000, 4), 2)["scheduled"] == 0  # a clock that steps back
    assert reasons_of(balancer, flood(5000, 5), 1000)["scheduled"] == at_once
    assert balancer.counts_agree()


@pytest.mark.parametrize(("services", "rate"), [
    ([("tcp", 80)], 100), ([("udp", 80)], 25), ([("tcp", 80), ("udp", 80)], 100),
])  # fmt: skip
def test_auto_goes_by_how_long_a_flow_of_one_packet_is_remembered(services: list[tuple[str, int]], rate: int) -> None:
    specs = [service("dsr", protocol=protocol, port=port) for protocol, port in services]
    balancer = Balancer(config(*specs, new_flow_rate="auto", flows=3000, timeouts={"tcp_syn": 15, "udp": 60}))
    proto = services[-1][0]
    reasons_of(balancer, flood(5000, 1, proto), 0)
    assert reasons_of(balancer, flood(500, 2, proto), 1)["scheduled"] == rate


def test_each_worker_has_its_share() -> None:
    settings = config(service("dsr"), new_flow_rate=640, flows=100_000, timeouts={"tcp_syn": 15})
    memory = FlowMemory(settings.flows)
    made = []
    for shards in (range(16), range(16, 64)):
        balancer = Balancer(settings)
        balancer.pipeline = Pipeline(memory, shards=shards)
        balancer.reload(settings)
        reasons_of(balancer, flood(40_000, 1), 0)
        made.append(reasons_of(balancer, flood(10_000, 2), 1)["scheduled"])
    assert made == [160, 480]


def test_a_flow_in_mid_flow_takes_an_entry_too_and_a_rst_none() -> None:
    balancer = Balancer(config(service("dsr"), new_flow_rate=1, timeouts={"tcp_syn": 3}))
    letters = [("R", "maglev")] * 5 + [("A", "maglev"), ("S", "scheduled"), ("A", "maglev"), ("A", "overload")]
    seen = [balancer.send(first(CLIENT[4], 1000 + at, letters=each))[0] for at, (each, _) in enumerate(letters)]
    assert seen == [reason for _, reason in letters]
    assert balancer.pipeline.flow_count() == 3


def test_a_reply_that_the_hash_explains_needs_no_entry() -> None:
    """nat under a flood: both legs pass, and the flow is remembered when there is room."""
    balancer = Balancer(config(service("nat"), new_flow_rate=1, timeouts={"tcp_syn": 1}))
    assert balancer.send(first("10.1.0.9"))[0] == "scheduled"
    reason, sent, backend = balancer.send(first(CLIENT[4]))
    assert reason == "overload"
    assert sent is not None
    assert balancer.send(reply_to(sent))[0] == "overload"
    assert balancer.send(first(CLIENT[4], letters="A"))[::2] == ("overload", backend)
    assert balancer.pipeline.flow_count() == 1
    assert balancer.send(reply_to(sent, "A"), now=1.0)[0] == "maglev"
    assert balancer.send(first(CLIENT[4], letters="A"), now=1.0)[::2] == ("conntrack", backend)


@pytest.mark.parametrize(("forward", "changes"), [("fullnat", {}), ("nat", {"vip": "203.0.113.0/28"})])
def test_what_needs_an_entry_is_dropped_without_one(forward: str, changes: dict[str, Any]) -> None:
    dp = datapath(service(forward, **changes), snat=SNAT, new_flow_rate=1, timeouts={"tcp_syn": 2})
    results = [dp.process(first(CLIENT[4], port)) for port in range(1000, 1005)]
    assert [result.reason for result in results] == ["scheduled"] * 2 + ["new_flow_rate"] * 3
    assert [result.backend is None for result in results] == [False] * 2 + [True] * 3
    assert dp.process(first(CLIENT[4], 1000, letters="A")).reason == "conntrack"
    [web] = dp.stats()["services"]
    assert (web["drops"], web["paths"]) == ({"new_flow_rate": 3}, {})


def test_fullnat_answers_unknown_connections_also_in_a_flood() -> None:
    dp = datapath(service("fullnat"), snat=SNAT, new_flow_rate=1, timeouts={"tcp_syn": 1})
    assert [dp.process(first(CLIENT[4], port)).reason for port in (1000, 1001)] == ["scheduled", "new_flow_rate"]
    assert dp.process(first(CLIENT[4], 1002, letters="A")).reason == "rejected"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("forward", ["dsr", "nat"])
@pytest.mark.parametrize("changes", [
    *({"scheduler": scheduler} for scheduler in EVERY), {"scheduler": "rr", "affinity": {}},
    {"scheduler": "maglev", "bounded_load": 1.01}, {"scheduler": "ketama", "bounded_load": 1.01},
], ids=" ".join)  # fmt: skip
def test_a_flow_stays_where_its_first_packet_went(changes: dict[str, Any], forward: str, protocol: str) -> None:
    """Begun without an entry, remembered later: every packet has the same backend, whatever the scheduler."""
    check = {"check": {"type": "tcp"}} if changes["scheduler"] == "lrt" else {}
    spec = service(forward, protocol=protocol, **changes, **check)
    by_client = changes["scheduler"] == "source-hash" or "affinity" in changes
    timeouts = {"tcp_syn": 15, "udp": 20}
    balancer = Balancer(config(spec, new_flow_rate=10, flows=100_000, timeouts=timeouts))
    reasons_of(balancer, flood(2000, 1, protocol), 0)
    ports = range(1000, 1200)
    begun = {port: balancer.send(first(CLIENT[4], port, protocol), 0)[::2] for port in ports}
    assert {reason for reason, _ in begun.values()} == {"overload"}
    kept = set()
    for second, letters in ((1, "S"), (3, "A"), (8, "AP"), (14, "A"), (19, "A"), (24, "AP"), (30, "A")):
        for port in ports:
            reason, _, backend = balancer.send(first(CLIENT[4], port, protocol, letters), second)
            assert backend == begun[port][1], (reason, second)
            kept |= {port} if reason == "conntrack" else set()
    assert kept == set(ports)
    assert (len({backend for _, backend in begun.values()}) > 1) != by_client
    assert balancer.counts_agree()


def test_after_a_flood_a_scheduler_has_its_say_again() -> None:
    timeouts = {"tcp_syn": 15, "udp": 20}
    balancer = Balancer(config(service("dsr", scheduler="rr"), new_flow_rate=10, timeouts=timeouts))
    reasons_of(balancer, flood(2000, 1), 0)
    assert reasons_of(balancer, flood(50, 2), 15) == {"maglev": 50}  # some may have begun in the flood
    assert reasons_of(balancer, flood(50, 3), 15.001) == {"scheduled": 50}


@pytest.mark.parametrize("scheduler", ["rr", "lc"])
def test_a_full_table_sends_every_packet_of_a_flow_to_one_backend(scheduler: str) -> None:
    """Only established flows in the way, and the budget not used up: by the hash all the same."""
    balancer = Balancer(config(service("dsr", scheduler=scheduler), flows=64))
    for port in range(1000, 1400):
        for letters in "SA":
            balancer.send(first(CLIENT[4], port, letters=letters))
    without = 0
    for port in range(5000, 5400):
        went = [balancer.send(first(CLIENT[4], port, letters=letters), 1)[::2] for letters in "SAA"]
        without += went[0][0] == "overload"
        assert len({backend for _, backend in went}) == 1
    assert without > 300
    assert balancer.counts_agree()


@pytest.mark.parametrize(("rate", "forward", "proto"), [
    ("auto", "dsr", "tcp"), ("auto", "nat", "udp"), (1_000_000, "nat", "tcp"), (1_000_000, "dsr", "udp"),
])  # fmt: skip
def test_a_flood_of_200_000_sources(rate: int | str, forward: str, proto: str) -> None:
    """Into a small table, at 50,000 a second, with established flows that send a packet a second: none is lost."""
    limits = {"tcp_syn": 15, "tcp_established": 900, "udp": 60}
    balancer = Balancer(config(service(forward, protocol=proto), new_flow_rate=rate, flows=4096, timeouts=limits))
    ports = range(1000, 2000)
    for port in ports:
        sent = balancer.send(first(CLIENT[4], port, proto))[1]
        assert sent is not None
        balancer.send(reply_to(sent) if forward == "nat" else first(CLIENT[4], port, proto, "A"))
        balancer.send(first(CLIENT[4], port, proto, "A"))
    kept = {flow[2]: flow[5] for flow in balancer.flows() if flow[6] in ("established", "udp")}
    assert len(kept) == 1000
    reasons: Counter[str] = Counter()
    for tenth in range(40):
        reasons += reasons_of(balancer, flood(5000, tenth, proto), tenth / 10)
        if tenth % 10 == 9:
            alive = reasons_of(balancer, (first(CLIENT[4], port, proto, "A") for port in ports), tenth / 10)
            assert alive == {"conntrack": 1000}
    assert {flow[2]: flow[5] for flow in balancer.flows() if flow[2] in ports and str(flow[1]) == CLIENT[4]} == kept
    assert balancer.pipeline.flow_count() <= balancer.pipeline.flow_capacity
    assert balancer.counts_agree()
    if rate == "auto":
        assert reasons["scheduled"] <= 2048 + 4 * 4096 / 2 / 15
        assert balancer.pipeline.counters()["flows_evicted"] == 0
    else:
        assert balancer.pipeline.counters()["flows_evicted"] > 100_000
    assert reasons.total() == 200_000
    assert set(reasons) <= {"scheduled", "overload"}


# --- counters by service ----------------------------------------------------------------------------------------------


def test_drops_and_fallbacks_are_counted_by_service() -> None:
    dp = datapath(
        service("nat", name="web", deny=["10.1.0.9"]),
        service("dsr", name="dns", protocol="udp", source_limit={"rate": 1}),
        service("dsr", name="idle", port=81),
        service("dsr", name="empty", port=82, backends=[]),
    )  # fmt: skip
    sent = dp.process(first(CLIENT[4])).frames[0]
    dp.process(reply_to(sent))
    dp.process(first(CLIENT[4], letters="A"))
    dp.process_batch([first("10.1.0.9"), first(CLIENT[4], 41000, letters="A"), first(CLIENT[4], letters="SF")])
    dp.process_batch(first(CLIENT[4], port, "udp") for port in range(5))
    dp.process(frame(CLIENT[4], 40000, VIP[4], 82))
    dp.process(frame(CLIENT[4], 40000, VIP[4], 83))
    dp.process(frame(BACKENDS[4][0], 8080, "10.1.0.77", 1))  # of no flow
    dp.process(frame(CLIENT[4], 40001, VIP[4], 80, ttl=1))
    seen = {each["name"]: (each["paths"], each["drops"]) for each in dp.stats()["services"]}
    assert seen == {
        "web": ({"maglev": 1, "time_exceeded": 1}, {"denied": 1, "tcp_flags": 1}),
        "dns": ({}, {"source_limit": 4}),
        "idle": ({}, {}),
        "empty": ({}, {"no_backend": 1}),
    }
    drops = dp.stats()["counters"]["drops"]
    assert {name: count for name, count in drops.items() if count} == {
        "denied": 1, "tcp_flags": 1, "source_limit": 4, "no_backend": 1, "reply_unknown": 1,
    }  # fmt: skip


def test_replies_and_fragments_count_for_their_service() -> None:
    dp = datapath(service("nat", protocol="udp", name="one"), service("nat", protocol="udp", name="two", port=81))
    for port in (80, 81):
        whole = frame(CLIENT[4], 40000 + port, VIP[4], port, "udp", payload=bytes(2000))
        assert [dp.process(each).reason for each in cut(whole, [1008], port)] == ["scheduled", "fragment"]
        sent = take_apart(dp.process(frame(CLIENT[4], 50000, VIP[4], port, "udp")).frames[0])
        answer = frame(sent.dst, sent.dport, sent.src, sent.sport, "udp", ttl=1)
        assert dp.process(answer).reason == "time_exceeded"
    dp.process(answer)
    seen = {each["name"]: each["paths"] for each in dp.stats()["services"]}
    assert seen == {"one": {"fragment": 1, "time_exceeded": 1}, "two": {"fragment": 1, "time_exceeded": 2}}


def test_counters_keep_to_the_name_over_reloads() -> None:
    web, api = service("dsr", name="web", backends=[]), service("dsr", name="api", port=81, backends=[])
    dp = datapath(web, api)
    for port in (80, 80, 81):
        dp.process(frame(CLIENT[4], 40000, VIP[4], port))

    def seen() -> dict[str, int]:
        return {each["name"]: each["drops"].get("no_backend", 0) for each in dp.stats()["services"]}

    assert seen() == {"web": 2, "api": 1}
    dp.reload(config(service("dsr", name="new", port=82, backends=[]), api, web), now=1)
    assert seen() == {"new": 0, "api": 1, "web": 2}
    dp.reload(config(api), now=2)
    dp.reload(config(service("dsr", name="later", port=83, backends=[]), api), now=100)
    assert seen() == {"later": 0, "api": 1}  # the slot of web, or of new, and none of their counts
    dp.process(frame(CLIENT[4], 40000, VIP[4], 83))
    assert seen() == {"later": 1, "api": 1}


def events_of(balancer: Balancer) -> dict[str, dict[str, int]]:
    return {
        plan.name: {name: count for name, count in balancer.pipeline.service_events(plan.slot).items() if count}
        for plan in balancer.plans
    }


@pytest.mark.parametrize("changes", [
    {"scheduler": "maglev", "bounded_load": 1.01}, {"scheduler": "ketama", "bounded_load": 1.01},
    {"scheduler": "maglev", "backends": [{"address": address, "max_flows": 100} for address in BACKENDS[4]]},
])  # fmt: skip
def test_flows_that_a_limit_moves_on_are_counted(changes: dict[str, Any]) -> None:
    """Those that would be elsewhere without it."""
    bound = Balancer(config(service("dsr", name="bound", **changes), service("dsr", name="other", port=81)))
    free = Balancer(config(service("dsr", scheduler=changes["scheduler"])))
    moved = 0
    for port in range(1000, 1300):
        moved += bound.send(first(CLIENT[4], port))[2] != free.send(first(CLIENT[4], port))[2]
    assert moved > 0
    counted = events_of(bound)
    assert moved <= counted["bound"].pop("load_moved") <= moved + 5  # the least loaded of all may be the first named
    assert counted == {"bound": {}, "other": {}}


@pytest.mark.parametrize("scheduler", ["rr", "random", "p2c"])
def test_turns_and_lots_that_a_limit_moves_on_are_counted(scheduler: str) -> None:
    backends = [{"address": BACKENDS[4][0], "max_flows": 1}, *({"address": address} for address in BACKENDS[4][1:])]
    balancer = Balancer(config(service("dsr", name="web", scheduler=scheduler, backends=backends)))
    reasons_of(balancer, [first(CLIENT[4], port) for port in range(1000, 1300)], 0)
    counted = events_of(balancer)["web"].pop("load_moved")
    assert counted == 149 if scheduler == "rr" else 10 < counted < 300


def test_flows_that_a_conflict_moves_on_are_counted() -> None:
    web, api = service("nat", name="web"), service("nat", name="api", vip="203.0.113.20")
    balancer = Balancer(config(web, api))
    free = Balancer(config(api))
    moved = 0
    for port in range(1000, 1300):
        balancer.send(first(CLIENT[4], port))
        packet = frame(CLIENT[4], port, "203.0.113.20", 80)
        moved += balancer.send(packet)[2] != free.send(packet)[2]
    assert moved > 50
    assert events_of(balancer) == {"web": {}, "api": {"conflict_moved": moved}}


def test_clients_that_stick_and_those_that_are_placed_anew_are_counted() -> None:
    web = service("dsr", name="web", affinity={"timeout": "5m"})
    balancer = Balancer(config(web, service("dsr", name="other", port=81)))
    clients = [f"10.1.0.{number}" for number in range(1, 61)]
    before = {client: balancer.send(first(client, 1000))[2] for client in clients}
    for client in clients:
        assert balancer.send(first(client, 1001))[2] == before[client]
    assert events_of(balancer) == {"web": {"affine": 60}, "other": {}}
    leaves = f"{BACKENDS[4][0]}:80"
    balancer.standings.drain(("web", leaves))
    balancer.plan()
    moved = sum(balancer.send(first(client, 1002))[2] != before[client] for client in clients)
    assert 0 < moved == Counter(before.values())[leaves]
    assert events_of(balancer) == {"web": {"affine": 120 - moved, "affine_moved": moved}, "other": {}}


def test_evicted_and_untracked_flows_are_counted_for_their_services() -> None:
    """Half-open ones for the service that has lost them, whoever came instead."""
    services = [service("dsr", name=name, port=port) for name, port in (("old", 81), ("new", 80))]
    balancer = Balancer(config(*services, flows=64))
    old = [frame(CLIENT[4], port, VIP[4], 81, flags=flags("S")) for port in range(1000, 1060)]
    balancer.pipeline.process(old, 0)
    for at in range(20):
        balancer.pipeline.process([first(CLIENT[4], port) for port in range(20_000 + at * 100, 20_100 + at * 100)], at)
    left = sum(flow[4] == 81 for flow in balancer.flows())
    counted = events_of(balancer)
    assert counted["old"] == {"flows_evicted": 60 - left}
    assert counted["new"]["flows_evicted"] == balancer.pipeline.counters()["flows_evicted"] - (60 - left)
    for flow in balancer.flows():
        balancer.send(frame(str(flow[1]), flow[2], VIP[4], flow[4], flags=flags("A")), 0.5)
    reasons = reasons_of(balancer, [first(CLIENT[4], port) for port in range(30_000, 30_500)], 0.6)
    assert reasons["overload"] > 100
    assert events_of(balancer)["new"]["flows_untracked"] == reasons["overload"]
    assert balancer.pipeline.counters()["flows_untracked"] == reasons["overload"]


def test_events_begin_anew_with_another_service() -> None:
    balancer = Balancer(config(service("dsr", name="web", affinity={})))
    for port in (1000, 1001):
        balancer.send(first(CLIENT[4], port))
    slot = balancer.plans[0].slot
    assert balancer.pipeline.service_events(slot)["affine"] == 1
    balancer.pipeline.renew((), [slot])
    assert set(balancer.pipeline.service_events(slot).values()) == {0}
    with pytest.raises(ValueError, match=r"slots of services are 0\.\.65535, not -1"):
        balancer.pipeline.service_events(-1)


def test_slots_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"slots of services are 0\.\.65535, not 65536"):
        Pipeline(64).service_counters(65536)
