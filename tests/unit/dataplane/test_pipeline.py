"""pipeline.pxd, track.pxd and schedule.pxd: from a flow's first packet to its last, on one balancer and on a fleet."""

from __future__ import annotations

from typing import Any

import pytest

import fastlb
from fastlb import Datapath, Verdict
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, flags, reply_to, service
from tests.frames import ACK, FIN, RST, SYN, frame, mac_of, take_apart

ALL = [(forward, version, protocol) for forward in ("nat", "dsr") for version in (4, 6) for protocol in ("tcp", "udp")]


# --- placement ----------------------------------------------------------------


@pytest.mark.parametrize(("forward", "version", "protocol"), ALL)
def test_new_flows_are_placed_as_anyone_can_predict(forward: str, version: int, protocol: str) -> None:
    weights = (1, 0, 7)
    chosen = service(forward, version, protocol)
    for backend, weight in zip(chosen["backends"], weights, strict=True):
        backend["weight"] = weight
    chosen["backends"].reverse()
    balancer = datapath(chosen, hash_seed=42, maglev_size=509)
    port = 8080 if forward == "nat" else 80
    hosts = [address if version == 4 else f"[{address}]" for address in BACKENDS[version]]
    keys = [f"{host}:{port}" for host in hosts]
    table = fastlb.maglev_table(keys, weights, 509, seed=42)
    for sport in range(1000, 1300):
        hashed = fastlb.flow_hash(CLIENT[version], sport, VIP[version], 80, protocol, seed=42)
        expected = keys[table[hashed % 509]]
        trace = balancer.trace(CLIENT[version], sport, VIP[version], 80, protocol)
        assert (trace.backend, trace.flow_hash, trace.slot, trace.why) == (expected, hashed, hashed % 509, "maglev")
        out = balancer.process(frame(CLIENT[version], sport, VIP[version], 80, protocol))
        assert (out.backend, out.reason) == (expected, "scheduled")
        assert take_apart(out.frames[0]).eth_dst == mac_of(expected.strip("[").split("]")[0].removesuffix(f":{port}"))


def test_any_port_hashes_the_packet_s_port() -> None:
    balancer = datapath(service("dsr", port="any"))
    keys = [f"{address}:0" for address in BACKENDS[4]]
    table = fastlb.maglev_table(keys, size=251)
    for dport in range(1, 200):
        hashed = fastlb.flow_hash(CLIENT[4], 40000, VIP[4], dport, "tcp")
        assert balancer.process(frame(CLIENT[4], 40000, VIP[4], dport)).backend == keys[table[hashed % 251]]


@pytest.mark.parametrize(("letters", "reason"), [
    ("S", "scheduled"), ("A", "maglev"), ("AP", "maglev"), ("SA", "maglev"), ("FA", "maglev"), ("R", "maglev"),
    ("RA", "maglev"), ("F", "maglev"), ("", "maglev"),
])  # fmt: skip
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_first_packet(forward: str, letters: str, reason: str) -> None:
    out = datapath(service(forward)).process(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags(letters)))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, reason)


@pytest.mark.parametrize(("forward", "version", "protocol"), ALL)
def test_every_balancer_of_a_fleet_sends_a_flow_to_the_same_backend(forward: str, version: int, protocol: str) -> None:
    """A flow that arrives in the middle at another balancer, which has another secret key and never saw its start."""
    first, second = (datapath(service(forward, version, protocol)) for _ in range(2))
    for sport in range(1000, 1200):
        opened = first.process(frame(CLIENT[version], sport, VIP[version], 80, protocol, flags=SYN))
        later = second.process(frame(CLIENT[version], sport, VIP[version], 80, protocol, flags=ACK, payload=b"x"))
        assert later.backend == opened.backend
        assert later.reason == ("maglev" if protocol == "tcp" else "scheduled")
        again = second.process(frame(CLIENT[version], sport, VIP[version], 80, protocol, flags=ACK))
        assert (again.backend, again.reason) == (opened.backend, "conntrack")


