"""What a reload cannot change, because it was settled when the balancer was opened. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from fastlb.config import Config

NEEDS_RESTART = (
    *("interfaces", "workers", "flows", "ring", "transmit", "control", "vip_address"),
    *("snat", "snat_ports", "flow_log", "flow_file", "affinity_entries"),
)


def restart_reasons(old: Config, new: Config) -> Iterator[str]:
    """Yield every change that a reload cannot make, as ``key: old -> new``."""
    for key in NEEDS_RESTART:
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            yield f"{key}: {_shown(before)} -> {_shown(after)}"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
