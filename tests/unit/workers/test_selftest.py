"""selftest.py: its verdict as a table, this machine's, and those of machines that refuse the test."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastlb.workers import selftest
from fastlb.workers.selftest import BLOCK_SIZE, BLOCKS, FRAMES, MAX_FRAME, make_frames, open_blocks_fault, verify
from tests.netns.balancer import until

ROOT = Path(__file__).parents[3]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces")
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="open blocks are read on x86-64 only")

A, B, C = b"first", b"second", b"third"
NOT_EARLY = "no frame could be read before its block was closed"

# --- the verdict ----------------------------------------------------------------------------------------------

VERDICTS = {
    "every frame early": ([(A, True), (B, True), (C, True)], None),
    "one frame early": ([(A, False), (B, False), (C, True)], None),
    "none early": ([(A, False), (B, False), (C, False)], NOT_EARLY),
    "the first is another": ([(B, True), (B, True), (C, True)], "frame 0 of 3 was read wrong"),
    "one is cut short": ([(A, True), (B[:-1], True), (C, True)], "frame 1 of 3 was read wrong"),
    "one has more": ([(A, True), (B, True), (C + b"\0", True)], "frame 2 of 3 was read wrong"),
    "one is empty": ([(A, True), (b"", True), (C, True)], "frame 1 of 3 was read wrong"),
    "two changed places": ([(A, True), (C, True), (B, True)], "frame 1 of 3 was read wrong"),
    "one twice": ([(A, True), (A, False), (B, True), (C, True)], "frame 1 of 3 was read wrong"),
    "one missing": ([(A, True), (C, True)], "frame 1 of 3 was read wrong"),
    "the last missing": ([(A, True), (B, True)], "2 frames of 3 were read"),
    "the last twice": ([(A, True), (B, True), (C, True), (C, False)], "4 frames of 3 were read"),
    "nothing": ([], "0 frames of 3 were read"),
}


@pytest.mark.parametrize(("taken", "fault"), VERDICTS.values(), ids=VERDICTS.keys())
def test_the_verdict(taken: list[tuple[bytes, bool]], fault: str | None) -> None:
    assert verify([A, B, C], taken) == fault


def test_what_is_sent() -> None:
    """Frames that can be told apart, of many lengths, fewer in a round than two blocks hold."""
    frames = make_frames(selftest.ROUNDS * FRAMES)
    assert frames == make_frames(len(frames))
    assert len(set(frames)) == len(frames)
    lengths = [len(frame) for frame in frames]
    assert 60 <= min(lengths) < 100
    assert MAX_FRAME - 40 < max(lengths) <= MAX_FRAME
    assert {length % 8 for length in lengths} == set(range(8))
    slots = [(158 + length + 7) // 8 * 8 for length in lengths]  # with the headers and the headroom in front
    rounds = [sum(slots[at : at + FRAMES]) for at in range(0, len(slots), FRAMES)]
    unused = BLOCKS * (48 + max(slots))
    assert max(rounds) < BLOCKS * BLOCK_SIZE - unused
    assert sum(slots) > 4 * BLOCKS * BLOCK_SIZE, "through every block several times"


# --- this machine ---------------------------------------------------------------------------------------------


@needs_root
@x86_only
def test_open_blocks_work_here() -> None:
    """On a machine that is busy just now the frames may be late, which is a fault, too; then it is tried again."""
    assert until(lambda: open_blocks_fault() is None)


@needs_root
@x86_only
def test_it_leaves_nothing_behind() -> None:
    """Neither descriptors nor threads, and this thread stays in its namespace."""
    open_blocks_fault()

    def seen() -> tuple[int, int, str]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), os.readlink("/proc/thread-self/ns/net")

    before = seen()
    for _ in range(3):
        open_blocks_fault()
    assert seen() == before


# --- machines that refuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["aarch64", "i686", ""])
def test_another_processor(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """It is not even tried: there, what works once proves nothing."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(selftest, "read_frames", lambda frames: pytest.fail("it was tried"))
    expected = f"it needs a processor that keeps the order of stores (x86-64), not {machine}"
    assert open_blocks_fault() == expected


@needs_root
@x86_only
@pytest.mark.parametrize(
    ("capability", "fault"),
    [
        ("sys_admin", "Operation not permitted (a network namespace needs CAP_SYS_ADMIN)"),
        ("net_admin", "Operation not permitted"),
        ("net_raw", "Operation not permitted"),
    ],
)
def test_without_a_privilege(capability: str, fault: str) -> None:
    script = "from fastlb.workers import selftest; print(selftest.open_blocks_fault())"
    (said,) = said_by(script, "setpriv", f"--bounding-set=-{capability}")
    assert said.startswith("it cannot be tried here: ")
    assert said.endswith(fault)


@needs_root
@x86_only
def test_without_descriptors_to_spare() -> None:
    """Whatever the first thing is that cannot be opened, those before it are closed again."""
    script = """
import itertools, os, resource
from fastlb.workers import selftest
selftest.open_blocks_fault()
before = os.listdir("/proc/self/fd")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for room in itertools.count():
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + room, hard))
    fault = selftest.open_blocks_fault()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(os.listdir("/proc/self/fd") == before, fault)
    if fault is None:
        break
"""
    *refused, last = said_by(script)
    assert len(refused) >= 3, "a program, a ring and a sender"
    assert {line.startswith("True it cannot be tried here: ") for line in refused} == {True}
    assert last == "True None"


def said_by(script: str, *before: str) -> list[str]:
    """The lines that a Python process prints; ``before``: a command that runs it."""
    command = [*before, sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.splitlines()
