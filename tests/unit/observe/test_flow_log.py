"""The flow log: a line for the beginning and one for the end of each flow, under both of its tuples."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastlb.errors import FastlbError
from fastlb.observe import flow_log
from fastlb.observe.flow_log import AT_ONCE, FlowLog, check_path
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, flags, service
from tests.frames import frame, take_apart

SNAT = ["10.3.0.5", "fd00:3::5"]


def balancer_of(forward: str, version: int = 4) -> Balancer:
    """One backend, and a pipeline that keeps lines for the log."""
    backends = [{"address": BACKENDS[version][0], "port": 8080}] if forward in ("nat", "fullnat") else []
    web = service(forward, version, name="web", **({"backends": backends} if backends else {}))
    balancer = Balancer(config(web, snat=SNAT))
    balancer.pipeline.log_flows()
    return balancer


def opening(sport: int, version: int = 4, letters: str = "S") -> bytes:
    return frame(CLIENT[version], sport, VIP[version], 80, flags=flags(letters))


def write(log: FlowLog, balancer: Balancer) -> int:
    """How many lines were written, when they are in the file."""
    lines = log.write([balancer.pipeline])
    assert log.wait_until_written()
    return lines


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(path: Path, balancer: Balancer) -> list[dict[str, Any]]:
    """The lines of a log of its own."""
    log = FlowLog(str(path))
    log.know(balancer.plans)
    written = write(log, balancer)
    log.close()
    found = lines_in(path)
    assert written == len(found)
    return found


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
def test_both_lines_of_a_flow(tmp_path: Path, forward: str, version: int) -> None:
    balancer = balancer_of(forward, version)
    _, sent, _ = balancer.send(opening(40000, version), 1.0)
    assert sent is not None
    seen = take_apart(sent)
    balancer.send(opening(40000, version, "R"), 3.5)
    balancer.send(opening(40001, version), 100.0)  # the sweep meets the first
    began, *rest = logged(tmp_path / "log", balancer)
    ended = next(line for line in rest if line["event"] == "end")
    host = "[{}]" if version == 6 else "{}"
    ends = {
        "service": "web",
        "protocol": "tcp",
        "client": f"{host.format(CLIENT[version])}:40000",
        "vip": f"{host.format(VIP[version])}:80",
        "source": f"{host.format(seen.src)}:{seen.sport}",
        "backend": f"{host.format(BACKENDS[version][0])}:8080",
    }
    assert (began["event"], began["state"]) == ("start", "syn")
    assert "seconds" not in began
    assert (ended["state"], ended["seconds"]) == ("reset", 2.5)
    for line in (began, ended):
        assert {key: line[key] for key in ends} == ends
    assert [line["client"].rsplit(":", 1)[1] for line in rest if line["event"] == "start"] == ["40001"]


def test_one_way_modes_are_not_logged(tmp_path: Path) -> None:
    balancer = balancer_of("dsr")
    balancer.send(opening(40000))
    assert logged(tmp_path / "log", balancer) == []


# --- names of backends -----------------------------------------------------------------------------------------------


def test_a_backend_that_nobody_named(tmp_path: Path) -> None:
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"))
    balancer.send(opening(40000))
    write(log, balancer)
    (line,) = lines_in(tmp_path / "log")
    assert (line["service"], line["backend"]) == ("?", "?:80")


def test_names_of_another_process(tmp_path: Path) -> None:
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"))
    balancer.send(opening(40000))
    log.know_names({("shop", "[fd00::9]:81"): balancer.plans[0].members[0].id})
    write(log, balancer)
    (line,) = lines_in(tmp_path / "log")
    assert (line["service"], line["backend"]) == ("shop", "[fd00::9]:81")


def test_names_of_backends_that_left(tmp_path: Path) -> None:
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"))
    log.know(balancer.plans)
    log.know([])
    balancer.send(opening(40000))
    write(log, balancer)
    assert lines_in(tmp_path / "log")[0]["service"] == "web"


# --- the file --------------------------------------------------------------------------------------------------------


def test_lines_are_written_once_and_added_to_what_is_there(tmp_path: Path) -> None:
    path, balancer = tmp_path / "log", balancer_of("nat")
    path.write_text('{"event": "from before"}\n')
    log = FlowLog(str(path))
    for sport in (40000, 40001):
        balancer.send(opening(sport))
        assert write(log, balancer) == 1
    assert write(log, balancer) == 0
    assert [line["event"] for line in lines_in(path)] == ["from before", "start", "start"]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_nobody_else_can_write_to_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        FlowLog(str(tmp_path / "log")).close()
    finally:
        os.umask(before)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o644 & ~umask


def test_a_file_that_was_renamed_keeps_its_lines(tmp_path: Path) -> None:
    path, balancer = tmp_path / "log", balancer_of("nat")
    log = FlowLog(str(path))
    balancer.send(opening(40000))
    write(log, balancer)
    path.rename(tmp_path / "log.1")
    balancer.send(opening(40001))
    write(log, balancer)
    log.reopen()
    balancer.send(opening(40002))
    write(log, balancer)
    ports = {name: [line["client"][-5:] for line in lines_in(tmp_path / name)] for name in ("log.1", "log")}
    assert ports == {"log.1": ["40000", "40001"], "log": ["40002"]}


def test_a_new_file_that_cannot_be_opened_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    path, balancer = tmp_path / "log", balancer_of("nat")
    log = FlowLog(str(path))
    path.rename(tmp_path / "log.1")
    path.mkdir()
    with pytest.raises(FastlbError, match="is no ordinary file"):
        log.reopen()
    balancer.send(opening(40000))
    write(log, balancer)
    assert len(lines_in(tmp_path / "log.1")) == 1


def test_writing_may_be_interrupted(tmp_path: Path) -> None:
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"))
    for sport in range(1, 3 * AT_ONCE):
        balancer.send(opening(sport))
    assert sum(1 for _ in log.write_in_steps([balancer.pipeline])) == 2
    assert log.wait_until_written()
    assert len(lines_in(tmp_path / "log")) == 3 * AT_ONCE - 1


def full(descriptor: int, data: memoryview) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_that_the_file_refuses_are_counted_and_end_the_writing(tmp_path: Path) -> None:
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"), write=full)
    for sport in range(1, 6):
        balancer.send(opening(sport))
    assert write(log, balancer) == 5
    assert log.lost == 5
    balancer.send(opening(6))
    assert not log.write_all([balancer.pipeline])
    log.close()
    assert lines_in(tmp_path / "log") == []


def test_all_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits into the queue at once."""
    monkeypatch.setattr(flow_log, "MAX_PENDING", 1)
    balancer, log = balancer_of("nat"), FlowLog(str(tmp_path / "log"))
    for sport in range(1, 3 * AT_ONCE):
        balancer.send(opening(sport))
    assert log.write_all([balancer.pipeline])
    log.close()
    assert len(lines_in(tmp_path / "log")) == 3 * AT_ONCE - 1


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("no/log", r"there is no directory /.*/no$"),
        ("folder", r"/.*/folder is no ordinary file$"),
        ("pipe", r"/.*/pipe is no ordinary file$"),
    ],
)
def test_a_log_that_cannot_be_written(tmp_path: Path, place: str, problem: str) -> None:
    """Above all one that would wait for its reader, and for ever."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for attempt in (FlowLog, check_path):
        with pytest.raises(FastlbError, match=rf"^flow_log: {problem}"):
            attempt(str(tmp_path / place))


def test_a_log_in_a_place_that_does_not_take_files() -> None:
    with pytest.raises(FastlbError, match=r"^flow_log: /proc/log: "):
        FlowLog("/proc/log")
