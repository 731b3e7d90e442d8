"""Paths of a configuration that lead to one file: whichever two they are, and by whatever way."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest

from fastlb.config import Config, load_config
from fastlb.config.files import clashing_files, identities
from fastlb.errors import ConfigError
from tests.unit.config.written import messages_of, problems_in

KEYS = ("control", "flow_file", "flow_log")
PAIRS = list(combinations(KEYS, 2))


def paths(folder: Path, **others: Path) -> dict[str, str]:
    """A configuration with a path of its own for each key, but these."""
    return {key: str(others.get(key, folder / key)) for key in KEYS}


def clashes(folder: Path, **others: Path) -> list[str]:
    """The keys that are told of, for files on a disk."""
    given = paths(folder, **others)
    found = clashing_files(given["control"], given["flow_file"], given["flow_log"], str(folder / "fastlb.yaml"))
    return [".".join(map(str, loc)) for loc, _ in found]


def test_paths_of_their_own_are_right(tmp_path: Path) -> None:
    assert Config.from_dict(paths(tmp_path)).flow_log == str(tmp_path / "flow_log")
    (tmp_path / "fastlb.yaml").write_text(f"flow_log: {tmp_path}/flow.log\n")
    assert load_config(tmp_path / "fastlb.yaml").control
    for key in KEYS:
        (tmp_path / key).touch()
    assert clashes(tmp_path) == []


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_two_keys(tmp_path: Path, first: str, second: str) -> None:
    both = tmp_path / "both"
    ((path, message),) = messages_of(paths(tmp_path, **{first: both, second: both}))
    assert path == second
    assert message == f'found "{both}"; it is {first}; give each a path of its own'


@pytest.mark.parametrize("key", KEYS)
def test_the_configuration_itself(tmp_path: Path, key: str) -> None:
    file = tmp_path / "fastlb.yaml"
    assert problems_in(f"icmp_echo: true\n{key}: {file}\n", tmp_path) == [
        (2, key, f'found "{file}"; it is this configuration; give each a path of its own')
    ]


def test_all_three_are_one(tmp_path: Path) -> None:
    both = tmp_path / "both"
    assert [path for path, _ in messages_of(dict.fromkeys(KEYS, str(both)))] == ["flow_file", "flow_log"]


@pytest.mark.parametrize("behind", [".flows", ".flows.rejected"])
def test_files_that_follow_from_control(tmp_path: Path, behind: str) -> None:
    log = f"{tmp_path}/lb.sock{behind}"
    ((path, message),) = messages_of({"control": f"{tmp_path}/lb.sock", "flow_log": log})
    assert path == "flow_log"
    assert message.startswith(f'found "{log}"; it is ')


def test_where_a_flow_file_is_set_aside(tmp_path: Path) -> None:
    assert clashes(tmp_path, flow_file=tmp_path / "flows", flow_log=tmp_path / "flows.rejected") == ["flow_log"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_ways_to_one_file(tmp_path: Path, first: str, second: str, there: bool) -> None:
    """By "..", by links of the file and of a directory, whether or not the file is there by now."""
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    file = tmp_path / "real" / "file"
    if there:
        file.touch()
    ways = ("real/../real/file", "folder/file", "folder/../real/file", "./real//file", "link")
    for way in ways:
        assert clashes(tmp_path, **{first: file, second: Path(f"{tmp_path}/{way}")}) == [second], way
    both = {first: tmp_path / "folder/file", second: tmp_path / "link"}
    assert clashes(tmp_path, **both) == [second]


def test_two_names_of_one_inode(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    given = paths(tmp_path, flow_file=tmp_path / "one", flow_log=tmp_path / "two")
    ((path, message),) = messages_of(given)
    assert path == "flow_log"
    assert message.startswith(f'found "{tmp_path}/two"; by a link it is the same file as "{tmp_path}/one", flow_file;')


def test_one_within_the_other(tmp_path: Path) -> None:
    ((path, message),) = messages_of(paths(tmp_path, flow_log=tmp_path / "control" / "log"))
    assert (path, "one lies within the other" in message) == ("flow_log", True)
    assert clashes(tmp_path, flow_log=tmp_path / "control.log") == []


def test_links_that_lead_nowhere_or_round_and_round(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert identities(str(tmp_path / "round")) & identities(str(tmp_path / "round"))
    assert clashes(tmp_path, flow_log=tmp_path / "round") == []
    assert clashes(tmp_path, flow_log=tmp_path / ("long" * 2000)) == []


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        Config.from_dict({"flow_log": "/tmp/\ud800"})
