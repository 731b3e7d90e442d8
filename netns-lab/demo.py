"""The demonstration: a lab, fastlb in it, real traffic, a report. Exit code 0 only if every check held.

    lab up -> fastlb run, and how frames leave -> HTTP and UDP over nat and dsr, IPv4 and IPv6 -> a big file, verified
           -> small packets at full speed -> drops by reason -> SIGTERM -> nothing left behind

Takes well under two minutes, and at DEADLINE gives up: then, too, everything is taken down.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from namespaces import become_root, inside
from topology import BACKENDS, HERE, VIPS, Lab, LabError, address, own_prefix, remove_abandoned

DEADLINE = 110  # seconds for the whole demonstration
START_TIMEOUT = 20.0  # seconds until fastlb must answer
STOP_TIMEOUT = 10.0  # seconds from SIGTERM until fastlb must have ended
ENDING_SIGNALS = (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
FLOWS = 1024
FRAME = 64  # bytes
WIDTH = 100  # characters of a line


class Report:
    """What the demonstration prints, and whether every check held."""

    def __init__(self) -> None:
        self.held = True

    def check(self, ok: bool, claim: str, otherwise: object = "") -> None:
        """Print one ok/FAILED line; ``otherwise`` explains a failure."""
        self.held = self.held and ok
        reason = f": {otherwise}" if otherwise and not ok else ""
        print(f"  {'ok    ' if ok else 'FAILED'}  {claim}{reason}")

    def note(self, words: str) -> None:
        """Print a remark, in lines of a terminal's width."""
        print(textwrap.fill(words, WIDTH, initial_indent="  ", subsequent_indent="  "))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print aligned columns: the first to the left, the others to the right."""
        lines = [tuple(columns), *(tuple(map(cell, row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for first, *others in lines:
            aligned = (word.rjust(width) for word, width in zip(others, widths[1:], strict=True))
            print("  " + "   ".join((first.ljust(widths[0]), *aligned)).rstrip())


def cell(value: object) -> str:
    """A number with thousands separated, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def path_name(forward: str, version: int) -> str:
    return f"{forward} IPv{version}"


# ---- fastlb


def fastlb(*words: str | Path) -> list[str | Path]:
    """The command line of this environment's fastlb."""
    return [sys.executable, "-m", "fastlb", *words]


def log_path(lab: Lab) -> Path:
    """Where fastlb's log goes; shown when something did not hold, then removed with the lab."""
    return lab.run_dir / "fastlb.log"


def read_status(lab: Lab) -> dict[str, Any] | None:
    """What ``fastlb status --json`` says; None while it does not answer."""
    command = fastlb("status", "--json", "--socket", lab.socket_path)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=10)
    except subprocess.TimeoutExpired:  # a slow machine
        return None
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def drops(status: dict[str, Any]) -> dict[str, int]:
    """Packets dropped by fastlb or lost by its rings, by reason, the commonest first."""
    counters = status["counters"]
    counted = counters["drops"] | {"ring_drops": counters["ring_drops"]}
    return {name: count for name, count in sorted(counted.items(), key=lambda item: -item[1]) if count}


def start_fastlb(lab: Lab, patience: float = START_TIMEOUT, **settings: Any) -> subprocess.Popen[Any]:
    """Start ``fastlb run`` in the balancer and wait until it answers; raises LabError after ``patience`` seconds."""
    command = fastlb("run", "-c", lab.write_config(**settings))
    with log_path(lab).open("wb") as log:
        balancer = lab.run("lb", command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=HERE.parent)
    deadline = time.monotonic() + patience
    while read_status(lab) is None:
        if balancer.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"fastlb did not start (exit code {balancer.returncode})")
        time.sleep(0.1)
    return balancer


def show_paths(lab: Lab, report: Report, transmit: str) -> None:
    """Which way frames leave each interface; a forced way must be the one."""
    status = read_status(lab)
    paths = status["transmit"] if status else {}
    forced = set() if transmit == "auto" else {transmit}
    ways = {
        "xdp": "AF_XDP from the ring's memory",
        "sendmmsg": "sendmmsg",
        "xdp+sendmmsg": "AF_XDP, and sendmmsg for want of queues",
    }
    for interface, path in paths.items():
        report.check({path} >= forced, f"frames leave {interface} by {ways[path]}", f"not by {transmit}")
    report.check(bool(paths), "fastlb tells how frames leave")


