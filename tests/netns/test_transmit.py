"""transmit.pxd, sendmmsg.pxd, xsk.pxd and transmit.py: frames leave by AF_XDP or by sendmmsg, once, whole and in order.

Real traffic in the lab; single frames over the cables of rig.py, where fastlb receives on l0 alone and sends on both.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.frames import ACK, BALANCER_MAC, frame, take_apart
from tests.netns.balancer import Balancer, drops, fastlb, until
from tests.netns.namespaces import Namespace
from tests.netns.rig import (
    BACKEND,
    CLIENT,
    PORT,
    VIP,
    Flood,
    OtherXsk,
    Preload,
    Rig,
    config,
    is_free,
    make_rig,
    next_port,
    open_sockets,
    settled,
)
from tests.netns.wire import Offload, Wire, leave_to_device, payload

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import BACKENDS, VIPS, Lab, own_prefix  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

MODES = ("xdp", "sendmmsg", "auto")
LONGEST = 4072  # bytes: a chunk of 4096 less the metadata in front
BUSY = "its queue is in use by another AF_XDP socket"


def balancer_of(rig: Rig, mode: str, directory: Path, **settings: Any) -> Balancer:
    return rig.balancer(directory, transmit=mode, **settings)


def one_ring() -> dict[str, Any]:
    """A ring on l0 alone, so that the other end may vanish; the replies of nat would need one there."""
    return {"interfaces": ["l0"], "services": [each for each in config()["services"] if each["forward"] != "nat"]}


# ---- real traffic


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "tx-") as lab:
        yield lab


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_traffic(lab: Lab, tmp_path: Path, mode: str) -> None:
    path = "sendmmsg" if mode == "sendmmsg" else "xdp"
    with Balancer(lab.namespace("lb"), lab.config(workers=1, transmit=mode), tmp_path) as balancer:
        assert balancer.status()["transmit"] == {"eth0": path, "eth1": path}
        assert f"eth0 {path}, eth1 {path}" in fastlb("status", "--socket", balancer.socket_path).stdout
        for vip in VIPS.values():
            for answer in (lab.client("fetch", vip, "--count", 60), lab.client("echo", vip, "--port", 5000)):
                assert answer["answered"] == answer["ports"], answer["errors"]
            for transfer in ("download", "upload"):
                assert lab.client(transfer, vip, "--bytes", 20_000_000)["verified"]
        counters = settled(balancer)["counters"]
        assert counters["transmitted"] == counters["forwarded"] > 1000
        assert (counters["transmitted_xdp"] > 500) == (path == "xdp")
        assert counters["transmitted_xdp"] == 0 or path == "xdp"
        assert drops(balancer.status()) == {}
        assert [each["event"] for each in balancer.logs()] == ["running"]


@pytest.mark.parametrize("mode", MODES)
def test_without_offloads_everything_leaves_one_way(lab: Lab, tmp_path: Path, mode: str) -> None:
    lab.set_offloads(False)
    try:
        with Balancer(lab.namespace("lb"), lab.config(workers=1, transmit=mode), tmp_path) as balancer:
            for way in VIPS:
                assert lab.client("download", VIPS[way], "--bytes", 5_000_000)["verified"]
                assert sorted(lab.client("fetch", VIPS[way], "--count", 60)["backends"]) == list(BACKENDS)
            counters = settled(balancer)["counters"]
    finally:
        lab.set_offloads(True)
    by_xdp = 0 if mode == "sendmmsg" else counters["transmitted"]
    assert (counters["transmitted_xdp"], counters["transmitted"]) == (by_xdp, counters["forwarded"])


# ---- single frames


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from make_rig(queues=1)


class Single:
    """A running balancer, and what a single frame does there."""

    def __init__(self, rig: Rig, balancer: Balancer, mode: str) -> None:
        self.rig, self.balancer, self.mode = rig, balancer, mode

    def by_xdp(self) -> int:
        return int(self.balancer.status()["counters"]["transmitted_xdp"])

    def send(self, raw: bytes, offload: Offload, wire: Wire | None = None) -> list[Any]:
        """Everything that arrives because of this frame: up to a marker that follows it on the same way."""
        wire = wire or self.rig.servers
        kind = "dsr" if wire is self.rig.servers else "hairpin"
        marker = next_port()
        self.rig.client.send(raw, offload)
        self.rig.client.send(frame(CLIENT[4], marker, VIP[kind, 4], PORT, "udp", payload=b"marker"))
        found = []
        while (arrival := wire.receive()).seen.sport != marker:
            found.append(arrival)
        return found


@pytest.fixture(scope="module", params=["xdp", "sendmmsg"])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Single]:
    with ExitStack() as undo:
        rig = Rig(undo)
        balancer = undo.enter_context(balancer_of(rig, request.param, tmp_path_factory.mktemp("transmit")))
        rig.reach(balancer)
        yield Single(rig, balancer, request.param)
        assert drops(balancer.status()).keys() <= {"no_neighbour", "no_route"}
        balancer.show_log()


def sized(kind: str, version: int, protocol: str, size: int) -> bytes:
    """A frame of exactly this many bytes."""
    headers = 14 + (20 if version == 4 else 40) + (20 if protocol == "tcp" else 8)
    return frame(
        CLIENT[version], next_port(), VIP[kind, version], PORT, protocol, flags=ACK, payload=payload(size - headers)
    )


@pytest.mark.parametrize("size", [80, LONGEST - 1, LONGEST, LONGEST + 1, LONGEST + 2, 4096, 4097, 9014])
@pytest.mark.parametrize("offload", ["plain", "partial"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("kind", "version"), [("nat", 4), ("nat", 6), ("dsr", 4), ("dsr", 6)])
def test_frames_at_the_boundary(
    single: Single, kind: str, version: int, protocol: str, offload: str, size: int
) -> None:
    whole = sized(kind, version, protocol, size)
    left, raw = leave_to_device(whole, offload)
    before = single.by_xdp()
    [got] = single.send(raw, left)
    sent = take_apart(whole)
    assert (len(got.raw), got.seen.sport, got.seen.segment[20:]) == (size, sent.sport, sent.segment[20:])
    assert got.seen.dst == (BACKEND[version] if kind == "nat" else sent.dst)
    marker = 1
    assert single.by_xdp() - before == (0 if single.mode == "sendmmsg" else marker + (size <= LONGEST))


TAGS = [
    ((0x8100, 5),),
    ((0x8100, 0x6FFE),),
    ((0x88A8, 7),),
    ((0x88A8, 7), (0x8100, 5)),
]


@pytest.mark.parametrize("tags", TAGS, ids=["802.1q", "priority", "802.1ad", "qinq"])
@pytest.mark.parametrize(
    ("offload", "size"),
    [*itertools.product(("plain", "partial"), (999, LONGEST, LONGEST + 1)), ("gso", 20_000)],
)
@pytest.mark.parametrize("kind", ["hairpin", "dsr", "nat"])
def test_vlan_tags(
    single: Single, kind: str, offload: str, size: int, tags: tuple[tuple[int, int], ...]
) -> None:
    """A tag stays on its link, so it is part of the frame that leaves there, and of that frame's length."""
    body = payload(size - 14 - 40 - 4 * len(tags))
    whole = frame(CLIENT[4], next_port(), VIP[kind, 4], PORT, flags=ACK, payload=body, tags=tags)
    left, raw = leave_to_device(whole, offload)
    before = single.by_xdp()
    [got] = single.send(raw, left, single.rig.client if kind == "hairpin" else None)
    sent = take_apart(whole)
    kept = tags if kind == "hairpin" else ()
    length = len(whole) - 4 * (len(tags) - len(kept))
    assert (got.seen.tags, got.seen.segment[20:], got.seen.sport) == (kept, sent.segment[20:], sent.sport)
    assert (got.offload.gso_type, got.offload.gso_size) == (left.gso_type, left.gso_size)
    assert single.by_xdp() - before == (0 if single.mode == "sendmmsg" else 1 + (length <= LONGEST))


