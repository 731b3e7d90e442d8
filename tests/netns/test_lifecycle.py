"""``fastlb run`` comes, changes and goes: what each way to end leaves behind, and what a reload may and may not do."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pyroute2 import IPRoute

from fastlb.kernel import guard
from tests import ebpf
from tests.netns.balancer import PATIENCE, Balancer, backends, fastlb, snmp, until, within

LAB_DIR = Path(__file__).resolve().parents[2] / "netns-lab"
sys.path.insert(0, str(LAB_DIR))

from topology import ADDRESSES, APPLICATIONS, BACKENDS, VIPS, Lab, add_address, index_of, own_prefix, service  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")

CLSACT, INGRESS = 0xFFFF_0000, 0xFFFF_FFF2
CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, CAP_PERFMON, PR_CAPBSET_DROP = 12, 13, 21, 38, 24
WEB = APPLICATIONS[0]
GUARD = {"program fastlb_guard"}
GUARD |= {f"map fastlb_{name}" for name in ("vips", "replies", "locals", "masks", "datagram", "to_host")}
RUNNING = {"program fastlb_filter", "program fastlb_bell", "packet socket"}
RUNNING |= {"map fastlb_asleep", "map fastlb_full", "map fastlb_sources"}
HOOKS = {"clsact on eth0", "clsact on eth1"}
REQUEST = b"GET %s HTTP/1.1\r\nHost: lab\r\n\r\n"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "life-") as lab:
        yield lab


def remains(lab: Lab) -> set[str]:
    """Everything of the balancer's node that a fastlb makes and could forget."""
    found = within(lab.namespace("lb"), _of_the_namespace)
    guards = within(lab.namespace("lb"), guard.show)
    mine = ebpf.of_namespace(lab.namespace("lb"), [each.program_id for each in guards])
    for kind, key, objects in (("program", "prog_id", ebpf.programs()), ("map", "map_id", ebpf.maps())):
        names = {number: name for number, name in objects.items() if name.startswith("fastlb_")}
        found |= {f"{kind} {name} #{number}" for number, name in names.items() if (key, number) in mine}
    return found


def _of_the_namespace() -> set[str]:
    sockets = Path("/proc/thread-self/net/packet").read_text().splitlines()[1:]
    found = {f"packet socket #{line.split()[-1]}" for line in sockets}
    with IPRoute() as rtnl:
        names = {link["index"]: link.get("ifname") for link in rtnl.get_links()}
        for qdisc in rtnl.get_qdiscs():
            if qdisc["handle"] == CLSACT:
                found.add(f"clsact on {names[qdisc['index']]}")
        found |= {f"address {each.get('address')} on {names[each['index']]}" for each in rtnl.get_addr()}
    return found


def kinds(found: set[str]) -> set[str]:
    """Without the numbers that tell one of a kind from another."""
    return {re.sub(" #.*", "", each) for each in found}


@pytest.fixture
def before(lab: Lab) -> Iterator[set[str]]:
    """What there was before the test; nothing may have come by its end (the kernel frees with some delay)."""
    there = remains(lab)
    yield there
    assert until(lambda: remains(lab) <= there), remains(lab) - there


@pytest.fixture
def balancer(lab: Lab, before: set[str], tmp_path: Path) -> Iterator[Balancer]:
    with Balancer(lab.namespace("lb"), lab.config(workers=1), tmp_path) as balancer:
        yield balancer
        balancer.show_log()


def fetched(lab: Lab, vip: str, count: int = 60) -> list[str]:
    """The backends that answered; every connection must be."""
    got = lab.client("fetch", vip, "--count", count)
    assert (got["answered"], got["errors"]) == (count, {})
    return sorted(got["backends"])


def outcome(lab: Lab, vip: str, port: int = WEB.port) -> str:
    """What becomes of one connection."""

    def attempt() -> str:
        try:
            with socket.create_connection((vip, port), timeout=0.7):
                return "connected"
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"

    return within(lab.namespace("client"), attempt)


def is_gone(lab: Lab, balancer: Balancer, before: set[str]) -> bool:
    return until(lambda: remains(lab) <= before) and not balancer.socket_path.exists()


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_clean_stop_leaves_nothing(
    lab: Lab, balancer: Balancer, before: set[str], number: signal.Signals
) -> None:
    for vip in VIPS.values():
        assert fetched(lab, vip) == list(BACKENDS)
    made = remains(lab) - before
    assert kinds(made) == GUARD | HOOKS | RUNNING
    assert balancer.terminate(number) == 0
    assert is_gone(lab, balancer, before), remains(lab) - before
    assert [each["event"] for each in balancer.logs()] == ["running", "stopped"]


