"""What does a packet cost in memory? Nanoseconds per packet of the pipeline, next to a bare walk of the same frames.

Every case is measured once a round, one after another, so that whatever else the machine does hits all of them.
See README.md beside this file for how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from ipaddress import ip_address, ip_network
from struct import pack
from typing import Any, NamedTuple

from extension import build
from report import Bar, Spread, print_table, write

from fastlb import reconcile
from fastlb._core import Pipeline, Routes
from fastlb.config import Config

BACKENDS = 100
FEW, MANY, FULL = 1_000, 1_000_000, 10_000_000
LEAST_ROUNDS = 9
POOL = 1 << 16  # frames at least: 4 MiB, so that few flows do not mean few frames
FRAMES = 1 << 20  # per measurement at least: some 50 ms
SYN, ACK = 0x02, 0x10
CLIENT_SIDE, BACKEND_SIDE = 1, 2  # interface indices
NOW = 1_000_000  # ms
TARGETS = {("dsr", FEW): 60, ("dsr", MANY): 100, ("nat", FEW): 90, ("nat", MANY): 130}  # ns, IPv4


class Addresses(NamedTuple):
    """One IP version's cast. ``gateway``: towards the clients; ``on_link``: the balancer's two networks."""

    client: str
    vip: str
    backends: str
    gateway: str
    on_link: tuple[str, str]
    size: int  # of a frame: 64 bytes do not hold IPv6 and TCP headers, which take 74


ADDRESSES = {
    4: Addresses("100.0.0.0", "203.0.113.10", "10.3.0.{}", "10.2.0.1", ("10.2.0.0/24", "10.3.0.0/24"), 64),
    6: Addresses("2001:db8::", "2001:db8:cafe::10", "fd00:3::{:x}", "fd00:2::1", ("fd00:2::/64", "fd00:3::/64"), 80),
}


class Case(NamedTuple):
    """One thing to measure; ``measure`` returns the ns per packet of one round."""

    name: str
    version: int
    flows: int
    measure: Callable[[], float]


# --- the balancer, as a host between a gateway and a network of backends --------------------------------------------


def make_pipeline(version: int, mode: str, flows: int) -> Pipeline:
    """One service with BACKENDS backends, published, and a table for ``flows`` flows."""
    cast = ADDRESSES[version]
    addresses = [cast.backends.format(100 + i) for i in range(BACKENDS)]
    port = {"port": 8080} if mode == "nat" else {}
    service = {"name": "web", "vip": cast.vip, "port": 80, "protocol": "tcp", "forward": mode}
    service["backends"] = [{"address": address, **port} for address in addresses]
    config = Config.from_dict({"services": [service]})
    plans = reconcile.plan_services(config, reconcile.BackendIds(), 0.0)
    pipeline = Pipeline(flows)
    pipeline.publish(reconcile.services_table(config, plans), make_routes(version, plans[0].members))
    return pipeline


def make_routes(version: int, members: Sequence[reconcile.Member]) -> Routes:
    """Backends on one link, clients through a gateway on another, behind the default route."""
    own, everywhere = b"\2\0\0\0\0\1", ip_network("0.0.0.0/0" if version == 4 else "::/0")
    cast = ADDRESSES[version]
    hops = [(b"\2\0\0\0\1\0", own, CLIENT_SIDE, 1500, None)]
    hops += [(b"\2\0\0\0\2" + bytes([i]), own, BACKEND_SIDE, 1500, None) for i in range(len(members))]
    prefixes = [
        (everywhere, CLIENT_SIDE, 0),
        (ip_network(cast.on_link[0]), CLIENT_SIDE, None),
        (ip_network(cast.on_link[1]), BACKEND_SIDE, None),
    ]
    neighbours = {(CLIENT_SIDE, ip_address(cast.gateway)): 0}
    neighbours |= {(BACKEND_SIDE, member.address): i for i, member in enumerate(members, 1)}
    return Routes(hops, prefixes, neighbours, {member.id: i for i, member in enumerate(members, 1)})


def template(version: int, flags: int = ACK) -> bytes:
    """A client's TCP frame to the VIP, checksums correct; the pool gives it a client's address and port."""
    cast = ADDRESSES[version]
    source, target = ip_address(cast.client).packed, ip_address(cast.vip).packed
    length = cast.size - 14 - (20 if version == 4 else 40)
    segment = pack("!HHIIBBHHH", 0, 80, 1, 1, 5 << 4, flags, 512, 0, 0) + bytes(length - 20)
    check = checksum(source + target + pack("!HH", 6, length) + segment)
    segment = segment[:16] + pack("!H", check) + segment[18:]
    if version == 4:
        header = pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0) + source + target
        header = header[:10] + pack("!H", checksum(header)) + header[12:]
        return b"\2\0\0\0\0\1" + b"\2\0\0\0\1\0" + b"\x08\x00" + header + segment
    header = pack("!IHBB", 6 << 28, length, 6, 64) + source + target
    return b"\2\0\0\0\0\1" + b"\2\0\0\0\1\0" + b"\x86\xdd" + header + segment


def checksum(data: bytes) -> int:
    """RFC 1071; ``data`` is of even length."""
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# --- what is measured -----------------------------------------------------------------------------------------------


class Leg:
    """Established flows of one mode, seen from one side."""

    def __init__(self, pipeline: Pipeline, drive: Any, frames: Any, ifindex: int):
        self.pipeline, self.drive, self.frames, self.ifindex = pipeline, drive, frames, ifindex
        self.passes = max(1, FRAMES // frames.count)

    def warm(self) -> None:
        """One pass that does not count: the case before has filled the caches with its own."""
        self.drive.run(self.frames, self.ifindex, NOW)

    def through_pipeline(self) -> float:
        """ns per packet; raises RuntimeError unless every packet was forwarded by its flow's entry."""
        self.warm()
        before = self.pipeline.counters()["conntrack"]
        seconds = self.drive.run(self.frames, self.ifindex, NOW, self.passes)
        packets = self.frames.count * self.passes
        if self.pipeline.counters()["conntrack"] - before != packets:
            raise RuntimeError(f"not all packets took the fast path: {self.pipeline.counters()}")
        return float(seconds * 1e9 / packets)

    def walk(self) -> float:
        """ns per packet without the pipeline."""
        self.drive.walk(self.frames)
        return float(self.drive.walk(self.frames, self.passes) * 1e9 / (self.frames.count * self.passes))


