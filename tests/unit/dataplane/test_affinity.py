"""Client-IP affinity: who follows whom, for how long, and what ends it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from fastlb import Datapath
from fastlb._core import AffinityMemory, FlowMemory, Pipeline, Services, explain_tuple
from fastlb.plan.affinity import MAX_PLACE, stickiness_of
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import BACKENDS, CLIENT, KEY, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import frame

EVERY = ["maglev", "ketama", "source-hash", "rr", "wrr", "random", "lc", "wlc", "lrt", "p2c"]
STICKY = {"by": "client-ip", "timeout": "300s"}
HALF = 0.6  # seconds: to so much a timeout is exact


def site(scheduler: str = "rr", forward: str = "dsr", version: int = 4, **changes: Any) -> dict[str, Any]:
    """A service whose scheduler alone would part any client's flows."""
    return service(forward, version, **{"scheduler": scheduler, "affinity": STICKY} | changes)


def syn(client: str = CLIENT[4], sport: int = 1000, dport: int = 80, letters: str = "S") -> bytes:
    return frame(client, sport, VIP[ip_address(client).version], dport, "tcp", flags=flags(letters))


def host_of(backend: str | None) -> str:
    return (backend or "none").rsplit(":", 1)[0].strip("[]")


def hosts(dp: Datapath, client: str, sports: Iterable[int], dport: int = 80, now: float = 0.0) -> list[str]:
    """The backend addresses of new flows."""
    return [host_of(each.backend) for each in dp.process_batch([syn(client, sport, dport) for sport in sports], now)]


def connect(dp: Datapath, client: str, sports: Iterable[int], dport: int = 80, now: float = 0.0) -> list[str]:
    """The backends' keys of new flows, each of which is established at once."""
    keys = []
    for sport in sports:
        sent = dp.process(syn(client, sport, dport), now)
        keys.append(sent.backend or "none")
        if sent.backend:
            dp.process(reply_to(sent.frames[0]), now)  # in one-way modes nobody's answer
            dp.process(syn(client, sport, dport, "A"), now)
    return keys


def connected_hosts(dp: Datapath, client: str, sports: Iterable[int], dport: int = 80, now: float = 0.0) -> list[str]:
    """The backends' addresses of new flows, each of which is established at once."""
    return [host_of(key) for key in connect(dp, client, sports, dport, now)]


def affine(lb: Balancer, client: str = CLIENT[4], dport: int = 80) -> Any:
    """What the table knows of a client."""
    found = explain_tuple(lb.pipeline, ip_address(client), 1, ip_address(VIP[4]), dport, 6, lb.pipeline.now_ms)
    return found["affine"]


# ---- who follows


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("scheduler", EVERY)
def test_the_flows_of_a_client_have_one_backend(scheduler: str, version: int) -> None:
    dp = datapath(site(scheduler, "nat", version))
    clients = [f"10.9.0.{host}" if version == 4 else f"fd00:9::{host:x}" for host in range(1, 60)]
    sports = [*range(1000, 1010), *range(2000, 2010)]
    seen = {client: set(hosts(dp, client, sports)) for client in clients}
    assert {len(each) for each in seen.values()} == {1}
    assert set.union(*seen.values()) == set(BACKENDS[version])
    assert dp.stats()["counters"]["affine"] == len(clients) * 19


@pytest.mark.parametrize("forward", ["nat", "fullnat", "dsr", "ipip", "gre", "gue"])
def test_in_every_mode(forward: str) -> None:
    dp = datapath(site("rr", forward), snat=["192.0.2.77"])
    assert len(set(hosts(dp, CLIENT[4], range(1000, 1030)))) == 1


@pytest.mark.parametrize(("version", "prefix", "near", "far"), [
    (4, 24, ["10.9.1.1", "10.9.1.255"], "10.9.2.1"),
    (4, 31, ["10.9.1.2", "10.9.1.3"], "10.9.1.4"),
    (4, 32, ["10.9.1.2"], "10.9.1.3"),
    (4, 1, ["10.9.1.2", "127.0.0.9"], "128.0.0.1"),
    (6, 56, ["fd00:9:0:ff::1", "fd00:9::2"], "fd00:9:0:100::1"),
    (6, 96, ["fd00:9::1:2", "fd00:9::ffff:ffff"], "fd00:9::1:0:0"),
    (6, 128, ["fd00:9::2"], "fd00:9::3"),
])  # fmt: skip
def test_clients_of_one_prefix_are_one(version: int, prefix: int, near: list[str], far: str) -> None:
    dp = datapath(site("rr", version=version, affinity=STICKY | {"prefix": prefix}))
    first = {host for client in near for host in hosts(dp, client, range(1000, 1003))}
    assert len(first) == 1
    assert set(hosts(dp, far, [1000])).isdisjoint(first)  # rr: the next one
    assert dp.stats()["affinity"] == {"clients": 2, "entries": 65536}