def test_a_stop_under_load(lab: Lab, balancer: Balancer, before: set[str]) -> None:
    flood = threading.Thread(target=lab.generate, args=(VIPS["dsr", 4], "--seconds", 2))
    flood.start()
    try:
        assert until(lambda: balancer.status()["counters"]["packets"] > 10_000)
        assert balancer.terminate() == 0
        assert is_gone(lab, balancer, before), remains(lab) - before
    finally:
        flood.join()


def test_a_stop_that_is_asked_for_twice(lab: Lab, balancer: Balancer, before: set[str]) -> None:
    for _ in range(50):
        balancer.send_signal(signal.SIGTERM)
    assert balancer.terminate() == 0
    assert is_gone(lab, balancer, before), remains(lab) - before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_stop_while_starting(lab: Lab, before: set[str], tmp_path: Path, number: signal.Signals) -> None:
    starting = Balancer(lab.namespace("lb"), lab.config(workers=1), tmp_path)
    for seen in (starting.socket_path.exists, lambda: remains(lab) >= HOOKS):
        process = starting.launch()
        try:
            assert until(seen)
            process.send_signal(number)
            assert process.wait(PATIENCE) == 0, starting.log_path.read_text()
        finally:
            process.kill()
            process.wait()
        assert is_gone(lab, starting, before), remains(lab) - before


def test_an_interface_that_vanishes(lab: Lab, before: set[str], tmp_path: Path) -> None:
    """Everything else goes on, and the stop is still clean."""
    with lab.rtnl("lb") as rtnl:
        rtnl.link("add", ifname="x0", kind="veth", peer={"ifname": "x1"})
        for name in ("x0", "x1"):
            rtnl.link("set", index=index_of(rtnl, name), state="up")
    config = lab.config(workers=1, interfaces=["eth0", "eth1", "x0"])
    with Balancer(lab.namespace("lb"), config, tmp_path) as balancer:
        with lab.rtnl("lb") as rtnl:
            rtnl.link("del", index=index_of(rtnl, "x0"))
        for vip in VIPS.values():
            assert fetched(lab, vip) == list(BACKENDS)
        assert balancer.terminate() == 0
        assert is_gone(lab, balancer, before), remains(lab) - before


# ---- crashing


@pytest.fixture
def vip_on_the_host(lab: Lab) -> Iterator[str]:
    """A VIP that the balancer's own kernel would answer for: nothing listens there, so by RST."""
    vip = VIPS["nat", 4]
    with lab.rtnl("lb") as rtnl:
        rtnl.addr("add", index=1, address=vip, prefixlen=32)
    yield vip
    with lab.rtnl("lb") as rtnl:
        rtnl.addr("del", index=1, address=vip, prefixlen=32)


def test_a_crash_leaves_the_guard_and_nothing_else(
    lab: Lab, vip_on_the_host: str, balancer: Balancer, before: set[str]
) -> None:
    def guard(*words: str) -> str:
        done = fastlb("guard", *words, namespace=lab.namespace("lb"))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert outcome(lab, vip_on_the_host) == "connected"
    balancer.kill()
    assert until(lambda: kinds(remains(lab) - before) == GUARD | HOOKS), remains(lab) - before

    resets = within(lab.namespace("lb"), snmp)["TcpOutRsts"]
    assert outcome(lab, vip_on_the_host) == "silence"
    assert within(lab.namespace("lb"), snmp)["TcpOutRsts"] == resets
    assert outcome(lab, vip_on_the_host, port=81) == "refused", "what is no service's is not guarded"

    shown = json.loads(guard("show", "--json"))["interfaces"]
    assert [each["interface"] for each in shown] == ["eth0", "eth1"]
    assert all(str(each["program_id"]) in guard("show") for each in shown)
    assert guard("remove").startswith("removed from: eth0, eth1, /dev/shm/fastlb-")
    assert until(lambda: remains(lab) <= before), remains(lab) - before
    assert json.loads(guard("show", "--json")) == {"interfaces": [], "flow_files": []}
    assert guard("remove").startswith("nothing is left over: ")
    assert outcome(lab, vip_on_the_host) == "refused", "and now the host answers"


def test_a_restart_takes_the_guard_over(lab: Lab, balancer: Balancer, before: set[str]) -> None:
    balancer.kill()
    left = {each for each in remains(lab) - before if each.startswith("program")}
    balancer.start()
    for vip in VIPS.values():
        assert fetched(lab, vip) == list(BACKENDS)
    assert until(lambda: not left & remains(lab)), "the old program is gone"
    assert balancer.terminate() == 0
    assert is_gone(lab, balancer, before), remains(lab) - before


