"""Replays a capture through a balancer: what would become of its frames?

    python replay.py fastlb.yaml in.pcap out.pcap 10.0.0.11=02:00:00:00:00:0b 198.51.100.7=02:00:00:00:00:07

``in.pcap``: Ethernet, as ``tcpdump -w`` writes it; frames to a VIP, and the replies of nat backends. ``out.pcap``: what
would be sent. The other arguments are the MAC addresses of backends and clients, all on one link here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

import fastlb
from fastlb._core import Pipeline, Routes, Services, reason_names
from fastlb.plan.ids import BackendIds
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table

INTERFACE = 1
MTU = 1500
OWN_MAC = bytes.fromhex("020000000001")
EVERYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))
MAC_LENGTH = 6  # bytes
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


def neighbour(text: str) -> tuple[str, str]:
    """Split ``ADDRESS=MAC``; raises ArgumentTypeError when it is neither."""
    address, _, mac = text.partition("=")
    try:
        ip_address(address)
        if len(bytes.fromhex(mac.replace(":", ""))) == MAC_LENGTH:
            return address, mac
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS=MAC, such as 10.0.0.11=02:00:00:00:00:0b")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; prints a usage and exits when it cannot be."""
    parser = argparse.ArgumentParser(
        description="Replay a capture through a balancer, and write down what it would send.",
        epilog="Example: replay.py fastlb.yaml in.pcap out.pcap 10.0.0.11=02:00:00:00:00:0b",
    )
    parser.add_argument("config", metavar="CONFIG", help="a configuration of fastlb, such as examples/fastlb.yaml")
    parser.add_argument("source", type=Path, metavar="IN.pcap", help="what arrives: Ethernet, as tcpdump -w writes it")
    parser.add_argument("target", type=Path, metavar="OUT.pcap", help="where to write the frames that would be sent")
    parser.add_argument(
        "neighbours", nargs="*", type=neighbour, metavar="ADDRESS=MAC", help="MAC addresses of backends and clients"
    )
    return parser.parse_args(arguments)


def replay(config: str, source: Path, target: Path, macs: dict[str, str]) -> Counter[str]:
    """Replay ``source``, write ``target``, and return how many frames ended with each reason."""
    from packetloop import Loop  # the example's own extension: a usage can be read before it is built

    capture = source.read_bytes()
    if (capture[:4], capture[20:PCAP_HEADER]) != PCAP_ETHERNET:
        raise SystemExit(f"{source}: not a little-endian pcap of Ethernet frames")
    loop = Loop(make_pipeline(fastlb.load_config(config), macs))
    reasons, sent = loop.run(capture[PCAP_HEADER:])
    target.write_bytes(capture[:PCAP_HEADER] + sent)
    names = reason_names()
    return Counter(names[reason] for reason in reasons)


def main() -> None:
    """Run the command; see the top of this file."""
    arguments = parse_arguments()
    try:
        counts = replay(arguments.config, arguments.source, arguments.target, dict(arguments.neighbours))
    except (fastlb.FastlbError, OSError) as error:
        raise SystemExit(str(error)) from None
    for reason, count in counts.most_common():
        print(f"{count:8} {reason}")


if __name__ == "__main__":
    main()
