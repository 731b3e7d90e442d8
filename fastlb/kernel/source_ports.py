"""What full NAT needs of this host: source ports that the kernel does not give to the host's own sockets."""

from __future__ import annotations

from collections.abc import Iterable

from fastlb.config.schema import Config
from fastlb.errors import FastlbError
from fastlb.model.net import Address, PortRange

_SYSCTLS = "/proc/sys/net/ipv4/"  # they hold for IPv6 too


def check_source_ports(config: Config, own: Iterable[Address]) -> None:
    """Raises FastlbError when the host may use a source port itself: its packets would be taken for a flow's.

    ``own``: the host's addresses. Only on those can a socket of the host collide with a flow.
    """
    shared = [address for address in config.snat if address in set(own)]
    clash = _clash(config.snat_ports, ephemeral_ports(), reserved_ports())
    if shared and clash is not None:
        raise FastlbError(
            f"snat_ports: {config.snat_ports}, but the kernel gives port {clash} of {shared[0]} to sockets of this "
            f"host; choose ports outside of net.ipv4.ip_local_port_range ({ephemeral_ports()}), or add them to "
            "net.ipv4.ip_local_reserved_ports"
        )


def _clash(wanted: PortRange, ephemeral: PortRange, reserved: Iterable[PortRange]) -> int | None:
    """The first wanted port that the kernel may give away."""
    port = max(wanted.first, ephemeral.first)
    for held in sorted(reserved):
        if held.first <= port <= held.last:
            port = held.last + 1
    return port if port <= min(wanted.last, ephemeral.last) else None


def ephemeral_ports() -> PortRange:
    """What sockets that do not ask for a port are given (ip(7))."""
    with open(_SYSCTLS + "ip_local_port_range") as file:
        first, last = file.read().split()
    return PortRange(int(first), int(last))


def reserved_ports() -> list[PortRange]:
    """What they are not given though it is in that range."""
    with open(_SYSCTLS + "ip_local_reserved_ports") as file:
        listed = file.read().strip()
    ranges = []
    for part in listed.split(",") if listed else ():
        first, _, last = part.partition("-")
        ranges.append(PortRange(int(first), int(last or first)))
    return ranges
