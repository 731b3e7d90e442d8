"""What commands need of a balancer: no more is asked of it than they use."""

from __future__ import annotations

import ast
import inspect

from fastlb.control import balancer, commands


def members(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


def used() -> set[str]:
    """The attributes of ``balancer`` and ``self._balancer`` in the commands' source."""
    tree = ast.parse(inspect.getsource(commands))
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {each.attr for each in attributes if ast.unparse(each.value) in ("balancer", "self._balancer")}


def test_commands_use_all_that_they_ask_for() -> None:
    assert members(balancer.Balancer) == used()