def test_udp_flows_follow_too() -> None:
    dp = datapath(site("rr", protocol="udp"))
    sent = [dp.process(frame(CLIENT[4], sport, VIP[4], 80, "udp")).backend for sport in range(1000, 1020)]
    assert len(set(sent)) == 1


def test_without_affinity_nothing_is_remembered() -> None:
    dp = datapath(site("rr", affinity=None))
    assert len(set(hosts(dp, CLIENT[4], range(1000, 1003)))) == 3
    assert dp.stats()["affinity"]["clients"] == 0
    assert dp.stats()["counters"]["affine"] == 0


def test_services_without_a_group_go_their_own_ways() -> None:
    dp = datapath(site(name="a"), site(name="b", port=443))
    hosts(dp, "10.9.0.9", [1], 443)  # turns of b are one further
    first, second = hosts(dp, CLIENT[4], range(1000, 1005)), hosts(dp, CLIENT[4], range(1000, 1005), 443)
    assert (len(set(first)), len(set(second))) == (1, 1)
    assert first != second


# ---- groups

GROUP = STICKY | {"group": "site"}


def grouped(changes: dict[str, Any] | None = None, **both: Any) -> list[dict[str, Any]]:
    plain = site(name="plain", affinity=GROUP, **both)
    secure = site(**{"name": "secure", "port": 443, "affinity": GROUP} | both | (changes or {}))
    return [plain, secure]


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_ports_80_and_443_share_a_client(forward: str) -> None:
    backends = [{"address": address} | ({"port": 8443} if forward == "nat" else {}) for address in BACKENDS[4]]
    dp = datapath(*grouped({"backends": backends}, forward=forward))
    for number in range(1, 40):
        client = f"10.9.0.{number}"
        first, second = (80, 443) if number % 2 else (443, 80)
        seen = {*hosts(dp, client, range(1000, 1005), first), *hosts(dp, client, range(2000, 2005), second)}
        assert len(seen) == 1
        assert hosts(dp, f"10.9.1.{number}", [1])  # the turns go on


def test_a_backend_of_one_service_alone_is_no_one_for_the_other() -> None:
    lone, common = "10.3.0.11", "10.3.0.12"
    dp = datapath(*grouped(
        {"backends": [{"address": common}]}, backends=[{"address": lone, "weight": 9}, {"address": common}],
        scheduler="wrr",
    ))  # fmt: skip
    assert hosts(dp, CLIENT[4], [1000, 1001]) == [lone, lone]
    assert hosts(dp, CLIENT[4], [1000]) == [lone]
    assert hosts(dp, CLIENT[4], [1000], 443) == [common]
    assert hosts(dp, CLIENT[4], range(2000, 2009)) == [common] * 9  # what one remembers holds for all


def test_groups_of_one_name_and_another_prefix_do_not_meet() -> None:
    """As when a reload changes the prefix of all services."""
    stickiness = {
        stickiness_of(config(site(affinity=each, version=version)).services[0])
        for version in (4, 6)
        for each in (GROUP, GROUP | {"prefix": 24}, GROUP | {"group": "other"}, STICKY)
    }
    assert len({each.group for each in stickiness if each}) == 8


# ---- release


def test_a_backend_leaves_and_its_clients_are_placed_anew() -> None:
    dp = datapath(site())
    before = {number: hosts(dp, f"10.9.0.{number}", [1000])[0] for number in range(1, 31)}
    left = BACKENDS[4][0]
    dp.reload(config(site(backends=[{"address": each} for each in BACKENDS[4][1:]])))
    after = {number: hosts(dp, f"10.9.0.{number}", range(2000, 2005)) for number in before}
    assert {len(set(each)) for each in after.values()} == {1}
    for number, host in before.items():
        assert (after[number][0] == host) == (host != left)
    dp.reload(config(site()))  # and when it comes back, those who were placed anew stay
    assert {number: hosts(dp, f"10.9.0.{number}", [3000])[0] for number in before} == {
        number: each[0] for number, each in after.items()
    }