class Download:
    """GET /bytes/N of which a part is read, and the rest later."""

    def __init__(self, lab: Lab, vip: str, size: int) -> None:
        self.size = size
        self.socket = within(lab.namespace("client"), socket.create_connection, (vip, WEB.port), PATIENCE)
        self.socket.sendall(REQUEST % b"/bytes/%d" % size)
        self.stream = self.socket.makefile("rb")
        head = b"".join(iter(self.stream.readline, b"\r\n")).decode()
        self.expected = re.search("X-SHA256: (.*)\r", head)[1]  # type: ignore[index]
        self.digest = hashlib.sha256()

    def read(self, count: int) -> None:
        data = self.stream.read(count)
        self.size -= len(data)
        self.digest.update(data)

    def finish(self) -> str:
        """Whether what came is what was sent."""
        self.read(self.size)
        self.stream.close()
        self.socket.close()
        return "whole" if (self.size, self.digest.hexdigest()) == (0, self.expected) else f"{self.size} bytes missing"


def test_connections_survive_a_crash_and_restart(lab: Lab, balancer: Balancer) -> None:
    """Without the flow table of before the Maglev table explains both legs of each connection; with it it need not
    (test_takeover.py)."""
    balancer.terminate()
    balancer.configure({**balancer.config, "flow_file": "none"})
    balancer.start()
    downloads = {way: Download(lab, vip, 50_000_000) for way, vip in VIPS.items()}
    for download in downloads.values():
        download.read(1_000_000)
    balancer.kill()
    balancer.start()
    assert {way: download.finish() for way, download in downloads.items()} == dict.fromkeys(VIPS, "whole")
    assert balancer.status()["counters"]["paths"]["maglev"] > 0


# ---- reloading


