"""part.py: every part of a balancer is one, and knows neither the balancer nor another part."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlb.daemon import balancer as balancers
from fastlb.daemon import signals
from fastlb.daemon.balancer import Balancer
from fastlb.daemon.lifecycle import Lifecycle
from fastlb.daemon.part import Part
from fastlb.daemon.parts import Parts
from fastlb.daemon.world import Marks
from fastlb.kernel import cpus

METHODS = [name for name, _ in inspect.getmembers(Part, inspect.isfunction) if not name.startswith("_")]
NAMES = ["host", "flows", "publisher", "path_mtus", "packet_path", "vips", "backends"]
CORES = cpus.plan([0, 1], 1)


def made() -> Parts:
    return Parts.make(Lifecycle(), Marks(), CORES, lambda function: function(), lambda: None)


def reached(of: object, seen: set[int]) -> Iterator[object]:
    """Yield what an object holds, by attributes and containers, and what its callables are bound to."""
    if id(of) in seen or isinstance(of, (str, bytes, int, float, type(None))):
        return
    seen.add(id(of))
    yield of
    held = list(vars(of).values()) if hasattr(of, "__dict__") and not inspect.isclass(of) else []
    if isinstance(of, dict):
        held += of.values()
    elif isinstance(of, (list, tuple, set, frozenset)):
        held += of
    if inspect.ismethod(of):
        held.append(of.__self__)
    for each in held:
        if not inspect.ismodule(each):
            yield from reached(each, seen)


def test_the_protocol() -> None:
    assert METHODS == ["apply", "open", "tick"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_part_fulfils_it(name: str, method: str) -> None:
    """Under the same names of arguments, with the same types."""
    wanted, found = getattr(Part, method), getattr(type(getattr(made(), name)), method)
    assert inspect.signature(found) == inspect.signature(wanted)
    assert inspect.getdoc(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_part_has_another_one(name: str) -> None:
    parts = made()
    own = getattr(parts, name)
    others = [each for each in parts.in_order() if each is not own]
    held = list(reached(own, set()))
    assert held[0] is own
    assert not [each for each in held if any(each is other for other in others)]
    assert not [each for each in held if isinstance(each, Parts)]


@pytest.mark.parametrize("name", NAMES)
def test_no_part_has_the_balancer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands out functions only: that wake it, that hand over to its loop, and that give up."""
    file = tmp_path / "fastlb.yaml"
    file.write_text("interfaces: [eth0]\nservices: []\n")
    owner = Balancer(str(file))
    kept: list[Parts] = []

    class Stopped(Exception):
        """The balancer has made its parts."""

    def make(*args: Any) -> Parts:
        kept.append(Parts.make(*args))
        raise Stopped

    for check in ("check_privileges", "check_memory", "raise_file_limit"):
        monkeypatch.setattr(balancers, check, lambda *_: None)
    for each in ("hold_reload", "on_stop", "ignore"):
        monkeypatch.setattr(signals, each, lambda *_: None)
    monkeypatch.setattr(balancers, "Parts", type("Making", (), {"make": staticmethod(make)}))
    with pytest.raises(Stopped):
        owner.run()
    own = getattr(kept[0], name)
    attributes = [value for value in vars(own).values() if not callable(value)]
    assert not [each for each in reached(attributes, set()) if isinstance(each, Balancer)]
