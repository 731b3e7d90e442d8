"""The mirror against a real kernel: one namespace is watched, another is its peer.

    nb-<pid>-near                      nb-<pid>-far
      eth0 10.9.0.1  fd09::1   ──────  eth0 10.9.0.2  fd09::2     (02:00:00:00:09:02)
      eth1 10.9.1.1  fd09:1::1 ──────  eth1 10.9.1.2  fd09:1::2

Nobody sends a packet here but the two kernels, and near's only when the watcher asks it to.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute, netns

from fastlb.errors import KernelError
from fastlb.kernel import mirror, netlink
from fastlb.kernel.asks import ASK_BATCH
from fastlb.kernel.host_tables import HostTables
from fastlb.kernel.mirror import Watcher
from fastlb.kernel.vips import add_vip, remove_vip
from fastlb.model.hostview import KernelView, Route

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

NEAR, FAR = (f"nb-{os.getpid()}-{side}" for side in ("near", "far"))
PATIENCE = 60.0  # seconds until something that should have happened is called missing
FAR_MAC, MOVED_MAC = "02:00:00:00:09:02", "02:00:00:00:09:99"
PEERS = {4: ip_address("10.9.0.2"), 6: ip_address("fd09::2")}
SECOND_PEERS = {4: ip_address("10.9.1.2"), 6: ip_address("fd09:1::2")}
AWAY = {4: ip_address("198.51.100.7"), 6: ip_address("2001:db8::7")}
both_families = pytest.mark.parametrize("version", [4, 6])


@contextmanager
def inside(namespace: str) -> Iterator[IPRoute]:
    """Move this thread into a namespace, for as long as the block lasts."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    netns.setns(namespace)
    try:
        with IPRoute() as ipr:
            yield ipr
    finally:
        netns.setns(home)
        os.close(home)


def sysctl(name: str, value: object) -> None:
    Path("/proc/sys/net", name).write_text(f"{value}\n")


def index(name: str) -> int:
    return socket.if_nametoindex(name)


def set_up_side(side: int) -> None:
    with inside((NEAR, FAR)[side - 1]) as ipr:
        for number in (0, 1):
            name = f"eth{number}"
            for version in (4, 6):  # a second of trust instead of half a minute, then one quick probe
                base = f"ipv{version}/neigh/{name}"
                sysctl(f"{base}/base_reachable_time_ms", 1000)
                sysctl(f"{base}/delay_first_probe_time", 1)
                sysctl(f"{base}/retrans_time_ms", 100)
                sysctl(f"{base}/ucast_solicit", 1)
            sysctl(f"ipv6/conf/{name}/accept_dad", 0)
            sysctl(f"ipv6/conf/{name}/keep_addr_on_down", 1)
            ipr.link("set", index=index(name), state="up")
            network = ("fd09", "fd09:1")[number]
            ipr.addr("add", index=index(name), address=f"10.9.{number}.{side}", prefixlen=24)
            ipr.addr("add", index=index(name), address=f"{network}::{side}", prefixlen=64)


@pytest.fixture
def wires() -> Iterator[None]:
    with ExitStack() as made:
        for name in (NEAR, FAR):
            netns.create(name)
            made.callback(netns.remove, name)
        with inside(NEAR) as ipr:
            for number in (0, 1):
                peer = {"ifname": f"eth{number}", "net_ns_fd": FAR}
                ipr.link("add", kind="veth", ifname=f"eth{number}", peer=peer)
        with inside(FAR) as ipr:
            ipr.link("set", index=index("eth0"), address=FAR_MAC)
        set_up_side(1)
        set_up_side(2)
        yield