class NewFlows:
    """The first packets of MANY flows, into an empty table for so many."""

    def __init__(self, drive_module: Any, version: int, mode: str, frames: Any):
        self.pipeline = make_pipeline(version, mode, MANY)
        self.drive, self.frames = drive_module.Drive(self.pipeline), frames
        self.drive.run(frames, CLIENT_SIDE, NOW)  # the table's pages exist from here on

    def measure(self) -> float:
        """ns per packet; raises RuntimeError unless every packet made an entry."""
        self.drive.forget_all()
        seconds = self.drive.run(self.frames, CLIENT_SIDE, NOW)
        if self.pipeline.flow_count() != MANY:
            raise RuntimeError(f"not every flow was tracked: {self.pipeline.counters()}")
        return float(seconds * 1e9 / MANY)


def established(drive_module: Any, version: int, mode: str, flows: int, frames: Any) -> list[Leg]:
    """The client's leg, and in nat the reply leg, of flows whose handshake is over."""
    pipeline = make_pipeline(version, mode, MANY)
    drive = drive_module.Drive(pipeline)
    frames.set_flags(SYN)
    replies = drive.answers(frames, template(version), CLIENT_SIDE, NOW)
    frames.set_flags(ACK)
    replies.set_flags(ACK)
    legs = [Leg(pipeline, drive, frames, CLIENT_SIDE)]
    if mode == "nat":
        legs.append(Leg(pipeline, drive, replies, BACKEND_SIDE))
    for leg in reversed(legs):
        leg.warm()
    return legs


