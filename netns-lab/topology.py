"""The lab: six network namespaces, joined by veth pairs of two queues each.

                         203.0.113.0/24, 2001:db8:cafe::/64 (the VIPs) via lb
                         |
    +--------+       +---+----------------+                 +------------------+
    | client |       | router             |                 | lb               |
    |   eth0 +-------+ c0              l0 +-----------------+ eth0             |
    |     .2 |       | .1              .1 |   10.2.0.0/24   | .2               |
    +--------+       |                    |   fd00:2::/64   |                  |
     10.1.0.0/24     |     br0 .1         |                 |                  |
     fd00:1::/64     |  p0  p1  p2  p3    |                 |          eth1 .2 |
                     +---+---+---+---+----+                 +-------------+----+
                         |   |   |   |                                    |
                         +---|---|---|------------------------------------+
                             |   |   |        10.3.0.0/24, fd00:3::/64
               +-------------+   |   +-------------+
               |                 |                 |
        +------+-----+    +------+-----+    +------+-----+
        | b1 eth0    |    | b2 eth0    |    | b3 eth0    |   on each lo the dsr VIPs:
        |   .11 ::11 |    |   .12 ::12 |    |   .13 ::13 |     203.0.113.20, 2001:db8:cafe::20
        +------------+    +------------+    +------------+

    nat   client -> router -> lb -> bN, and back bN -> lb -> router -> client (a backend's default route)
    dsr   client -> router -> lb -> bN, and back bN -> router -> client (``rule from VIP table 100``)
    ipip, gre, gue   as dsr, but in a tunnel from lb to bN, where ``fastlb decap`` unwraps it

The balancer's kernel forwards nothing: what comes out of lb, fastlb has sent. Interfaces live in the
lab's namespaces from birth; the host's own namespace never sees one.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from generator import Counters, interface_counters
from namespaces import identity, inside, write_sysctl
from pyroute2 import IPRoute, netns
from pyroute2.ethtool.ioctl import IoctlEthtool
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

HERE = Path(__file__).resolve().parent

BACKENDS = ("b1", "b2", "b3")
NODES = ("client", "router", "lb", *BACKENDS)


class Wire(NamedTuple):
    """One veth pair."""

    node: str
    interface: str
    peer_node: str
    peer_interface: str


WIRES = (
    Wire("client", "eth0", "router", "c0"),
    Wire("lb", "eth0", "router", "l0"),
    Wire("lb", "eth1", "router", "p0"),
    Wire("b1", "eth0", "router", "p1"),
    Wire("b2", "eth0", "router", "p2"),
    Wire("b3", "eth0", "router", "p3"),
)
BRIDGE = "br0"
BRIDGE_PORTS = ("p0", "p1", "p2", "p3")
QUEUES = 2

# Address of (node, interface), by IP version.
ADDRESSES: Mapping[tuple[str, str], Mapping[int, str]] = {
    ("client", "eth0"): {4: "10.1.0.2/24", 6: "fd00:1::2/64"},
    ("router", "c0"):   {4: "10.1.0.1/24", 6: "fd00:1::1/64"},
    ("router", "l0"):   {4: "10.2.0.1/24", 6: "fd00:2::1/64"},
    ("router", BRIDGE): {4: "10.3.0.1/24", 6: "fd00:3::1/64"},
    ("lb", "eth0"):     {4: "10.2.0.2/24", 6: "fd00:2::2/64"},
    ("lb", "eth1"):     {4: "10.3.0.2/24", 6: "fd00:3::2/64"},
    ("b1", "eth0"):     {4: "10.3.0.11/24", 6: "fd00:3::11/64"},
    ("b2", "eth0"):     {4: "10.3.0.12/24", 6: "fd00:3::12/64"},
    ("b3", "eth0"):     {4: "10.3.0.13/24", 6: "fd00:3::13/64"},
}  # fmt: skip

# VIP of (forwarding mode, IP version).
VIPS: Mapping[tuple[str, int], str] = {
    ("nat", 4): "203.0.113.10",
    ("nat", 6): "2001:db8:cafe::10",
    ("dsr", 4): "203.0.113.20",
    ("dsr", 6): "2001:db8:cafe::20",
}
FULL_VIPS: Mapping[tuple[str, int], str] = {
    ("fullnat", 4): "203.0.113.60",
    ("fullnat", 6): "2001:db8:cafe::60",
}
TUNNEL_VIPS: Mapping[tuple[str, int], str] = {
    ("ipip", 4): "203.0.113.30",
    ("ipip", 6): "2001:db8:cafe::30",
    ("gre", 4): "203.0.113.40",
    ("gre", 6): "2001:db8:cafe::40",
    ("gue", 4): "203.0.113.50",
    ("gue", 6): "2001:db8:cafe::50",
}
ALL_VIPS = {**VIPS, **FULL_VIPS, **TUNNEL_VIPS}
TWO_WAY = ("nat", "fullnat")

MAIN_TABLE = 254
DSR_TABLE = 100


class Route(NamedTuple):
    """One static route."""

    node: str
    destination: str
    gateway: str
    table: int = MAIN_TABLE


ROUTES = (
    Route("client", "0.0.0.0/0", "10.1.0.1"),
    Route("client", "::/0", "fd00:1::1"),
    Route("router", "203.0.113.0/24", "10.2.0.2"),
    Route("router", "2001:db8:cafe::/64", "fd00:2::2"),
    Route("lb", "0.0.0.0/0", "10.2.0.1"),
    Route("lb", "::/0", "fd00:2::1"),
    *(Route(node, "0.0.0.0/0", "10.3.0.2") for node in BACKENDS),
    *(Route(node, "::/0", "fd00:3::2") for node in BACKENDS),
    *(Route(node, "0.0.0.0/0", "10.3.0.1", DSR_TABLE) for node in BACKENDS),
    *(Route(node, "::/0", "fd00:3::1", DSR_TABLE) for node in BACKENDS),
)


class Application(NamedTuple):
    """One thing that is balanced: the VIP's port, and the port a backend listens on behind ``nat``."""

    name: str
    protocol: str
    port: int
    nat_port: int


