"""Plans as the immutable tables of the data path, and how many flows it may remember. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from fastlb._core import Services
from fastlb.config import Config
from fastlb.plan.plan import Plan

MAX_FLOWS = 1 << 30


def services_table(config: Config, plans: Iterable[Plan]) -> Services:
    """Return the plans as one immutable table of the data path."""
    timeouts = config.timeouts.model_dump()
    return Services(
        plans, hash_seed=config.hash_seed, timeouts=timeouts, echo=config.icmp_echo, new_flows=new_flows(config)
    )


def new_flows(config: Config) -> tuple[int, int]:
    """Return how many entries the workers may make a second, and at once after a time without any.

    A flow of one packet is remembered for tcp_syn, or for udp where there is no TCP: the longest that any service has.
    So by ``auto`` a flood of such flows fills half of the table at once, and half of it in the long run.
    """
    remembered = _longest(config, "tcp", "tcp_syn") or _longest(config, "udp", "udp") or config.timeouts.tcp_syn
    if config.new_flow_rate == "auto":
        rate = max(1, int(config.flows / 2 / remembered))
        return rate, max(rate, config.flows // 2)
    return config.new_flow_rate, min(int(config.new_flow_rate * remembered), MAX_FLOWS)


def _longest(config: Config, protocol: str, key: str) -> float:
    """Return the longest such timeout of a service of this protocol, in seconds; 0 without such a service."""
    general: float = getattr(config.timeouts, key)
    own = (getattr(service.timeouts, key) for service in config.services if service.protocol == protocol)
    return max((general if each is None else each for each in own), default=0.0)
