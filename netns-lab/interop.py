#!/usr/bin/env python3
"""What clients see through fastlb, and through the kernel's own balancer (IPVS), in one lab, on one kernel.

Run it by `make interop`, inside a kernel that has IPVS and tunnel devices (uml.py). Backends unwrap packets by the
kernel's devices, set up with the commands of docs/decap.md.

    IPv4, in tunnels over IPv4      every scenario, beside IPVS where it has the mode
    IPv6, and tunnels that mix      MAIN scenarios, and tunnels narrower than what IPv6 promises
"""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from typing import Any

from demo import Report, fastlb, start_fastlb
from namespaces import inside
from pyroute2 import IPVS, IPVSDest, IPVSService
from topology import (
    ALL_VIPS,
    APPLICATIONS,
    BACKENDS,
    DSR_TABLE,
    TWO_WAY,
    Lab,
    LabError,
    address,
    index_of,
    own_prefix,
    service,
)

WEB = APPLICATIONS[0]
IPVS_METHODS = {"nat": 0, "dsr": 3, "ipip": 2}  # IP_VS_CONN_F_MASQ, DROUTE, TUNNEL
MODES = ("nat", "dsr", "ipip", "fullnat", "gre", "gue")
TUNNELS = ("ipip", "gre", "gue")
MIXED = {(6, 6): MODES, (4, 6): TUNNELS, (6, 4): TUNNELS}  # IP versions inside and outside; outside of a tunnel: both
NARROW, NARROWEST = 1400, 1280  # bytes
FEW, SIZE = 30, 3_000_000
PATIENCE = 4.0  # seconds for an answer
START = 90.0  # seconds until fastlb must run, in a kernel that is a process on a machine that may be busy

Scenario = Callable[[Lab, str], str]
Keep = Callable[[tuple[str, ...]], None]  # takes out all backends but these, of a balancer that runs


# ---- the balancers


@contextmanager
def by_fastlb(lab: Lab, forward: str) -> Iterator[Keep]:
    """fastlb, with one service."""
    web = service(WEB, forward, 4) | {"no_backend": "reset"}
    backends = {backend["address"]: backend for backend in web["backends"]}
    with running(lab, [web]) as reload:
        yield lambda kept: reload([web | {"backends": [backends[address(node, "eth0", 4)] for node in kept]}])


@contextmanager
def running(lab: Lab, services: list[dict[str, Any]]) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """On the way out that every kernel has; what it gives goes over to other services."""
    settings: dict[str, Any] = {
        "workers": 1, "transmit": "sendmmsg", "snat": [address("lb", "eth1", version) for version in (4, 6)],
    }  # fmt: skip
    process = start_fastlb(lab, START, services=services, **settings)

    def reload(others: list[dict[str, Any]]) -> None:
        lab.check("lb", fastlb("reload", "-c", lab.write_config(services=others, **settings)))

    try:
        yield reload
    finally:
        process.terminate()
        process.wait(START)


@contextmanager
def by_ipvs(lab: Lab, forward: str) -> Iterator[Keep]:
    """The same by IPVS, whose host has the VIP, and routes."""
    vip = ALL_VIPS[forward, 4]
    virtual = IPVSService(addr=vip, port=WEB.port, protocol=socket.IPPROTO_TCP, sched_name="rr")
    with inside(lab.namespace("lb")):
        kernel = IPVS()
    lab.sysctl("lb", "net.ipv4.ip_forward", 1)
    lab.check("lb", ["ip", "address", "add", f"{vip}/32", "dev", "lo"])
    try:
        kernel.service("add", service=virtual)
        port = WEB.nat_port if forward == "nat" else WEB.port
        reals = {
            node: IPVSDest(addr=address(node, "eth0", 4), port=port, fwd_method=IPVS_METHODS[forward])
            for node in BACKENDS
        }
        for real in reals.values():
            kernel.dest("add", service=virtual, dest=real)

        def keep(kept: tuple[str, ...]) -> None:
            for node, real in reals.items():
                if node not in kept:
                    kernel.dest("del", service=virtual, dest=real)

        yield keep
    finally:
        with suppress(Exception):
            kernel.service("del", service=virtual)
        kernel.close()
        lab.check("lb", ["ip", "address", "del", f"{vip}/32", "dev", "lo"])
        lab.sysctl("lb", "net.ipv4.ip_forward", 0)


BALANCERS = {"fastlb": by_fastlb, "IPVS": by_ipvs}