APPLICATIONS = (
    Application("web", "tcp", 80, 8080),
    Application("echo", "udp", 5000, 5001),
    Application("discard", "udp", 9, 9),  # RFC 863: swallows what the packet generator sends
)

# Written before any link exists, so that "default" reaches every link; forwarding comes first because
# the kernel resets other keys when it changes. New namespaces inherit the host's values: set them all.
SYSCTLS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("router",), "net.ipv4.ip_forward", 1),
    (("router",), "net.ipv6.conf.all.forwarding", 1),
    (("client", "lb", *BACKENDS), "net.ipv4.ip_forward", 0),
    (("client", "lb", *BACKENDS), "net.ipv6.conf.all.forwarding", 0),
    *(
        (nodes, key.format(scope), value)
        for scope in ("all", "default")
        for nodes, key, value in (
            (NODES, "net.ipv4.conf.{}.rp_filter", 0),  # a dsr reply enters router from where no VIP is routed
            (NODES, "net.ipv4.conf.{}.send_redirects", 0),
            (NODES, "net.ipv6.conf.{}.disable_ipv6", 0),
            (NODES, "net.ipv6.conf.{}.accept_dad", 0),  # addresses work at once
            (NODES, "net.ipv6.conf.{}.accept_ra", 0),
            (BACKENDS, "net.ipv4.conf.{}.arp_ignore", 1),  # the VIP on lo is not announced
            (BACKENDS, "net.ipv4.conf.{}.arp_announce", 2),
        )
    ),
    (BACKENDS, "net.core.somaxconn", 4096),
    (BACKENDS, "net.ipv4.tcp_max_syn_backlog", 4096),
)

PURPOSES = ("bench", "demo", "test")  # of the labs that a process makes for itself

CARRIER_TIMEOUT = 5.0  # seconds until every link must be up
SERVER_TIMEOUT = 10.0  # seconds until every server must listen
STOP_TIMEOUT = 3.0  # seconds from SIGTERM to SIGKILL


class LabError(Exception):
    """The lab cannot be brought up, or something inside it failed; the message is one clear line."""