def weighted(base: Mapping[str, Any], name: str, *weights: int) -> dict[str, Any]:
    """The configuration with other weights for one service's backends."""

    def reweighted(service: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(service["backends"], weights, strict=True)
        return service | {"backends": [backend | {"weight": weight} for backend, weight in pairs]}

    services = [reweighted(each) if each["name"] == name else each for each in base["services"]]
    return {**base, "services": services}


class Session:
    """A connection that is kept: one request after another, each told by whom."""

    def __init__(self, lab: Lab, vip: str) -> None:
        self.socket = within(lab.namespace("client"), socket.create_connection, (vip, WEB.port), PATIENCE)
        self.stream = self.socket.makefile("rb")

    def ask(self) -> str:
        """The backend that answers."""
        self.socket.sendall(REQUEST % b"/")
        head = b"".join(iter(self.stream.readline, b"\r\n")).decode()
        length = int(re.search("Content-Length: ([0-9]*)", head)[1])  # type: ignore[index]
        return self.stream.read(length).decode().split()[0]

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def by_command(balancer: Balancer, config: Mapping[str, Any]) -> None:
    done = balancer.reload(config)
    assert (done.returncode, done.stderr) == (0, "")
    count = len(config["services"])
    assert done.stdout == f"reloaded: {count} service{'s' if count != 1 else ''}\n"


def by_signal(balancer: Balancer, config: Mapping[str, Any]) -> None:
    reloads = [each["event"] for each in balancer.logs()].count("reloaded")
    balancer.configure(config)
    balancer.send_signal(signal.SIGHUP)
    assert until(lambda: [each["event"] for each in balancer.logs()].count("reloaded") > reloads)


@pytest.mark.parametrize("reload", [by_command, by_signal])
def test_services_come_and_go(
    lab: Lab, balancer: Balancer, reload: Callable[[Balancer, Mapping[str, Any]], None]
) -> None:
    base, fresh = lab.config(workers=1), service(WEB, "nat", 4) | {"name": "fresh", "port": 8000}
    vip = VIPS["nat", 4]
    session = Session(lab, vip)
    own = session.ask()
    assert outcome(lab, vip, 8000) == "silence"
    reload(balancer, {**base, "services": [fresh, *base["services"]]})
    assert outcome(lab, vip, 8000) == "connected"
    assert session.ask() == own
    reload(balancer, base)
    assert outcome(lab, vip, 8000) == "silence"
    assert (session.ask(), fetched(lab, vip)) == (own, list(BACKENDS))
    session.close()


@pytest.mark.parametrize("way", VIPS)
def test_weights_decide_for_new_flows_only(lab: Lab, balancer: Balancer, way: tuple[str, int]) -> None:
    name, vip = f"web-{way[0]}-{way[1]}", VIPS[way]
    sessions = [Session(lab, vip) for _ in range(12)]
    owners = [session.ask() for session in sessions]
    assert len(set(owners)) > 1
    by_command(balancer, weighted(balancer.config, name, 0, 0, 1))
    assert fetched(lab, vip) == ["b3"]
    assert [session.ask() for session in sessions] == owners
    by_command(balancer, weighted(balancer.config, name, 1, 3, 0))
    got = lab.client("fetch", vip, "--count", 400)["backends"]
    assert sorted(got) == ["b1", "b2"]
    assert 50 < got["b1"] < 150, "a quarter"
    assert [session.ask() for session in sessions] == owners
    weights = [each["weight"] for each in backends(balancer.status(), name).values()]
    assert weights == [1, 3, 0]
    for session in sessions:
        session.close()


def test_a_reload_under_load_loses_no_connection(lab: Lab, balancer: Balancer) -> None:
    vip, name, reloads, results = VIPS["nat", 4], "web-nat-4", 0, []
    base = balancer.config

    def load() -> None:
        for _ in range(4):
            results.append(lab.client("fetch", vip, "--count", 500))

    loading = threading.Thread(target=load)
    loading.start()
    while loading.is_alive() or not reloads:
        balancer.configure(weighted(base, name, reloads % 3, 1, 2))
        balancer.send_signal(signal.SIGHUP)
        reloads += 1
        time.sleep(0.05)
    loading.join()
    assert [(got["answered"], got["errors"]) for got in results] == [(500, {})] * 4
    events = [each["event"] for each in balancer.logs()]
    assert events.count("reloaded") > 5
    assert set(events) == {"running", "reloaded"}


def test_an_invalid_file_changes_nothing(lab: Lab, balancer: Balancer) -> None:
    vip, base, good = VIPS["nat", 4], balancer.config, balancer.status()["services"]
    session = Session(lab, vip)
    own = session.ask()
    broken = {**base, "services": [base["services"][0] | {"port": 0, "forwrad": "nat"}]}

    done = balancer.reload(broken)
    assert (done.returncode, done.stdout) == (2, "")
    assert [path in done.stderr for path in ("services[0].port", "services[0].forwrad")] == [True, True]
    assert done.stderr.count(f"fastlb: {balancer.config_path}:") == 2, "each with its line"
    by_file = fastlb("reload", "-c", balancer.config_path)
    assert (by_file.returncode, by_file.stderr) == (2, done.stderr)

    balancer.send_signal(signal.SIGHUP)
    assert until(lambda: len(refusals(balancer)) == 3)
    assert refusals(balancer)[0] == refusals(balancer)[1] == refusals(balancer)[2]
    assert [f"fastlb: {line}" for line in refusals(balancer)[2]] == done.stderr.splitlines()

    assert (session.ask(), fetched(lab, vip), balancer.running) == (own, list(BACKENDS), True)
    assert [each["name"] for each in balancer.status()["services"]] == [each["name"] for each in good]
    session.close()


def refusals(balancer: Balancer) -> list[list[str]]:
    """The problems of each reload that was refused, as they were logged."""
    return [each["problems"] for each in balancer.logs() if each["event"].startswith("reload refused")]


# what is changed, and what is said about it
REFUSED_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"interfaces": ["eth0"]}, "interfaces: eth0, eth1 -> eth0"),
    ({"flows": 5000}, "flows: 1000000 -> 5000"),
    ({"vip_address": "interface"}, "vip_address: none -> interface"),
    ({"transmit": "sendmmsg"}, "transmit: auto -> sendmmsg"),
]


def test_what_a_reload_cannot_change(balancer: Balancer) -> None:
    base = balancer.config
    for change, said in REFUSED_CHANGES:
        done = balancer.reload({**base, **change})
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr
        assert "restart" in done.stderr


def test_a_reload_to_a_dsr_backend_behind_a_gateway_is_refused(lab: Lab, balancer: Balancer) -> None:
    far = service(WEB, "dsr", 4) | {"backends": [{"address": "10.1.0.2"}]}
    done = balancer.reload({**balancer.config, "services": [far]})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "10.1.0.2 is behind gateway" in done.stderr
    assert fetched(lab, VIPS["dsr", 4]) == list(BACKENDS)


# ---- VIPs on the interface

ON_LINK = {4: "10.2.0.200", 6: "fd00:2::200"}


