"""cpus.py: who gets which core, as tables; and real threads moved there, in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from fastlb.config import Config
from fastlb.kernel import cpus
from fastlb.kernel.cpus import LOWEST_PRIORITY, Plan
from tests.netns.balancer import ROOT, until

# --- how many, and where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "available", "count"),
    [
        ("auto", 1, 1),
        ("auto", 2, 1),
        ("auto", 4, 3),
        ("auto", 8, 7),
        ("auto", 65, 64),
        ("auto", 66, 64),
        ("auto", 192, 64),
        (1, 8, 1),
        (2, 1, 2),
        (4, 4, 4),
        (64, 2, 64),
    ],
)
def test_how_many_workers(wanted: int | Literal["auto"], available: int, count: int) -> None:
    assert cpus.count_workers(wanted, available) == count
    assert Config.from_dict({"workers": count}).workers == count, "as many as the configuration allows"


PLANS = [
    # cores, workers: theirs, the others', whether they meet
    ({0}, 1, (0,), {0}, True),
    ({0}, 3, (0, 0, 0), {0}, True),
    ({0, 1}, 1, (1,), {0}, False),
    ({0, 1}, 2, (0, 1), {0, 1}, True),
    ({0, 1}, 3, (1, 0, 1), {0, 1}, True),
    ({0, 1}, 4, (0, 1, 0, 1), {0, 1}, True),
    ({0, 1, 2, 3}, 1, (3,), {0, 1, 2}, False),
    ({0, 1, 2, 3}, 2, (2, 3), {0, 1}, False),
    ({0, 1, 2, 3}, 3, (1, 2, 3), {0}, False),
    ({0, 1, 2, 3}, 4, (0, 1, 2, 3), {0, 1, 2, 3}, True),
    (set(range(8)), 2, (6, 7), {0, 1, 2, 3, 4, 5}, False),
    (set(range(8)), 7, (1, 2, 3, 4, 5, 6, 7), {0}, False),
    (set(range(8)), 9, (7, 0, 1, 2, 3, 4, 5, 6, 7), set(range(8)), True),
    # a cpuset with gaps
    ({5}, 1, (5,), {5}, True),
    ({2, 5, 11}, 1, (11,), {2, 5}, False),
    ({2, 5, 11}, 2, (5, 11), {2}, False),
    ({2, 5, 11}, 3, (2, 5, 11), {2, 5, 11}, True),
    ({2, 5, 11}, 4, (11, 2, 5, 11), {2, 5, 11}, True),
]


@pytest.mark.parametrize(("available", "workers", "theirs", "others", "crowded"), PLANS)
def test_a_plan(available: set[int], workers: int, theirs: tuple[int, ...], others: set[int], crowded: bool) -> None:
    assert cpus.plan(available, workers) == Plan(theirs, frozenset(others), crowded)


NICE = os.getpriority(os.PRIO_PROCESS, 0)  # these tests may be run by nice(1)


# --- threads --------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """Where a thread runs, and its nice value."""

    cores: set[int]
    priority: int


class Seen(NamedTuple):
    workers: list[Placed]
    others: list[Placed]  # that were there before
    later: Placed  # started by one of them
    workers_again: list[Placed]  # after a second time


def placed(thread: int) -> Placed:
    return Placed(os.sched_getaffinity(thread), os.getpriority(os.PRIO_PROCESS, thread))


def settle(plan: Plan) -> Seen:
    """In this process: start workers, keep all other threads off them, and see where they all are."""
    end, pinned = threading.Event(), threading.Barrier(len(plan.workers) + 1)

    def work(core: int) -> None:
        cpus.pin_worker(core)
        pinned.wait()
        end.wait()

    others = [int(thread) for thread in os.listdir("/proc/self/task")]
    workers = [threading.Thread(target=work, args=(core,)) for core in plan.workers]
    for worker in workers:
        worker.start()
    pinned.wait()
    ids = [worker.native_id or 0 for worker in workers]
    cpus.keep_off(plan, ids)
    before = [placed(thread) for thread in ids]
    later: list[Placed] = []
    asker = threading.Thread(target=lambda: later.append(placed(0)))
    asker.start()
    asker.join()
    cpus.keep_off(plan, ids)
    seen = Seen(before, [placed(thread) for thread in others], later[0], [placed(thread) for thread in ids])
    end.set()
    for worker in workers:
        worker.join()
    return seen


def settled(plan: Plan) -> Seen:
    """In a process of its own, so that this one's threads stay where they are."""
    before = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        seen = process.submit(settle, plan).result()
    assert (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) == before
    return seen


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_keep_off_the_workers_cores() -> None:
    plan = cpus.plan(os.sched_getaffinity(0), 1)
    seen = settled(plan)
    assert seen.workers == [Placed({plan.workers[0]}, NICE)]
    assert seen.others != []
    assert all(other == Placed(set(plan.others), NICE) for other in seen.others)
    assert seen.later == Placed(set(plan.others), NICE)
    assert seen.workers_again == seen.workers
    assert not seen.workers[0].cores & seen.others[0].cores