def address(node: str, interface: str, version: int) -> str:
    """The plain address of an interface, without its prefix length; version is 4 or 6."""
    return ADDRESSES[node, interface][version].partition("/")[0]


class Lab:
    """The whole lab as a context manager: up on entry, gone on exit, also when ``up`` fails half way.

        with Lab("fastlb-trial-") as lab:
            answer = lab.client("fetch", VIPS["dsr", 4], "--count", "200")

    ``prefix`` starts every namespace's name and the run directory's, so that labs with different
    prefixes stand side by side. ``every_mode``: with ALL_VIPS, and a receiver of tunnels in every backend.
    """

    def __init__(self, prefix: str = "fastlb-", every_mode: bool = False):
        self.prefix = prefix
        self.vips = ALL_VIPS if every_mode else VIPS
        self.every_mode = every_mode
        self.run_dir = Path("/run", f"{prefix}lab")
        self._children: list[subprocess.Popen[Any]] = []
        self._known: set[tuple[int, int]] = set()  # identities of our namespaces, kept for leftovers()

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- up and down

    def up(self) -> None:
        """Build everything and start the servers; raises LabError, having cleaned up, when it cannot."""
        self._claim()
        try:
            self._create_namespaces()
            self._set_sysctls()
            self._connect()
            self._bridge()
            self._assign_addresses()
            self._add_routes()
            self._wait_for_carrier()
            self._start_servers()
            if self.every_mode:
                self._start_receivers()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Undo ``up`` in reverse order, whoever did it and however far it came; does nothing twice."""
        with ExitStack() as undo:  # runs every step, last first, even when one of them fails
            undo.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            for node in NODES:
                undo.callback(self._remove_namespace, node)
            undo.callback(self._stop_processes)

    def leftovers(self) -> list[str]:
        """What of this lab still exists, one line each; empty after a good ``down``."""
        left = [f"namespace {name}" for name in map(self.namespace, NODES) if name in netns.listnetns()]
        left += [f"directory {self.run_dir}"] if self.run_dir.exists() else []
        left += [
            f"process {pid}"
            for pid in filter(str.isdigit, os.listdir("/proc"))
            if identity(f"/proc/{pid}/ns/net") in self._known
        ]
        return left

    def _claim(self) -> None:
        if os.geteuid() != 0:
            raise LabError("network namespaces need root")
        there = [name for name in map(self.namespace, NODES) if name in netns.listnetns()]
        if there:
            raise LabError(f"namespace {there[0]} exists: take that lab down, or use another prefix")
        try:
            self.run_dir.mkdir(mode=0o700)
        except FileExistsError:
            raise LabError(f"{self.run_dir} exists: take that lab down, or use another prefix") from None

    def _create_namespaces(self) -> None:
        for node in NODES:
            netns.create(self.namespace(node))
            self._remember(node)

    def _remove_namespace(self, node: str) -> None:
        with suppress(FileNotFoundError):
            netns.remove(self.namespace(node))

    def _set_sysctls(self) -> None:
        for nodes, key, value in SYSCTLS:
            for node in nodes:
                self.sysctl(node, key, value)

    def _connect(self) -> None:
        queues = {"num_tx_queues": QUEUES, "num_rx_queues": QUEUES}
        for wire in WIRES:
            peer = {"ifname": wire.peer_interface, "net_ns_fd": self.namespace(wire.peer_node), **queues}
            with self.rtnl(wire.node) as rtnl:
                rtnl.link("add", ifname=wire.interface, kind="veth", peer=peer, **queues)
        for node in NODES:
            with self.rtnl(node) as rtnl:
                for link in rtnl.get_links():
                    rtnl.link("set", index=link["index"], state="up")

    def _bridge(self) -> None:
        with self.rtnl("router") as rtnl:
            # Snooping would hold back neighbour discovery until a querier shows up, and there is none.
            rtnl.link("add", ifname=BRIDGE, kind="bridge", br_mcast_snooping=0)
            bridge = index_of(rtnl, BRIDGE)
            for port in BRIDGE_PORTS:
                rtnl.link("set", index=index_of(rtnl, port), master=bridge)
            rtnl.link("set", index=bridge, state="up")

    def _assign_addresses(self) -> None:
        for (node, interface), by_version in ADDRESSES.items():
            with self.rtnl(node) as rtnl:
                for prefix in by_version.values():
                    add_address(rtnl, interface, prefix)
        for node in BACKENDS:
            with self.rtnl(node) as rtnl:
                for vip in self.one_way_vips():
                    add_address(rtnl, "lo", f"{vip}/{ipaddress.ip_address(vip).max_prefixlen}")

    def _add_routes(self) -> None:
        for route in ROUTES:
            with self.rtnl(route.node) as rtnl:
                rtnl.route("add", dst=route.destination, gateway=route.gateway, table=route.table)
        for node in BACKENDS:
            with self.rtnl(node) as rtnl:
                for vip in self.one_way_vips():
                    bits = ipaddress.ip_address(vip).max_prefixlen
                    rtnl.rule("add", src=vip, src_len=bits, table=DSR_TABLE)

    def _wait_for_carrier(self) -> None:
        deadline = time.monotonic() + CARRIER_TIMEOUT
        while waiting := [f"{node}.{name}" for node in NODES for name in self._links_without_carrier(node)]:
            if time.monotonic() > deadline:
                raise LabError(f"no carrier after {CARRIER_TIMEOUT:g} s: {', '.join(waiting)}")
            time.sleep(0.01)

    def _links_without_carrier(self, node: str) -> list[str]:
        with self.rtnl(node) as rtnl:
            states = {link.get("ifname"): link.get("operstate") for link in rtnl.get_links()}
        return [name for name, state in states.items() if name != "lo" and state != "UP"]

    def _start_servers(self) -> None:
        servers = {node: self._start_server(node) for node in BACKENDS}
        deadline = time.monotonic() + SERVER_TIMEOUT
        for node, server in servers.items():
            assert server.stdout is not None
            ready, _, _ = select.select([server.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or server.stdout.readline() != b"ready\n":
                log = self.run_dir.joinpath(f"{node}.log").read_text()
                raise LabError(f"the servers of {node} did not start: {log.strip() or 'no message'}")
            server.stdout.close()

    def _start_server(self, node: str) -> subprocess.Popen[Any]:
        command = [sys.executable, str(HERE / "servers.py"), node]
        with self.run_dir.joinpath(f"{node}.log").open("wb") as log:
            return self.run(node, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                            start_new_session=True)  # fmt: skip

    def _start_receivers(self) -> None:
        """`fastlb decap` in every backend: this kernel may have no tunnel devices."""
        for node in BACKENDS:
            command = [sys.executable, "-m", "fastlb", "decap", "eth0"]
            with self.run_dir.joinpath(f"{node}-decap.log").open("wb") as log:
                self.run(node, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=HERE.parent,
                         start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + SERVER_TIMEOUT
        while waiting := [node for node in BACKENDS if not self._has_link(node, "fastlb0")]:
            if time.monotonic() > deadline:
                said = self.run_dir.joinpath(f"{waiting[0]}-decap.log").read_text().strip()
                raise LabError(f"fastlb decap of {waiting[0]} did not start: {said or 'no message'}")
            time.sleep(0.05)

    def _has_link(self, node: str, interface: str) -> bool:
        """Is there such an interface, and is it up?"""
        with self.rtnl(node) as rtnl:
            return any(link["flags"] & 1 for link in rtnl.get_links(ifname=interface))

    # ---- processes

    def run(self, node: str, argv: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start a process in a node's namespace; the lab ends it in ``down`` if it still runs then."""
        with inside(self.namespace(node)):
            child = subprocess.Popen([str(word) for word in argv], **popen)
        self._children.append(child)
        with self.run_dir.joinpath("pids").open("a") as pids:
            pids.write(f"{child.pid}\n")
        return child

    def check(self, node: str, argv: Sequence[str | Path], timeout: float = 60.0) -> str:
        """Run a command in a node's namespace to its end and return what it printed.

        Raises LabError with its standard error when it returns other than 0 or takes over ``timeout`` s.
        """
        child = self.run(node, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words = " ".join(map(str, argv))
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            raise LabError(f"{node}: {words}: still running after {timeout:g} s: {out}{err}") from None
        if child.returncode != 0:
            raise LabError(f"{node}: {words}: exit code {child.returncode}: {err.strip() or out.strip()}")
        return str(out)

    def client(self, *arguments: str | int, node: str = "client", timeout: float = 60.0) -> dict[str, Any]:
        """Run client.py in a node's namespace and return the JSON object it prints."""
        return self._script("client.py", node, arguments, timeout)

    def generate(
        self, target: str, *arguments: str | int, node: str = "client", timeout: float = 90.0
    ) -> dict[str, Any]:
        """Run the packet generator against an address; returns the JSON object it prints.

        The frames bear the client's address. ``node="router"`` puts them on the wire to the balancer
        straight away, which spares the machine the router's work for each of them.
        """
        interface, *next_hop = {"client": ("eth0", "router", "c0"), "router": ("l0", "lb", "eth0")}[node]
        source = address("client", "eth0", ipaddress.ip_address(target).version)
        fixed = (interface, self.mac(*next_hop), source, target)
        return self._script("generator.py", node, (*fixed, *arguments), timeout)

    def _script(self, name: str, node: str, words: Iterable[str | int], timeout: float) -> dict[str, Any]:
        output = self.check(node, [sys.executable, HERE / name, *map(str, words)], timeout)
        answer: dict[str, Any] = json.loads(output)
        return answer

    def pids(self) -> list[int]:
        """The recorded processes that still run in one of this lab's namespaces.

        The namespace tells a process of ours from a stranger that was given the same number later.
        """
        for node in NODES:
            self._remember(node)
        try:
            recorded = [int(line) for line in self.run_dir.joinpath("pids").read_text().split()]
        except FileNotFoundError:
            return []
        return [pid for pid in recorded if identity(f"/proc/{pid}/ns/net") in self._known]

    def _stop_processes(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + STOP_TIMEOUT
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.01)
        for child in self._children:
            child.poll()
        self._children.clear()

    # ---- looking and changing

    def namespace(self, node: str) -> str:
        """The name of a node's namespace, as under /run/netns."""
        return self.prefix + node

    def namespace_path(self, node: str) -> Path:
        """The file that stands for a node's namespace."""
        return Path(netns.NETNS_RUN_DIR, self.namespace(node))

    def _remember(self, node: str) -> None:
        known = identity(self.namespace_path(node))
        if known is not None:
            self._known.add(known)

    @contextmanager
    def rtnl(self, node: str) -> Iterator[IPRoute]:
        """A pyroute2 IPRoute in a node's namespace."""
        with inside(self.namespace(node)):
            rtnl = IPRoute()
        with rtnl:
            yield rtnl

    def sysctl(self, node: str, key: str, value: int | str) -> None:
        """Set one sysctl of a node: ``lab.sysctl("lb", "net.ipv4.ip_forward", 1)``."""
        with inside(self.namespace(node)):
            write_sysctl(key, value)

    def mac(self, node: str, interface: str) -> str:
        """An interface's hardware address, as "02:00:00:00:00:01"."""
        with self.rtnl(node) as rtnl:
            return str(rtnl.link("get", ifname=interface)[0].get("address"))

    def set_link(self, node: str, interface: str, **changes: Any) -> None:
        """Change a link: ``address="02:..."``, ``state="down"``, ``mtu=1400``."""
        with self.rtnl(node) as rtnl:
            rtnl.link("set", index=index_of(rtnl, interface), **changes)

    def set_offloads(self, enabled: bool) -> None:
        """Switch checksum and segmentation offload (tx, tso, gso) on every link of the lab.

        Off means that every frame is at most an MTU long and carries its full checksum.
        """
        for node in NODES:
            with self.rtnl(node) as rtnl, inside(self.namespace(node)):
                ethtool = IoctlEthtool()
                for name in (link.get("ifname") for link in rtnl.get_links()):
                    if name != "lo":
                        ethtool.change_ifname(name)
                        set_offloads(ethtool, enabled)
                ethtool.close()

    def counters(self, node: str) -> dict[str, Counters]:
        """The kernel's packet and byte counters of each interface of a node."""
        with inside(self.namespace(node)):
            return interface_counters()

    # ---- fastlb's side

    @property
    def config_path(self) -> Path:
        """Where ``write_config`` puts the configuration unless told otherwise."""
        return self.run_dir / "fastlb.yaml"

    @property
    def socket_path(self) -> Path:
        """The control socket that the configuration names."""
        return self.run_dir / "fastlb.sock"

    def one_way_vips(self) -> list[str]:
        """Those that backends hold themselves."""
        return [vip for (forward, _), vip in self.vips.items() if forward not in TWO_WAY]

    def config(self, **changes: Any) -> dict[str, Any]:
        """fastlb's configuration for this lab as a dict; ``changes`` replace top-level keys."""
        services = [service(application, *at) for application in APPLICATIONS for at in self.vips]
        base = {"interfaces": ["eth0", "eth1"], "control": str(self.socket_path), "services": services}
        if self.every_mode:
            base["snat"] = [address("lb", "eth1", version) for version in (4, 6)]
        return base | changes

    def write_config(self, path: Path | None = None, **changes: Any) -> Path:
        """Write ``config(**changes)`` as YAML into the run directory (or to ``path``); returns where."""
        path = path or self.config_path
        path.write_text(yaml.safe_dump(self.config(**changes), sort_keys=False))
        return path


def service(application: Application, forward: str, version: int) -> dict[str, Any]:
    """One service of the lab's configuration, named like "web-dsr-4"."""
    backends: list[dict[str, Any]] = [{"address": address(node, "eth0", version)} for node in BACKENDS]
    if forward in TWO_WAY and application.nat_port != application.port:
        backends = [backend | {"port": application.nat_port} for backend in backends]
    return {
        "name": f"{application.name}-{forward}-{version}",
        "vip": ALL_VIPS[forward, version],
        "port": application.port,
        "protocol": application.protocol,
        "forward": forward,
        "backends": backends,
    }


def own_prefix(purpose: str) -> str:
    """The prefix of a lab that no other process has; ``purpose`` is one of PURPOSES."""
    return f"fastlb-{purpose}{os.getpid()}-"


def remove_abandoned() -> list[str]:
    """Take down what processes with an `own_prefix` left behind when they were killed; needs root.

    Returns the names of the namespaces and run directories that were there.
    """
    named = re.compile(rf"fastlb-(?:{'|'.join(PURPOSES)})(\d+)-.*")
    labs = [path.name for path in Path("/run").glob("fastlb-*lab")]
    gone = [name for name in labs + netns.listnetns() if (own := named.fullmatch(name)) and not is_running(own[1])]
    for name in gone:
        if name in labs:
            Lab(name.removesuffix("lab")).down()
    for name in set(gone) & set(netns.listnetns()):
        netns.remove(name)
    return gone


def is_running(pid: str) -> bool:
    """Is there a process of this number?"""
    return Path("/proc", pid).exists()


def index_of(rtnl: IPRoute, interface: str) -> int:
    """An interface's index; raises LabError when the namespace has no such interface."""
    found: list[int] = rtnl.link_lookup(ifname=interface)
    if not found:
        raise LabError(f"no interface {interface} here")
    return found[0]


def add_address(rtnl: IPRoute, interface: str, prefix: str) -> None:
    """Give an interface an address such as "10.1.0.2/24", which can be bound at once.

    Without IPv6 duplicate detection, which a busy kernel puts off even on lo, where there is nothing to detect.
    """
    host, _, bits = prefix.partition("/")
    flags = IFA_F_NODAD if ":" in host else 0
    rtnl.addr("add", index=index_of(rtnl, interface), address=host, prefixlen=int(bits), flags=flags)


def set_offloads(ethtool: IoctlEthtool, enabled: bool) -> None:
    """Switch the offloads of the chosen interface; segmentation needs checksumming, so order matters."""
    flags = ("tx-checksumming", "tcp-segmentation-offload", "generic-segmentation-offload")
    for flag in flags if enabled else reversed(flags):
        ethtool.set_offload_flag(flag, int(enabled))
