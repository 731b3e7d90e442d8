"""Which share of the flows moves to another backend when backends come and go, when a balancer is lost, and both?

A balancer has placed flows by their SYNs. Then its configuration changes, and the flows go on: at the same balancer,
which remembers them, and at another one with the new configuration that has never seen any of them. That one stands for
a balancer that takes over from one that is lost, and for one without connection tracking. Both are the very pipeline
that workers run; no root and no network are needed.

The least that can move is the flows of backends that have left and, where nobody remembers, what newcomers must take
over for all shares to be even again. The second table is the experiment of the Maglev paper's figure 12 (Eisenbud et
al., NSDI 2016, section 5.3): 1,000 backends of which some fail at once, counted in slots of the table.
"""

from __future__ import annotations

import argparse
import operator
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from statistics import fmean
from struct import pack

from core import ACK, SYN, checksum
from report import Bar, Spread, announce, print_table, progress, write
from xxhash import xxh64_intdigest

import fastlb

SCHEDULERS = ("maglev", "ketama")
POOLS = (10, 100, 1000)  # backends
FLOWS, QUICK_FLOWS = 200_000, 20_000
VIP, PORT = "203.0.113.10", 443
CHECKED = 100  # of so many placements one is compared with what the public functions say
PAPER_BACKENDS, PAPER_SIZES, PAPER_FAILURES = 1000, (65537, 655373), (1, 5, 10, 20)
REPEATS, QUICK_REPEATS = 40, 4  # of each; the paper's are 200


@dataclass(frozen=True)
class Event:
    """What becomes of the backends: so many leave, so many come."""

    title: str
    leave: int = 0
    come: int = 0

    def least(self, backends: int, gone: float, remembered: bool) -> float:
        """The least share of flows that moves; ``gone``: the share of those whose backend left."""
        if remembered:
            return gone
        after = backends - self.leave + self.come
        return max(gone, self.come / after)


@dataclass(frozen=True)
class Found:
    """Of one pool, event and scheduler: shares of all flows."""

    backends: int
    event: str
    scheduler: str
    gone: float  # their backend left
    least: float  # could move, where nobody remembers
    remembered: float  # moved at the balancer that has placed them
    forgotten: float  # moved at another one


def events(backends: int) -> list[Event]:
    """A tenth of ten backends is one."""
    tenth = backends // 10
    few = [Event("none"), Event("one leaves", 1), Event("one comes", 0, 1), Event("one is replaced", 1, 1)]
    more = [
        Event(f"{tenth} leave", tenth), Event(f"{tenth} come", 0, tenth), Event(f"{tenth} are replaced", tenth, tenth)
    ]  # fmt: skip
    return few + (more if tenth > 1 else [])


# --- flows ----------------------------------------------------------------------------------------------------------


Client = tuple[str, int]


def make_clients(count: int) -> list[Client]:
    """Addresses and ports of clients, each once."""
    numbers = random.Random(1)
    clients: dict[Client, None] = {}
    while len(clients) < count:
        clients[f"100.{numbers.randrange(64, 128)}.{numbers.randrange(256)}.{numbers.randrange(256)}",
                numbers.randrange(1024, 65536)] = None  # fmt: skip
    return list(clients)


def make_frames(clients: Iterable[Client], flags: int) -> list[bytes]:
    """A TCP segment to the VIP from each of them."""
    target = ip_address(VIP).packed
    link = b"\2\0\0\0\0\1" + b"\2\0\0\0\1\0" + b"\x08\x00"
    frames = []
    for address, port in clients:
        ends = ip_address(address).packed + target
        header = pack("!BBHHHBB", 0x45, 0, 40, 0, 0x4000, 64, 6)
        header += pack("!H", checksum(header + b"\0\0" + ends)) + ends
        segment = pack("!HHIIBBH", port, PORT, 1, 1, 5 << 4, flags, 512)
        check = checksum(ends + pack("!HH", 6, 20) + segment + bytes(4))
        frames.append(link + header + segment + pack("!HH", check, 0))
    return frames


