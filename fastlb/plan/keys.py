"""What the classifier must take for the data path: the keys of VIPs, and of backends whose replies come back. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from fastlb.config import Config
from fastlb.model.match import LATER, PORT_BITS, Block, Key, Keys
from fastlb.model.modes import MODES
from fastlb.model.net import PROTOCOL_NUMBERS, Address
from fastlb.plan.plan import Plan


def classifier_keys(plans: Iterable[Plan], echo: bool) -> Keys:
    """Return what the receive filter and the guard take; with ``echo`` also pings to VIPs."""
    vips: set[Key] = set()
    replies: dict[str, set[Key]] = {"nat": set(), "fullnat": set()}
    for plan in plans:
        vips.update(_vip_keys(plan, echo))
        if MODES[plan.forward].sees_replies:
            replies[plan.forward].update(_reply_keys(plan))
    return Keys(vips, replies["nat"], replies["fullnat"])


def _vip_keys(plan: Plan, echo: bool) -> Iterable[Key]:
    protocol = PROTOCOL_NUMBERS[plan.protocol]
    for block in plan.blocks:
        yield _key(plan.network.network_address, block, protocol, plan.network.prefixlen)
    yield portless_key(plan, LATER | protocol)
    if echo:
        yield portless_key(plan, 0)


def _reply_keys(plan: Plan) -> Iterable[Key]:
    protocol = PROTOCOL_NUMBERS[plan.protocol]
    for member in plan.members:
        for block in (Block(member.port, PORT_BITS),) if member.port else plan.blocks:
            yield _key(member.address, block, protocol, member.address.max_prefixlen)
        yield Key(member.address, 0, LATER | protocol)


def _key(address: Address, block: Block, protocol: int, prefix: int) -> Key:
    """Return the key in its shortest form: None where all bits of the address or the port count."""
    length = None if prefix == address.max_prefixlen else prefix
    bits = None if block.bits == (PORT_BITS if block.port else 0) else block.bits
    return Key(address, block.port, protocol, length, bits)


def portless_key(plan: Plan, protocol: int) -> Key:
    """Return the key of echo requests or later fragments to the VIP, by a mask that the service has anyway."""
    if plan.network.num_addresses == 1:
        return Key(plan.network.network_address, 0, protocol)
    return Key(plan.network.network_address, 0, protocol, plan.network.prefixlen, plan.blocks[0].bits)


def vips_of_this_host(plans: Iterable[Plan], own: Iterable[Address]) -> list[str]:
    """Return a line for each VIP prefix that holds an address of this host, whose own traffic would be taken.

    ``own``: the host's addresses.
    """
    addresses = list(own)
    return [
        f"service {plan.name}: VIP {plan.vip} holds {address}, an address of this host; use prefixes without it"
        for plan in plans
        if plan.network.num_addresses > 1
        for address in addresses
        if address in plan.network
    ]


def held_vips(config: Config) -> set[Address]:
    """Return the VIPs that fastlb puts on an interface: all with vip_address: interface, else none."""
    vips = (service.network.network_address for service in config.services)
    return set(vips) if config.vip_address == "interface" else set()
