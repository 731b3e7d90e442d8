"""flow_places.py: where files may be, who has them, and what is left there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from fastlb.config import Config
from fastlb.errors import FlowFileError, FlowFileUsedError
from fastlb.model.files import REJECTED
from fastlb.workers import flow_places
from fastlb.workers.flow_places import (
    IDENTITY_AT,
    LeftFile,
    bring_here,
    check_path,
    held_bytes,
    is_in_memory,
    left_elsewhere,
    left_files,
    lock,
    network_namespace,
    places,
    remove_files,
)
from fastlb.workers.flow_records import seal


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder that is in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def config(flow_file: str, control: str = "/run/fastlb.sock") -> Config:
    return Config.from_dict({"interfaces": ["eth0"], "services": [], "flow_file": flow_file, "control": control})


def test_places() -> None:
    digest = hashlib.sha256(b"/run/fastlb.sock").hexdigest()[:12]
    assert [places(config(which)) for which in ("none", "/dev/shm/x", "auto")] == [
        [],
        [Path("/dev/shm/x")],
        [Path("/run/fastlb.sock.flows"), Path(f"/dev/shm/fastlb-fastlb-{digest}.flows")],
    ]


def test_two_control_sockets_of_one_name_have_two_places() -> None:
    first, second = (places(config("auto", f"/run/{folder}/lb.sock"))[1] for folder in "ab")
    assert first != second


def test_what_is_in_memory(memory: Path) -> None:
    assert is_in_memory(memory)
    check_path(memory / "flows")
    assert not is_in_memory(Path("/proc"))
    with pytest.raises(FlowFileError, match="/proc is not on tmpfs or ramfs; a flow file must be in memory"):
        check_path(Path("/proc/flows"))
    with pytest.raises(FlowFileError, match="none: No such file or directory"):
        is_in_memory(memory / "none")


def test_memory_that_a_file_takes_already(memory: Path) -> None:
    here = config(str(memory / "flows"))
    assert held_bytes(here) == 0
    (memory / "flows").write_bytes(bytes(1 << 16))
    assert held_bytes(here) == 1 << 16


def test_a_file_has_one_owner(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_places, "LOCK_PATIENCE", 0.0)
    path = memory / "flows"
    path.touch()
    with path.open() as first, path.open() as second:
        lock(first.fileno(), path)
        with pytest.raises(FlowFileUsedError, match=f"another fastlb uses {path}"):
            lock(second.fileno(), path)
        fcntl.flock(first, fcntl.LOCK_UN)
        lock(second.fileno(), path)


@pytest.fixture
def moved(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was left at "before" by a balancer on eth0 and eth1; nothing else of this machine is seen."""
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", memory)
    monkeypatch.setattr(flow_places, "DEFAULT_CONTROL", str(memory / "default" / "fastlb.sock"))
    return leave(memory / "before", interfaces=["eth0", "eth1"])


def leave(path: Path, **identity: object) -> Path:
    path.write_bytes(bytes(IDENTITY_AT) + seal(0, {"namespace": network_namespace(), **identity}))
    return path


def test_a_file_follows_its_balancer(memory: Path, moved: Path) -> None:
    """To where the edited configuration looks, once; its memory is no new need."""
    here = config(str(memory / "after"))
    assert left_elsewhere(here) == moved
    assert held_bytes(here) >= IDENTITY_AT
    with structlog.testing.capture_logs() as logs:
        bring_here(here)
        bring_here(here)
    assert [line["was"] for line in logs] == [str(moved)]
    assert os.listdir(memory) == ["after"]


def test_it_is_found_beside_the_default_control_socket(memory: Path, moved: Path) -> None:
    (memory / "default").mkdir()
    other = leave(memory / "default" / "fastlb.sock.flows", interfaces=["eth0"])
    os.utime(other, (2 << 30, 2 << 30))  # the newer one
    assert left_elsewhere(config("auto", "/nowhere/fastlb.sock")) == other


def test_it_is_not_taken_from_another_file_system(memory: Path, moved: Path, tmp_path: Path) -> None:
    if tmp_path.stat().st_dev == memory.stat().st_dev:
        pytest.skip("needs a temporary directory that is not in /dev/shm")
    with structlog.testing.capture_logs() as logs:
        bring_here(config(str(tmp_path / "after")))
    assert [line["file"] for line in logs] == [str(moved)]
    assert moved.exists()


@pytest.mark.parametrize("identity", [
    {"interfaces": ["eth1"]}, {}, {"interfaces": ["eth0"], "namespace": 1},
])  # fmt: skip
def test_files_of_others_stay(memory: Path, moved: Path, identity: dict[str, object]) -> None:
    """Of other interfaces, of a fastlb that did not say, of another network namespace."""
    leave(moved, **identity)
    assert left_elsewhere(config(str(memory / "after"))) is None


def test_a_file_in_use_stays(memory: Path, moved: Path) -> None:
    with moved.open() as file:
        lock(file.fileno(), moved)
        assert left_elsewhere(config(str(memory / "after"))) is None


@pytest.mark.parametrize("own", ["after", f"before{REJECTED}", "none"])
def test_nothing_is_looked_for(memory: Path, moved: Path, own: str) -> None:
    """While there is a file of one's own; what was set aside is no file; and with none there is nothing to find."""
    if own == "after":
        (memory / own).touch()
    else:
        moved.rename(memory / f"before{REJECTED}")
    assert left_elsewhere(config("none" if own == "none" else str(memory / "after"))) is None


def test_what_is_left(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the configuration: whatever is there; of others in /dev/shm: those of this network namespace."""
    monkeypatch.setattr(flow_places, "SHARED_MEMORY", memory)
    for name, namespace in (("own", None), ("fastlb-a.flows", network_namespace()), ("fastlb-b.flows", 1)):
        record = b"" if namespace is None else bytes(IDENTITY_AT) + seal(0, {"namespace": namespace})
        (memory / name).write_bytes(record)
    (memory / f"own{REJECTED}").touch()
    (memory / "fastlb-link.flows").symlink_to(memory / "fastlb-a.flows")
    here = config(str(memory / "own"))
    with (memory / "own").open() as own:
        lock(own.fileno(), memory / "own")
        found = left_files(here)
        assert {Path(each.path).name: each.state for each in found} == {
            "own": "in use", f"own{REJECTED}": "set aside", "fastlb-a.flows": "left over",
        }  # fmt: skip
        remove_files(found)
    assert sorted(os.listdir(memory)) == ["fastlb-b.flows", "fastlb-link.flows", "own"]


def test_a_file_that_has_gone_is_removed_already(memory: Path) -> None:
    remove_files([LeftFile(str(memory / "gone"), 0, "left over")])