def test_without_cores_of_their_own_they_come_last() -> None:
    whole = os.sched_getaffinity(0)
    plan = cpus.plan(whole, len(whole))
    seen = settled(plan)
    assert seen.workers == [Placed({core}, NICE) for core in sorted(whole)]
    assert all(other == Placed(whole, LOWEST_PRIORITY) for other in seen.others)
    assert seen.later == Placed(whole, LOWEST_PRIORITY)
    assert seen.workers_again == seen.workers


def replaced(plan: Plan) -> Placed:
    """Where a worker is that a thread of the lowest priority starts."""
    cpus.keep_off(plan, [])
    found: list[Placed] = []

    def work() -> None:
        cpus.pin_worker(plan.workers[0])
        found.append(placed(0))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    return found[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: raises a thread's priority")
def test_a_worker_that_is_started_later_is_no_less_a_worker() -> None:
    whole = os.sched_getaffinity(0)
    plan = cpus.plan(whole, len(whole))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        assert process.submit(replaced, plan).result() == Placed({plan.workers[0]}, NICE)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: raises a thread's priority")
def test_a_worker_of_a_nice_process_is_as_nice() -> None:
    script = """
import os
from fastlb.kernel import cpus
core = min(os.sched_getaffinity(0))
cpus.keep_off(cpus.plan({core}, 1), [])
print(os.getpriority(os.PRIO_PROCESS, 0))
cpus.pin_worker(core)
print(os.getpriority(os.PRIO_PROCESS, 0))
"""
    command = ["nice", "-n", "3", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"19\n{min(NICE + 3, 19)}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives up a capability")
def test_without_the_right_to_raise_it_the_priority_stays() -> None:
    script = """
import os
from fastlb.kernel import cpus
core = min(os.sched_getaffinity(0))
cpus.keep_off(cpus.plan({core}, 1), [])
cpus.pin_worker(core)
print(os.sched_getaffinity(0) == {core}, os.getpriority(os.PRIO_PROCESS, 0))
"""
    command = ["setpriv", "--bounding-set=-sys_nice", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True 19\n"


def test_a_thread_has_its_name() -> None:
    names: list[str] = []

    def work() -> None:
        cpus.name_thread("worker-63")
        names.append(Path("/proc/thread-self/comm").read_text())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == ["worker-63\n"]
    assert Path("/proc/thread-self/comm").read_text() not in names


def test_threads_that_end_meanwhile_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    ended = thread.native_id or 0
    assert until(lambda: not cpus.exists(ended))
    monkeypatch.setattr(cpus, "all_threads", lambda: [ended])
    cpus.keep_off(cpus.plan({0}, 1), [])


def test_whether_a_thread_exists() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    number = thread.native_id or 0
    assert cpus.exists(number)
    assert cpus.exists(threading.get_native_id())
    end.set()
    thread.join()
    assert until(lambda: not cpus.exists(number))
    assert not cpus.exists(os.getppid()), "a thread of another process"
