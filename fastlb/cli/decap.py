"""`fastlb decap`: the receiving end of tunnels, on a backend."""

from __future__ import annotations

import argparse
from ipaddress import ip_address

from fastlb.cli.options import Commands, add_command, add_log_level, number
from fastlb.model.modes import TUNNELS
from fastlb.model.net import Address


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands, "decap", run, "on a backend: unwrap packets from tunnels, until SIGTERM (needs root)",
        "For a host whose kernel has no tunnel devices: it receives ipip, gre and gue, and hands what is inside to the "
        "host by a TUN device. SIGUSR1 logs the counters. See docs/decap.md.",
    )  # fmt: skip
    parser.add_argument("interface", metavar="INTERFACE", help="the interface where tunnel packets arrive")
    parser.add_argument(
        "--mode", type=modes, metavar="MODES",
        help=f"which tunnels to unwrap, separated by commas (default: {','.join(TUNNELS)})",
    )  # fmt: skip
    parser.add_argument(
        "--tun", type=interface_name, default="fastlb0", metavar="NAME",
        help="the name of the TUN device to create (default: fastlb0)",
    )  # fmt: skip
    parser.add_argument("--port", type=number(1, 65535), default=6080, help="the UDP port of gue (default: 6080)")
    parser.add_argument(
        "--key", type=number(0, (1 << 32) - 1),
        help="the key that gre packets must carry (default: only packets without a key)",
    )  # fmt: skip
    parser.add_argument(
        "--address", type=address, action="append", default=[], metavar="ADDR",
        help="accept only tunnel packets sent to this address; may be given several times (default: every address "
        "that the interface has at the start)",
    )  # fmt: skip
    add_log_level(parser)


def run(arguments: argparse.Namespace) -> None:
    """Unwrap packets until a signal ends it. Raises KernelError."""
    from fastlb.daemon import decap  # netlink and eBPF
    from fastlb.observe import log

    log.configure(arguments.log_level)
    decap.run(
        decap.Options(
            interface=arguments.interface,
            modes=arguments.mode or decap.MODES,
            tun=arguments.tun,
            port=arguments.port,
            key=arguments.key,
            addresses=tuple(arguments.address),
        )
    )


def modes(text: str) -> tuple[str, ...]:
    """Return the modes of a list with commas, each once; for argparse."""
    listed = tuple(dict.fromkeys(text.split(",")))
    if unknown := [mode for mode in listed if mode not in TUNNELS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(TUNNELS)}")
    return listed


def interface_name(text: str) -> str:
    """Return the text if the kernel would take it for an interface's name; for argparse."""
    if not 0 < len(text.encode()) < 16 or "/" in text or text in (".", "..") or any(map(str.isspace, text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for an interface: 1 to 15 characters, no / or space")
    return text


def address(text: str) -> Address:
    """Return the address; for argparse."""
    try:
        return ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
