"""What does a packet cost in memory? Nanoseconds per packet of the pipeline, and how they divide over its stages.

Cases take turns, a few milliseconds each, so that whatever else the machine does hits all of them.
See README.md beside this file for how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from ipaddress import ip_address, ip_network
from statistics import fmean
from struct import pack
from typing import Any, NamedTuple

from extension import build
from flowfiles import memory_in_file
from report import Bar, Spread, announce, print_table, progress, write

from fastlb._core import FlowMemory, Pipeline, Routes
from fastlb.config import Config
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import Member, plan_services
from fastlb.plan.tables import services_table

BACKENDS = 100
FEW, MANY, MOST, FULL = 1_000, 1_000_000, 8_000_000, 10_000_000
LEAST_ROUNDS, ROUNDS = 9, 13
NEEDS, QUICK_NEEDS = ("two minutes", 7), ("half a minute", 1.3)  # time, and GB of memory
POOL = 1 << 16  # frames at least: 4 MiB, so that few flows do not mean few frames
FRAMES = 1 << 17  # a turn: some 5 ms
TURNS = 8  # a round
SYN, ACK = 0x02, 0x10
CLIENT_SIDE, BACKEND_SIDE = 1, 2  # interface indices
NOW = 1_000_000  # ms
HOUR = 3_600_000  # ms, longer than any flow stays without a packet
WHOLE = "counters"  # the last stage
TARGETS = {  # ns, IPv4; those of nat are for either leg
    ("dsr", FEW): 50,
    ("dsr", MANY): 80,
    ("dsr", MOST): 100,
    ("nat", FEW): 90,
    ("nat", MANY): 130,
}

TUNNELS = ("ipip", "gre", "gue")
TWO_WAY = ("nat", "fullnat")
MODES = ("dsr", *TWO_WAY, *TUNNELS)
NEW = " new flow"  # behind a mode's name
IN_FILE = {" in a file": True, " in a file, small pages": False}  # behind a mode's name: large pages?
IN_FILE_MODES = ("dsr", "nat")
NEW_FLOW_MODES = ("dsr", "nat")
NEW_FLOW = 2  # times what a packet of an established flow costs, at most
ABOVE_DSR = {"nat": 30, "nat reply": 30, "fullnat": 30, "fullnat reply": 30} | dict.fromkeys(TUNNELS, 15)  # ns at most
SOURCES = 32  # addresses of fullnat, so that no shard runs out of ports
SOURCE_PORTS = (1024, 65535)


class Addresses(NamedTuple):
    """One IP version's cast. ``gateway``: towards the clients; ``on_link``: the balancer's two networks."""

    client: str
    vip: str
    backends: str
    gateway: str
    on_link: tuple[str, str]
    own: str  # where tunnels come from
    size: int  # of a frame: 64 bytes do not hold IPv6 and TCP headers, which take 74


ADDRESSES = {
    4: Addresses(
        "100.0.0.0", "203.0.113.10", "10.3.0.{}", "10.2.0.1", ("10.2.0.0/24", "10.3.0.0/24"), "10.3.0.2", 64
    ),
    6: Addresses(
        "2001:db8::", "2001:db8:cafe::10", "fd00:3::{:x}", "fd00:2::1", ("fd00:2::/64", "fd00:3::/64"), "fd00:3::2", 80
    ),
}


@dataclass
class Case:
    """One thing to measure, up to a stage of the pipeline; ``measure`` returns the ns per packet of one turn."""

    name: str
    version: int
    flows: int
    stage: str
    measure: Callable[[], float]
    rounds: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)

    @property
    def target(self) -> int | None:
        """What the project has promised for this case, in ns."""
        return TARGETS.get((self.name.removesuffix(" reply"), self.flows)) if self.version == 4 else None


class Group(NamedTuple):
    """Cases over one flow table; ``warm`` brings the caches to what they are while such traffic lasts."""

    warm: Callable[[], None]
    turns: int  # a round
    cases: list[Case]


# --- the balancer, as a host between a gateway and a network of backends --------------------------------------------


def make_pipeline(version: int, mode: str, flows: int, memory: FlowMemory | None = None) -> Pipeline:
    """One service with BACKENDS backends, published, and a table for ``flows`` flows, or that in ``memory``."""
    cast = ADDRESSES[version]
    addresses = [cast.backends.format(100 + i) for i in range(BACKENDS)]
    port = {"port": 8080} if mode in TWO_WAY else {}
    sources = [cast.backends.format(200 + i) for i in range(SOURCES)] if mode == "fullnat" else []
    service = {"name": "web", "vip": cast.vip, "port": 80, "protocol": "tcp", "forward": mode}
    service["backends"] = [{"address": address, **port} for address in addresses]
    config = Config.from_dict({"services": [service], "snat": sources, "new_flow_rate": 100_000_000})
    plans = plan_services(config, BackendIds(), 0.0)
    pipeline = Pipeline(memory or FlowMemory(flows, sources=config.snat, ports=SOURCE_PORTS))
    pipeline.publish(services_table(config, plans), make_routes(version, plans[0].members))
    return pipeline


def make_routes(version: int, members: Sequence[Member]) -> Routes:
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
    sources = {member.id: ip_network(cast.own) for member in members}
    return Routes(hops, prefixes, neighbours, {member.id: i for i, member in enumerate(members, 1)}, sources)


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
        self.at = 0

    def warm(self) -> None:
        """Every frame once."""
        self.drive.run(self.frames, 0, self.frames.count, self.ifindex, NOW)

    def through(self, stage: str) -> float:
        """ns per packet up to ``stage``, of the FRAMES that follow those of the last time.

        Raises RuntimeError unless every packet was forwarded by its flow's entry.
        """
        before = self.pipeline.counters()["conntrack"]
        seconds = self.drive.run(self.frames, self.at, FRAMES, self.ifindex, NOW, stage)
        self.at = (self.at + FRAMES) % self.frames.count
        if stage == WHOLE and self.pipeline.counters()["conntrack"] - before != FRAMES:
            raise RuntimeError(f"not all packets took the fast path: {self.pipeline.counters()}")
        return float(seconds * 1e9 / FRAMES)


class NewFlows:
    """The first packets of MANY flows, into an empty table for so many."""

    def __init__(self, drive_module: Any, version: int, mode: str, frames: Any):
        self.pipeline = make_pipeline(version, mode, MANY)
        self.drive, self.frames, self.now = drive_module.Drive(self.pipeline), frames, NOW

    def warm(self) -> None:
        """Make the entries, so that the table's pages exist, and let them all expire."""
        self.drive.run(self.frames, 0, MANY, CLIENT_SIDE, self.now)
        self.now += HOUR
        self.pipeline.process([], self.now)
        if self.pipeline.flow_count() != 0:
            raise RuntimeError(f"{self.pipeline.flow_count()} flows have not expired")

    def open(self) -> float:
        """ns per packet; raises RuntimeError unless every packet made an entry."""
        seconds = self.drive.run(self.frames, 0, MANY, CLIENT_SIDE, self.now)
        if self.pipeline.flow_count() != MANY:
            raise RuntimeError(f"not every flow was tracked: {self.pipeline.counters()}")
        return float(seconds * 1e9 / MANY)


