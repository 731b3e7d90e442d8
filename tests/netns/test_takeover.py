"""What outlives a ``fastlb run``, and who takes it over: real transfers go on in every mode, whatever ended it.

Services schedule by turns: a packet in mid-flow that no entry knows would go by the Maglev table, mostly elsewhere.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.netns.balancer import ROOT, Balancer, fastlb, until, within
from tests.netns.rig import Preload

sys.path.insert(0, str(ROOT / "netns-lab"))
from topology import ALL_VIPS, BACKENDS, Lab, own_prefix

from fastlb.kernel import guard

MODES = ("nat", "fullnat", "dsr", "ipip")
WAYS = [(mode, 4) for mode in MODES] + [("fullnat", 6)]
EACH = 25  # transfers of a way
TRICKLE = ("--count", EACH, "--seconds", 5)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(own_prefix("test") + "over-", every_mode=True) as lab:
        yield lab


def settings(lab: Lab, **changes: Any) -> dict[str, Any]:
    base = lab.config(workers=1, flows=100_000, **changes)
    return {**base, "services": [{**each, "scheduler": "rr"} for each in base["services"]]}


@pytest.fixture
def balancer(lab: Lab, tmp_path: Path) -> Iterator[Balancer]:
    with Balancer(lab.namespace("lb"), settings(lab), tmp_path) as balancer:
        yield balancer
        balancer.show_log()


def flow_file(balancer: Balancer) -> Path:
    return Path(balancer.status()["flows"]["file"])


def guarded(balancer: Balancer) -> list[str]:
    return [each.interface for each in within(balancer.namespace, guard.show)]


def events(balancer: Balancer) -> list[str]:
    return [each["event"] for each in balancer.logs()]


# ---- transfers


def crash(balancer: Balancer) -> None:
    balancer.kill()
    balancer.start()


def hand_over(balancer: Balancer) -> None:
    done = fastlb("stop", "--handover", "-c", balancer.config_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert balancer.wait() == 0
    balancer.start()


def two_workers_and_one_again(balancer: Balancer) -> None:
    balancer.configure({**balancer.config, "workers": 2})
    hand_over(balancer)
    balancer.configure({**balancer.config, "workers": 1})
    crash(balancer)


@pytest.mark.parametrize("change", [crash, hand_over, two_workers_and_one_again], ids=lambda each: each.__name__)
def test_transfers_go_on(lab: Lab, balancer: Balancer, change: Callable[[Balancer], None]) -> None:
    """All of them, in every mode, byte for byte; none had ended before it, and none was guessed at."""
    with ThreadPoolExecutor(len(WAYS)) as pool:
        running = {way: pool.submit(lab.client, "trickle", ALL_VIPS[way], *TRICKLE) for way in WAYS}
        assert until(lambda: all(established(balancer, way) == EACH for way in WAYS))
        began = time.monotonic()
        change(balancer)
        results = {way: each.result() for way, each in running.items()}
    assert {way: (got["verified"], got["errors"]) for way, got in results.items()} == dict.fromkeys(WAYS, (EACH, {}))
    assert min(got["ends"][0] for got in results.values()) > began
    counters = balancer.status()["counters"]
    assert (counters["paths"]["maglev"], counters["paths"]["rejected"], counters["drops"]["reply_unknown"]) == (0, 0, 0)
    taken = [each for each in balancer.logs() if each["event"] == "flows taken over"]
    assert [(each["damaged"], each["of_no_backend"]) for each in taken] == [(0, 0)] * len(taken)
    assert all(each["flows"] >= EACH * len(WAYS) for each in taken)


def established(balancer: Balancer, way: tuple[str, int]) -> int:
    """Flows with at least a few packets."""
    name = f"web-{way[0]}-{way[1]}"
    (found,) = (each for each in balancer.status()["services"] if each["name"] == name)
    moved = all(each["packets"] > 5 * each["active_flows"] for each in found["backends"])
    return sum(each["active_flows"] for each in found["backends"]) if moved else 0


def test_counts_and_ports_are_those_of_the_flows(lab: Lab, balancer: Balancer) -> None:
    """Over restarts, until all flows are over: nothing is left that no flow has."""
    balancer.configure({**balancer.config, "timeouts": {"tcp_closing": "1s", "tcp_syn": "1s"}})
    crash(balancer)
    for _ in range(3):
        for way in WAYS:
            got = lab.client("fetch", ALL_VIPS[way], "--count", 60)
            assert (got["answered"], got["errors"]) == (60, {})
        crash(balancer)
    assert until(lambda: balancer.status()["flows"]["active"] == 0)
    status = balancer.status()
    assert [row["taken"] for row in status["flows"]["source_ports"]] == [0, 0, 0, 0]
    assert {each["active_flows"] for service in status["services"] for each in service["backends"]} == {0}


# ---- what stays, and what goes


def test_a_clean_stop_removes_the_file(balancer: Balancer) -> None:
    file = flow_file(balancer)
    assert (file.stat().st_mode & 0o777, file.stat().st_size > 8_000_000) == (0o600, True)
    assert balancer.terminate() == 0
    assert (file.exists(), guarded(balancer)) == (False, [])
    balancer.start()
    assert "flows taken over" not in events(balancer)
    done = fastlb("stop", "--socket", balancer.socket_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
    assert (balancer.wait(), file.exists(), guarded(balancer)) == (0, False, [])
    assert "Traceback" not in balancer.log_path.read_text()


def test_a_handover_says_what_stays(lab: Lab, balancer: Balancer) -> None:
    assert lab.client("fetch", ALL_VIPS["nat", 4], "--count", 20)["answered"] == 20
    file = flow_file(balancer)
    done = fastlb("stop", "--handover", "--socket", balancer.socket_path)
    assert (done.returncode, done.stdout) == (
        0, f"stopped; kept for the next run: the guard on eth0, eth1; 20 flows in {file}\n",
    )  # fmt: skip
    assert balancer.wait() == 0
    assert events(balancer)[-1] == "stopped; guard, VIPs and flows stay"
    assert (file.exists(), guarded(balancer), balancer.socket_path.exists()) == (True, ["eth0", "eth1"], False)

    shown = json.loads(fastlb("guard", "show", "--json", namespace=balancer.namespace).stdout)
    assert [(each["path"], each["state"]) for each in shown["flow_files"]] == [(str(file), "left over")]
    assert str(file) in fastlb("guard", "show", namespace=balancer.namespace).stdout
    done = fastlb("guard", "remove", namespace=balancer.namespace)
    assert (done.returncode, done.stdout) == (0, f"removed from: eth0, eth1, {file}\n")
    assert (file.exists(), guarded(balancer)) == (False, [])
    assert fastlb("guard", "show", namespace=balancer.namespace).stdout.startswith("nothing is left over: ")


def test_a_handover_by_a_signal(lab: Lab, balancer: Balancer) -> None:
    """Whose sender need not know the socket."""
    assert lab.client("fetch", ALL_VIPS["nat", 4], "--count", 20)["answered"] == 20
    file = flow_file(balancer)
    for _ in range(2):
        assert balancer.terminate(signal.SIGUSR2) == 0
        assert events(balancer)[-1] == "stopped; guard, VIPs and flows stay"
        assert (file.exists(), guarded(balancer)) == (True, ["eth0", "eth1"])
        balancer.start()
    assert [each["flows"] for each in balancer.logs() if each["event"] == "flows taken over"] == [20, 20]


def test_a_handover_without_a_file(balancer: Balancer) -> None:
    """Guard and VIPs stay; there is nothing to say of flows."""
    balancer.terminate()
    balancer.configure({**balancer.config, "flow_file": "none"})
    balancer.start()
    assert balancer.status()["flows"]["file"] is None
    done = fastlb("stop", "--handover", "--socket", balancer.socket_path)
    assert done.stdout == "stopped; kept for the next run: the guard on eth0, eth1; no flow\n"
    assert guarded(balancer) == ["eth0", "eth1"]


def test_a_file_in_use_is_not_removed(balancer: Balancer) -> None:
    shown = json.loads(fastlb("guard", "show", "--json", namespace=balancer.namespace).stdout)
    assert [each["state"] for each in shown["flow_files"]] == ["in use"]
    assert fastlb("guard", "remove", namespace=balancer.namespace).returncode == 1
    assert flow_file(balancer).exists()


def test_a_file_is_not_shared(lab: Lab, balancer: Balancer, tmp_path: Path) -> None:
    """By a balancer that has nothing else in common with this one."""
    other = tmp_path / "other.yaml"
    shared = {"flow_file": str(flow_file(balancer)), "interfaces": ["lo2"], "services": []}
    lab.write_config(other, control=str(tmp_path / "other.sock"), flows=100_000, **shared)
    with lab.rtnl("lb") as rtnl:
        rtnl.link("add", ifname="lo2", kind="veth", peer={"ifname": "lo3"})
    try:
        done = fastlb("run", "-c", other, namespace=balancer.namespace)
    finally:
        with lab.rtnl("lb") as rtnl:
            rtnl.link("del", index=rtnl.link_lookup(ifname="lo2")[0])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"fastlb: another fastlb uses {flow_file(balancer)}")


def test_a_start_that_fails_leaves_it_to_the_next(lab: Lab, balancer: Balancer, preload: Preload) -> None:
    """After the guard was attached: rings cannot be had. What a handover left is still there."""
    assert lab.client("fetch", ALL_VIPS["nat", 4], "--count", 20)["answered"] == 20
    file = flow_file(balancer)
    fastlb("stop", "--handover", "--socket", balancer.socket_path)
    balancer.wait()
    done = fastlb("run", "-c", balancer.config_path, namespace=balancer.namespace, env=preload(REFUSE="ring"))
    assert (done.returncode, "cannot open a receive ring" in done.stderr) == (1, True)
    assert (file.exists(), guarded(balancer)) == (True, ["eth0", "eth1"])
    balancer.start()
    taken = [each for each in balancer.logs() if each["event"] == "flows taken over"]
    assert [each["flows"] for each in taken] == [20]


def test_a_damaged_file_is_set_aside(lab: Lab, balancer: Balancer) -> None:
    file = flow_file(balancer)
    balancer.kill()
    with file.open("r+b") as damaged:
        damaged.truncate(1 << 20)
    balancer.start()
    (said,) = (each for each in balancer.logs() if "set aside" in each["event"])
    assert (said["reason"], said["level"]) == ("it is cut short", "warning")
    assert said["file"] == f"{file}.rejected"
    got = lab.client("fetch", ALL_VIPS["nat", 4], "--count", 30)
    assert (got["answered"], sorted(got["backends"])) == (30, list(BACKENDS))
    words = ("guard", "show", "--json", "-c", balancer.config_path)
    shown = json.loads(fastlb(*words, namespace=balancer.namespace).stdout)
    assert sorted(each["state"] for each in shown["flow_files"]) == ["in use", "set aside"]


def test_a_place_that_is_not_in_memory_is_refused(balancer: Balancer) -> None:
    balancer.terminate()
    balancer.configure({**balancer.config, "flow_file": "/proc/flows"})
    done = fastlb("run", "-c", balancer.config_path, namespace=balancer.namespace)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "flow_file: /proc is not on tmpfs or ramfs" in done.stderr
    assert guarded(balancer) == []