# --- the reply leg ------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_replies_after_a_restart(version: int, protocol: str) -> None:
    """A fresh flow table meets the backend's packet first: the Maglev table tells the VIP that it belongs to."""
    shared = service("nat", version, protocol)
    other = service("nat", version, protocol, name="other", vip="203.0.113.77" if version == 4 else "2001:db8:cafe::77")
    services = [other, shared]
    before, after = datapath(*services), datapath(*services)
    for sport in range(1000, 1100):
        opened = before.process(frame(CLIENT[version], sport, VIP[version], 80, protocol))
        back = after.process(reply_to(opened.frames[0], "A", b"data"))
        if other_explains(services, version, protocol, sport, opened.backend):
            continue  # both VIPs lead here from this client port; either answer would be a guess
        assert (back.reason, back.backend) == ("maglev", opened.backend)
        seen = take_apart(back.frames[0])
        assert (seen.src, seen.sport, seen.dst, seen.dport) == (VIP[version], 80, CLIENT[version], sport)
        onward = after.process(frame(CLIENT[version], sport, VIP[version], 80, protocol, flags=ACK))
        assert onward.backend == opened.backend
        assert onward.reason == ("conntrack" if protocol == "tcp" else "scheduled")


def other_explains(
    services: list[dict[str, Any]], version: int, protocol: str, sport: int, backend: str | None
) -> bool:
    hosts = [address if version == 4 else f"[{address}]" for address in BACKENDS[version]]
    keys = [f"{host}:8080" for host in hosts]
    table = fastlb.maglev_table(keys, size=251)
    hashed = fastlb.flow_hash(CLIENT[version], sport, services[0]["vip"], 80, protocol)
    return keys[table[hashed % 251]] == backend


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_reply_that_nothing_explains_is_dropped(protocol: str) -> None:
    balancer = datapath(service("nat", protocol=protocol))
    opened = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, protocol))
    assert opened.backend is not None
    wrong = next(address for address in BACKENDS[4] if not opened.backend.startswith(address))
    out = balancer.process(frame(wrong, 8080, CLIENT[4], 40000, protocol, flags=SYN | ACK))
    assert (out.verdict, out.reason, out.backend, out.frames) == (Verdict.DROP, "reply_unknown", None, [])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_replies_of_a_drained_backend(protocol: str) -> None:
    one = [{"address": BACKENDS[4][0], "port": 8080}]
    balancer = datapath(service("nat", protocol=protocol, backends=one))
    opened = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, protocol))
    balancer.reload(config(service("nat", protocol=protocol, backends=[one[0] | {"weight": 0}])))
    assert balancer.process(reply_to(opened.frames[0])).reason == "conntrack"
    assert balancer.process(frame(CLIENT[4], 40001, VIP[4], 80, protocol)).reason == "no_backend"


def test_a_stray_reply_leaves_a_flow_where_it_is() -> None:
    """By now Maglev would send this client to the other backend, which answers out of turn; the entry knows better."""
    one, other = ({"address": address, "port": 8080} for address in BACKENDS[4][:2])
    balancer = datapath(service("nat", backends=[one]))
    opened = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80))
    balancer.process(reply_to(opened.frames[0]))
    balancer.reload(config(service("nat", backends=[one | {"weight": 0}, other])), now=1)
    balancer.process(frame(BACKENDS[4][1], 8080, CLIENT[4], 40000, flags=ACK), now=1)
    assert balancer.stats()["flows"]["active"] == 1
    later = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK), now=1)
    assert (later.backend, later.reason) == ("10.3.0.11:8080", "conntrack")


def test_a_reply_takes_the_place_of_an_entry_that_no_longer_decides() -> None:
    """The VIP went to another service, whose backend's reply comes first: still one entry a flow."""
    first = service("nat", name="first", backends=[{"address": BACKENDS[4][0], "port": 8080}])
    second = service("nat", name="second", port=81, backends=[{"address": BACKENDS[4][1], "port": 8080}])
    balancer = datapath(first, second)
    balancer.process(frame(CLIENT[4], 40000, VIP[4], 80))
    balancer.reload(config(first | {"port": 82}, second | {"port": 80}), now=1)
    back = balancer.process(frame(BACKENDS[4][1], 8080, CLIENT[4], 40000, flags=ACK), now=1)
    assert (back.reason, back.backend) == ("maglev", "10.3.0.12:8080")
    assert balancer.stats()["flows"]["active"] == 1
    later = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK), now=1)
    assert (later.backend, later.reason) == ("10.3.0.12:8080", "conntrack")