def test_one_flow_stays_in_order_over_both_ways(single: Single) -> None:
    """Small frames, long ones, open checksums and GSO packets, in turns of all lengths."""
    shapes = [("plain", 100), ("partial", 1400), ("gso", 20_000), ("plain", 8000), ("plain", 100), ("gso", 5000)]
    total, small, before, got = 3000, 0, single.by_xdp(), []
    port = next_port()
    for start in range(0, total, 50):
        for number in range(start, start + 50):
            offload, size = shapes[(number * number // 7) % len(shapes)]
            body = number.to_bytes(4, "big") + payload(size)
            whole = frame(CLIENT[4], port, VIP["dsr", 4], PORT, flags=ACK, seq=number, payload=body)
            small += offload != "gso" and len(whole) <= LONGEST
            single.rig.client.send(*reversed(leave_to_device(whole, offload)))
        got += [single.rig.servers.receive().seen.tcp.seq for _ in range(50)]
    assert got == list(range(total))
    assert 500 < small < total - 500
    assert single.by_xdp() - before == (small if single.mode == "xdp" else 0)


# ---- links that come and go


def events(balancer: Balancer) -> list[str]:
    """What was said about l1's way out."""
    return [each["event"] for each in balancer.logs() if each.get("interface") == "l1"]


def accounted(balancer: Balancer, sent: int, before: dict[str, Any]) -> dict[str, int]:
    """The new drops; every frame was read, and ended as sent or dropped."""
    after = settled(balancer)["counters"]
    assert after["ring_drops"] == 0
    assert after["packets"] - before["packets"] == sent
    new = {name: count - before["drops"][name] for name, count in after["drops"].items()}
    assert sent == after["transmitted"] - before["transmitted"] + sum(new.values())
    return {name: count for name, count in new.items() if count}


DOWN = {  # of l1: what is said about its socket
    "the link": (["AF_XDP socket lost; sending by sendmmsg", "AF_XDP socket open"], "host", "l1"),
    "its peer": ([], "server_side", "s0"),
}


@pytest.mark.parametrize("mode", ["xdp", "sendmmsg"])
@pytest.mark.parametrize("what", DOWN)
def test_a_link_that_goes_down_and_up(rig: Rig, tmp_path: Path, what: str, mode: str) -> None:
    """Without its peer the link keeps its socket: each frame is refused, and counted, until the route is gone."""
    said, side, name = DOWN[what]
    namespace: Namespace = getattr(rig, side)
    with balancer_of(rig, mode, tmp_path, **one_ring()) as balancer:
        rig.reach(balancer)
        before = settled(balancer)["counters"]
        with Flood(rig) as flood:
            for _ in range(3):
                assert flood.more(rig.servers)
                enough = balancer.status()["counters"]["drops"]["no_route"] + 100  # each time fastlb must see it
                namespace.set_link(name, state="down")
                assert until(lambda: balancer.status()["counters"]["drops"]["no_route"] > enough)  # noqa: B023
                namespace.set_link(name, state="up")
                assert until(lambda: balancer.status()["transmit"].get("l1") == mode)
                by_xdp = balancer.status()["counters"]["transmitted_xdp"]
                assert flood.more(rig.servers)
                assert (balancer.status()["counters"]["transmitted_xdp"] > by_xdp) == (mode == "xdp")
        assert flood.last(rig.servers)
        assert flood.arrived == sorted(set(flood.arrived)), "none twice, none out of order"
        dropped = accounted(balancer, flood.sent, before)
        assert dropped.keys() <= {"no_route", "no_neighbour", "tx_link_down", "tx_full"}
        sent = flood.sent - sum(dropped.values())
        if (what, mode) != ("its peer", "sendmmsg"):  # a link without a carrier takes those, and says nothing
            assert 0 <= sent - len(flood.arrived) < 100
        assert events(balancer) == (said * 3 if mode == "xdp" else [])
        assert balancer.terminate() == 0


@pytest.mark.parametrize("mode", ["xdp", "sendmmsg"])
def test_an_interface_that_vanishes_and_returns(rig: Rig, tmp_path: Path, mode: str) -> None:
    with balancer_of(rig, mode, tmp_path, **one_ring()) as balancer:
        rig.reach(balancer)
        before = settled(balancer)["counters"]
        with Flood(rig) as flood:
            for _ in range(2):
                assert flood.more(rig.servers)
                rig.cut("l1")
                assert until(lambda: "l1" not in balancer.status()["transmit"])
                rig.connect_servers()
                assert until(lambda: balancer.status()["transmit"].get("l1") == mode)
            by_xdp = balancer.status()["counters"]["transmitted_xdp"]
            assert flood.more(rig.servers)
            assert (balancer.status()["counters"]["transmitted_xdp"] > by_xdp) == (mode == "xdp")
        assert flood.last(rig.servers)
        assert flood.arrived == sorted(set(flood.arrived))
        assert accounted(balancer, flood.sent, before).keys() <= {
            "no_route", "no_neighbour", "tx_link_down", "tx_error", "tx_full"
        }  # fmt: skip
        assert balancer.terminate() == 0


def test_interfaces_that_vanish_leave_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    """More often than a worker has sockets, and without traffic, which would tell it."""
    with balancer_of(rig, "auto", tmp_path, **one_ring()) as balancer:
        sockets = open_sockets(balancer)
        for _ in range(20):
            rig.cut("l1")
            assert until(lambda: "l1" not in balancer.status()["transmit"])
            rig.connect_servers()
            assert until(lambda: balancer.status()["transmit"].get("l1") == "xdp")
        assert until(lambda: open_sockets(balancer) == sockets)
        rig.reach(balancer)
        assert events(balancer) == []


# ---- refusals


def test_a_clean_stop_frees_the_queues(rig: Rig, tmp_path: Path) -> None:
    with balancer_of(rig, "xdp", tmp_path) as balancer:
        assert [is_free(rig.host, name) for name in ("l0", "l1")] == [False, False]
        assert balancer.terminate() == 0
    for name in ("l0", "l1"):
        assert until(is_free, rig.host, name)


def test_a_restart_has_its_queues_at_once(rig: Rig, tmp_path: Path) -> None:
    with balancer_of(rig, "xdp", tmp_path) as balancer:
        for end in (balancer.terminate, balancer.kill, balancer.terminate):
            end()
            balancer.start()
            assert balancer.status()["transmit"] == {"l0": "xdp", "l1": "xdp"}
        assert {each["event"] for each in balancer.logs()} - {"flows taken over"} == {"running", "stopped"}


def test_a_queue_in_use_is_waited_for(rig: Rig, tmp_path: Path) -> None:
    with ExitStack() as undo:
        other = undo.enter_context(OtherXsk(rig.host, "l1"))
        balancer = undo.enter_context(balancer_of(rig, "auto", tmp_path))
        assert balancer.status()["transmit"] == {"l0": "xdp", "l1": "sendmmsg"}
        rig.reach(balancer)
        assert settled(balancer)["counters"]["transmitted_xdp"] == 0
        other.socket.close()
        assert until(lambda: balancer.status()["transmit"]["l1"] == "xdp")
        rig.reach(balancer)
        assert settled(balancer)["counters"]["transmitted_xdp"] > 0
        assert events(balancer) == ["AF_XDP refused; sending by sendmmsg", "AF_XDP socket open"]
        [refused] = (each for each in balancer.logs() if each["event"].startswith("AF_XDP refused"))
        assert refused["reason"] == BUSY


def test_a_queue_in_use_is_an_error_when_forced(rig: Rig, tmp_path: Path) -> None:
    with OtherXsk(rig.host, "l1"):
        refused(rig, tmp_path, f"l1: {BUSY}")
    assert until(is_free, rig.host, "l0"), "what was open is closed again"


def refused(rig: Rig, directory: Path, said: str, **options: Any) -> None:
    """With transmit: xdp, fastlb says this and ends."""
    balancer = balancer_of(rig, "xdp", directory)
    done = fastlb("run", "-c", balancer.config_path, namespace=rig.host.name, **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fastlb: transmit: xdp cannot be had on {said}\n"
    assert not balancer.socket_path.exists()


REFUSALS = {
    "socket": "this kernel has no AF_XDP (Address family not supported by protocol)",
    "bind": "AF_XDP: cannot bind to queue 0 (Operation not supported)",
}


@pytest.mark.parametrize("part", REFUSALS)
def test_a_refusal_for_good(
    rig: Rig, tmp_path: Path, preload: Preload, part: str
) -> None:
    refused(rig, tmp_path, f"l0: {REFUSALS[part]}", env=preload(REFUSE=part))
    with balancer_of(rig, "auto", tmp_path, environment=preload(REFUSE=part)) as balancer:
        rig.reach(balancer)
        assert balancer.status()["transmit"] == {"l0": "sendmmsg", "l1": "sendmmsg"}
        up = balancer.status()["uptime"]
        assert until(lambda: balancer.status()["uptime"] > up + 1)  # it looks after its sockets several times a second
        said = [(each["event"], each.get("reason")) for each in balancer.logs()]
        assert said == [("AF_XDP refused; sending by sendmmsg", REFUSALS[part])] * 2 + [("running", None)]
        assert settled(balancer)["counters"]["transmitted_xdp"] == 0


def test_a_kernel_without_transmit_metadata(
    rig: Rig, tmp_path: Path, preload: Preload
) -> None:
    """AF_XDP it is, and only open checksums go by sendmmsg."""
    with balancer_of(rig, "xdp", tmp_path, environment=preload(REFUSE="metadata")) as balancer:
        rig.reach(balancer)
        single = Single(rig, balancer, "xdp")
        for offload, size, by_xdp in (("plain", 999, 2), ("partial", 999, 1), ("plain", LONGEST, 2)):
            whole = sized("nat", 4, "tcp", size)
            left, raw = leave_to_device(whole, offload)
            before = single.by_xdp()
            [got] = single.send(raw, left)
            assert got.seen == replace(
                take_apart(whole), eth_dst=got.seen.eth_dst, eth_src=BALANCER_MAC, dst=BACKEND[4], ttl=63,
                segment=got.seen.segment,
            )  # fmt: skip
            assert got.seen.segment[20:] == take_apart(whole).segment[20:]
            assert single.by_xdp() - before == by_xdp