def make_cases(drive_module: Any) -> Iterator[Case]:
    """Every case, in the order in which a round measures them."""
    for version in ADDRESSES:
        for flows in (FEW, MANY):
            frames = drive_module.Frames(template(version), max(POOL // flows * flows, flows))
            frames.assign(0, flows)
            (dsr,) = established(drive_module, version, "dsr", flows, frames)
            nat, reply = established(drive_module, version, "nat", flows, frames)
            yield Case("bare walk", version, flows, dsr.walk)
            yield Case("dsr", version, flows, dsr.through_pipeline)
            yield Case("nat", version, flows, nat.through_pipeline)
            yield Case("nat reply", version, flows, reply.through_pipeline)
    opening = drive_module.Frames(template(4, SYN), MANY)
    opening.assign(0, MANY)
    for mode in ("dsr", "nat"):
        yield Case(f"{mode} new flow", 4, MANY, NewFlows(drive_module, 4, mode, opening).measure)


def measure(cases: Sequence[Case], rounds: int) -> list[Spread]:
    """Each case once a round; in the order of ``cases``."""
    values: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, found in zip(cases, values, strict=True):
            found.append(case.measure())
    return [Spread.of(found) for found in values]


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(pipeline: Pipeline, flows: int) -> dict[str, float]:
    """Bytes per tracked flow, hot and cold, when the table holds the ``flows`` that it was made for."""
    hot, cold = pipeline.memory()
    return {
        "flows": flows,
        "hot": hot / flows,
        "cold": cold / flows,
        "load": flows / pipeline.flow_capacity,
    }


def fill(drive_module: Any, flows: int) -> dict[str, float]:
    """Establish ``flows`` flows in a table made for them, then look every one of them up."""
    pipeline = make_pipeline(4, "dsr", flows)
    drive = drive_module.Drive(pipeline)
    frames = drive_module.Frames(template(4), MANY)
    for first in range(0, flows, MANY):
        frames.assign(first, MANY)
        for flags in (SYN, ACK):
            frames.set_flags(flags)
            drive.run(frames, CLIENT_SIDE, NOW)
    before = pipeline.counters()
    for first in range(0, flows, MANY):
        frames.assign(first, MANY)
        drive.run(frames, CLIENT_SIDE, NOW)
    counters = pipeline.counters()
    return memory(pipeline, flows) | {
        "tracked": pipeline.flow_count(),
        "untracked": counters["flows_untracked"],
        "evicted": counters["flows_evicted"],
        "found_again": counters["conntrack"] - before["conntrack"],
    }


# --- what is told ---------------------------------------------------------------------------------------------------


def target_of(case: Case) -> int | None:
    """What the project has promised for this case, in ns."""
    return TARGETS.get((case.name.removesuffix(" reply"), case.flows)) if case.version == 4 else None


def tell_cases(cases: Sequence[Case], spreads: Sequence[Spread]) -> list[dict[str, Any]]:
    """Print the table of cases; the same as data."""
    measured = list(zip(cases, spreads, strict=True))
    walks = {(case.version, case.flows): spread.median for case, spread in measured if case.name == "bare walk"}
    rows, data = [], []
    for case, spread in measured:
        above, target = spread.median - walks[case.version, case.flows], target_of(case)
        data.append({**case._asdict(), **asdict(spread), "above_walk": above, "target": target})
        del data[-1]["measure"]
        name, span = f"IPv{case.version} {case.name}", f"{spread.p10:.1f} .. {spread.p90:.1f}"
        limit = f"<= {target}" if target else ""
        rows.append((name, f"{case.flows:,}", f"{spread.median:.1f}", span, f"{above:.1f}", limit))
    print_table(("", "flows", "ns", "p10 .. p90", "above walk", "target"), rows)
    return data


def tell_memory(found: Sequence[dict[str, float]]) -> None:
    print("\nbytes per tracked flow, in a table that holds what it was made for")
    rows = [(f"{row['flows']:,}", f"{row['hot']:.1f}", f"{row['cold']:.1f}", f"{row['load']:.0%}") for row in found]
    print_table(("flows", "hot", "cold", "entries in use"), rows)
    for row in found:
        if "tracked" in row:
            print(
                f"{row['flows']:,} flows established: {row['tracked']:,} tracked, {row['untracked']} untracked, "
                f"{row['evicted']} evicted, {row['found_again']:,} found again"
            )


def bars(cases: Sequence[Case], spreads: Sequence[Spread]) -> list[Bar]:
    return [
        Bar(
            f"IPv{case.version} {case.name}, {case.flows:,} flows",
            spread,
            colour=1 if case.name == "bare walk" else 2 * (case.flows == MANY),
            target=target_of(case),
        )
        for case, spread in zip(cases, spreads, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Nanoseconds per packet of the pipeline in memory.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no table of ten million flows")
    parser.add_argument("--rounds", type=int, help=f"how often each case is measured, at least {LEAST_ROUNDS}")
    options = parser.parse_args()
    rounds = max(LEAST_ROUNDS, options.rounds or (LEAST_ROUNDS if options.quick else 21))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    drive = build("_drive")
    cases = list(make_cases(drive))
    spreads = measure(cases, rounds)
    title = f"ns per packet in memory: {BACKENDS} backends, batches of 32, {rounds} rounds"
    print(title)
    data = tell_cases(cases, spreads)
    tables = [memory(make_pipeline(4, "dsr", MANY), MANY)]
    if not options.quick:
        tables.append(fill(drive, FULL))
    tell_memory(tables)
    found = {"rounds": rounds, "cases": data, "memory": tables}
    write("core", title, found, bars(cases, spreads), "ns per packet")


if __name__ == "__main__":
    main()