def established(
    drive_module: Any, version: int, mode: str, flows: int, frames: Any, memory: FlowMemory | None = None
) -> list[Leg]:
    """The client's leg, and in the NAT modes the reply leg, of flows whose handshake is over."""
    pipeline = make_pipeline(version, mode, max(flows, MANY), memory)
    drive = drive_module.Drive(pipeline)
    frames.set_flags(SYN)
    replies = drive.answers(frames, template(version), CLIENT_SIDE, NOW)
    frames.set_flags(ACK)
    replies.set_flags(ACK)
    legs = [Leg(pipeline, drive, frames, CLIENT_SIDE)]
    if mode in TWO_WAY:
        legs.append(Leg(pipeline, drive, replies, BACKEND_SIDE))
    for leg in reversed(legs):
        leg.warm()
    return legs


def make_groups(drive_module: Any, counts: Sequence[int]) -> Iterator[Group]:
    """Every case, in the order in which a round measures them; stage by stage for IPv4 from the client."""
    for version in ADDRESSES:
        stages = drive_module.STAGES[1:] if version == 4 else (WHOLE,)
        for flows in counts:
            frames = make_frames(drive_module, version, flows)
            for mode in ("dsr", "nat"):
                yield of_established(drive_module, version, mode, flows, frames, stages)
            for mode in ("fullnat", *TUNNELS) if flows <= MANY else ():
                yield of_established(drive_module, version, mode, flows, frames, (WHOLE,))
    yield from of_files(drive_module, IN_FILE_MODES)
    yield from of_new_flows(drive_module, NEW_FLOW_MODES)


