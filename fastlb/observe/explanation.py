"""What an explanation is made of: the tuple that is asked about, what is known of it, and the steps in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import wrap
from typing import Any, NamedTuple

from fastlb.config import Service
from fastlb.model.net import PROTOCOL_NUMBERS, Address, endpoint_text, parse_endpoint
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import Member, Plan

WIDTH = 118  # of the lines that are printed


class FiveTuple(NamedTuple):
    """A packet's source, destination and protocol, "tcp" or "udp"."""

    src: Address
    sport: int
    dst: Address
    dport: int
    protocol: str

    def __str__(self) -> str:
        return f"{endpoint_text(self.src, self.sport)} -> {endpoint_text(self.dst, self.dport)}/{self.protocol}"


def parse_tuple(source: str, destination: str) -> FiveTuple:
    """Return the tuple of "198.51.100.7:40000" and "203.0.113.10:443/tcp".

    Raises ValueError, which says what would be right.
    """
    destination, _, protocol = destination.partition("/")
    if protocol not in PROTOCOL_NUMBERS:
        raise ValueError(f"a destination ends in /tcp or /udp, as in 203.0.113.10:443/tcp, not in {protocol!r}")
    packet = FiveTuple(*parse_endpoint(source), *parse_endpoint(destination), protocol)
    if packet.src.version != packet.dst.version:
        raise ValueError(f"{packet.src} and {packet.dst} are of different IP versions")
    return packet


@dataclass(frozen=True)
class Step:
    """One stage: ``says`` it in words, ``facts`` are the same for programs."""

    stage: str
    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What is known beside the data path itself: plans, configuration, states of backends, workers, and next hops."""

    plans: Sequence[Plan]
    services: Sequence[Service]
    states: BackendStates
    worker_of: Callable[[int], str] = lambda shard: ""  # a shard's worker, in words
    next_hop: Callable[[Address], tuple[str, Address] | None] = lambda address: None  # (interface, address)
    hops_known: bool = True  # not without a running balancer
    now: float = 0.0  # seconds, on the clock of ``states``


@dataclass(frozen=True)
class Explanation:
    """What becomes of a packet. ``verdict``: FORWARD, PASS or DROP; ``reason``: the counter's name."""

    packet: FiveTuple
    service: str | None
    backend: str | None
    verdict: str
    reason: str
    steps: tuple[Step, ...]
    flow_hash: int | None = None  # that of the service's scheduler, equal on every balancer of a fleet
    slot: int | None = None  # of the service's Maglev table

    def as_json(self) -> dict[str, Any]:
        """Return it for programs: each step has its facts beside what it says."""
        return {
            "packet": str(self.packet),
            "service": self.service,
            "backend": self.backend,
            "verdict": self.verdict,
            "reason": self.reason,
            "flow_hash": self.flow_hash,
            "slot": self.slot,
            "steps": [{"stage": step.stage, "says": step.says, **step.facts} for step in self.steps],
        }


def lines_of(explained: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines, for people, of an explanation that came as JSON."""
    yield str(explained["packet"])
    for step in explained["steps"]:
        yield from wrap(step["says"], WIDTH, initial_indent=f"  {step['stage']:<10} ", subsequent_indent=" " * 13)


@dataclass(frozen=True)
class ClientPacket:
    """A packet to a VIP, and what the data path found for it (`_core.explain_tuple`)."""

    packet: FiveTuple
    context: Context
    found: Mapping[str, Any]

    @cached_property
    def plan(self) -> Plan:
        """The service."""
        position: int = self.found["service"]
        return self.context.plans[position]

    @cached_property
    def members(self) -> dict[int, Member]:
        """The service's backends by id."""
        return {member.id: member for member in self.plan.members}

    @cached_property
    def known(self) -> bool:
        """True if the flow has an entry that decides."""
        entry = self.found["entry"]
        return entry is not None and entry["void"] is None

    @cached_property
    def backend(self) -> Member | None:
        """The backend that the packet goes to."""
        return self.members.get(self.found["backend"])

    def key(self, number: int) -> str | None:
        """Return the key of the backend with this id."""
        member = self.members.get(number)
        return member.key if member else None
