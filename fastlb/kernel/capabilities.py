"""Capabilities that a balancer cannot do without (capabilities(7))."""

from __future__ import annotations

NETWORK = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
EBPF = {"CAP_BPF": 39, "CAP_PERFMON": 38}
"""CAP_PERFMON: the filter adds numbers from a packet to a pointer."""
SYS_ADMIN = {"CAP_SYS_ADMIN": 21}
"""It stands for those of EBPF, and is what kernels ask for that do not have them (before 5.8)."""


def needed_capabilities(last: int) -> dict[str, int]:
    """Return the names and the bits of what is needed; ``last``: the highest bit that the kernel has."""
    return NETWORK | (EBPF if last >= max(EBPF.values()) else SYS_ADMIN)


def missing_capabilities(effective: int, last: int) -> list[str]:
    """Return the names of what is needed, and not in this set of bits."""
    has = {bit for bit in range(last + 1) if effective >> bit & 1}
    if has.issuperset(SYS_ADMIN.values()):
        has.update(EBPF.values())
    return [name for name, bit in needed_capabilities(last).items() if bit not in has]