def stop_fastlb(lab: Lab, balancer: subprocess.Popen[Any], report: Report) -> None:
    """End fastlb with SIGTERM and look at what it left in the balancer's namespace."""
    balancer.send_signal(signal.SIGTERM)
    try:
        code: object = balancer.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        code = f"still running after {STOP_TIMEOUT:g} s"
    print()
    report.check(code == 0, "fastlb ended with exit code 0 on SIGTERM", code)
    left = left_by_fastlb(lab)
    report.check(not left, "fastlb left nothing behind", ", ".join(left))


def left_by_fastlb(lab: Lab) -> list[str]:
    """Control socket, guard and packet sockets that still exist in the balancer's namespace."""
    left = [str(lab.socket_path)] if lab.socket_path.exists() else []
    with lab.rtnl("lb") as rtnl:
        kinds = [(qdisc.get("kind"), qdisc["index"]) for qdisc in rtnl.get_qdiscs()]
    left += [f"{kind} on interface {index}" for kind, index in kinds if kind in ("clsact", "ingress")]
    with inside(lab.namespace("lb")):
        sockets = Path("/proc/thread-self/net/packet").read_text().splitlines()[1:]
    return left + ["a packet socket" for _ in sockets]


# ---- traffic


def show_fetches(lab: Lab, report: Report, command: str, count: int) -> None:
    """HTTP or UDP from many client ports at once over every path; who served how many."""
    answers = {path: lab.client(command, vip, "--count", count) for path, vip in lab.vips.items()}
    title = {"fetch": "HTTP, a request a connection", "echo": "UDP echo, three datagrams a port"}[command]
    rows = []
    for path, answer in answers.items():
        served = (answer["backends"].get(node, 0) for node in BACKENDS)
        rate = round(answer["answered"] / answer["seconds"])
        rows.append((path_name(*path), answer["ports"], answer["answered"], *served, rate))
    report.table((title, "client ports", "answered", *BACKENDS, "per second"), rows)
    for path, answer in answers.items():
        check_fetch(report, path, answer, count)


def check_fetch(report: Report, path: tuple[str, int], answer: dict[str, Any], count: int) -> None:
    """What must hold of one path's HTTP or UDP answers."""
    name, served = path_name(*path), answer["backends"]
    whole = answer["answered"] == answer["ports"] == count
    report.check(whole, f"{name}: every port was answered", answer["errors"])
    report.check(set(served) == set(BACKENDS), f"{name}: every backend served", served)
    if "clients" in answer:
        whose = "balancer" if path[0] == "fullnat" else "client"
        seen = address("lb", "eth1", path[1]) if path[0] == "fullnat" else address("client", "eth0", path[1])
        report.check(set(answer["clients"]) == {seen}, f"{name}: backends see the {whose}'s address", answer["clients"])
    if "torn" in answer:
        report.check(answer["torn"] == 0, f"{name}: each port stayed with one backend", answer["torn"])


def show_transfers(lab: Lab, report: Report, size: int) -> None:
    """A big file, both ways, in every mode."""
    rows, checks = [], []
    for forward in dict.fromkeys(forward for forward, _ in lab.vips):
        for command in ("download", "upload"):
            answer = lab.client(command, lab.vips[forward, 4], "--bytes", size)
            name = f"{path_name(forward, 4)} {command}"
            speed = answer["bytes"] * 8 / answer["seconds"] / 1e9
            rows.append((name, answer["bytes"] / 1e6, answer["seconds"], speed, answer["backend"]))
            checks.append((answer["verified"], f"{name}: SHA-256 verified", answer))
    report.table(("one big file", "MB", "seconds", "Gbit/s", "backend"), rows)
    for check in checks:
        report.check(*check)


def show_flood(lab: Lab, report: Report, seconds: float) -> None:
    """Small packets at full speed from the client through a dsr service to the backends' discard port."""
    before = flood_counters(lab)
    sent = lab.generate(VIPS["dsr", 4], "--seconds", str(seconds), "--flows", FLOWS, "--size", FRAME)
    time.sleep(0.5)  # what is still in the ring
    after = flood_counters(lab)
    counts = {"client sends": sent["frames"]} | {place: after[place] - before[place] for place in after}
    title = f"{FRAME}-byte UDP packets of {FLOWS:,} flows, {sent['seconds']:.1f} s"
    rows = [(place, n, round(n / sent["seconds"])) for place, n in counts.items()]
    report.table((title, "packets", "per second"), rows)
    arrived = [counts[f"{node} in"] for node in BACKENDS]
    report.check(all(arrived), "every backend received small packets", arrived)
    report.note(
        "The client sends as fast as it can, which is meant to be more than one worker can take here. What finds the "
        "receive ring full is lost, as at a full network card, and counted as ring_drops in the table at the end."
    )
    again = lab.client("fetch", VIPS["nat", 4], "--count", 50)
    report.check(again["answered"] == 50, "HTTP works after the flood", again["errors"])