def test_a_backend_that_comes_back_finds_the_clients_that_were_idle() -> None:
    dp = datapath(site())
    before = {number: hosts(dp, f"10.9.0.{number}", [1000])[0] for number in range(1, 31)}
    dp.reload(config(site(backends=[{"address": BACKENDS[4][1]}])), now=1.0)
    dp.reload(config(site()), now=2.0)
    assert {number: hosts(dp, f"10.9.0.{number}", [2000])[0] for number in before} == before


@pytest.mark.parametrize("on_leave", ["keep", "rehash", "reset"])
def test_a_backend_that_is_kept_for_its_flows_takes_no_client(on_leave: str) -> None:
    dp = datapath(site(name="web", on_leave=on_leave))
    [left] = hosts(dp, CLIENT[4], [1000])
    others = [{"address": each} for each in BACKENDS[4] if each != left]
    dp.reload(config(site(name="web", on_leave=on_leave, backends=others)), now=1.0)
    seen = hosts(dp, CLIENT[4], range(2000, 2005), now=1.0)
    assert len(set(seen)) == 1
    assert left not in seen


def check(lb: Balancer, key: str, *, passed: bool) -> None:
    """Three checks in a row end so."""
    for _ in range(3):
        lb.standings.checked(lb.settings.services[0], key, 0.01 if passed else None, "", 0.0)


def test_what_a_standing_does_to_clients() -> None:
    """The table of docs/backends.md, as new flows see it; the operator's words are taken back in between."""
    settings = config(site("wrr", name="web", check={"type": "tcp"}))
    key = f"{BACKENDS[4][0]}:80"
    lb = Balancer(settings)
    for address in BACKENDS[4]:
        check(lb, f"{address}:80", passed=True)
    lb.plan()

    def client_of_key(first: int) -> int:
        return next(number for number in range(first, first + 9) if lb.send(syn(f"10.9.0.{number}"))[2] == key)

    keeps = {"weight": True, "draining": False, "down": False}
    for at, (word, kept) in enumerate(keeps.items()):
        number = client_of_key(1 + 20 * at)
        match word:
            case "weight":
                lb.standings.set_weight(("web", key), 0, 0.0)
            case "draining":
                lb.standings.drain(("web", key))
            case "down":
                check(lb, key, passed=False)
        lb.plan()
        sent = [lb.send(syn(f"10.9.0.{number}", sport))[2] for sport in range(2000, 2010)]
        assert set(sent) == {key} if kept else (key not in sent and len(set(sent)) == 1), word
        others = {lb.send(syn(f"10.9.0.{20 * at + other}", 5))[2] for other in range(10, 20)}
        assert key not in others, word  # nobody new
        lb.standings.enable(("web", key), 0.0)
        check(lb, key, passed=True)
        lb.plan()


def test_all_weights_are_0_and_known_clients_stay() -> None:
    dp = datapath(site())
    before = hosts(dp, CLIENT[4], [1000])
    dp.reload(config(site(backends=[{"address": address, "weight": 0} for address in BACKENDS[4]])))
    assert hosts(dp, CLIENT[4], [1001, 1002]) == before * 2
    assert dp.process(syn("10.9.0.1")).reason == "no_backend"


def test_a_reload_of_weights_and_scheduler_changes_nothing() -> None:
    dp = datapath(site("rr", "nat"))
    before = {number: hosts(dp, f"10.9.0.{number}", [1000])[0] for number in range(1, 31)}
    weights = [{"address": address, "weight": weight} for address, weight in zip(BACKENDS[4], (1, 90, 0), strict=True)]
    for sport, scheduler in enumerate(EVERY, 2000):
        dp.reload(config(site(scheduler, "nat", backends=weights)))
        assert {number: hosts(dp, f"10.9.0.{number}", [sport])[0] for number in before} == before


def test_a_client_whose_backend_is_full_is_placed_anew() -> None:
    capped = [{"address": address, "max_flows": 3} for address in BACKENDS[4]]
    dp = datapath(site(backends=capped))
    seen = hosts(dp, CLIENT[4], range(1000, 1010))
    assert Counter(seen) == {BACKENDS[4][0]: 3, BACKENDS[4][1]: 3, BACKENDS[4][2]: 3, "none": 1}
    assert seen == sorted(seen)
    assert dp.process(syn(sport=1010)).reason == "backends_full"


# ---- time


