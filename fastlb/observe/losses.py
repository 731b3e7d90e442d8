"""What a reload takes away, where that is nearly all: a file that was cut short, say, or generated from half the data.

Nothing is refused, since it may be meant. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable

from fastlb.config import Config

NEARLY_ALL = 0.75  # the share from which on it is told: two of three may well be meant


def describe_losses(before: Config, after: Config) -> list[str]:
    """Return a sentence where a reload takes away NEARLY_ALL services or backends, or more; else nothing.

    What goes by another name is still there: services are compared by what clients connect to.
    """
    gone = {what: _gone(of(before), of(after)) for what, of in (("services", _services), ("backends", _backends))}
    if not any(number >= NEARLY_ALL * of > 0 for number, of in gone.values()):
        return []
    counts = " and ".join(f"{number} of {of} {what}" for what, (number, of) in gone.items())
    return [f"{counts} are gone with this reload; if that is not meant, mend the file and reload again"]


def _gone(before: set[Hashable], after: set[Hashable]) -> tuple[int, int]:
    """Return how many are gone, and of how many."""
    return len(before - after), len(before)


def _services(config: Config) -> set[Hashable]:
    return {(service.vip, service.port, service.protocol) for service in config.services}


def _backends(config: Config) -> set[Hashable]:
    return {
        (service.vip, service.port, service.protocol, backend.address, backend.port)
        for service in config.services
        for backend in service.backends
    }
