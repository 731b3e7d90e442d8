"""cgroup.py: limits of both versions, of each group on the way up, wherever the hierarchy is mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastlb.kernel.cgroup import VERSIONS, MemoryLimit, Version, memory_limits, open_unmounted

V1_NONE = 9223372036854771712
FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}


class Host:
    """A host whose /proc and hierarchies are folders of the test."""

    def __init__(self, folder: Path, group: dict[int, str], root: str = "/") -> None:
        self.proc, self.mounts = folder / "proc", {1: folder / "v1 memory", 2: folder / "v2"}
        self.proc.mkdir()
        lines = ["3:cpuset:/elsewhere", *(f"4:cpu,memory:{group[1]}" for _ in [0] if 1 in group)]
        lines += [f"0::{group[2]}" for _ in [0] if 2 in group]
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        mounts = [
            f"31 23 0:28 / {folder} rw - tmpfs tmpfs rw,mode=755",
            f"32 31 0:29 / {folder}/cpuset rw - cgroup cgroup rw,cpuset",
            f"33 31 0:30 {root} {str(self.mounts[1]).replace(' ', chr(92) + '040')} rw,relatime - cgroup x rw,memory",
            f"34 31 0:31 {root} {self.mounts[2]} rw shared:4 - cgroup2 cgroup2 rw",
        ]
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))

    def limit(self, version: int, group: str, limit: object, used: int = 0, cached: int = 0) -> str:
        """Give a group a limit; return the path of its file. Twice ``cached`` of what is used can be given back."""
        limit_file, used_file, prefix = FILES[version]
        folder = self.mounts[version] / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / used_file).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"anon 77\n{prefix}inactive_file {cached}\n{prefix}active_file {cached}\n"
        )
        return str(folder / limit_file)


def refuse(version: Version) -> int:
    raise PermissionError


@pytest.mark.parametrize("version", [1, 2])
def test_of_the_group_and_those_above(tmp_path: Path, version: int) -> None:
    host = Host(tmp_path, {version: "/a/b/c"})
    own = host.limit(version, "a/b/c", 1000, used=300, cached=50)
    host.limit(version, "a/b", V1_NONE if version == 1 else "max")
    above = host.limit(version, "a", 500, used=100, cached=90)
    host.limit(version, "a/other", 1)
    assert memory_limits(host.proc, refuse) == [MemoryLimit(own, 1000, 200), MemoryLimit(above, 500, 0)]


@pytest.mark.parametrize(("limit", "used", "free"), [(1000, 300, 700), (1000, 1200, 0)])
def test_what_is_free(limit: int, used: int, free: int) -> None:
    assert MemoryLimit("memory.max", limit, used).free == free


@pytest.mark.parametrize(("group", "root"), [
    ("/docker/1/in", "/docker/1"), ("/in", "/"), ("/docker/1/in", "/docker/1/in"),
])  # fmt: skip
def test_a_container_sees_its_own_part(tmp_path: Path, group: str, root: str) -> None:
    host = Host(tmp_path, {2: group}, root)
    own = host.limit(2, "" if group == root else "in", 700)
    assert memory_limits(host.proc, refuse) == [MemoryLimit(own, 700, 0)]


@pytest.mark.parametrize("group", ["/../outside", "/elsewhere"])
def test_of_another_namespace_the_top_is_seen(tmp_path: Path, group: str) -> None:
    host = Host(tmp_path, {2: group}, "/" if ".." in group else "/mine")
    own = host.limit(2, "", 700)
    assert memory_limits(host.proc, refuse) == [MemoryLimit(own, 700, 0)]


def test_both_versions_at_once(tmp_path: Path) -> None:
    """Hybrid: version 2 is there without memory, or with it and version 1 without."""
    host = Host(tmp_path, {1: "/a", 2: "/b"})
    (host.mounts[2] / "b").mkdir(parents=True)
    own = host.limit(1, "a", 900)
    assert memory_limits(host.proc, refuse) == [MemoryLimit(own, 900, 0)]


@pytest.mark.parametrize("spoilt", ["memory.max", "memory.current", "memory.stat"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, spoilt: str) -> None:
    host = Host(tmp_path, {2: "/a"})
    (Path(host.limit(2, "a", 700)).parent / spoilt).unlink()
    assert memory_limits(host.proc, refuse) == []


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    host = Host(tmp_path, {})
    assert memory_limits(host.proc, refuse) == []
    (host.proc / "cgroup").unlink()
    assert memory_limits(host.proc, refuse) == []


def test_a_hierarchy_that_is_mounted_nowhere_is_asked_for(tmp_path: Path) -> None:
    """Without the right to do so it is left out."""
    host = Host(tmp_path, {1: "/a", 2: "/b"})
    for version, group in ((1, "a"), (2, "b")):
        host.limit(version, group, 100 * version)
    (host.proc / "mountinfo").write_text("")
    tops = {"cgroup": host.mounts[1], "cgroup2": host.mounts[2]}
    found = memory_limits(host.proc, lambda version: os.open(tops[version.file_system], os.O_RDONLY))
    assert [(each.file, each.limit) for each in found] == [
        ("cgroup2:/b/memory.max", 200), ("memory:/a/memory.limit_in_bytes", 100)
    ]  # fmt: skip
    assert memory_limits(host.proc, refuse) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: opens a file system that is not mounted")
def test_the_hierarchies_of_this_machine() -> None:
    """Mounted or not, a hierarchy has a list of the processes in its top."""
    opened = 0
    for version in VERSIONS:
        try:
            top = open_unmounted(version)
        except OSError:  # this kernel has the other version only
            continue
        opened += 1
        try:
            assert os.access("cgroup.procs", os.R_OK, dir_fd=top)
        finally:
            os.close(top)
    assert opened