@pytest.mark.parametrize(("timeout", "pause", "stays"), [
    (1, 0.999, True), (1, 1 + HALF, False),
    (300, 299.9, True), (300, 300 + HALF, False),
    (86400, 86399, True), (86400, 86400 + HALF, False),
    (300, 500_000, False),
])  # fmt: skip
@pytest.mark.parametrize("start", [0.0, 0.255, 1000.123, (1 << 32) / 1000 - 1, (1 << 30) / 1000 - 0.1])
def test_timeouts(timeout: int, pause: float, stays: bool, start: float) -> None:
    """Also where milliseconds, and the ticks of slots, come round."""
    dp = datapath(site(affinity=STICKY | {"timeout": timeout}))
    [before] = connected_hosts(dp, CLIENT[4], [1000], now=start)
    [after] = hosts(dp, CLIENT[4], [1001], now=start + pause)
    assert (after == before) == stays


def test_each_new_flow_renews_it() -> None:
    dp = datapath(site(affinity=STICKY | {"timeout": 10}))
    seen = {connected_hosts(dp, CLIENT[4], [1000 + step], now=9.0 * step)[0] for step in range(20)}
    assert len(seen) == 1
    dp.process(syn(sport=1019, letters="A"), now=9 * 19 + 9)  # a packet of a flow that is there does not
    assert set(hosts(dp, CLIENT[4], [2000], now=9 * 19 + 11)).isdisjoint(seen)


@pytest.mark.parametrize("step", [-1.0, -299.0, -3600.0, -86400.0])
def test_a_clock_that_steps_back_lets_nobody_go(step: float) -> None:
    dp = datapath(site())
    before = connected_hosts(dp, CLIENT[4], [1000], now=200_000.0)
    assert connected_hosts(dp, CLIENT[4], [1001], now=200_000.0 + step) == before
    assert connected_hosts(dp, CLIENT[4], [1002], now=200_000.0 + step + 299) == before
    assert hosts(dp, CLIENT[4], [1003], now=200_000.0 + step + 299 + 301) != before


def test_a_new_timeout_holds_from_the_next_flow_on() -> None:
    dp = datapath(site())
    before = connected_hosts(dp, CLIENT[4], [1000])
    dp.reload(config(site(affinity=STICKY | {"timeout": 10})))
    assert connected_hosts(dp, CLIENT[4], [1001], now=100.0) == before
    assert hosts(dp, CLIENT[4], [1002], now=111.0) != before


def test_what_has_ended_is_cleared_and_never_comes_back() -> None:
    """Ticks come round after twelve days, and would find the client again."""
    dp = datapath(site())
    round_of_ticks = (1 << 22) * 0.256
    before = hosts(dp, CLIENT[4], [1000])
    assert dp.stats()["affinity"]["clients"] == 1
    for minute in range(0, 40, 2):
        dp.process_batch([], now=60.0 * minute)
    assert hosts(dp, CLIENT[4], [1001], now=round_of_ticks) != before


# ---- what is learnt of connections that are established, and of others

TRIAL = 12 * 0.256  # seconds that a client is remembered by its SYN alone
WAYS_TO_FAIL = {  # what comes after the SYN, and would establish nothing
    "nothing": [], "the SYN again": ["S"], "a RST of the client's": ["R"],
}  # fmt: skip
EVERY_MODE = ["nat", "fullnat", "dsr", "ipip", "gre", "gue"]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("after", WAYS_TO_FAIL.values(), ids=WAYS_TO_FAIL)
@pytest.mark.parametrize("forward", EVERY_MODE)
def test_a_flow_that_was_never_established_binds_nobody(forward: str, after: list[str], version: int) -> None:
    """Flows that begin together stay together; but whoever tries again a little later is placed anew."""
    sources = ["192.0.2.77", "2001:db8::77"]
    dp = datapath(site("rr", forward, version), snat=sources)
    seen = []
    for attempt in range(3):
        now = 4.0 * attempt
        together = [dp.process(syn(CLIENT[version], 1000 * (attempt + 1) + n), now + n / 10) for n in range(5)]
        for letters in after:
            dp.process(syn(CLIENT[version], 1000 * (attempt + 1), letters=letters), now + 1)
        assert len({each.backend for each in together}) == 1
        seen.append(together[0].backend)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_a_client_whose_backend_answers_no_more_is_let_go(forward: str, version: int) -> None:
    """It was bound by connections of before; those that fail do not renew that, however many there are."""
    dp = datapath(site("rr", forward, version, affinity=STICKY | {"timeout": 10}))
    before = connected_hosts(dp, CLIENT[version], [1000])
    for second in range(1, 10):
        assert hosts(dp, CLIENT[version], [1000 + second], now=float(second)) == before
    assert hosts(dp, CLIENT[version], [2000], now=10 + HALF) != before