class Observer:
    """A watcher in NEAR, and every view that it reported."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.repeats = 0  # reports without a change
        self.watcher = Watcher(self.take)
        with inside(NEAR):
            self.view = self.watcher.start()

    def take(self, view: KernelView) -> None:
        with self.changed:
            self.repeats += view == self.view
            self.view = view
            self.changed.notify_all()

    def until(self, holds: Callable[[KernelView], object]) -> KernelView:
        with self.changed:
            assert self.changed.wait_for(lambda: holds(self.view), PATIENCE), f"never held: {self.view}"
            return self.view

    def link(self, name: str) -> int:
        return next(link.index for link in self.view.links.values() if link.name == name)

    def resolve(self, version: int) -> tuple[int, Any]:
        hop = (self.link("eth0"), PEERS[version])
        self.watcher.want([hop])
        self.until(lambda view: view.neighbours.get(hop) == mac(FAR_MAC))
        return hop


@pytest.fixture
def seen(wires: None) -> Iterator[Observer]:
    observer = Observer()
    yield observer
    observer.watcher.close()
    assert observer.repeats == 0


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def away(version: int) -> str:
    return {4: "198.51.100.0/24", 6: "2001:db8::/32"}[version]


def test_first_view_is_complete(seen: Observer) -> None:
    with inside(NEAR) as ipr:
        kernel = {link["index"]: link for link in ipr.get_links()}
    assert {i: (link.name, link.mac, link.mtu) for i, link in seen.view.links.items()} == {
        i: (
            link.get_attr("IFLA_IFNAME"),
            mac(link.get_attr("IFLA_ADDRESS")),
            link.get_attr("IFLA_MTU"),
        )
        for i, link in kernel.items()
    }
    assert {link.name: link.up for link in seen.view.links.values()} == {
        "lo": False,
        "eth0": True,
        "eth1": True,
    }
    own = {"10.9.0.1", "10.9.1.1", "fd09::1", "fd09:1::1"}
    assert {str(a) for a in seen.view.addresses if not a.is_link_local} == own
    assert {(str(r.prefix), r.gateway, r.link) for r in seen.view.routes if not r.prefix.is_link_local} == {
        ("10.9.0.0/24", None, seen.link("eth0")),
        ("10.9.1.0/24", None, seen.link("eth1")),
        ("fd09::/64", None, seen.link("eth0")),
        ("fd09:1::/64", None, seen.link("eth1")),
    }
    assert not set(seen.view.neighbours) & {(seen.link("eth0"), peer) for peer in PEERS.values()}


@both_families
def test_wanted_next_hop_is_resolved_without_traffic_of_ours(seen: Observer, version: int) -> None:
    assert seen.resolve(version) == seen.view.next_hop(PEERS[version])


def test_hundreds_of_next_hops_are_all_asked_for(seen: Observer) -> None:
    with inside(FAR) as ipr:  # far answers ARP for the whole prefix
        ipr.route("add", type="local", table=255, dst="10.9.0.128/25", oif=index("lo"), scope=254)
        ipr.route("add", type="local", table=255, dst="10.9.1.128/25", oif=index("lo"), scope=254)
    hops = [
        (seen.link(f"eth{number}"), ip_address(f"10.9.{number}.{last}"))
        for number in (0, 1)
        for last in range(129, 254)
    ]
    assert len(hops) > ASK_BATCH
    seen.watcher.want(hops)
    seen.until(lambda view: set(hops) <= set(view.neighbours))


@both_families
def test_moved_mac_is_noticed_from_an_announcement(seen: Observer, version: int) -> None:
    with inside(NEAR):  # trusted for longer than this test is patient: only the announcement can tell
        sysctl(f"ipv{version}/neigh/eth0/base_reachable_time_ms", 600_000)
    with inside(FAR):
        sysctl("ipv4/conf/eth0/arp_notify", 1)
        sysctl("ipv6/conf/eth0/ndisc_notify", 1)
    hop = seen.resolve(version)
    with inside(FAR) as ipr:
        ipr.link("set", index=index("eth0"), address=MOVED_MAC)
    seen.until(lambda view: view.neighbours.get(hop) == mac(MOVED_MAC))


@both_families
def test_moved_mac_is_noticed_without_announcement(seen: Observer, version: int) -> None:
    hop = seen.resolve(version)
    with inside(FAR) as ipr:
        ipr.link("set", index=index("eth0"), address=MOVED_MAC)
    seen.until(lambda view: view.neighbours.get(hop) == mac(MOVED_MAC))


@both_families
def test_peer_that_is_gone_is_forgotten_and_found_again(seen: Observer, version: int) -> None:
    hop = seen.resolve(version)
    address = {"address": str(PEERS[version]), "prefixlen": {4: 24, 6: 64}[version]}
    with inside(FAR) as ipr:
        ipr.addr("del", index=index("eth0"), **address)
    seen.until(lambda view: hop not in view.neighbours)
    with inside(FAR) as ipr:
        ipr.addr("add", index=index("eth0"), **address)
    seen.until(lambda view: view.neighbours.get(hop) == mac(FAR_MAC))


@both_families
def test_route_that_moves_is_followed(seen: Observer, version: int) -> None:
    other_gateway = {4: "10.9.0.3", 6: "fd09::3"}[version]
    for gateway, name in (
        (PEERS[version], "eth0"),
        (ip_address(other_gateway), "eth0"),
        (SECOND_PEERS[version], "eth1"),
    ):
        with inside(NEAR) as ipr:
            ipr.route("replace", dst=away(version), gateway=str(gateway), oif=index(name))
        hop = (seen.link(name), gateway)
        seen.until(lambda view, hop=hop: view.next_hop(AWAY[version]) == hop)  # type: ignore[misc]
    with inside(NEAR) as ipr:
        ipr.route("del", dst=away(version))
    seen.until(lambda view: view.next_hop(AWAY[version]) is None)


@both_families
def test_lowest_metric_wins_until_its_link_is_dead(seen: Observer, version: int) -> None:
    with inside(NEAR) as ipr:
        for gateway, name, metric in ((PEERS, "eth0", 20), (SECOND_PEERS, "eth1", 10)):
            ipr.route(
                "add", dst=away(version), gateway=str(gateway[version]), oif=index(name), priority=metric
            )
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth1"), SECOND_PEERS[version]))
    with inside(FAR) as ipr:  # near loses the carrier; its kernel keeps the IPv4 route
        ipr.link("set", index=index("eth1"), state="down")
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth0"), PEERS[version]))


@both_families
def test_ecmp_takes_the_first_next_hop_whose_link_is_up(seen: Observer, version: int) -> None:
    hops = [
        {"gateway": str(PEERS[version]), "oif": seen.link("eth0")},
        {"gateway": str(SECOND_PEERS[version]), "oif": seen.link("eth1")},
    ]
    with inside(NEAR) as ipr:
        ipr.route("add", dst=away(version), multipath=hops)
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth0"), PEERS[version]))
    with inside(FAR) as ipr:
        ipr.link("set", index=index("eth0"), state="down")
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth1"), SECOND_PEERS[version]))
    with inside(FAR) as ipr:
        ipr.link("set", index=index("eth0"), state="up")
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth0"), PEERS[version]))


@both_families
def test_unreachable_prefix_hides_the_default_route(seen: Observer, version: int) -> None:
    default = {4: "0.0.0.0/0", 6: "::/0"}[version]
    with inside(NEAR) as ipr:
        ipr.route("add", dst=default, gateway=str(PEERS[version]), oif=index("eth0"))
    seen.until(lambda view: view.next_hop(AWAY[version]) == (seen.link("eth0"), PEERS[version]))
    with inside(NEAR) as ipr:
        ipr.route("add", dst=away(version), type="unreachable")
    seen.until(lambda view: view.next_hop(AWAY[version]) is None)


def test_other_tables_are_not_ours_and_details_of_main_are(seen: Observer) -> None:
    with inside(NEAR) as ipr:
        ipr.route("add", dst="198.51.100.0/25", gateway="10.9.1.2", oif=index("eth1"), table=100)
        ipr.route("add", dst="198.51.100.0/24", gateway="10.9.1.2", oif=index("eth1"), tos=0x10)
        ipr.route("add", dst="198.51.100.0/24", gateway="10.9.0.2", oif=index("eth0"), metrics={"mtu": 1380})
        via = {"family": socket.AF_INET6, "addr": "fd09::2"}
        ipr.route("add", dst="203.0.113.0/24", via=via, oif=index("eth0"))
    eth0 = seen.link("eth0")
    expected = {
        Route(ip_network("198.51.100.0/24"), ip_address("10.9.0.2"), eth0, 1380),
        Route(ip_network("203.0.113.0/24"), ip_address("fd09::2"), eth0),
    }
    found = seen.until(lambda view: expected <= set(view.routes))
    assert found.next_hop(AWAY[4]) == (eth0, PEERS[4])
    assert found.next_hop(ip_address("203.0.113.5")) == (eth0, PEERS[6])


def test_what_changes_nothing_is_not_reported(seen: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "DEBOUNCE", 0.0)
    monkeypatch.setattr(mirror, "ROUTE_REST", 0)
    monkeypatch.setattr(mirror, "ROUTE_COUNT_REST", 0)
    with inside(NEAR) as ipr:
        for last in range(20):
            ipr.route("add", dst=f"198.51.100.{last}/32", gateway="10.9.1.2", oif=index("eth1"), table=100)
        add_vip("eth0", ip_address("203.0.113.1"))  # once it is seen, the routes have been
    seen.until(lambda view: ip_address("203.0.113.1") in view.addresses)
    assert seen.repeats == 0


@both_families
def test_link_that_goes_down_and_up_is_resolved_again(seen: Observer, version: int) -> None:
    hop = seen.resolve(version)
    with inside(NEAR) as ipr:
        ipr.link("set", index=index("eth0"), state="down")
    down = seen.until(lambda view: hop not in view.neighbours and PEERS[version] not in _reachable(view))
    assert not down.links[hop[0]].up
    with inside(NEAR) as ipr:
        ipr.link("set", index=index("eth0"), state="up")
    seen.until(lambda view: view.next_hop(PEERS[version]) == hop and view.neighbours.get(hop) == mac(FAR_MAC))


def _reachable(view: KernelView) -> set[Any]:
    return {peer for peer in PEERS.values() if view.next_hop(peer)}


def test_mtu_and_mac_of_a_link_are_followed(seen: Observer) -> None:
    eth0 = seen.link("eth0")
    with inside(NEAR) as ipr:
        ipr.link("set", index=eth0, mtu=1400, address=MOVED_MAC)
    seen.until(lambda view: (view.links[eth0].mtu, view.links[eth0].mac) == (1400, mac(MOVED_MAC)))


def test_link_that_vanishes_takes_everything_with_it(seen: Observer) -> None:
    hop = seen.resolve(4)
    with inside(NEAR) as ipr:
        ipr.link("del", index=hop[0])
    gone = seen.until(lambda view: hop[0] not in view.links and hop[0] not in {r.link for r in view.routes})
    assert hop[0] not in {index for index, _ in gone.neighbours}
    assert {str(a) for a in gone.addresses if not a.is_link_local} == {"10.9.1.1", "fd09:1::1"}
    assert gone.next_hop(PEERS[4]) is None


def test_link_that_leaves_a_bridge_is_still_there(seen: Observer) -> None:
    eth1 = seen.link("eth1")
    with inside(NEAR) as ipr:
        ipr.link("add", kind="bridge", ifname="br0")
        ipr.link("set", index=eth1, master=index("br0"))
        ipr.link("set", index=eth1, master=0)
        ipr.addr("add", index=eth1, address="10.9.2.1", prefixlen=24)  # what came before it has been seen too
    view = seen.until(lambda view: ip_address("10.9.2.1") in view.addresses)
    assert view.links[eth1].name == "eth1"
    assert ip_address("10.9.1.1") in view.addresses


def test_overrun_leads_to_a_fresh_dump(wires: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """While on_change sleeps, 200 neighbours appear, and the buffer holds a few of the events."""
    monkeypatch.setattr(netlink, "RECEIVE_BUFFER", 4096)
    busy, go_on = threading.Event(), threading.Event()
    observer = Observer()
    take = observer.take

    def slow(view: KernelView) -> None:
        busy.set()
        go_on.wait(PATIENCE)
        take(view)

    observer.watcher.on_change = slow
    eth0 = observer.link("eth0")
    hops = {(eth0, ip_address(f"10.9.0.{last}")) for last in range(50, 250)}
    try:
        with inside(NEAR) as ipr:
            ipr.neigh("add", dst="10.9.0.9", lladdr=FAR_MAC, ifindex=eth0, state="permanent")
            assert busy.wait(PATIENCE)
            for _, address in sorted(hops):
                ipr.neigh("add", dst=str(address), lladdr=MOVED_MAC, ifindex=eth0, state="permanent")
        go_on.set()
        view = observer.until(lambda view: hops <= set(view.neighbours))
        assert {view.neighbours[hop] for hop in hops} == {mac(MOVED_MAC)}
        assert observer.watcher.overruns >= 1
    finally:
        go_on.set()
        observer.watcher.close()


def test_change_that_was_not_taken_is_told_again(seen: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "RETRY", 0.05)
    take = seen.take

    def fail_once(view: KernelView) -> None:
        seen.watcher.on_change = take
        raise ValueError("a mistake elsewhere")

    seen.watcher.on_change = fail_once
    with inside(NEAR):
        add_vip("eth0", ip_address("203.0.113.1"))
    seen.until(lambda view: ip_address("203.0.113.1") in view.addresses)
    assert seen.watcher.on_change == take


def test_watching_goes_on_after_an_event_that_could_not_be_taken_in(
    seen: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, fails = HostTables.apply, iter([True])

    def fail_once(*args: Any) -> Any:
        if next(fails, False):
            raise ValueError("a message that nobody foresaw")
        return apply(*args)

    monkeypatch.setattr(mirror, "RETRY", 0.05)
    monkeypatch.setattr(HostTables, "apply", fail_once)
    with inside(NEAR):
        add_vip("eth0", ip_address("203.0.113.1"))
    seen.until(lambda view: ip_address("203.0.113.1") in view.addresses)
    assert next(fails, None) is None


def resources() -> tuple[set[str], int]:
    names = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    return {name for name in names if "socket:" in name or "eventfd" in name}, threading.active_count()


def test_close_leaves_no_thread_and_no_socket(wires: None) -> None:
    before = resources()
    observer = Observer()
    observer.resolve(4)
    assert resources() != before
    observer.watcher.close()
    assert resources() == before
    observer.watcher.close()
    observer.watcher.want([])
    assert resources() == before


def test_close_before_start_and_from_the_callback(wires: None) -> None:
    before = resources()
    Watcher(lambda view: None).close()
    observer = Observer()
    closed = threading.Event()

    def close(view: KernelView) -> None:
        observer.watcher.close()
        closed.set()

    observer.watcher.on_change = close
    with inside(NEAR):
        add_vip("eth0", ip_address("203.0.113.1"))
    assert closed.wait(PATIENCE)
    observer.watcher.close()
    assert resources() == before


def test_start_that_fails_leaves_nothing(wires: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = resources()
    monkeypatch.setattr(os, "eventfd", refuse)
    with pytest.raises(KernelError, match="Too many open files"):
        Watcher(lambda view: None).start()
    assert resources() == before


@both_families
@pytest.mark.parametrize("by_name", [True, False])
def test_vip_comes_and_goes(seen: Observer, version: int, by_name: bool) -> None:
    vip = ip_address({4: "203.0.113.10", 6: "2001:db8:cafe::10"}[version])
    link: int | str = "eth0" if by_name else seen.link("eth0")
    with inside(NEAR) as ipr:
        assert add_vip(link, vip) is True
        assert add_vip(link, vip) is False
        (held,) = (a for a in ipr.get_addr() if a.get_attr("IFA_ADDRESS") == str(vip))
    assert (held["index"], held["prefixlen"]) == (seen.link("eth0"), vip.max_prefixlen)
    flags = held.get_attr("IFA_FLAGS")
    assert flags & 0x40 == 0, "tentative: the kernel does not answer for it yet"
    assert bool(flags & 0x20) == (version == 6), "IPv6 VIPs are deprecated as source addresses"
    seen.until(lambda view: vip in view.addresses)
    with inside(FAR) as ipr:
        hop_is_known = _far_resolves(ipr, str(vip))
    assert hop_is_known
    with inside(NEAR):
        assert remove_vip(link, vip) is True
        assert remove_vip(link, vip) is False
    seen.until(lambda view: vip not in view.addresses)


def _far_resolves(ipr: IPRoute, vip: str) -> bool:
    """The peer gets an answer to its ARP or ND for the VIP."""
    heard = threading.Event()
    hop = (index("eth0"), ip_address(vip))
    watcher = Watcher(lambda view: heard.set() if hop in view.neighbours else None)
    watcher.start()
    watcher.want([hop])
    try:
        return heard.wait(PATIENCE)
    finally:
        watcher.close()


def test_vip_on_a_link_that_is_not_there(wires: None) -> None:
    with inside(NEAR):
        with pytest.raises(KernelError, match=r"cannot add the address 203\.0\.113\.10 on eth7"):
            add_vip("eth7", ip_address("203.0.113.10"))
        assert remove_vip("eth7", ip_address("203.0.113.10")) is False


# ---- a host with very many routes

MANY = 10_000  # of each IP version


def many(verb: str, gateways: dict[int, Any], first: int = 0, count: int = MANY) -> None:
    """Add, replace or delete MANY prefixes of each version, side by side, as a routing daemon does."""
    numbers = range(first, first + count)
    lines = [f"route {verb} 20.{number >> 8}.{number & 255}.0/24 via {gateways[4]} dev eth1" for number in numbers]
    lines += [f"route {verb} 2a00:{number:x}::/32 via {gateways[6]} dev eth1" for number in numbers]
    subprocess.run(["ip", "-n", NEAR, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def client(version: int, number: int) -> Any:
    return ip_address({4: f"20.{number >> 8}.{number & 255}.9", 6: f"2a00:{number:x}::9"}[version])


@pytest.fixture
def crowded(wires: None) -> Iterator[Observer]:
    """A watcher on a host that has very many routes."""
    many("add", SECOND_PEERS)
    observer = Observer()
    yield observer
    observer.watcher.close()


def test_very_many_routes_are_all_known_and_kept_up_without_reading_them_again(crowded: Observer) -> None:
    eth0, eth1 = crowded.link("eth0"), crowded.link("eth1")
    for version in (4, 6):
        for number in (0, 1, MANY // 2, MANY - 1):
            assert crowded.view.next_hop(client(version, number)) == (eth1, SECOND_PEERS[version])
        assert crowded.view.next_hop(client(version, MANY)) is None
    with inside(NEAR) as ipr:
        for version in (4, 6):  # one that matters, among others
            many("replace", SECOND_PEERS, 5000, 500)
            ipr.route("add", dst=away(version), gateway=str(PEERS[version]), oif=eth0)
            many("del", SECOND_PEERS, 5000, 500)
            many("add", SECOND_PEERS, 5000, 500)
            hop = (eth0, PEERS[version])
            crowded.until(lambda view, version=version, hop=hop: view.next_hop(AWAY[version]) == hop)  # type: ignore[misc]
            ipr.route("del", dst=away(version))
            crowded.until(lambda view, version=version: view.next_hop(AWAY[version]) is None)  # type: ignore[misc]
        ipr.route("del", dst="20.0.7.0/24")
        ipr.route("replace", dst="2a00:7::/32", gateway=str(PEERS[6]), oif=eth0)
    crowded.until(lambda view: view.next_hop(client(4, 7)) is None and view.next_hop(client(6, 7)) == (eth0, PEERS[6]))
    assert crowded.watcher.route_dumps == 1


def test_very_many_routes_go_with_their_link(crowded: Observer) -> None:
    """IPv4 says nothing of it."""
    with inside(NEAR) as ipr:
        ipr.link("set", index=index("eth1"), state="down")
    crowded.until(lambda view: view.next_hop(client(4, 7)) is None and view.next_hop(client(6, 7)) is None)
    with inside(NEAR) as ipr:
        ipr.link("set", index=index("eth1"), state="up")
    many("replace", SECOND_PEERS)
    eth1 = crowded.link("eth1")
    for version in (4, 6):
        crowded.until(lambda view, version=version: view.next_hop(client(version, 7)) == (eth1, SECOND_PEERS[version]))  # type: ignore[misc]


def test_a_storm_of_routes_that_overruns_the_socket_leaves_nothing_stale(
    wires: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While on_change sleeps, very many routes change, and the buffer holds a few of the events."""
    monkeypatch.setattr(netlink, "RECEIVE_BUFFER", 1 << 16)
    release = threading.Event()
    observer = Observer()
    observer.watcher.on_change = lambda view: (release.wait(PATIENCE), observer.take(view))  # type: ignore[assignment]
    try:
        many("add", SECOND_PEERS, count=2000)
        many("del", SECOND_PEERS, 1000, 1000)
        release.set()
        hop = {version: (observer.link("eth1"), SECOND_PEERS[version]) for version in (4, 6)}
        for version in (4, 6):
            observer.until(lambda view, version=version: view.next_hop(client(version, 999)) == hop[version])  # type: ignore[misc]
            observer.until(lambda view, version=version: view.next_hop(client(version, 1999)) is None)  # type: ignore[misc]
        assert observer.watcher.overruns
    finally:
        release.set()
        observer.watcher.close()