def on_link(lab: Lab, versions: tuple[int, ...]) -> dict[str, Any]:
    services = [service(WEB, "nat", version) | {"vip": ON_LINK[version]} for version in versions]
    return lab.config(workers=1, vip_address="interface", services=services)


def test_vips_on_the_interface(lab: Lab, before: set[str], tmp_path: Path) -> None:
    """The router finds them by ARP and ND, which the host answers; no packet of a service reaches the host's stack."""
    held = {f"address {vip} on eth0" for vip in ON_LINK.values()}
    with Balancer(lab.namespace("lb"), on_link(lab, (4, 6)), tmp_path) as balancer:
        resets = within(lab.namespace("lb"), snmp)["TcpOutRsts"]
        for vip in ON_LINK.values():
            assert fetched(lab, vip) == list(BACKENDS)
        assert within(lab.namespace("lb"), snmp)["TcpOutRsts"] == resets
        assert held <= remains(lab)
        by_command(balancer, on_link(lab, (4,)))
        assert held & remains(lab) == {f"address {ON_LINK[4]} on eth0"}
        by_command(balancer, on_link(lab, (4, 6)))
        assert fetched(lab, ON_LINK[6]) == list(BACKENDS)
        assert balancer.terminate() == 0
        assert is_gone(lab, balancer, before), remains(lab) - before


def test_vips_on_the_interface_after_a_crash(lab: Lab, before: set[str], tmp_path: Path) -> None:
    """They stay, for the guard to take what comes; the next run, and its clean stop, treat them as its own."""
    with Balancer(lab.namespace("lb"), on_link(lab, (4, 6)), tmp_path) as balancer:
        balancer.kill()
        assert {f"address {vip} on eth0" for vip in ON_LINK.values()} <= remains(lab)
        balancer.start()
        for vip in ON_LINK.values():
            assert fetched(lab, vip) == list(BACKENDS)
        assert balancer.terminate() == 0
        assert is_gone(lab, balancer, before), remains(lab) - before


# ---- what does not even start


