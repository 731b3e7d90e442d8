"""The lab by itself: it carries traffic without fastlb, and it always goes away again."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dpkt
import pytest
from pyroute2 import IPRoute

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

import generator  # noqa: E402
from topology import BACKENDS, NODES, VIPS, Lab, LabError, address, own_prefix, remove_abandoned  # noqa: E402

from fastlb.config import load_config  # noqa: E402

GONE = own_prefix("test") + "gone-"
STEPS = (
    "_create_namespaces",
    "_set_sysctls",
    "_connect",
    "_bridge",
    "_assign_addresses",
    "_add_routes",
    "_wait_for_carrier",
    "_start_servers",
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "lab-") as lab:
        yield lab


@pytest.fixture
def forwarding_balancer(lab: Lab) -> Iterator[None]:
    """The balancer's kernel as a plain router, so that backends can answer along their default route."""
    keys = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    for key in keys:
        lab.sysctl("lb", key, 1)
    yield
    for key in keys:
        lab.sysctl("lb", key, 0)


@pytest.fixture
def vips_to_b2(lab: Lab) -> Iterator[None]:
    """The router itself plays a dsr balancer that has one backend."""
    routes = [
        {"dst": f"{VIPS['dsr', version]}/{bits}", "gateway": address("b2", "eth0", version)}
        for version, bits in ((4, 32), (6, 128))
    ]
    with lab.rtnl("router") as rtnl:
        for route in routes:
            rtnl.route("add", **route)
    yield
    with lab.rtnl("router") as rtnl:
        for route in routes:
            rtnl.route("del", **route)


def host_links() -> set[str]:
    with IPRoute() as rtnl:
        return {link.get("ifname") for link in rtnl.get_links()}


# ---- traffic


@pytest.mark.usefixtures("forwarding_balancer")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nat_way_back_leads_through_the_balancer(lab: Lab, backend: str, version: int) -> None:
    before = lab.counters("lb")["eth1"].rx_packets
    own, target = address("client", "eth0", version), address(backend, "eth0", version)
    http = lab.client("fetch", target, "--port", 8080, "--count", 20)
    udp = lab.client("echo", target, "--port", 5001, "--count", 20)
    assert (http["answered"], http["ports"], http["backends"]) == (20, 20, {backend: 20}), http["errors"]
    assert http["clients"] == {own: 20}
    assert (udp["answered"], udp["ports"], udp["backends"]) == (20, 20, {backend: 20}), udp["errors"]
    assert lab.counters("lb")["eth1"].rx_packets - before > 20 * 5


@pytest.mark.usefixtures("vips_to_b2")
@pytest.mark.parametrize("version", [4, 6])
def test_dsr_way_back_bypasses_the_balancer(lab: Lab, version: int) -> None:
    before = lab.counters("lb")
    vip = VIPS["dsr", version]
    http = lab.client("fetch", vip, "--count", 1000)
    udp = lab.client("echo", vip, "--count", 100)
    down = lab.client("download", vip, "--bytes", 20_000_000)
    up = lab.client("upload", vip, "--bytes", 20_000_000)
    after = lab.counters("lb")
    assert (http["answered"], http["ports"], http["backends"]) == (1000, 1000, {"b2": 1000}), http["errors"]
    assert (udp["answered"], udp["backends"], udp["torn"]) == (100, {"b2": 100}, 0), udp["errors"]
    assert (down["bytes"], down["verified"], down["backend"]) == (20_000_000, True, "b2")
    assert (up["bytes"], up["verified"], up["backend"]) == (20_000_000, True, "b2")
    strays = sum(after[name].rx_packets - before[name].rx_packets for name in ("eth0", "eth1"))
    assert strays < 100, "only ARP and neighbour discovery may come by"


def test_the_balancers_kernel_forwards_nothing(lab: Lab) -> None:
    before = lab.counters("lb")
    sent = lab.generate(VIPS["dsr", 4], "--frames", 500)
    after = lab.counters("lb")
    assert sent["frames"] == 500
    assert after["eth0"].rx_packets - before["eth0"].rx_packets >= 500
    assert after["eth1"].tx_packets - before["eth1"].tx_packets < 100


@pytest.mark.usefixtures("vips_to_b2")
@pytest.mark.parametrize("version", [4, 6])
def test_generator_fills_the_discard_port(lab: Lab, version: int) -> None:
    before = lab.counters("b2")["eth0"].rx_packets
    replies = lab.counters("b2")["eth0"].tx_packets
    sent = lab.generate(VIPS["dsr", version], "--frames", 5000, "--flows", 300)
    assert sent["frames"] == 5000
    assert lab.counters("b2")["eth0"].rx_packets - before >= 5000
    assert lab.counters("b2")["eth0"].tx_packets - replies < 100, "nothing answers, not even by ICMP"


@pytest.mark.usefixtures("vips_to_b2")
def test_offloads(lab: Lab) -> None:
    """With them frames are longer than an MTU on average; without them none can be."""
    average = {}
    for enabled in (False, True):
        lab.set_offloads(enabled)
        before = lab.counters("client")["eth0"]
        assert lab.client("download", VIPS["dsr", 4], "--bytes", 20_000_000)["verified"]
        after = lab.counters("client")["eth0"]
        average[enabled] = (after.rx_bytes - before.rx_bytes) / (after.rx_packets - before.rx_packets)
    assert average[False] <= 1514 < average[True]


