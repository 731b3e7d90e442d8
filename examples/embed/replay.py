"""Replays a capture through a balancer: what would become of its frames?

    python replay.py fastlb.yaml in.pcap out.pcap 10.0.0.11=02:00:00:00:00:0b 198.51.100.7=02:00:00:00:00:07

``in.pcap``: Ethernet, as ``tcpdump -w`` writes it; frames to a VIP, and the replies of nat backends. ``out.pcap``: what
would be sent. The other arguments are the MAC addresses of backends and clients, all on one link here.
"""

from __future__ import annotations

import sys
from collections import Counter
from ipaddress import ip_address, ip_network
from pathlib import Path

from packetloop import Loop

import fastlb
from fastlb._core import Pipeline, Routes, Services, reason_names
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table

INTERFACE = 1
MTU = 1500
OWN_MAC = bytes.fromhex("020000000001")
EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))
PCAP_HEADER = 24  # bytes
PCAP_ETHERNET = (b"\xd4\xc3\xb2\xa1", b"\x01\x00\x00\x00")  # magic number and link type: microseconds, little-endian


def make_tables(config: fastlb.Config, macs: dict[str, str]) -> tuple[Services, Routes]:
    """What to publish: services from the configuration, and next hops from ``macs``."""
    plans = plan_services(config, BackendIds(), 0.0)
    hops = [(bytes.fromhex(mac.replace(":", "")), OWN_MAC, INTERFACE, MTU, None) for mac in macs.values()]
    position = {ip_address(address): at for at, address in enumerate(macs)}
    nowhere = len(hops)
    routes = Routes(
        [*hops, (b"", b"", 0, 0, "no_neighbour")],
        [(network, INTERFACE, None) for network in EVERYWHERE],
        {(INTERFACE, address): at for address, at in position.items()},
        {member.id: position.get(member.address, nowhere) for plan in plans for member in plan.members},
    )
    return services_table(config, plans), routes


def make_pipeline(config: fastlb.Config, macs: dict[str, str]) -> Pipeline:
    """A pipeline with its first publication."""
    pipeline = Pipeline(config.flows)
    pipeline.publish(*make_tables(config, macs))
    return pipeline


def main(config: str, source: str, target: str, *neighbours: str) -> int:
    """The command; see the top of this file."""
    capture = Path(source).read_bytes()
    if (capture[:4], capture[20:PCAP_HEADER]) != PCAP_ETHERNET:
        print(f"{source}: not a little-endian pcap of Ethernet frames", file=sys.stderr)
        return 2
    loop = Loop(make_pipeline(fastlb.load_config(config), dict(pair.split("=") for pair in neighbours)))
    reasons, sent = loop.run(capture[PCAP_HEADER:])
    Path(target).write_bytes(capture[:PCAP_HEADER] + sent)
    names = reason_names()
    for reason, count in Counter(reasons).most_common():
        print(f"{count:8} {names[reason]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