def without_capabilities(*dropped: int) -> None:
    """In a child, before its exec: root, but not with everything."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in dropped:
        assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
BROKEN = {"interfaces": ["eth0"], "workers": 0, "services": [{"name": "web", "vip": "203.0.113.10"}]}

# changes to the configuration, options of the process, exit code, what each line of the answer must say
REFUSED_STARTS = [
    pytest.param(
        {"interfaces": ["eth0", "eth7"]},
        {},
        1,
        ["interface eth7 does not exist; there are: eth0, eth1, lo"],
        id="missing interface",
    ),
    pytest.param({"interfaces": ["lo"]}, {}, 1, ["interface lo has no MAC address"], id="interface without a mac"),
    pytest.param(
        {"ring": {"block_size": "4MiB", "blocks": 4096}},
        {},
        1,
        [r"the receive rings take 32768 MiB, and \d+ MiB are free; try fewer ring.blocks"],
        id="ring too large",
        marks=pytest.mark.skipif(MEMORY > 32 << 30, reason="this machine has memory for the largest rings there are"),
    ),
    pytest.param(
        {"services": [service(WEB, "dsr", 4) | {"backends": [{"address": "10.1.0.2"}]}]},
        {},
        1,
        [r"dsr backend 10\.1\.0\.2 is behind gateway 10\.2\.0\.1; it must be on-link"],
        id="dsr through a gateway",
    ),
    pytest.param(
        {"services": [service(WEB, "dsr", 6) | {"backends": [{"address": "fd00:1::2"}]}]},
        {},
        1,
        ["dsr backend fd00:1::2 is behind gateway fd00:2::1; it must be on-link"],
        id="dsr through a gateway, ipv6",
    ),
    pytest.param(
        {},
        {"preexec_fn": partial(without_capabilities, CAP_NET_ADMIN, CAP_NET_RAW)},
        1,
        ["needs root: CAP_NET_ADMIN and CAP_NET_RAW missing"],
        id="not root",
    ),
    pytest.param(
        {},
        {"preexec_fn": partial(without_capabilities, CAP_NET_RAW)},
        1,
        ["needs root: CAP_NET_RAW missing"],
        id="no raw sockets",
    ),
    pytest.param(
        {},
        {"preexec_fn": partial(without_capabilities, CAP_SYS_ADMIN, CAP_PERFMON)},
        1,
        [r"needs root: CAP_PERFMON missing \(without root it needs CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF and CAP_P"],
        id="no additions to pointers in eBPF",
    ),
    pytest.param(
        {"control": "/proc/nowhere/fastlb.sock"}, {}, 1, ["cannot open the control socket"], id="control socket nowhere"
    ),
    pytest.param({"interfaces": []}, {}, 2, ["interfaces: .*at least one interface"], id="no interfaces"),
    pytest.param(
        BROKEN,
        {},
        2,
        [
            r"services\[0\]\.port: it is missing",
            r"services\[0\]\.protocol: it is missing",
            r"services\[0\]\.forward: it is missing",
            r"fastlb\.yaml:\d+: workers: ",
        ],
        id="invalid configuration",
    ),
]


@pytest.mark.parametrize(("changes", "options", "code", "said"), REFUSED_STARTS)
def test_a_start_that_is_refused(
    lab: Lab,
    before: set[str],
    tmp_path: Path,
    changes: dict[str, Any],
    options: dict[str, Any],
    code: int,
    said: list[str],
) -> None:
    path = tmp_path / "fastlb.yaml"
    config = lab.config(workers=1, control=str(tmp_path / "fastlb.sock")) | changes
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    done = fastlb("run", "-c", path, namespace=lab.namespace("lb"), **options)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (code, "", len(said)), done.stderr
    for line, pattern in zip(lines, said, strict=True):
        assert re.match(f"fastlb: .*{pattern}", line), line
    assert [each.name for each in tmp_path.iterdir()] == ["fastlb.yaml"], "no socket"


@pytest.mark.parametrize(("name", "said"), [("missing.yaml", "No such file"), ("", "directory")])
def test_a_file_that_cannot_be_read(lab: Lab, before: set[str], tmp_path: Path, name: str, said: str) -> None:
    for command in ("run", "check"):
        done = fastlb(command, "-c", tmp_path / name, namespace=lab.namespace("lb"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said.lower() in done.stderr.lower()


def test_a_second_instance_is_refused(lab: Lab, balancer: Balancer, tmp_path: Path) -> None:
    """With the same configuration, or with another one for the same interface."""
    there = remains(lab)
    other = lab.write_config(tmp_path / "other.yaml", interfaces=["eth1"], control=str(tmp_path / "other.sock"))
    for path, said in ((balancer.config_path, "it answers on"), (other, "on interface eth1")):
        done = fastlb("run", "-c", path, namespace=lab.namespace("lb"))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "another fastlb is running" in done.stderr
        assert said in done.stderr
        assert remains(lab) <= there
    assert fetched(lab, VIPS["nat", 4]) == list(BACKENDS)


def test_a_start_that_fails_half_way(lab: Lab, before: set[str], tmp_path: Path) -> None:
    """The first interface has its guard when the second one refuses: somebody else's filter is in its place."""
    with ExitStack() as undo:
        with lab.rtnl("lb") as rtnl:
            at = index_of(rtnl, "eth1")
            rtnl.tc("add", "clsact", at)
            undo.callback(remove_clsact, lab, "eth1")
            place = {"index": at, "parent": INGRESS, "prio": 1, "protocol": 0x0800}
            rtnl.tc("add-filter", "u32", keys=["0x0/0x0+0"], target=1, **place)
        there = remains(lab)
        config = on_link(lab, (4, 6))
        refused = Balancer(lab.namespace("lb"), config, tmp_path)
        done = fastlb("run", "-c", refused.config_path, namespace=lab.namespace("lb"))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "eth1: cannot attach the guard" in done.stderr
        assert until(lambda: remains(lab) <= there), remains(lab) - there
        assert not refused.socket_path.exists()


def remove_clsact(lab: Lab, interface: str) -> None:
    with lab.rtnl("lb") as rtnl:
        rtnl.tc("del", "clsact", index_of(rtnl, interface))


# ---- the other commands


def test_status(lab: Lab, balancer: Balancer) -> None:
    fetched(lab, VIPS["nat", 4])
    table = fastlb("status", "--socket", balancer.socket_path)
    assert (table.returncode, table.stderr) == (0, "")
    (first, *_) = table.stdout.splitlines()
    assert f"pid {balancer.pid}, " in first
    assert "on eth0, eth1" in first
    row = next(line.split() for line in table.stdout.splitlines() if "10.3.0.11:8080" in line)
    assert row[:7] == ["web-nat-4", "203.0.113.10", "80/tcp", "nat", "10.3.0.11:8080", "unchecked", "1"]
    data = json.loads(fastlb("status", "-c", balancer.config_path, "--json").stdout)
    assert data.keys() == balancer.status().keys()
    assert data["pid"] == balancer.pid
    assert [each["name"] for each in data["services"]] == [each["name"] for each in balancer.config["services"]]
    assert balancer.socket_path.stat().st_mode & 0o777 == 0o600