def test_set_link(lab: Lab) -> None:
    old = lab.mac("b3", "eth0")
    lab.set_link("b3", "eth0", address="02:00:00:00:00:33")
    assert lab.mac("b3", "eth0") == "02:00:00:00:00:33" != old
    with pytest.raises(LabError, match="no interface eth7"):
        lab.set_link("b3", "eth7", mtu=1400)


def test_links_have_two_queues(lab: Lab) -> None:
    for node in NODES:
        with lab.rtnl(node) as rtnl:
            for link in rtnl.get_links():
                if link.get("ifname") not in ("lo", "br0"):
                    assert (link.get("num_tx_queues"), link.get("num_rx_queues")) == (2, 2)


# ---- what fastlb and the tests are given


def test_configuration_is_valid(lab: Lab) -> None:
    config = load_config(lab.write_config(workers=1))
    assert config.workers == 1
    assert config.control == str(lab.socket_path)
    assert sorted(service.name for service in config.services) == sorted(
        f"{name}-{forward}-{version}"
        for name in ("web", "echo", "discard")
        for forward in ("nat", "dsr")
        for version in (4, 6)
    )


@pytest.mark.parametrize("size", [62, 64, 65, 1514])
@pytest.mark.parametrize("version", [4, 6])
def test_frames_are_valid(version: int, size: int) -> None:
    """dpkt takes them apart and computes the same checksums from scratch."""
    source, target = address("client", "eth0", version), VIPS["dsr", version]
    arguments = argparse.Namespace(
        next_hop_mac="02:00:00:00:00:01", source=source, target=target, port=9, flows=3, size=size
    )
    frames = generator.build_frames(arguments, bytes.fromhex("020000000002"))
    assert [len(frame) for frame in frames] == [size] * 3
    for flow, frame in enumerate(frames):
        ip = dpkt.ethernet.Ethernet(frame).data
        assert (ip.data.sport, ip.data.dport, ip.data.ulen) == (1024 + flow, 9, len(ip.data))
        ip.data.sum = 0
        if ip.v == 4:
            ip.sum = 0
        assert bytes(ip) == frame[14:]


def test_check_tells_what_failed(lab: Lab) -> None:
    with pytest.raises(LabError, match="b1: sh -c echo oops >&2; exit 3: exit code 3: oops"):
        lab.check("b1", ["sh", "-c", "echo oops >&2; exit 3"])
    with pytest.raises(LabError, match=r"still running after 0\.1 s"):
        lab.check("b1", ["sleep", "60"], timeout=0.1)


# ---- coming and going


def test_down_leaves_nothing() -> None:
    links = host_links()
    lab = Lab(GONE)
    with lab:
        assert len(lab.leftovers()) == len(NODES) + 1 + len(BACKENDS), "namespaces, run directory, servers"
        assert host_links() == links
    assert lab.leftovers() == []
    lab.down()


def test_down_ends_a_process_that_ignores_sigterm() -> None:
    with Lab(GONE) as lab:
        stubborn = ["sh", "-c", "trap '' TERM; echo; exec sleep 1000"]
        child = lab.run("client", stubborn, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert lab.leftovers() == []


@pytest.mark.parametrize("step", STEPS)
def test_failure_in_the_middle_leaves_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step does its work and then fails: the most there can be to clean up."""
    links = host_links()
    whole = getattr(Lab, step)

    def fails_at_its_end(self: Lab) -> None:
        whole(self)
        raise RuntimeError(step)

    monkeypatch.setattr(Lab, step, fails_at_its_end)
    lab = Lab(GONE)
    with pytest.raises(RuntimeError, match=step):
        lab.up()
    assert lab.leftovers() == []
    assert host_links() == links


def test_a_server_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topology.HERE", Path("/nonexistent"))
    lab = Lab(GONE)
    with pytest.raises(LabError, match=r"servers of b1 did not start: .*No such file"):
        lab.up()
    assert lab.leftovers() == []


def test_second_lab_of_the_same_name_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match=f"{lab.prefix}client exists"):
        Lab(lab.prefix).up()
    assert lab.client("fetch", "127.0.0.1", "--count", 1, node="b1")["backends"] == {"b1": 1}, "still there"


def test_what_a_killed_process_leaves_is_removed_by_the_next() -> None:
    """And what belongs to a process that still runs is not."""
    program = f"import sys; sys.path.insert(0, {str(LAB_DIR)!r}); import topology; "
    program += "topology.Lab(topology.own_prefix('test')).up(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"\n"
        prefix = f"fastlb-test{killed.pid}-"
        with Lab(GONE) as lab:
            assert remove_abandoned() == []
            killed.kill()
            killed.wait()
            assert sorted(remove_abandoned()) == sorted([f"{prefix}lab", *(prefix + node for node in NODES)])
            assert len(lab.pids()) == len(BACKENDS), "still there"
    assert Lab(prefix).leftovers() == []
    assert remove_abandoned() == []


def test_command_line() -> None:
    """Up in one process, used and taken down from others."""

    def command(*words: str) -> str:
        argv = [sys.executable, str(LAB_DIR / "lab"), "--prefix", GONE, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    try:
        said = command("up")
        assert f"enter lb fastlb run -c /run/{GONE}lab/fastlb.yaml" in said
        assert len(Lab(GONE).pids()) == 3
        assert "(b3)" in command("status")
        fetch = (str(LAB_DIR / "client.py"), "fetch", "10.3.0.12", "--count", "5")
        assert '"answered": 5' in command("enter", "b1", *fetch)
    finally:
        command("down")
    assert command("status") == "The lab is down.\n"
    assert Lab(GONE).leftovers() == []