def test_the_last_connection_to_be_established_counts() -> None:
    """One that took longer than its client was remembered is learnt, unless the client has another backend by then."""
    dp = datapath(site("rr"))
    late = dp.process(syn(sport=1000)).backend
    dp.process(syn(sport=1000, letters="A"), now=TRIAL + 1)
    assert dp.process(syn(sport=1001), now=200.0).backend == late
    other = dp.process(syn("10.9.0.9", 1000)).backend
    [placed] = connect(dp, "10.9.0.9", [1001], now=TRIAL + 1)
    assert placed != other
    dp.process(syn("10.9.0.9", 1000, letters="A"), now=TRIAL + 2)
    assert dp.process(syn("10.9.0.9", 1002), now=200.0).backend == placed


def test_a_removed_backend_teaches_nothing() -> None:
    dp = datapath(site("rr", name="web"))
    sent = dp.process(syn())
    left = [{"address": each} for each in BACKENDS[4] if each != host_of(sent.backend)]
    dp.reload(config(site("rr", name="web", backends=left)), now=1.0)
    assert dp.process(syn(letters="A"), now=2.0).backend == sent.backend  # which it keeps
    assert host_of(dp.process(syn(sport=2000), now=2.0).backend) != host_of(sent.backend)


# ---- the table


def template() -> bytearray:
    return bytearray(frame("10.0.0.1", 7, VIP[4], 80, "udp", with_checksum=False))


def of_clients(addresses: Iterable[int]) -> list[bytes]:
    made = template()
    frames = []
    for address in addresses:
        made[26:30] = address.to_bytes(4, "big")
        frames.append(bytes(made))
    return frames