def flood_counters(lab: Lab) -> dict[str, int]:
    """The kernel's packet counters along the way of the flood."""
    balancer = lab.counters("lb")
    places = {"balancer in": balancer["eth0"].rx_packets, "balancer out": balancer["eth1"].tx_packets}
    return places | {f"{node} in": lab.counters(node)["eth0"].rx_packets for node in BACKENDS}


def show_drops(lab: Lab, report: Report) -> None:
    """fastlb's own account."""
    status = read_status(lab)
    report.check(status is not None, "fastlb status answers")
    if status:
        counters = status["counters"]
        by_xdp = counters["transmitted_xdp"]
        rows = [("AF_XDP", by_xdp), ("sendmmsg", counters["transmitted"] - by_xdp)]
        report.table(("sent by fastlb, by path", "packets"), rows)
        each = [(f"worker {n} on core {w['core']}", w["packets"]) for n, w in enumerate(status["workers"])]
        report.table(("handled by fastlb, by worker", "packets"), each)
        report.check(all(packets for _, packets in each), "every worker had packets", each)
    found = drops(status) if status else {}
    report.table(("dropped by fastlb, by reason", "packets"), list(found.items()) or [("nothing", 0)])


# ---- the whole


def demonstrate(report: Report, options: argparse.Namespace) -> None:
    """Everything between an empty machine and an empty machine."""
    remove_abandoned()
    lab = Lab(own_prefix("demo"), every_mode=True)
    started = time.monotonic()
    with lab:
        report.check(True, f"lab up, six namespaces and their servers ({time.monotonic() - started:.1f} s)")
        try:
            balancer = start_fastlb(lab, transmit=options.transmit, workers=options.workers)
            report.check(True, "fastlb runs")
            show_paths(lab, report, options.transmit)
            for vip in lab.vips.values():  # neighbours are resolved and programs warm before anything is measured
                lab.client("fetch", vip, "--count", 20)
            show_fetches(lab, report, "fetch", options.count)
            show_fetches(lab, report, "echo", options.count)
            show_transfers(lab, report, options.bytes)
            show_flood(lab, report, options.seconds)
            show_drops(lab, report)
            stop_fastlb(lab, balancer, report)
        except Exception as error:
            report.check(False, "the demonstration ran to its end", describe(error))
        if not report.held and log_path(lab).exists():
            print(f"\nfastlb's log:\n{log_path(lab).read_text().rstrip()}")
    left = lab.leftovers()
    report.check(not left, "the lab left nothing behind", ", ".join(left))


def describe(error: Exception) -> str:
    """An exception as one line; our own speak for themselves."""
    return str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"


def give_up(number: int, _: FrameType | None) -> None:
    """A signal ends the demonstration as an exception, so that the lab is taken down on the way out."""
    for each in ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    reason = f"not done after {DEADLINE} s" if number == signal.SIGALRM else signal.Signals(number).name
    raise LabError(f"stopped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show fastlb at work in a lab of network namespaces.")
    parser.add_argument("--count", type=int, default=200, help="client ports per path (200)")
    parser.add_argument("--bytes", type=int, default=200_000_000, help="size of the big file (200000000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the flood (5)")
    ways = ("auto", "xdp", "sendmmsg")
    parser.add_argument("--transmit", choices=ways, default="auto", help="force the way frames leave (auto)")
    parser.add_argument("--workers", type=int, default=1, help="packet-path threads; each link has two queues (1)")
    options = parser.parse_args()
    become_root()
    for number in ENDING_SIGNALS:
        signal.signal(number, give_up)
    signal.alarm(DEADLINE)
    started = time.monotonic()
    report = Report()
    try:
        demonstrate(report, options)
    except LabError as error:
        report.check(False, "the lab came up", error)
    verdict = "Everything held" if report.held else "NOT everything held"
    print(f"\n{verdict}, {time.monotonic() - started:.0f} s.")
    sys.exit(0 if report.held else 1)


if __name__ == "__main__":
    main()