def test_status_without_a_balancer(tmp_path: Path) -> None:
    for command in ("status", "reload"):
        done = fastlb(command, "--socket", tmp_path / "fastlb.sock")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"fastlb: no fastlb is running on {tmp_path}/fastlb.sock; is it the right --socket or -c?\n"
        )


def test_a_request_that_makes_no_sense(balancer: Balancer) -> None:
    for request in (b"{}\n", b"status\n", b'{"command": "dance"}\n', b"[]\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(balancer.socket_path))
            connection.sendall(request)
            answer = json.loads(connection.makefile("rb").readline())
        assert answer["ok"] is False
        assert re.match("(unknown|unreadable) request", answer["error"])
    assert balancer.status()["pid"] == balancer.pid


def test_check_and_schema(lab: Lab, tmp_path: Path) -> None:
    path = lab.write_config(tmp_path / "fastlb.yaml", workers=1)
    good = fastlb("check", "-c", path)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"{path}: valid, 12 services, 36 backends\n", "")
    shown = json.loads(fastlb("check", "-c", path, "--json").stdout)
    assert (shown["workers"], shown["maglev_size"], len(shown["services"])) == (1, 65537, 12)
    schema = json.loads(fastlb("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    path.write_text(yaml.safe_dump(BROKEN))
    bad = fastlb("check", "-c", path)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 4)


def test_check_against_the_host(lab: Lab, tmp_path: Path) -> None:
    """What `run` would refuse there, `check --host` says as well."""
    here = lab.namespace("lb")
    path = lab.write_config(tmp_path / "fastlb.yaml", workers=1)
    good = fastlb("check", "-c", path, "--host", namespace=here)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"{path}: valid, 12 services, 36 backends\n", "")
    elsewhere = fastlb("check", "-c", path, "--host", namespace=lab.namespace("b1"))
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "")
    assert "interface eth1 does not exist" in elsewhere.stderr
    refused = lab.write_config(tmp_path / "refused.yaml", workers=1, flow_log=str(tmp_path / "none" / "flows"))
    assert "flow_log: there is no directory" in fastlb("check", "-c", refused, "--host", namespace=here).stderr
    refused = lab.write_config(tmp_path / "refused.yaml", workers=1, flow_file="/proc/flows")
    assert "a flow file must be in memory" in fastlb("check", "-c", refused, "--host", namespace=here).stderr
    mine = tmp_path / "mine.txt"
    mine.write_text("of somebody else")
    other = tmp_path / "other"
    other.mkdir()
    for place in (mine, other):
        refused = lab.write_config(tmp_path / "refused.yaml", workers=1, control=str(place))
        for words in (("check", "--host"), ("run",)):
            told = fastlb(*words, "-c", refused, namespace=here)
            assert told.returncode == 1
            assert f"control: {place} is there, and is no socket" in told.stderr
    assert mine.read_text() == "of somebody else"
    odd = lab.write_config(tmp_path / "odd.yaml", workers=64, snat=["192.0.2.9", "2001:db8::9"], ring={"blocks": 4})
    told = fastlb("check", "-c", odd, "--host", namespace=here)
    assert told.returncode == 0
    assert "note: workers share cores: 64 on " in told.stdout
    assert "note: answers must be routed here: snat: 192.0.2.9 is no address of this host" in told.stdout
    half = lab.write_config(tmp_path / "half.yaml", workers=1, interfaces=["eth0"])
    noted = fastlb("check", "-c", half, "--host", namespace=here)
    assert noted.returncode == 1
    assert "service web-nat-4: backend 10.3.0.11 and 2 more is reached by eth1, which is not among" in noted.stderr
    narrow = ["fd00:3::11", "dev", "eth1", "mtu", "1200"]
    lab.check("lb", ["ip", "-6", "route", "add", *narrow])
    try:
        assert fastlb("check", "-c", path, namespace=here).returncode == 0
        for words in (("check", "--host"), ("run",)):
            refused = fastlb(*words, "-c", path, namespace=here)
            assert refused.returncode == 1
            assert "service web-nat-6: the MTU towards backend fd00:3::11 is 1200; IPv6 needs 1280" in refused.stderr
    finally:
        lab.check("lb", ["ip", "-6", "route", "del", *narrow])