def receive_by_kernel(lab: Lab) -> None:
    """docs/decap.md, with the kernel's tunnel devices."""
    devices = {
        "lb4": ("ipip", 4), "lb64": ("sit", 4), "lbg4": ("gre", 4),
        "lb6": ("ip6tnl mode any", 6), "lbg6": ("ip6gre", 6),
    }  # fmt: skip
    for node in BACKENDS:
        lab.sysctl(node, "net.ipv4.conf.all.rp_filter", 0)
        for device, (kind, outer) in devices.items():
            own = address(node, "eth0", outer)
            lab.check(node, ["ip", "link", "add", device, "type", *kind.split(), "local", own])
            lab.check(node, ["ip", "link", "set", device, "up"])
            lab.sysctl(node, f"net.ipv4.conf.{device}.rp_filter", 0)
        for version in ("-4", "-6"):
            lab.check(node, ["ip", version, "fou", "add", "port", "6080", "gue"])


def hold_vips(lab: Lab) -> None:
    """Those that the lab has not given its backends yet."""
    for (forward, version), vip in ALL_VIPS.items():
        if forward in TWO_WAY or (forward, version) in lab.vips:
            continue
        prefix = f"{vip}/{32 if version == 4 else 128}"
        for node in BACKENDS:
            lab.check(node, ["ip", "address", "add", prefix, "dev", "lo"])
            lab.check(node, ["ip", f"-{version}", "rule", "add", "from", prefix, "table", str(DSR_TABLE)])


# ---- what a client does, and what it sees


def connect(lab: Lab, vip: str) -> str:
    """Many connections, one after the other's port."""
    got = lab.client("fetch", vip, "--count", FEW)
    return f"{got['answered']} of {FEW} answered by {len(got['backends'])}"


def transfer(lab: Lab, vip: str) -> str:
    """Both ways, hashed at both ends."""
    whole = [lab.client(way, vip, "--bytes", SIZE)["verified"] for way in ("download", "upload")]
    return "intact" if all(whole) else "broken"


@contextmanager
def connected(lab: Lab, vip: str, port: int = 0) -> Iterator[socket.socket]:
    with inside(lab.namespace("client")):
        sock = socket.socket()
    with sock:
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port:
            sock.bind((address("client", "eth0", 4), port))
        sock.connect((vip, WEB.port))
        yield sock


def ask(sock: socket.socket, path: str = "/") -> bytes:
    """The whole answer, until the other side closes."""
    sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    answer = b""
    while piece := sock.recv(1 << 16):
        answer += piece
    return answer