# --- one client port, two VIPs, the same backends -----------------------------


def two_vips(protocol: str, backends: int) -> Datapath:
    members = [{"address": address, "port": 8080} for address in BACKENDS[4][:backends]]
    return datapath(
        service("nat", protocol=protocol, name="one", backends=members),
        service("nat", protocol=protocol, name="two", vip="203.0.113.20", backends=members),
    )


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_second_flow_avoids_the_first_one_s_backend(protocol: str) -> None:
    """The backend would see one tuple twice. Replies must find their own VIP again."""
    balancer = two_vips(protocol, 3)
    avoided = 0
    for sport in range(1000, 1200):
        one = balancer.process(frame(CLIENT[4], sport, VIP[4], 80, protocol))
        told = balancer.trace(CLIENT[4], sport, "203.0.113.20", 80, protocol)
        wanted = next(step.facts["scheduled"] for step in told.steps if step.stage == "scheduler")
        two = balancer.process(frame(CLIENT[4], sport, "203.0.113.20", 80, protocol))
        assert two.reason in ("scheduled", "nat_conflict")
        assert (told.backend, told.reason, told.verdict) == (two.backend, two.reason, two.verdict)
        if two.reason == "nat_conflict":
            continue
        assert two.backend != one.backend
        assert (two.backend == wanted) == (wanted != one.backend)
        avoided += wanted == one.backend
        for out, vip in ((one, VIP[4]), (two, "203.0.113.20")):
            back = balancer.process(reply_to(out.frames[0]))
            assert (back.reason, take_apart(back.frames[0]).src) == ("conntrack", vip)
    assert avoided > 20
    assert balancer.stats()["counters"]["drops"]["nat_conflict"] < 20


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_without_another_backend_it_is_a_conflict(protocol: str) -> None:
    balancer = two_vips(protocol, 1)
    assert balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, protocol)).reason == "scheduled"
    out = balancer.process(frame(CLIENT[4], 40000, "203.0.113.20", 80, protocol))
    assert (out.verdict, out.reason, out.backend) == (Verdict.DROP, "nat_conflict", None)
    assert balancer.process(frame(CLIENT[4], 40001, "203.0.113.20", 80, protocol)).reason == "scheduled"
    assert balancer.stats()["flows"]["active"] == 2


@pytest.mark.parametrize("end", [[RST], [FIN | ACK, None]])
def test_a_flow_that_is_over_gives_way(end: list[int | None]) -> None:
    balancer = two_vips("tcp", 1)
    opened = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80))
    for bits in end:
        if bits is None:
            balancer.process(reply_to(opened.frames[0], "FA"))
        else:
            balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=bits))
    assert balancer.process(frame(CLIENT[4], 40000, "203.0.113.20", 80)).reason == "scheduled"
    assert balancer.stats()["flows"]["active"] == 1


def test_a_flow_that_expired_gives_way() -> None:
    balancer = two_vips("udp", 1)
    balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, "udp"), now=100)
    balancer.process_batch([], now=159)
    assert balancer.process(frame(CLIENT[4], 40000, "203.0.113.20", 80, "udp"), now=160.1).reason == "scheduled"


def test_an_exact_port_and_any_port_on_one_backend_conflict_too() -> None:
    one = [{"address": BACKENDS[4][0]}]
    balancer = datapath(
        service("nat", name="exact", backends=one),
        service("nat", name="any", vip="203.0.113.20", port="any", nat_any_port=True, backends=one),
    )
    assert balancer.process(frame(CLIENT[4], 40000, VIP[4], 80)).reason == "scheduled"
    assert balancer.process(frame(CLIENT[4], 40000, "203.0.113.20", 80)).reason == "nat_conflict"


