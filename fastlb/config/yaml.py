"""Reads YAML into plain data, remembers where each key stands, and notes what YAML itself lets pass.

Scalars are read as YAML 1.2 reads them where YAML 1.1 surprises: yes, no, on and off are text, and so are
dates. Numbers on which the two disagree (0123, 1:30) are refused. Anchors and aliases work, merge keys do
not.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fastlb.errors import ConfigError, Problem

Loc = tuple[int | str, ...]  # a key path: ("services", 0, "port")

# libyaml's parser where PyYAML has it: six times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Levels of nesting. The schema has 5; PyYAML's composers recurse, the one over libyaml until it crashes.
DEEPEST = 32

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,40}|0x[0-9a-fA-F_]{1,40})")
NUMBER = re.compile(r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?")


class Origin:
    """Where data came from: here a dict, which has no lines and no faults of its own."""

    def __init__(self) -> None:
        self.faults: dict[Loc, str] = {}

    def line(self, loc: Loc) -> int:
        """The line to report for a fault at ``loc``, from 1; 0 when there are no lines."""
        return 0

    def where(self, line: int) -> str:
        """The line for people: "fastlb.yaml:12", or "" when there is none."""
        return ""


class Document(Origin):
    """One YAML file: ``data`` as dicts, lists and scalars, ``faults`` by key path."""

    def __init__(self, name: str, root: yaml.Node):
        super().__init__()
        self._name = name
        self._root = root
        self._converted: dict[int, object] = {}  # by node: an alias is converted once
        self.data = self._convert(root, ())

    @classmethod
    def read(cls, path: str) -> Document:
        """Raises ConfigError when the file cannot be read, is not YAML, or is empty."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise _unusable(path, f"it cannot be read: {error.strerror}") from None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise _unusable(f"{path}:{line}", "it is not UTF-8 text; save it as UTF-8") from None
        root = _compose(path, text)
        if root is None:
            raise _unusable(path, "it is empty; it must have keys such as interfaces and services")
        return cls(path, root)

    def where(self, line: int) -> str:
        return f"{self._name}:{line}"

    def line(self, loc: Loc) -> int:
        """The line of the key or list item at ``loc``, or of the nearest one around it."""
        node = self._root
        line: int = node.start_mark.line
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in reversed(node.value) if pair[0].value == part), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                line = node.start_mark.line
        return line + 1

    def _convert(self, node: yaml.Node, loc: Loc) -> object:
        if id(node) in self._converted:
            return self._converted[id(node)]
        if isinstance(node, yaml.SequenceNode):
            items: list[object] = []
            self._converted[id(node)] = items  # before its items: an alias may stand inside what it names
            items += [self._convert(item, (*loc, number)) for number, item in enumerate(node.value)]
            return items
        if isinstance(node, yaml.MappingNode):
            return self._convert_mapping(node, loc)
        return self._convert_scalar(node, loc)

    def _convert_mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        mapping: dict[str, object] = {}
        self._converted[id(node)] = mapping
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.faults[loc] = (
                    f"line {key.start_mark.line + 1} has a collection for a key; a key must be text"
                )
                continue
            here = (*loc, key.value)
            mapping[key.value] = self._convert(value, here)
            if key.value in first:
                self.faults[here] = f"it is given twice, first on line {first[key.value]}; keep one"
            first.setdefault(key.value, key.start_mark.line + 1)
        return mapping

    def _convert_scalar(self, node: yaml.Node, loc: Loc) -> object:
        text: str = node.value
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" if INTEGER.fullmatch(text):
                return int(text.replace("_", ""), 16 if "x" in text else 10)
            case "float" if NUMBER.fullmatch(text):
                return float(text.replace("_", ""))
            case "int" | "float":
                self.faults[loc] = _number_trap(text)
                return None
            case _:
                return text


def _number_trap(text: str) -> str:
    if ":" in text:
        return f"YAML may read {text} as a number in base 60; write it in quotes, or as a plain number"
    if text.lstrip("+-").startswith("0"):
        return f"YAML may read {text} as a number in base 8 or 2; write a plain number, or quotes for text"
    return f"{text} is not a number that can be used here; write a plain number, or quotes for text"


def _compose(path: str, text: str) -> yaml.Node | None:
    """The one document in the text; None when it is empty. ConfigError when it is not YAML."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _nested(path)
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" in str(error.problem):  # libyaml since 2026 has a limit of its own, and reads ahead
            raise _nested(path) from None
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise _unusable(where, f"it is not valid YAML: {_syntax(error)}") from None
    except yaml.YAMLError as error:  # a ReaderError: a character that YAML does not allow
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise _unusable(f"{path}:{line}", "there is a control character here; remove it") from None
    return root


def _nested(path: str) -> ConfigError:
    return _unusable(path, f"it is nested deeper than {DEEPEST} levels; the configuration needs 5")


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words on one line, with what helps."""
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "cannot start any token" in words or "tab character" in words:
        return f"{words}; indent with spaces, and put text that begins with %, @, ` or a tab in quotes"
    if "mapping values are not allowed" in words:
        return f"{words}; align the keys of a mapping, and put text that contains ': ' in quotes"
    if "single document" in words:
        return f"{words}; remove the second '---' and what follows"
    return f"{words}; check the indentation, brackets and quotes"


def _unusable(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(where, "", message)])
