"""What pydantic finds wrong with data, in words that say what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fastlb.config.refusal import show
from fastlb.config.schema import Model
from fastlb.config.yaml import Loc

# What other programs call a key, where no spelling is near.
_OTHER_NAMES = {
    "ip": ("address", "vip"),
    "host": ("address",),
    "server": ("address",),
    "virtual_ip": ("vip",),
    "algorithm": ("scheduler",),
    "balance": ("scheduler",),
    "lb_policy": ("scheduler",),
    "mode": ("forward",),
    "method": ("forward",),
    "servers": ("backends",),
    "members": ("backends",),
    "health_check": ("check",),
    "healthcheck": ("check",),
    "sticky": ("affinity",),
    "persistence": ("affinity",),
    "whitelist": ("allow",),
    "blacklist": ("deny",),
}


def dotted(loc: Loc) -> str:
    """Return a key path as people write it: ("services", 0, "port") is services[0].port."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def sentence(detail: ErrorDetails, root: type[Model]) -> str:
    """Return what is wrong, and what would be right, of one thing that pydantic found in data for ``root``."""
    kind, loc, value = detail["type"], detail["loc"], detail["input"]
    if kind == "missing":
        description = _model_at(loc[:-1], root).model_fields[str(loc[-1])].description
        return f"it is missing; add it: {description}"
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), _model_at(loc[:-1], root), root)
    if kind == "invalid_key":
        return "a key must be text; write it in quotes"
    if kind in ("model_type", "dict_type"):
        return _no_mapping(value, _model_at(loc, root))
    if kind == "tuple_type":
        return _no_list(value)
    return detail["msg"]


def _no_mapping(value: object, model: type[Model]) -> str:
    return (
        f"found {show(value)}; it must be a mapping with keys among: {', '.join(model.model_fields)}"
        f"{_as_only_key(value, model)}"
    )


def _as_only_key(value: object, model: type[Model]) -> str:
    """Advise ``{type: "tcp"}`` where "tcp" was written and is right for the one key that the mapping must have."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    if len(required) != 1:
        return ""
    try:
        model.model_validate({required[0]: value})
    except ValidationError:
        return ""
    return f"; write {{{required[0]}: {show(value)}}}"


def _no_list(value: object) -> str:
    if isinstance(value, dict) and value:
        return 'found a mapping; it must be a list: write "- " in front of the first key of each item'
    if isinstance(value, str):
        return f"found {show(value)}; it must be a list: write [{show(value)}]"
    return f"found {show(value)}; it must be a list ([] when there are none)"


def _unknown_key(key: str, model: type[Model], root: type[Model]) -> str:
    plain = key.lower().replace("-", "_")
    known = list(model.model_fields)
    meant = difflib.get_close_matches(plain, known, n=1) or [
        name for name in _OTHER_NAMES.get(plain, ()) if name in known
    ]
    if meant:
        return f'there is no such key; did you mean "{meant[0]}"?'
    if places := [path for path, other in _mappings(root) if plain in other.model_fields]:
        return f"there is no such key here, only in {' and '.join(places)}; check the indentation"
    return f"there is no such key; use one of: {', '.join(known)}"


def _model_at(loc: Loc, root: type[Model]) -> type[Model]:
    """Return the model whose fields are the keys of the mapping at ``loc``."""
    model = root
    for part in loc:
        if isinstance(part, str):
            model = _inner(model.model_fields[part].annotation) or model
    return model


def _mappings(model: type[Model], path: str = "") -> Iterator[tuple[str, type[Model]]]:
    """Yield every mapping of the file with its key path, the whole one first."""
    yield path or "the top level", model
    for name, field in model.model_fields.items():
        if inner := _inner(field.annotation):
            brackets = "[]" if get_origin(field.annotation) is tuple else ""
            yield from _mappings(inner, f"{path}.{name}{brackets}".removeprefix("."))


def _inner(annotation: Any) -> type[Model] | None:
    """Return the model in a type such as ``tuple[Service, ...]`` or ``Check | None``; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)