def test_dsr_knows_no_conflict() -> None:
    """The packet keeps its VIP, so a backend tells the flows apart."""
    one = [{"address": BACKENDS[4][0]}]
    balancer = datapath(service("dsr", name="one", backends=one),
                        service("dsr", name="two", vip="203.0.113.20", backends=one))  # fmt: skip
    for vip in (VIP[4], "203.0.113.20"):
        assert balancer.process(frame(CLIENT[4], 40000, vip, 80)).reason == "scheduled"


# --- a VIP that passes to another service -------------------------------------


@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_an_entry_of_another_service_no_longer_decides(forward: str) -> None:
    """Both services keep the backend, but the VIP's port is now the other one's: its scheduler decides."""
    first = service(forward, name="first", backends=[{"address": BACKENDS[4][0]}])
    second = service(forward, name="second", port=81, backends=[{"address": BACKENDS[4][1]}])
    balancer = datapath(first, second)
    assert balancer.process(frame(CLIENT[4], 40000, VIP[4], 80)).backend == "10.3.0.11:80"
    balancer.reload(config(first | {"port": 82}, second | {"port": 80}), now=1)
    later = balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK), now=1)
    assert (later.backend, later.reason) == ("10.3.0.12:80", "maglev")
    assert balancer.stats()["flows"]["active"] == 1


# --- what does not fit --------------------------------------------------------


@pytest.mark.parametrize(("version", "overhead"), [(4, 28), (6, 48)])
@pytest.mark.parametrize("forward", ["nat", "dsr"])
def test_mtu(forward: str, version: int, overhead: int) -> None:
    balancer = datapath(service(forward, version, "udp"), mtu=1400)
    for tags in ((), ((0x8100, 5),)):
        fits = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=bytes(1400 - overhead), tags=tags)
        longer = bytes(1401 - overhead)
        over = frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=longer, tags=tags, df=True)
        assert balancer.process(fits).verdict is Verdict.FORWARD
        assert balancer.process(over).reason == "too_big"
    padded = frame(CLIENT[version], 40000, VIP[version], 80, "udp") + bytes(1500)
    assert balancer.process(padded).verdict is Verdict.FORWARD  # the packet counts, not what trails it


# --- counters -----------------------------------------------------------------


def test_packets_and_bytes_are_counted_once_where_they_belong() -> None:
    balancer = Balancer(config(service("nat", backends=[{"address": BACKENDS[4][0], "port": 8080}])))
    frames = [
        frame(CLIENT[4], 40000, VIP[4], 80),
        frame(BACKENDS[4][0], 8080, CLIENT[4], 40000, flags=SYN | ACK),
        frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK, payload=b"x" * 100),
        frame(CLIENT[4], 40000, VIP[4], 81),
        frame(CLIENT[4], 40000, VIP[4], 80, ttl=1),
    ]
    for raw in frames:
        balancer.send(raw)
    counters = balancer.pipeline.counters()
    assert {name: value for name, value in counters.items() if value} == {
        "packets": 5,
        "bytes": sum(map(len, frames)),
        "forwarded": 4,
        "forwarded_bytes": sum(map(len, frames[:3])) + len(frames[4]) + 28,
        "scheduled": 1,
        "conntrack": 2,
        "no_service": 1,
        "time_exceeded": 1,
    }
    assert balancer.pipeline.backend_stats(1) == {
        "packets": 2,
        "bytes": len(frames[0]) + len(frames[2]),
        "reply_packets": 1,
        "reply_bytes": len(frames[1]),
        "new_flows": 1,
        "answered_flows": 1,
        "active_flows": 1,
    }


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_a_batch_is_its_frames_one_after_another(size: int) -> None:
    frames = []
    for number in range(size):
        frames.append(frame(CLIENT[4], 1000 + number % 7, VIP[4], 80, flags=SYN if number % 3 else ACK))
    together = datapath(service("nat")).process_batch(frames)
    alone = datapath(service("nat"))
    assert together == [alone.process(raw) for raw in frames]
