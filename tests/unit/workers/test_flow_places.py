"""flow_places.py: where files may be, who has them, and what is left there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlb.config import Config
from fastlb.errors import FlowFileError, FlowFileUsedError
from fastlb.model.files import REJECTED
from fastlb.workers import flow_places
from fastlb.workers.flow_places import (
    IDENTITY_AT,
    LeftFile,
    check_path,
    held_bytes,
    is_in_memory,
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
