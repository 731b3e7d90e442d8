"""What do clients notice when fastlb is killed and started again? A thousand downloads in progress, in each mode.

Each mode has a turn with the flow table in a file, as is the default, and one without, for comparison. New flows are
placed by turns (`scheduler: rr`): what the table does not know goes astray, rather than be guessed by the Maglev table.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forwarders import HERE, ForwarderError, command_line
from report import GOAL_COLUMNS, Bar, Goal, Spread, print_table, write
from topology import ALL_VIPS, Lab, own_prefix

from fastlb.control.client import call
from fastlb.errors import ControlError

MODES = ("nat", "fullnat", "dsr", "ipip")
TRANSFERS = 1000
SECONDS = 15  # that each takes at least
FORWARDED = 100  # packets, more than the host sends by itself
TIMEOUT = 60.0  # until something that should happen is called missing
FILES = {"auto": "in a file", "none": "lost"}  # flow_file: where the flow table is, after the crash


@dataclass(frozen=True)
class Outcome:
    """Of one turn. Times in seconds."""

    mode: str
    flow_file: str
    intact: int  # transfers that were completed, every byte right
    restart: float  # from the kill to the first answer of the new process
    silence: float  # from the kill until packets leave the balancer again


def run(rounds: int) -> None:
    """Measure, print and write."""
    with Lab(own_prefix("bench"), every_mode=True) as lab:
        found = [crash(lab, mode, place) for _ in range(max(1, rounds)) for place in FILES for mode in MODES]
    tell(found)


def crash(lab: Lab, mode: str, place: str) -> Outcome:
    """Start, let TRANSFERS transfers begin, kill, start again, and wait for all of them."""
    services = [each | {"scheduler": "rr"} for each in lab.config()["services"] if each["name"] == f"web-{mode}-4"]
    config = lab.write_config(services=services, flow_file=place)
    words = ("--count", TRANSFERS, "--seconds", SECONDS)
    with ThreadPoolExecutor(2) as pool:
        with started(lab, config) as first:
            transfers = pool.submit(lab.client, "trickle", ALL_VIPS[mode, 4], *words, timeout=10 * TIMEOUT)
            wait_for(lambda: active_flows(lab) >= TRANSFERS, "transfers did not begin")
            killed = time.monotonic()
            first.kill()
            first.wait()
        silence = pool.submit(silent_since, lab, killed, packets_out(lab))
        with started(lab, config):
            restart = time.monotonic() - killed
            got = transfers.result()
    if got["ends"] and got["ends"][0] < killed:
        raise ForwarderError("a transfer had ended before the crash; SECONDS is too short for this machine")
    return Outcome(mode, place, got["verified"], restart, silence.result())


def silent_since(lab: Lab, killed: float, sent: int) -> float:
    """Seconds from ``killed`` on until FORWARDED more packets than ``sent`` have left the balancer."""
    wait_for(lambda: packets_out(lab) >= sent + FORWARDED, "nothing is forwarded")
    return time.monotonic() - killed


def packets_out(lab: Lab) -> int:
    return sum(each.tx_packets for each in lab.counters("lb").values())


@contextmanager
def started(lab: Lab, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`fastlb run`, answering; stopped at the end, unless it has ended. Raises ForwarderError with its log."""
    path = lab.run_dir / "fastlb.log"
    with path.open("wb") as log:
        process = lab.run("lb", command_line("run", "-c", config), stdout=log, stderr=log, cwd=HERE.parent)
    try:
        wait_for(lambda: process.poll() is not None or status(lab), "fastlb does not answer")
        if process.poll() is not None:
            raise ForwarderError(f"fastlb did not start: {path.read_text().strip()}")
        yield process
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def status(lab: Lab) -> dict[str, Any]:
    """What fastlb says of itself; empty while it does not answer."""
    with suppress(ControlError, ValueError):
        return dict(call(str(lab.socket_path), "status"))
    return {}


def active_flows(lab: Lab) -> int:
    """That have been answered: a SYN alone is one packet."""
    (service,) = status(lab)["services"]
    if any(each["packets"] < 4 * each["active_flows"] for each in service["backends"]):
        return 0
    return sum(each["active_flows"] for each in service["backends"])


def wait_for(condition: Callable[[], object], problem: str) -> None:
    """Raises ForwarderError."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise ForwarderError(problem)
        time.sleep(0.01)


# --- what is told ---------------------------------------------------------------------------------------------------


def tell(found: Sequence[Outcome]) -> None:
    """The table, whether all were completed, JSON and the picture."""
    title = f"kill -9 under {TRANSFERS:,} downloads, and restart"
    rows = [(f"{each.mode}, flows {FILES[each.flow_file]}", *cells(each)) for each in found]
    print_table((title, "completed intact", "answers after", "forwards after"), rows)
    goals = [Goal(f"{mode}: part completed", parts, 1.0) for mode, parts in completed(found).items()]
    print_table(("flows in a file", *GOAL_COLUMNS[1:]), [goal.row() for goal in goals])
    bars = [
        Bar(f"{each.mode}, flows {FILES[each.flow_file]}", Spread.of([each.intact]), int(each.flow_file == "none"))
        for each in found
    ]
    told = {"outcomes": [asdict(each) for each in found], "goals": [asdict(goal) for goal in goals]}
    write("lab-crash", title, told, bars, "downloads completed intact")


def cells(outcome: Outcome) -> tuple[str, ...]:
    return f"{outcome.intact:,}", f"{outcome.restart:.2f} s", f"{outcome.silence:.2f} s"


def completed(found: Sequence[Outcome]) -> Mapping[str, Spread]:
    return {
        mode: Spread.of(each.intact / TRANSFERS for each in found if (each.mode, each.flow_file) == (mode, "auto"))
        for mode in MODES
    }