@pytest.mark.parametrize("words", [[], ["run"], ["dance"], ["guard"], ["status", "--socket", "a", "-c", "b"]])
def test_wrong_usage(words: list[str]) -> None:
    done = fastlb(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: fastlb" in done.stderr


def test_a_guard_in_use_is_not_removed(lab: Lab, balancer: Balancer) -> None:
    shown = json.loads(fastlb("guard", "show", "--json", namespace=lab.namespace("lb")).stdout)
    assert [(each["interface"], each["in_use"]) for each in shown["interfaces"]] == [("eth0", True), ("eth1", True)]
    done = fastlb("guard", "remove", namespace=lab.namespace("lb"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastlb: a running fastlb uses eth0, eth1; stop it, which removes everything by itself\n"
    assert json.loads(fastlb("guard", "show", "--json", namespace=lab.namespace("lb")).stdout) == shown


def test_vips_that_a_crash_left_are_removed(lab: Lab, balancer: Balancer) -> None:
    def held() -> set[str]:
        with lab.rtnl("lb") as route:
            return {message.get_attr("IFA_ADDRESS") for message in route.get_addr()} & set(VIPS.values())

    balancer.terminate()
    balancer.configure({**balancer.config, "vip_address": "interface"})
    balancer.start()
    assert held() == set(VIPS.values())
    balancer.kill()
    assert held() == set(VIPS.values())
    done = fastlb("guard", "remove", namespace=lab.namespace("lb"))
    assert (done.returncode, held()) == (0, set())
    assert done.stdout.startswith("removed from: eth0, eth1, ")

    balancer.start()
    balancer.kill()
    balancer.configure({**balancer.config, "vip_address": "none"})
    balancer.start()  # which takes over, and removes what its configuration does not hold
    assert held() == set()


def test_an_address_of_the_administrator_stays(lab: Lab, balancer: Balancer) -> None:
    vip = VIPS["nat", 4]
    balancer.terminate()
    with lab.rtnl("lb") as route:
        index = route.link_lookup(ifname="eth0")[0]
        route.addr("add", index=index, address=vip, prefixlen=32)
        try:
            balancer.configure({**balancer.config, "vip_address": "interface"})
            balancer.start()
            balancer.terminate()
            assert vip in {message.get_attr("IFA_ADDRESS") for message in route.get_addr(index=index)}
        finally:
            route.addr("del", index=index, address=vip, prefixlen=32)


def test_sighup_does_not_cut_a_stop_short(lab: Lab, balancer: Balancer) -> None:
    balancer.send_signal(signal.SIGTERM)
    for _ in range(20):
        if balancer.running:
            balancer.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert until(lambda: not balancer.running)
    assert "stopped" in [each["event"] for each in balancer.logs()]
    assert not {each for each in remains(lab) if each.startswith("clsact")}


def test_an_interface_that_is_made_again_is_served_again(lab: Lab, balancer: Balancer) -> None:
    vip = VIPS["nat", 4]
    assert fetched(lab, vip) == list(BACKENDS)
    mac = lab.mac("lb", "eth1")
    with lab.rtnl("lb") as rtnl, lab.rtnl("router") as router:
        rtnl.link("del", index=index_of(rtnl, "eth1"))
        assert until(lambda: "interface is gone; waiting for it" in [each["event"] for each in balancer.logs()])
        peer = {"ifname": "p0", "net_ns_fd": lab.namespace("router")}
        rtnl.link("add", ifname="eth1", kind="veth", address=mac, peer=peer)
        router.link("set", index=index_of(router, "p0"), master=index_of(router, "br0"), state="up")
        rtnl.link("set", index=index_of(rtnl, "eth1"), state="up")
        for prefix in ADDRESSES["lb", "eth1"].values():
            add_address(rtnl, "eth1", prefix)
    assert until(lambda: lab.client("fetch", vip, "--count", 20)["answered"] == 20)
    assert fetched(lab, vip) == list(BACKENDS)
    shown = json.loads(fastlb("guard", "show", "--json", namespace=lab.namespace("lb")).stdout)
    assert [each["interface"] for each in shown["interfaces"]] == ["eth0", "eth1"]


def test_a_backend_that_is_this_host_is_refused(lab: Lab, balancer: Balancer, tmp_path: Path) -> None:
    first = balancer.config["services"][0]
    own = {**balancer.config, "services": [{**first, "backends": [{"address": "10.3.0.2", "port": 8080}]}]}
    done = balancer.reload(own)
    assert (done.returncode, done.stderr) == (
        1,
        f"fastlb: service {first['name']}: backend 10.3.0.2 is an address of this host; it must be another host's\n",
    )
