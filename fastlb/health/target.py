"""What is asked, of whom, and how long: checks that look the same on the wire are one target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastlb.config import Service
from fastlb.health.types import CONVERSATIONS
from fastlb.model.names import BackendName


class Target(NamedTuple):
    """One check as it looks on the wire. Services that give the same one share its results."""

    type: str  # of types.CONVERSATIONS
    address: str
    port: int
    timeout: float  # seconds from the SYN to the end of what is needed of the answer
    request: bytes  # every option that reaches the wire is in it


def targets_of(service: Service) -> Iterator[tuple[BackendName, Target]]:
    """Yield the service's backends with their targets; nothing for a service without a check."""
    check = service.check
    if check is None:
        return
    request = CONVERSATIONS[check.type].request
    for backend in service.backends:
        address, port = str(backend.address), check.port or backend.port or service.single_port
        asked = request(check, address, port) if request else b""
        target = Target(check.type, address, port, check.timeout, asked)
        yield (service.name, service.key(backend)), target