@dataclass(frozen=True)
class Traffic:
    """The same flows twice: as they begin, and in the middle."""

    clients: list[Client]
    first: list[bytes]
    later: list[bytes]

    @classmethod
    def of(cls, count: int) -> Traffic:
        clients = make_clients(count)
        return cls(clients, make_frames(clients, SYN), make_frames(clients, ACK))


# --- balancers ------------------------------------------------------------------------------------------------------


def address_of(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


def key_of(number: int) -> str:
    return f"{address_of(number)}:{PORT}"


def configuration(numbers: Iterable[int], scheduler: str, flows: int) -> fastlb.Config:
    """One service with these backends."""
    backends = [{"address": address_of(number)} for number in numbers]
    service = {"name": "web", "vip": VIP, "port": PORT, "protocol": "tcp", "forward": "dsr", "scheduler": scheduler}
    return fastlb.Config.from_dict({"flows": 2 * flows, "services": [service | {"backends": backends}]})


def balancer(config: fastlb.Config, numbers: Iterable[int]) -> fastlb.Datapath:
    """One that can reach these backends."""
    made = fastlb.Datapath(config)
    for number in numbers:
        made.set_neighbour(address_of(number), "02:00:00:00:00:0b")
    return made


def placed(dp: fastlb.Datapath, frames: Sequence[bytes]) -> list[str | None]:
    """Each frame's backend; none for what is not forwarded."""
    results = dp.process_batch(frames)
    return [result.backend if result.verdict == fastlb.Verdict.FORWARD else None for result in results]


def predicted(scheduler: str, config: fastlb.Config) -> Callable[[Client], str]:
    """Where a client's flow goes by the public functions alone, for a fleet to agree on."""
    keys = sorted(f"{backend.address}:{PORT}" for backend in config.services[0].backends)
    if scheduler == "maglev":
        table = fastlb.maglev_table(keys, size=config.maglev_size)
        return lambda client: keys[table[fastlb.flow_hash(*client, VIP, PORT, "tcp") % len(table)]]
    points = sorted(
        (xxh64_intdigest(f"{key}_{number}".encode(), config.hash_seed), position)
        for position, key in enumerate(keys)
        for number in range(config.ring_points)
    )
    hashes = [hashed for hashed, _ in points]

    def on_ring(client: Client) -> str:
        at = bisect_left(hashes, fastlb.flow_hash(*client, VIP, PORT, "tcp"))
        return keys[points[at % len(points)][1]]

    return on_ring


def verify(traffic: Traffic, backends: Sequence[str | None], predict: Callable[[Client], str]) -> None:
    """Raises RuntimeError when the pipeline places a flow otherwise."""
    for client, backend in list(zip(traffic.clients, backends, strict=True))[::CHECKED]:
        if backend != predict(client):
            raise RuntimeError(f"{client} is at {backend}, and not at {predict(client)}")


# --- the measurement ------------------------------------------------------------------------------------------------


def measure(traffic: Traffic, backends: int, event: Event, scheduler: str) -> Found:
    """Place the flows, change the backends, and look where the flows are. Those that leave are drawn by lot."""
    leaving = set(random.Random(backends).sample(range(1, backends + 1), event.leave))
    before = range(1, backends + 1)
    after = [number for number in range(1, backends + event.come + 1) if number not in leaving]
    everybody = range(1, backends + event.come + 1)
    first = balancer(configuration(before, scheduler, len(traffic.clients)), everybody)
    at_first = placed(first, traffic.first)
    config = configuration(after, scheduler, len(traffic.clients))
    first.reload(config)
    remembered = placed(first, traffic.later)
    forgotten = placed(balancer(config, everybody), traffic.later)
    verify(traffic, forgotten, predicted(scheduler, config))
    left = {key_of(number) for number in leaving}
    count = len(traffic.clients)
    gone = sum(backend in left for backend in at_first) / count
    moved = [sum(map(operator.ne, at_first, later)) / count for later in (remembered, forgotten)]
    least = event.least(backends, gone, remembered=False)
    return Found(backends, event.title, scheduler, gone, least, *moved)


def failures(size: int, count: int, repeats: int) -> tuple[float, float]:
    """The Maglev paper's experiment: shares of slots that change when ``count`` backends fail, in the mean: all of
    them, and those whose backend did not fail."""
    keys = [key_of(number) for number in range(1, PAPER_BACKENDS + 1)]
    whole = fastlb.maglev_table(keys, size=size)
    changed, needless = [], []
    for repeat in range(repeats):
        failed = set(random.Random(repeat).sample(range(PAPER_BACKENDS), count))
        rest = fastlb.maglev_table(keys, [int(at not in failed) for at in range(PAPER_BACKENDS)], size)
        differ = list(map(operator.ne, whole, rest))
        changed.append(sum(differ) / size)
        needless.append(sum(slot not in failed for slot, differs in zip(whole, differ, strict=True) if differs) / size)
    return fmean(changed), fmean(needless)


# --- what is told ---------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def tell_flows(found: Sequence[Found], flows: int) -> None:
    """One line for each pool and event."""
    by_place = {(each.backends, each.event, each.scheduler): each for each in found}
    rows = []
    for backends, event in dict.fromkeys((each.backends, each.event) for each in found):
        maglev, ketama = (by_place[backends, event, scheduler] for scheduler in SCHEDULERS)
        rows.append((
            f"{backends} backends: {event}",
            *map(percent, (maglev.least, maglev.forgotten, ketama.least, ketama.forgotten)),
            *map(percent, (maglev.gone, maglev.remembered, ketama.gone, ketama.remembered)),
        ))  # fmt: skip
    print(f"{flows:,} flows, % of them that move. "
          "Elsewhere: at another balancer, without entries (a balancer is lost, and what the line says, at once)\n")
    columns = (
        "", "least", "maglev elsewhere", "least", "ketama elsewhere",
        "least", "maglev tracked", "least", "ketama tracked",
    )  # fmt: skip
    print_table(columns, rows)


def tell_failures(repeats: int) -> list[dict[str, float]]:
    """The paper's experiment, and what it says of it."""
    shares = [
        {"size": size, "failures": count, "changed": changed, "needless": needless}
        for size in PAPER_SIZES
        for count in PAPER_FAILURES
        for changed, needless in [failures(size, count, repeats)]
    ]
    print()
    rows = [
        (f"M = {each['size']:,}, {each['failures']} of {PAPER_BACKENDS:,} fail", percent(each["failures"] / 1000),
         percent(each["changed"]), percent(each["needless"]))
        for each in shares
    ]  # fmt: skip
    print_table((f"% of slots that change, mean of {repeats}", "least", "changed", "of others' backends"), rows)
    print("Eisenbud et al. 2016, figure 12, has the same experiment as a curve, without numbers; its text says that\n"
          "more change the more fail, and fewer in the larger table.")
    return shares


def every_case() -> Iterator[tuple[int, Event, str]]:
    """Yield every pool with every event and scheduler."""
    for backends in POOLS:
        for event in events(backends):
            for scheduler in SCHEDULERS:
                yield backends, event, scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of flows that move when backends and balancers change.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the flows")
    quick = parser.parse_args().quick
    flows = QUICK_FLOWS if quick else FLOWS
    announce("disruption.py, which flows move when backends change", "a minute" if quick else "five minutes")
    traffic = Traffic.of(flows)
    cases = list(every_case())
    found = [measure(traffic, *case) for case in progress(cases, "case")]
    tell_flows(found, flows)
    paper = tell_failures(QUICK_REPEATS if quick else REPEATS)
    bars = [
        Bar(f"{each.scheduler}, {each.backends}: {each.event}",
            Spread(100 * each.forgotten, 100 * each.forgotten, 100 * each.forgotten),
            SCHEDULERS.index(each.scheduler), 100 * each.least)
        for each in found
    ]  # fmt: skip
    title = "flows that move to another backend, at a balancer without entries; target: the least that must"
    write("disruption", title, {"flows": [asdict(each) for each in found], "figure 12": paper}, bars, "% of the flows")


if __name__ == "__main__":
    main()
