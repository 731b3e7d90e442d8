"""From YAML to plain data: one pass over the events of the parser, which notes what YAML itself lets pass.

Scalars are read as YAML 1.2 reads them where YAML 1.1 surprises: yes, no, on and off are text, and so are
dates. Numbers on which the two disagree (0123, 1:30) are refused. Anchors and aliases work, merge keys do
not. Where a key stands is found out only for a message: PyYAML's nodes take more time and memory than the data.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import yaml

from fastlb.errors import ConfigError, Problem

Loc = tuple[int | str, ...]  # a key path: ("services", 0, "port")

# libyaml's parser where PyYAML has it: six times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Levels of nesting. The schema has 5; a reader calls itself for each, and so do PyYAML's, until they crash.
MAX_DEPTH = 32

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,40}|0x[0-9a-fA-F_]{1,40})")
NUMBER = re.compile(r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?")
_TAGS = "tag:yaml.org,2002:"


class Origin:
    """Where data came from: here a dict, which has no lines and no faults of its own."""

    def __init__(self) -> None:
        self.faults: dict[Loc, str] = {}

    def line(self, loc: Loc) -> int:
        """Return the line to report for a fault at ``loc``, from 1; 0 when there are no lines."""
        return 0

    def where(self, line: int) -> str:
        """Return the line for people: "fastlb.yaml:12", or "" when there is none."""
        return ""


class Document(Origin):
    """One YAML file: ``data`` as dicts, lists and scalars, ``faults`` by key path."""

    def __init__(self, name: str, text: str):
        super().__init__()
        self._name = name
        self._text = text
        reader = _Reader(name, text)
        self.data = reader.read()
        self.faults = reader.faults

    @classmethod
    def read(cls, path: str) -> Document:
        """Return the document of a file; raises ConfigError when it cannot be read, is not YAML, or is empty."""
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
        return cls(path, text)

    def where(self, line: int) -> str:
        return f"{self._name}:{line}"

    def line(self, loc: Loc) -> int:
        """Return the line of the key or list item at ``loc``, or of the nearest one around it."""
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

    @cached_property
    def _root(self) -> Any:
        return yaml.compose(self._text, Loader=_Loader)


class _Reader:
    """Makes data of the events of one document. ``faults``: what YAML lets pass and the data must not have."""

    def __init__(self, name: str, text: str) -> None:
        self.faults: dict[Loc, str] = {}
        self._name = name
        self._text = text
        self._path: list[int | str] = []
        self._anchors: dict[str, object] = {}
        self._plain: dict[str, object] = {}  # what plain scalars mean: most stand in a file many times
        self._depth = 0

    def read(self) -> object:
        """Return the data; raises ConfigError when the text is not YAML, or is empty."""
        try:
            self._loader = _Loader(self._text)
            self._next = self._loader.get_event
            try:
                return self._document()
            finally:
                self._loader.dispose()
        except yaml.MarkedYAMLError as error:
            if "nesting depth" in str(error.problem):  # libyaml since 2026 has a limit of its own, and reads ahead
                raise self._too_deep() from None
            in_quotes = "quoted scalar" in str(error.context)  # the line of the quote that is not closed
            mark = (error.context_mark if in_quotes else None) or error.problem_mark or error.context_mark
            where = f"{self._name}:{mark.line + 1}" if mark else self._name
            raise _unusable(where, f"it is not valid YAML: {_syntax(error)}") from None
        except yaml.YAMLError as error:  # a ReaderError: a character that YAML does not allow
            line = self._text.count("\n", 0, getattr(error, "position", 0)) + 1
            raise _unusable(f"{self._name}:{line}", "there is a control character here; remove it") from None

    def _document(self) -> object:
        self._next()  # the stream starts
        if isinstance(self._next(), yaml.StreamEndEvent):
            raise _unusable(self._name, "it is empty; it must have keys such as interfaces and services")
        data = self._value(self._next())
        self._next()  # the document ends
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            raise yaml.composer.ComposerError(
                "expected a single document in the stream", None, "but found another document", event.start_mark
            )
        return data

    def _value(self, event: Any) -> object:
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._remember(event, event)
            return self._scalar(event)
        if kind is yaml.AliasEvent:
            known = self._anchored(event)
            return self._scalar(known) if isinstance(known, yaml.ScalarEvent) else known
        return self._collection(event)

    def _collection(self, event: Any) -> object:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._too_deep()
        if type(event) is yaml.MappingStartEvent:
            mapping: dict[str, object] = {}
            self._remember(event, mapping)  # before its items: an alias may stand inside what it names
            self._fill_mapping(mapping)
        else:
            items: list[object] = []
            self._remember(event, items)
            self._fill_list(items)
        self._depth -= 1
        return items if type(event) is yaml.SequenceStartEvent else mapping

    def _fill_list(self, items: list[object]) -> None:
        path = self._path
        path.append(0)
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            path[-1] = len(items)
            items.append(self._value(event))
        path.pop()

    def _fill_mapping(self, mapping: dict[str, object]) -> None:
        path = self._path
        path.append("")
        keys: dict[str, Any] = {}  # the event of each
        while type(event := self._next()) is not yaml.MappingEndEvent:
            key = self._key(event)
            if key is None:
                self._skip(event)
                continue
            path[-1] = key
            mapping[key] = self._value(self._next())
            if keys.setdefault(key, event) is not event:
                self.faults[tuple(path)] = self._given_twice(keys[key].start_mark.line + 1)
        path.pop()

    def _given_twice(self, line: int) -> str:
        in_list = len(self._path) > 1 and isinstance(self._path[-2], int)
        item = ', or begin another item of the list with "- "' if in_list else ""
        return f"it is given twice, first on line {line}; keep one{item}"

    def _key(self, event: Any) -> str | None:
        """Return the text of a key; None when it is a collection."""
        known = event
        if type(event) is yaml.AliasEvent:
            known = self._anchored(event)
        elif type(event) is yaml.ScalarEvent:
            self._remember(event, event)
        return known.value if isinstance(known, yaml.ScalarEvent) else None

    def _skip(self, key: Any) -> None:
        """Read a key that is a collection, and its value, for the anchors alone."""
        self.faults[tuple(self._path[:-1])] = (
            f"line {key.start_mark.line + 1} has a collection for a key; a key must be text"
        )
        noted = dict(self.faults)
        self._value(key)
        self._value(self._next())
        self.faults = noted

    def _remember(self, event: Any, what: object) -> None:
        """Keep what an anchor names: the event of a scalar, or a collection."""
        if event.anchor is None:
            return
        if event.anchor in self._anchors:
            raise yaml.composer.ComposerError(None, None, "found duplicate anchor", event.start_mark)
        self._anchors[event.anchor] = what

    def _anchored(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            raise yaml.composer.ComposerError(None, None, "found undefined alias", event.start_mark)
        return self._anchors[event.anchor]

    def _scalar(self, event: Any) -> object:
        text: str = event.value
        if event.tag is None and not event.implicit[0]:
            return text  # in quotes, or a block of text
        known = event.tag is None and text in self._plain
        return self._plain[text] if known else self._resolved(event)

    def _resolved(self, event: Any) -> object:
        """Return what a scalar means that is not in quotes, and remember it."""
        tag, text = event.tag, event.value
        if tag is None or tag == "!":
            tag = self._loader.resolve(yaml.ScalarNode, text, event.implicit)
        try:
            value = _meaning(tag.removeprefix(_TAGS), text)
        except ValueError as trap:
            self.faults[tuple(self._path)] = str(trap)
            return None
        if event.tag is None:
            self._plain[text] = value
        return value

    def _too_deep(self) -> ConfigError:
        return _unusable(self._name, f"it is nested deeper than {MAX_DEPTH} levels; the configuration needs 5")


def _meaning(kind: str, text: str) -> object:
    """Return the value of a scalar of this kind; ValueError, with what would be right, for a trap."""
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind == "int" and INTEGER.fullmatch(text):
        return int(text.replace("_", ""), 16 if "x" in text else 10)
    if kind == "float" and NUMBER.fullmatch(text):
        return float(text.replace("_", ""))
    if kind in ("int", "float"):
        raise ValueError(_number_trap(text))
    return text


def _number_trap(text: str) -> str:
    if ":" in text:
        return f"YAML may read {text} as a number in base 60; write it in quotes, or as a plain number"
    if text.lstrip("+-").startswith("0"):
        return f"YAML may read {text} as a number in base 8 or 2; write a plain number, or quotes for text"
    return f"{text} is not a number that can be used here; write a plain number, or quotes for text"


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words on one line, with what helps."""
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "cannot start any token" in words or "tab character" in words:
        return f"{words}; indent with spaces, and put text that begins with %, @, ` or a tab in quotes"
    if "quoted scalar" in words:
        return f"{words}; close the quote that begins here"
    if "could not find expected ':'" in words:
        return f"{words}; put a space behind the ':' of each key, and close each quote"
    if any(part in words for part in ("expected '-' indicator", "expected key", "expected <block end>")):
        return f"{words}; begin each item of a list with '- ', and align the items and keys of one level"
    if "alias" in words or "anchor" in words:
        return f"{words}; put text that begins with * or & in quotes, and give each anchor a name of its own"
    if "mapping values are not allowed" in words:
        return f"{words}; align the keys of a mapping, and put text that contains ': ' in quotes"
    if "single document" in words:
        return f"{words}; remove the second '---' and what follows"
    return f"{words}; check the indentation, brackets and quotes"


def _unusable(where: str, message: str) -> ConfigError:
    return ConfigError([Problem(where, "", message)])