def make_some_groups(drive_module: Any, words: Sequence[str]) -> Iterator[Group]:
    """IPv4, whole packets: dsr, which the others are compared with, and the modes among ``words``; new flows: "new";
    tables in files: "file"."""
    modes = [mode for mode in MODES if mode == "dsr" or mode in words]
    for flows in (FEW, MANY):
        frames = make_frames(drive_module, 4, flows)
        for mode in modes:
            yield of_established(drive_module, 4, mode, flows, frames, (WHOLE,))
    if "file" in words:
        yield from of_files(drive_module, [mode for mode in IN_FILE_MODES if mode in modes])
    if "new" in words:
        yield from of_new_flows(drive_module, [mode for mode in NEW_FLOW_MODES if mode in modes])


def make_frames(drive_module: Any, version: int, flows: int) -> Any:
    """Those of established flows, equally many of each."""
    frames = drive_module.Frames(template(version), max(POOL // flows * flows, flows))
    frames.assign(0, flows)
    return frames


def of_established(drive_module: Any, version: int, mode: str, flows: int, frames: Any, stages: Sequence[str]) -> Group:
    """The legs of one mode; for dsr the walk over the same frames, too."""
    client, *reply = established(drive_module, version, mode, flows, frames)
    cases = [Case(mode, version, flows, stage, partial(client.through, stage)) for stage in stages]
    if mode == "dsr":
        cases.insert(0, Case("bare walk", version, flows, "walk", partial(client.through, "walk")))
    cases += [Case(f"{mode} reply", version, flows, WHOLE, partial(leg.through, WHOLE)) for leg in reply]
    return Group(client.warm, TURNS, cases)


def of_files(drive_module: Any, modes: Sequence[str]) -> Iterator[Group]:
    """The client's leg of MANY flows whose table is in a file."""
    frames = make_frames(drive_module, 4, MANY)
    for mode in modes:
        for where, large in IN_FILE.items():
            client, *_ = established(drive_module, 4, mode, MANY, frames, memory_in_file(MANY, large))
            yield Group(client.warm, TURNS, [Case(mode + where, 4, MANY, WHOLE, partial(client.through, WHOLE))])


def of_new_flows(drive_module: Any, modes: Sequence[str]) -> Iterator[Group]:
    frames = drive_module.Frames(template(4, SYN), MANY)
    frames.assign(0, MANY)
    for mode in modes:
        new = NewFlows(drive_module, 4, mode, frames)
        yield Group(new.warm, 1, [Case(f"{mode}{NEW}", 4, MANY, WHOLE, new.open)])


def measure(groups: Sequence[Group], rounds: int) -> None:
    """A round's value of a case is the mean of its turns."""
    for _ in progress(range(rounds), "round"):
        for group in groups:
            group.warm()
            turns = [[case.measure() for case in group.cases] for _ in range(group.turns)]
            for case, values in zip(group.cases, zip(*turns, strict=True), strict=True):
                case.rounds.append(fmean(values))


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
            drive.run(frames, 0, MANY, CLIENT_SIDE, NOW)
    before = pipeline.counters()
    for first in range(0, flows, MANY):
        frames.assign(first, MANY)
        drive.run(frames, 0, MANY, CLIENT_SIDE, NOW)
    counters = pipeline.counters()
    return memory(pipeline, flows) | {
        "tracked": pipeline.flow_count(),
        "untracked": counters["flows_untracked"],
        "evicted": counters["flows_evicted"],
        "found_again": counters["conntrack"] - before["conntrack"],
    }


# --- what is told ---------------------------------------------------------------------------------------------------


def tell_cases(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print the table of whole packets; the same as data."""
    walks = {(case.version, case.flows): case.spread.median for case in cases if case.name == "bare walk"}
    rows, data = [], []
    for case in cases:
        spread, target = case.spread, case.target
        above = spread.median - walks[case.version, case.flows]
        met = spread.median <= target if target else None
        found = {"name": case.name, "version": case.version, "flows": case.flows, **asdict(spread)}
        data.append({**found, "above_walk": above, "target": target, "met": met})
        verdict = (f"<= {target}", "met" if met else "not met") if target else ("", "")
        name = f"IPv{case.version} {case.name}"
        rows.append((name, f"{case.flows:,}", f"{spread.median:.1f}", span(spread), f"{above:.1f}", *verdict))
    print_table(("", "flows", "ns", "p10 .. p90", "above walk", "target", ""), rows)
    return data


def tell_modes(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print what the other modes cost above dsr, round by round; the same as data."""
    plain = {case.flows: case for case in cases if case.version == 4 and case.name == "dsr"}
    rows, data = [], []
    for case in cases:
        if case.version != 4 or case.name not in ABOVE_DSR:
            continue
        above = Spread.of(ns - dsr for ns, dsr in zip(case.rounds, plain[case.flows].rounds, strict=True))
        bound = ABOVE_DSR[case.name]
        met = above.median <= bound
        data.append({"name": case.name, "flows": case.flows, **asdict(above), "bound": bound, "met": met})
        verdict = "met" if met else "not met"
        rows.append((case.name, f"{case.flows:,}", f"{above.median:.1f}", span(above), f"<= {bound}", verdict))
    print()
    print_table(("IPv4, ns above dsr", "flows", "median", "p10 .. p90", "target", ""), rows)
    return data


def tell_new_flows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print how many times as long a new flow takes as an established one's packet, round by round; the same as data.

    Both with the same number of flows in a table of the same size.
    """
    packets = {case.name: case for case in cases if case.version == 4 and case.flows == MANY}
    rows, data = [], []
    for case in (case for case in cases if case.name.endswith(NEW)):
        same = packets[case.name.removesuffix(NEW)]
        times = Spread.of(ns / known for ns, known in zip(case.rounds, same.rounds, strict=True))
        met = times.median <= NEW_FLOW
        data.append({"name": case.name, "flows": case.flows, **asdict(times), "bound": NEW_FLOW, "met": met})
        range_ = f"{times.p10:.2f} .. {times.p90:.2f}"
        verdict = "met" if met else "not met"
        rows.append((case.name, f"{case.flows:,}", f"{times.median:.2f}", range_, f"<= {NEW_FLOW}", verdict))
    if rows:
        print()
        print_table(("IPv4, times an established flow's", "flows", "median", "p10 .. p90", "target", ""), rows)
    return data


def tell_files(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print what a table in a file costs above one in the process's own memory, round by round; the same as data."""
    own = {case.name: case for case in cases if case.version == 4 and case.flows == MANY}
    rows, data = [], []
    for mode in IN_FILE_MODES:
        for case in (own[mode + where] for where in IN_FILE if mode + where in own):
            above = Spread.of(ns - same for ns, same in zip(case.rounds, own[mode].rounds, strict=True))
            data.append({"name": case.name, "flows": case.flows, **asdict(above)})
            rows.append((case.name, f"{case.flows:,}", f"{above.median:.1f}", span(above)))
    if rows:
        print()
        print_table(("IPv4, ns above the process's own memory", "flows", "median", "p10 .. p90"), rows)
    return data


def span(spread: Spread) -> str:
    return f"{spread.p10:.1f} .. {spread.p90:.1f}"


def stage_costs(cases: Sequence[Case]) -> Iterator[Spread]:
    """What each stage adds to those before it: the difference of the medians, the range of those within a round.

    ``cases``: from the walk on, each one stage longer.
    """
    before = [0.0] * len(cases[0].rounds)
    for case in cases:
        within = Spread.of(ns - less for ns, less in zip(case.rounds, before, strict=True))
        yield Spread(case.spread.median - Spread.of(before).median, within.p10, within.p90)
        before = case.rounds


def tell_stages(walks: Sequence[Case], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print how the ns of an established client's packet divide over the stages; the same as data.

    ``walks``: one for each number of flows; ``cases``: of one mode, by number of flows, then by stage.
    """
    runs = [[walk, *(case for case in cases if case.flows == walk.flows)] for walk in walks]
    costs = [list(stage_costs(run)) for run in runs]
    rows = [
        (run[0].stage, *(word for spread in row for word in (f"{spread.median:.1f}", span(spread))))
        for run, row in zip(zip(*runs, strict=True), zip(*costs, strict=True), strict=True)
    ]
    whole = [run[-1].spread for run in runs]
    rows.append(("whole", *(word for spread in whole for word in (f"{spread.median:.1f}", span(spread)))))
    heads = (word for walk in walks for word in (f"{walk.flows:,} flows", "p10 .. p90"))
    print()
    print_table((f"IPv4 {cases[0].name} by stage, ns", *heads), rows)
    return [
        {"name": cases[0].name, "flows": case.flows, "stage": case.stage, **asdict(cost), "so_far": asdict(case.spread)}
        for run, row in zip(runs, costs, strict=True)
        for case, cost in zip(run, row, strict=True)
    ]


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


def bars(cases: Sequence[Case]) -> list[Bar]:
    colours = {FEW: 0, MANY: 2, MOST: 3}
    return [
        Bar(
            f"IPv{case.version} {case.name}, {case.flows:,} flows",
            case.spread,
            colour=1 if case.name == "bare walk" else colours[case.flows],
            target=case.target,
        )
        for case in cases
    ]


def words_of(text: str) -> list[str]:
    """The argument of --only. Raises argparse.ArgumentTypeError for what is no case."""
    words = text.split(",")
    for word in words:
        if word not in (*MODES, "new", "file"):
            raise argparse.ArgumentTypeError(f"{word!r} is none of: {', '.join((*MODES, 'new', 'file'))}")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description="Nanoseconds per packet of the pipeline in memory.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no table of over a million flows")
    parser.add_argument(
        "--only",
        type=words_of,
        metavar="WORD,...",
        help="quick, and only dsr and these modes, over IPv4, without stages; `new`: also new flows of these modes; "
        "`file`: also with the table in a file",
    )
    parser.add_argument("--rounds", type=int, help=f"how often each case is measured, at least {LEAST_ROUNDS}")
    options = parser.parse_args()
    quick = options.quick or options.only
    rounds = max(LEAST_ROUNDS, options.rounds or (LEAST_ROUNDS if quick else ROUNDS))
    announce("core.py, what a packet costs in memory", *(QUICK_NEEDS if quick else NEEDS))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    drive = build("_drive")
    tables = [memory(make_pipeline(4, "dsr", MANY), MANY)]
    if not quick:
        print(f"  a table with {FULL:,} flows", file=sys.stderr, flush=True)
        tables.append(fill(drive, FULL))
    if options.only:
        groups = list(make_some_groups(drive, options.only))
    else:
        groups = list(make_groups(drive, (FEW, MANY) if quick else (FEW, MANY, MOST)))
    measure(groups, rounds)
    title = f"ns per packet in memory: {BACKENDS} backends, batches of 32, {rounds} rounds"
    print(title)
    tell([case for group in groups for case in group.cases], title, rounds, tables, staged=not options.only)


def tell(cases: Sequence[Case], title: str, rounds: int, tables: Sequence[dict[str, float]], staged: bool) -> None:
    """Print and write everything. ``staged``: there are cases for each stage."""
    whole = [case for case in cases if case.stage in ("walk", WHOLE)]
    walks = [case for case in whole if case.stage == "walk" and case.version == 4]
    found = {"rounds": rounds, "cases": tell_cases(whole)}
    found["above_dsr"] = tell_modes(whole)
    found["new_flows"] = tell_new_flows(whole)
    found["files"] = tell_files(whole)
    found["stages"] = [
        row
        for mode in (("dsr", "nat") if staged else ())
        for row in tell_stages(walks, [case for case in cases if case.version == 4 and case.name == mode])
    ]
    tell_memory(tables)
    write("core", title, {**found, "memory": tables}, bars(whole), "ns per packet")


if __name__ == "__main__":
    main()
