"""What full NAT needs of this host: source ports that the kernel does not give to the host's own sockets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastlb.errors import FastlbError
from fastlb.model.net import Address, PortRange

_SYSCTLS = "/proc/sys/net/ipv4/"  # they hold for IPv6 too


def check_source_ports(sources: Sequence[Address], ports: PortRange, own: Iterable[Address]) -> None:
    """Raise FastlbError when the host may use a source port itself: its packets would be taken for a flow's.

    ``sources`` and ``ports``: what flows are sent from. ``own``: the host's addresses; only on those can a socket of
    the host collide with a flow.
    """
    held = set(own)
    shared = [address for address in sources if address in held]
    clash = first_clash(ports, ephemeral_ports(), reserved_ports())
    if shared and clash is not None:
        raise FastlbError(
            f"snat_ports: {ports}, but the kernel gives port {clash} of {shared[0]} to sockets of this "
            f"host; choose ports outside of net.ipv4.ip_local_port_range ({ephemeral_ports()}), or add them to "
            "net.ipv4.ip_local_reserved_ports"
        )


def first_clash(wanted: PortRange, ephemeral: PortRange, reserved: Iterable[PortRange]) -> int | None:
    """Return the first wanted port that the kernel may give to a socket; None: it gives none of them."""
    port = max(wanted.first, ephemeral.first)
    for held in sorted(reserved):
        if held.first <= port <= held.last:
            port = held.last + 1
    return port if port <= min(wanted.last, ephemeral.last) else None


def ephemeral_ports() -> PortRange:
    """Return the range from which the kernel gives a port to a socket that asks for none (ip(7))."""
    with open(_SYSCTLS + "ip_local_port_range") as file:
        first, last = file.read().split()
    return PortRange(int(first), int(last))


def reserved_ports() -> list[PortRange]:
    """Return the ports that the kernel gives to no such socket, though they are in that range."""
    with open(_SYSCTLS + "ip_local_reserved_ports") as file:
        return parse_ports(file.read())


def parse_ports(listed: str) -> list[PortRange]:
    """Return the ranges of a sysctl's list, as in "8080,9000-9100"; one that is empty has none."""
    ranges = []
    for part in listed.strip().split(",") if listed.strip() else ():
        first, _, last = part.partition("-")
        ranges.append(PortRange(int(first), int(last or first)))
    return ranges
