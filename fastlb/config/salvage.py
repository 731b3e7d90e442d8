"""What is valid in data that has faults, so that the rules between fields can be checked all the same.

A field is None where what was written is faulty or missing; the rules say nothing about such a field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from fastlb.config import addresses
from fastlb.config.schema import Backend, Check, Model, Service
from fastlb.config.yaml import Loc
from fastlb.model.net import Address

_PARSERS: dict[tuple[type[Model], str], Callable[[object], object]] = {
    (Service, "vip"): addresses.parse_vip,
    (Service, "port"): addresses.parse_ports,
    (Backend, "address"): addresses.parse_address,
}
# The rules of these mappings and lists wait until all the rest is right.
_LEFT_OUT = {"tunnel", "timeouts", "affinity", "allow", "deny", "source_limit"}

_M = TypeVar("_M", bound=Model)


def salvage_services(data: object, faulty: Collection[Loc]) -> tuple[Service, ...]:
    """Return the services in the data, whose faults are at these key paths."""
    services = []
    for loc, raw in _items(data, "services", ()):
        backends = tuple(_salvage(Backend, item, at, faulty) for at, item in _items(raw, "backends", loc))
        services.append(_salvage(Service, raw, loc, faulty).model_copy(update={"backends": backends}))
    return tuple(services)


def salvage_snat(data: object, faulty: Collection[Loc]) -> tuple[Address, ...] | None:
    """Return the addresses of snat; None when something is wrong with it, so that nothing more can be said."""
    if not isinstance(data, Mapping) or any(loc[:1] == ("snat",) for loc in faulty):
        return None
    return tuple(map(addresses.parse_address, data.get("snat", ())))


def _items(data: object, key: str, loc: Loc) -> Iterator[tuple[Loc, Mapping[str, object]]]:
    """Yield the mappings in the list at ``data[key]`` with their key paths."""
    listed = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(listed, list | tuple):
        for number, item in enumerate(listed):
            yield (*loc, key, number), item if isinstance(item, Mapping) else {}


def _salvage(model: type[_M], raw: Mapping[str, object], loc: Loc, faulty: Collection[Loc]) -> _M:
    """Return what is valid in ``raw``, as a model that was not validated as a whole."""
    values = {name: _value(model, name, raw, (*loc, name), faulty) for name in model.model_fields}
    return model.model_construct(_fields_set=set(raw), **values)


def _value(model: type[Model], name: str, raw: Mapping[str, object], loc: Loc, faulty: Collection[Loc]) -> Any:
    field = model.model_fields[name]
    if loc in faulty and name != "check":
        return None
    if name not in raw:
        return None if field.is_required() else field.default
    if name in _LEFT_OUT:
        return None
    if name == "check":  # a check that is faulty is still a check
        inner = raw[name]
        return _salvage(Check, inner if isinstance(inner, Mapping) else {}, loc, faulty)
    parse = _PARSERS.get((model, name))
    return parse(raw[name]) if parse else raw[name]