def half_close(lab: Lab, vip: str) -> str:
    """The client closes its side first, and still gets all of the answer."""
    with connected(lab, vip) as sock:
        sock.sendall(b"GET /bytes/300000 HTTP/1.0\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(1 << 16):
            answer += piece
    return f"{len(answer.split(bytes((13, 10, 13, 10)), 1)[1])} bytes"


def unacknowledged(sock: socket.socket) -> int:
    """Bytes."""
    (left,) = struct.unpack("i", ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(left)


def reset(lab: Lab, vip: str) -> str:
    """The client resets, and comes again from the same port at once.

    The backend has acknowledged something by then: its kernel looks for the sockets of all packets of one turn before
    it works on any. An RST in one turn with the handshake's ACK would miss the new connection; in one turn with the
    next SYN it costs that one a retransmission, which no balancer can help.
    """
    for _ in range(3):
        with connected(lab, vip, 45000) as sock:
            sock.sendall(b"GET ")
            while unacknowledged(sock):
                time.sleep(0.01)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with connected(lab, vip, 45000) as sock:
        return ask(sock).split(b"\r\n", 1)[0].decode()


def path_mtu(lab: Lab, vip: str) -> str:
    """The links of client and VIP are wider than the one to the backends."""
    for version in ("-4", "-6"):
        lab.check("client", ["ip", version, "route", "flush", "cache"])
    with narrow(lab, NARROW):
        return "intact" if lab.client("upload", vip, "--bytes", SIZE)["verified"] else "broken"


@contextmanager
def narrow(lab: Lab, mtu: int) -> Iterator[None]:
    lab.set_link("lb", "eth1", mtu=mtu)
    try:
        yield
    finally:
        lab.set_link("lb", "eth1", mtu=1500)


def narrowest(lab: Lab, vip: str) -> str:
    """What IPv6 promises its senders, a tunnel does not leave: its own packets come in fragments."""
    with narrow(lab, NARROWEST):
        return transfer(lab, vip)


def loss(lab: Lab, vip: str) -> str:
    """One packet in a hundred is lost, and some overtake others, on the way to the balancer."""
    with lab.rtnl("router") as rtnl:
        link = index_of(rtnl, "l0")
        rtnl.tc("add", "netem", link, "1:", loss=1, delay=2000, prob_reorder=20, corr_reorder=50)  # %, microseconds
        try:
            return transfer(lab, vip)
        finally:
            rtnl.tc("del", "netem", link, "1:")


def nobody(lab: Lab, vip: str) -> str:
    """The last backend was taken out."""
    try:
        with connected(lab, vip):
            return "connected"
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silence"


def fewer(lab: Lab, vip: str) -> str:
    """One backend was taken out: the others serve everybody."""
    return connect(lab, vip)


SCENARIOS: list[tuple[str, Scenario, tuple[str, ...]]] = [  # and the backends that are left then
    ("connect", connect, BACKENDS),
    ("transfer", transfer, BACKENDS),
    ("half-close", half_close, BACKENDS),
    ("reset", reset, BACKENDS),
    ("path MTU", path_mtu, BACKENDS),
    ("loss and reordering", loss, BACKENDS),
    ("a backend gone", fewer, BACKENDS[1:]),
    ("every backend gone", nobody, ()),
]
MAIN = ("connect", "transfer", "path MTU")
IN_FRAGMENTS = ("narrow tunnel", narrowest)  # of IPv6 in tunnels
EXPECTED = {
    "connect": f"{FEW} of {FEW} answered by 3", "transfer": "intact", "half-close": "300000 bytes",
    "reset": "HTTP/1.1 200 OK", "path MTU": "intact", "loss and reordering": "intact",
    "a backend gone": f"{FEW} of {FEW} answered by 2", "every backend gone": "refused", "narrow tunnel": "intact",
}  # fmt: skip


def outcomes(lab: Lab, balancer: str, forward: str) -> dict[str, str]:
    """Every scenario through one balancer in one mode."""
    seen = {}
    vip = ALL_VIPS[forward, 4]
    for name, scenario, left in SCENARIOS:
        try:
            with BALANCERS[balancer](lab, forward) as keep:
                if left != BACKENDS:
                    connect(lab, vip)
                    keep(left)
                seen[name] = outcome(scenario, lab, vip)
        except (OSError, LabError) as error:
            seen[name] = failed(error)
        time.sleep(0.2)
    return seen


def outcome(scenario: Scenario, lab: Lab, vip: str) -> str:
    try:
        return scenario(lab, vip)
    except (OSError, LabError) as error:
        return failed(error)


def failed(error: Exception) -> str:
    return f"failed: {str(error).splitlines()[-1][:60]}"


def mixed_outcomes(lab: Lab, inner: int, outer: int, modes: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(mode, scenario, outcome) of the MAIN scenarios, with all modes in one fastlb."""
    services = [service(WEB, forward, inner) for forward in modes]
    if inner != outer:
        for each in services:
            each["backends"] = [{"address": address(node, "eth0", outer)} for node in BACKENDS]
    scenarios = [(name, scenario) for name, scenario, _ in SCENARIOS if name in MAIN]
    with running(lab, services):
        for forward in modes:
            special = [IN_FRAGMENTS] if inner == 6 and forward in TUNNELS else []
            for name, scenario in (*scenarios, *special):
                yield forward, name, outcome(scenario, lab, ALL_VIPS[forward, inner])


def way_name(forward: str, inner: int, outer: int) -> str:
    return f"{forward} IPv{inner}" + (f" over IPv{outer}" if forward in TUNNELS else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="What clients see through fastlb and through IPVS.")
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"some of {', '.join(MODES)} (all)")
    modes = parser.parse_args().modes or MODES
    report = Report()
    with Lab(own_prefix("demo")) as lab:
        hold_vips(lab)
        receive_by_kernel(lab)
        rows: list[tuple[Any, ...]] = []
        for forward in modes:
            ours = outcomes(lab, "fastlb", forward)
            theirs = outcomes(lab, "IPVS", forward) if forward in IPVS_METHODS else dict.fromkeys(ours, "-")
            way = way_name(forward, 4, 4)
            rows += [(way, name, ours[name], theirs[name]) for name in ours]
            for name, seen in ours.items():
                report.check(seen == EXPECTED[name], f"{way}, {name}: {EXPECTED[name]}", seen)
                if theirs[name] != "-":
                    report.check(theirs[name] == seen, f"{way}, {name}: the same by IPVS", theirs[name])
        for (inner, outer), all_modes in MIXED.items():
            chosen = [forward for forward in all_modes if forward in modes]
            for forward, name, seen in mixed_outcomes(lab, inner, outer, chosen) if chosen else ():
                way = way_name(forward, inner, outer)
                rows.append((way, name, seen, "-"))
                report.check(seen == EXPECTED[name], f"{way}, {name}: {EXPECTED[name]}", seen)
        report.table(("way", "scenario", "fastlb", "IPVS"), rows)
    sys.exit(0 if report.held else 1)


if __name__ == "__main__":
    main()