def test_a_hundred_thousand_clients_find_a_bounded_table() -> None:
    """All slots are in use, and most of the last clients are remembered, but those whose sets were overrun since."""
    settings = config(site("rr", protocol="udp"))
    lb = Balancer(settings)
    lb.pipeline = Pipeline(settings.flows, KEY, affinity=1001)  # with a random key, how many is a matter of luck
    lb.reload(settings)
    assert lb.pipeline.affinity_slots() == (0, 1008)  # whole sets of eight
    draw = random.Random(5)
    addresses = [draw.randrange(1 << 24, 0xDF000000) for _ in range(100_000)]
    for first in range(0, len(addresses), 5_000):
        lb.pipeline.process(of_clients(addresses[first : first + 5_000]), first // 5)
    assert lb.pipeline.affinity_slots() == (1008, 1008)
    before = lb.pipeline.counters()["affine"]
    lb.pipeline.process(of_clients(addresses[-300:]), 99_000)
    known = lb.pipeline.counters()["affine"] - before
    assert known > 200


def test_a_full_set_gives_up_the_client_whose_time_is_up_first() -> None:
    """One set of eight: the ninth client takes the place of the first."""
    settings = config(site("rr"))
    lb = Balancer(settings)
    lb.pipeline = Pipeline(settings.flows, KEY, affinity=8)
    lb.reload(settings)
    clients = [f"10.9.0.{number}" for number in range(1, 10)]
    placed = {client: lb.send(syn(client), now=number)[2] for number, client in enumerate(clients)}
    for number, client in enumerate(clients):
        lb.send(syn(client, letters="A"), now=number)
    assert lb.pipeline.affinity_slots() == (8, 8)
    known = {client: affine(lb, client) for client in clients}
    assert known.pop("10.9.0.1") is None
    assert {client: lb.keys[each["backend"]] for client, each in known.items() if each} == {
        client: placed[client] for client in clients[1:]
    }


@pytest.mark.parametrize("entries", [0, (1 << 24) + 1])
def test_sizes_that_cannot_be(entries: int) -> None:
    with pytest.raises(ValueError, match=r"an affinity table takes 1\.\.16777216 entries"):
        AffinityMemory(entries)


def test_all_workers_share_it() -> None:
    """Each flow is of the worker that owns its shard, and all of a client go to one backend."""
    settings = config(site("rr", name="web"))
    flows, affinity = FlowMemory(settings.flows, KEY), AffinityMemory(64)
    workers = []
    for at in range(4):
        worker = Balancer(settings)
        worker.pipeline = Pipeline(flows, shards=range(at, 64, 4), affinity=affinity)
        worker.reload(settings)
        workers.append(worker)
    seen: dict[str, set[str | None]] = {}
    for sport in range(1000, 1040):
        for client in ("10.9.0.1", "10.9.0.2", "10.9.0.3"):
            taken = [sent for worker in workers if (sent := worker.send(syn(client, sport)))[0] != "wrong_worker"]
            assert len(taken) == 1
            seen.setdefault(client, set()).add(taken[0][2])
    assert {len(each) for each in seen.values()} == {1}
    assert {worker.pipeline.affinity_slots() for worker in workers} == {(3, 64)}
    placed = [worker.pipeline.counters()["affine"] for worker in workers]
    assert min(placed) > 0
    assert sum(placed) == 3 * 39


# ---- several backends at one address

A, B, C = (IPv4Address(address) for address in BACKENDS[4])


def at(*ports: int, address: IPv4Address = A) -> list[dict[str, Any]]:
    return [{"address": str(address), "port": port} for port in ports]


def backends_of(dp: Datapath, client: str, sports: Iterable[int], dport: int = 80, now: float = 0.0) -> list[str]:
    return [each.backend or "none" for each in dp.process_batch([syn(client, each, dport) for each in sports], now)]


PAIR = [*at(81, 82), *at(80, address=B)]
MANY = [f"10.9.{number >> 8}.{number & 255}" for number in range(1200)]


@pytest.mark.parametrize("forward", ["nat", "fullnat"])
@pytest.mark.parametrize("scheduler", EVERY)
def test_a_client_keeps_its_backend_among_several_at_one_address(scheduler: str, forward: str) -> None:
    dp = datapath(site(scheduler, forward, backends=PAIR), snat=["192.0.2.77"])
    seen = {client: set(backends_of(dp, client, range(1000, 1004))) for client in MANY[:90]}
    assert {len(each) for each in seen.values()} == {1}
    assert set.union(*seen.values()) == {f"{A}:81", f"{A}:82", f"{B}:80"}


def test_first_and_later_flows_have_the_same_shares() -> None:
    dp = datapath(site("wrr", "nat", backends=[b | {"weight": w} for b, w in zip(PAIR, (3, 1, 2), strict=True)]))
    first = [backends_of(dp, client, [1000])[0] for client in MANY]
    assert Counter(first) == {f"{A}:81": 600, f"{A}:82": 200, f"{B}:80": 400}
    assert [backends_of(dp, client, [2000])[0] for client in MANY] == first


def test_a_flow_without_an_entry_goes_to_the_very_backend() -> None:
    """Whatever the scheduler and the hash say: also where they would name the other one at its address."""
    dp = datapath(site("rr", "nat", backends=at(81, 82)), timeouts={"tcp_established": 1})
    first = {client: connect(dp, client, [1000])[0] for client in MANY[:60]}
    later = {client: dp.process(syn(client, 1000, letters="A"), now=20.0) for client in first}
    assert {each.reason for each in later.values()} == {"maglev"}
    assert {client: each.backend for client, each in later.items()} == first
    assert set(first.values()) == {f"{A}:81", f"{A}:82"}


@pytest.mark.parametrize("gone", [{"weight": 0}, None], ids=["weight 0", "removed"])
def test_one_of_several_that_takes_no_new_clients(gone: dict[str, Any] | None) -> None:
    """With weight 0 it keeps those it has. Removed, its clients go to the other one at its address, and stay there."""
    dp = datapath(site("rr", "nat", backends=PAIR))
    first = {client: backends_of(dp, client, [1000])[0] for client in MANY[:90]}
    left = [*at(81), *at(80, address=B)] + ([at(82)[0] | gone] if gone else [])
    expected = first if gone else {
        client: f"{A}:81" if backend == f"{A}:82" else backend for client, backend in first.items()
    }  # fmt: skip
    dp.reload(config(site("rr", "nat", backends=left)))
    assert {client: connect(dp, client, [2000])[0] for client in first} == expected
    dp.reload(config(site("rr", "nat", backends=PAIR)))
    assert {client: backends_of(dp, client, [3000])[0] for client in first} == expected
    assert {backends_of(dp, client, [1000])[0] for client in MANY[90:120]} == {f"{A}:81", f"{A}:82", f"{B}:80"}


def test_one_more_at_an_address_moves_nobody() -> None:
    dp = datapath(site("rr", "nat", backends=[*at(81), *at(80, address=B)]))
    first = {client: backends_of(dp, client, [1000])[0] for client in MANY[:90]}
    dp.reload(config(site("rr", "nat", backends=PAIR)))
    assert {client: backends_of(dp, client, [2000])[0] for client in first} == first


def test_another_port_is_at_the_same_address() -> None:
    dp = datapath(site("rr", "nat", backends=[*at(81), *at(81, address=B)]))
    first = {client: hosts(dp, client, [1000]) for client in MANY[:30]}
    dp.reload(config(site("rr", "nat", backends=[*at(82), *at(82, address=B)])))
    assert {client: hosts(dp, client, [2000]) for client in first} == first


def one_and_several(weights: tuple[int, ...] = (3, 1)) -> list[dict[str, Any]]:
    """A group whose first service has one backend at each address, and whose second has two."""
    several = [
        each | {"weight": weight}
        for address in (A, B)
        for each, weight in zip(at(81, 82, address=address), weights, strict=True)
    ]
    return grouped({"backends": several}, backends=at(80) + at(80, address=B), forward="nat", scheduler="wrr")


@pytest.mark.parametrize("order", [(80, 443), (443, 80)])
def test_a_group_with_one_and_with_several_at_an_address(order: tuple[int, int]) -> None:
    """To whichever a client comes first: one address for all its flows, one backend there for those of each service."""
    dp = datapath(*one_and_several())
    seen = []
    for client in MANY:
        rounds = [(backends_of(dp, client, [sport], order[0])[0], backends_of(dp, client, [sport], order[1])[0])
                  for sport in (1000, 2000, 3000)]  # fmt: skip
        assert len(set(rounds)) == 1
        assert host_of(rounds[0][0]) == host_of(rounds[0][1])
        seen.append(dict(zip(order, rounds[0], strict=True))[443])
    shares = Counter(backend.rpartition(":")[2] for backend in seen)
    assert shares["81"] == pytest.approx(900, abs=75)  # five standard deviations


def test_what_the_hash_has_chosen_is_remembered() -> None:
    """Also when weights would have it choose another one since."""
    dp = datapath(*one_and_several())
    first = {client: (connected_hosts(dp, client, [1000]), connect(dp, client, [1000], 443)) for client in MANY[:200]}
    dp.reload(config(*one_and_several((1, 3))))
    for client, (host, backend) in first.items():
        assert (hosts(dp, client, [2000]), backends_of(dp, client, [2000], 443)) == (host, backend)


def test_few_clients_move_when_two_services_have_several_each() -> None:
    """A slot tells one of them which; for the other the hash decides, by weights, each time anew."""
    both = grouped({"backends": at(91, 92, 93)}, backends=at(81, 82), forward="nat")
    dp = datapath(*both)
    first = {client: (backends_of(dp, client, [1000]), backends_of(dp, client, [1000], 443)) for client in MANY}
    assert {client: (backends_of(dp, client, [2000]), backends_of(dp, client, [2000], 443)) for client in MANY} == first
    shares = Counter(other[0] for _, other in first.values())
    assert all(share == pytest.approx(400, abs=85) for share in shares.values())
    assert len(shares) == 3
    dp.reload(config(both[0], both[1] | {"backends": at(91, 93)}))
    for client, (own, other) in first.items():
        assert backends_of(dp, client, [3000]) == own
        if other != [f"{A}:92"]:
            assert backends_of(dp, client, [3000], 443) == other


def test_one_without_room_among_several() -> None:
    """Its client is placed anew, and sticks to where that is."""
    capped = [each | {"max_flows": 2} for each in at(81, 82)]
    dp = datapath(site("rr", "nat", backends=capped))
    assert backends_of(dp, CLIENT[4], range(1000, 1004)) == [f"{A}:81"] * 2 + [f"{A}:82"] * 2
    assert dp.process(syn(sport=1005)).reason == "backends_full"


# ---- packets in mid-flow


def test_a_flow_without_an_entry_goes_where_its_client_does() -> None:
    """What `rr` had placed goes on there, though Maglev names another one."""
    dp = datapath(site("rr", "nat"), timeouts={"tcp_established": 1})
    first = connected_hosts(dp, CLIENT[4], range(1000, 1020))
    later = dp.process_batch([syn(sport=sport, letters="A") for sport in range(1000, 1020)], now=20.0)
    assert [each.reason for each in later] == ["maglev"] * 20
    assert [host_of(each.backend) for each in later] == first


def test_a_reply_without_an_entry_is_explained_by_affinity() -> None:
    dp = datapath(site("rr", "nat"), timeouts={"tcp_established": 1, "tcp_syn": 1})
    connect(dp, CLIENT[4], [999])
    sent = [dp.process(syn(sport=sport)) for sport in range(1000, 1020)]
    back = [dp.process(reply_to(each.frames[0], "A"), now=20.0) for each in sent]
    assert [(each.reason, each.backend) for each in back] == [("maglev", each.backend) for each in sent]


def test_a_packet_in_mid_flow_is_not_remembered() -> None:
    dp = datapath(site("rr"))
    dp.process_batch([syn(f"10.9.0.{number}", letters="A") for number in range(1, 100)])
    assert dp.stats()["affinity"]["clients"] == 0


def test_another_balancer_agrees_by_source_hash() -> None:
    one, other = datapath(site("source-hash")), datapath(site("source-hash"))
    for number in range(1, 30):
        client = f"10.9.0.{number}"
        [host] = hosts(one, client, [1000])
        assert host_of(other.process(syn(client, 1000, letters="A")).backend) == host


def test_a_nat_conflict_goes_elsewhere_and_the_client_stays() -> None:
    """One client port, two VIPs, the same backends' address and port."""
    other = "203.0.113.20"
    dp = datapath(*grouped({"vip": other, "port": 80}, forward="nat"))
    [first] = hosts(dp, CLIENT[4], [1000])
    conflicting = dp.process(frame(CLIENT[4], 1000, other, 80, "tcp", flags=flags("S")))
    assert conflicting.reason == "scheduled"
    assert host_of(conflicting.backend) != first
    assert hosts(dp, CLIENT[4], range(2000, 2005)) == [first] * 5


# ---- seeing


def test_trace_says_affinity_and_changes_nothing() -> None:
    dp = datapath(site("rr"))
    before = dp.trace(CLIENT[4], 1000, VIP[4], 80, "tcp")
    assert (before.why, before.backend) == ("rr", dp.process(syn()).backend)
    told = [dp.trace(CLIENT[4], 2000, VIP[4], 80, "tcp") for _ in range(3)]
    assert {(each.why, each.backend) for each in told} == {("affinity", before.backend)}
    assert dp.process(syn(sport=2000)).backend == before.backend
    assert dp.stats()["counters"]["affine"] == 1


def test_what_is_told_of_a_client() -> None:
    lb = Balancer(config(site("rr", name="a"), site("rr", name="b", port=443, affinity=None)))
    assert affine(lb) is None
    key = lb.send(syn(), now=100.0)[2]
    lb.send(syn(letters="A"), now=100.0)
    known = affine(lb)
    assert known is not None
    assert lb.keys[known["backend"]] == key
    assert known["place"] == known["backend"]
    assert not known["full"]
    assert 300 <= known["left"] <= 300 + HALF
    lb.send(syn("10.9.0.9"), now=400.0)
    assert affine(lb) == known | {"left": pytest.approx(0.2, abs=0.4)}
    assert affine(lb, "10.9.0.1") is None
    assert affine(lb, dport=443) is None
    lb.reload(config(site("rr", name="a", backends=[])))
    assert (affine(lb) or {})["backend"] == 0  # released


def test_trace_says_why_a_client_is_placed_anew() -> None:
    capped = [{"address": address, "max_flows": 1} for address in BACKENDS[4]]
    dp = datapath(site(name="web", backends=capped[:2]))
    dp.process(syn(sport=1000))

    def told() -> str:
        steps = dp.trace(CLIENT[4], 2000, VIP[4], 80, "tcp").steps
        return next(step.says for step in steps if step.stage == "scheduler")

    assert told() == (
        "affinity: 10.3.0.11:80 has the flows that it may have, so rr: turn 2 of 2 of this worker, if no other flow "
        "comes first, of those with room (10.3.0.11:80 at most 1, 10.3.0.12:80 at most 1) -> 10.3.0.12:80; "
        "a packet that is no SYN goes after its client, to 10.3.0.11:80"
    )
    dp.process(syn(sport=1001))
    assert told() == "rr: each backend has the flows that it may have"
    full = dp.trace(CLIENT[4], 2000, VIP[4], 80, "tcp")
    assert (full.reason, full.backend) == (dp.process(syn(sport=2000)).reason, None)
    dp.reload(config(site(name="web", backends=capped[2:])))
    assert told().startswith("affinity: the client's former backend takes none, so rr: turn 1 of 1")
    connect(dp, CLIENT[4], [1002])
    dp.reload(config(site(name="web")))
    assert told() == "affinity: the client's last flow went to 10.3.0.13:80; remembered for 300 s more"


# ---- numbers of places


def test_the_data_path_refuses_numbers_that_do_not_fit() -> None:
    settings = config(site(affinity=GROUP, backends=[{"address": str(A)}]))
    [planned] = plan_services(settings, BackendIds(), 0.0)
    [member] = planned.members
    with pytest.raises(ValueError, match=r"places of an affinity group are 1\.\.262143"):
        services_table(settings, [replace(planned, members=(member._replace(place=MAX_PLACE + 1),))])
    fits = replace(planned, members=(member._replace(place=MAX_PLACE),))
    assert isinstance(services_table(settings, [fits]), Services)
