"""Files that a configuration names, or that follow from it, and that must not be one and the same.

A flow log that is the control socket, the flow table's file or the configuration itself would destroy it, or be
destroyed. Two names may lead to one file by symbolic links, by "..", by hard links, or by a directory that is mounted
twice; so the file system is asked, as it is now.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

from fastlb.config.refusal import show
from fastlb.config.yaml import Loc
from fastlb.model.files import flow_file_places, set_aside

MAX_SHOWN = 4096  # characters of a path: all of them, so that it can be found


class _File(NamedTuple):
    loc: Loc  # the key that it follows from
    path: str
    what: str


def clashing_files(
    control: str, flow_file: str, flow_log: str | None, written_in: str | None
) -> Iterator[tuple[Loc, str]]:
    """Yield the key paths of files that are another one of the same fastlb, each once, with what is wrong.

    ``written_in``: the file that the configuration is in; None: in none.
    """
    told = set()
    for first, second in combinations(_files(control, flow_file, flow_log, written_in), 2):
        if first.loc != second.loc and second.loc not in told and (fault := _fault(first, second)):
            told.add(second.loc)
            yield second.loc, f"{fault}; give each a path of its own"


def _files(control: str, flow_file: str, flow_log: str | None, written_in: str | None) -> Iterator[_File]:
    """Yield all files, those first that a message rather names as the other one."""
    if written_in is not None:
        yield _File((), written_in, "this configuration")
    yield _File(("control",), control, "control")
    place_is = "a place for the flow table (flow_file: auto)" if flow_file == "auto" else "flow_file"
    for place in flow_file_places(flow_file, control):
        yield _File(("flow_file",), str(place), place_is)
        yield _File(("flow_file",), str(set_aside(place)), "where a flow file is set aside that cannot be used")
    if flow_log is not None:
        yield _File(("flow_log",), flow_log, "flow_log")


def _fault(first: _File, second: _File) -> str | None:
    """Return in words how two files are one, or lie one within the other; None when they do not."""
    if identities(first.path) & identities(second.path):
        same = os.path.normpath(first.path) == os.path.normpath(second.path)
        how = "it is" if same else f"by a link it is the same file as {_shown(first)},"
        return f"found {_shown(second)}; {how} {first.what}"
    paths = os.path.realpath(first.path), os.path.realpath(second.path)
    if os.path.commonpath(paths) in paths:
        return f"found {_shown(second)}; of it and {_shown(first)}, {first.what}, one lies within the other"
    return None


def _shown(file: _File) -> str:
    return show(file.path, MAX_SHOWN)


def identities(path: str) -> set[object]:
    """Return what tells the file at a path from others: two paths that have one of these in common are one file."""
    real = os.path.realpath(path)
    found: set[object] = {real}
    for known, rest in ((real, ""), os.path.split(real)):
        with suppress(OSError):
            status = os.stat(known)
            found.add((status.st_dev, status.st_ino, rest))
    return found
