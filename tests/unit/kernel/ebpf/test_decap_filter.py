"""decap_filter.py: what is a tunnel's packet to one of our addresses, and what is left to the host."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from ipaddress import ip_address
from itertools import chain, combinations

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.ebpf.decap_filter import FILTER_NAME, MAX_ADDRESSES, key_of, load_programs, tunnel_filter
from fastlb.kernel.ebpf.frame import ACT_SHOT, ACT_UNSPEC, NOTHING, WHOLE_FRAME
from fastlb.model.names import GUARD_NAME
from tests.ebpf_machine import BpfKernel
from tests.netns.test_classifier import MF, OTHER_HOST, ethernet, ipv4, ipv6

HERE, HERE6, THERE, THERE6 = "192.0.2.1", "fd00::1", "192.0.2.2", "fd00::2"
LB, LB6, PORT = "10.0.0.1", "fd00:9::1", 6080
MODES = ("ipip", "gre", "gue")
FRAMES: list[tuple[str, bytes, str | None]] = [  # the mode whose packet it is
    ("ipip", ipv4(LB, 1, HERE, 2, 4), "ipip"),
    ("ipip of ipv6", ipv4(LB, 1, HERE, 2, 41), "ipip"),
    ("ipip in ipv6", ipv6(LB6, 1, HERE6, 2, 41), "ipip"),
    ("behind an encapsulation limit", ipv6(LB6, 1, HERE6, 2, 4, ((60, 0),)), "ipip"),
    ("behind a long one", ipv6(LB6, 1, HERE6, PORT, 17, ((60, 3),)), "gue"),
    ("gre, options", ipv4(LB, 1, HERE, 2, 47, ihl=9), "gre"),
    ("gre in ipv6", ipv6(LB6, 1, HERE6, 2, 47), "gre"),
    ("gue", ipv4(LB, 50000, HERE, PORT, 17), "gue"),
    ("gue, options", ipv4(LB, 50000, HERE, PORT, 17, ihl=6), "gue"),
    ("gue in ipv6", ipv6(LB6, 50000, HERE6, PORT, 17), "gue"),
    ("udp to another port", ipv4(LB, PORT, HERE, 53, 17), None),
    ("tcp to the port", ipv4(LB, 1, HERE, PORT, 6), None),
    ("to another address", ipv4(LB, 1, THERE, 2, 4), None),
    ("to another address, ipv6", ipv6(LB6, 1, THERE6, 2, 41), None),
    ("to another host", ipv4(LB, 1, HERE, 2, 4, mac=OTHER_HOST), None),
    ("a first fragment", ipv4(LB, 1, HERE, 2, 4, fragment=MF), None),
    ("a later fragment", ipv4(LB, 1, HERE, 2, 4, fragment=7), None),
    ("a fragment of ipv6", ipv6(LB6, 1, HERE6, 2, 4, ((44, 0),)), None),
    ("two options headers", ipv6(LB6, 1, HERE6, 2, 4, ((60, 0), (60, 0))), None),
    ("hop-by-hop options", ipv6(LB6, 1, HERE6, 2, 4, ((0, 0),)), None),
    ("version 5", ipv4(LB, 1, HERE, 2, 4, version=5), None),
    ("version 4 as IPv6", ipv6(LB6, 1, HERE6, 2, 4, version=4), None),
    ("a header of 16 bytes", ipv4(LB, 1, HERE, 2, 4, ihl=4), None),
    ("cut in the header", ipv4(LB, 1, HERE, 2, 4)[: 14 + 19], None),
    ("cut in the port", ipv4(LB, 1, HERE, PORT, 17)[: 14 + 23], None),
    ("arp", ethernet(bytes(28), 0x0806), None),
]
SETS = list(chain.from_iterable(combinations(MODES, count) for count in (1, 2, 3)))


@pytest.mark.parametrize("modes", SETS, ids="+".join)
def test_frames(bpf_kernel: BpfKernel, modes: tuple[str, ...]) -> None:
    """Filter and guard say the same of each."""
    with ExitStack() as stack:
        filter_fd, guard_fd = load_programs(modes, PORT, [ip_address(HERE), ip_address(HERE6)], stack)
        seen = {name: (bpf_kernel.run(filter_fd, frame), bpf_kernel.run(guard_fd, frame)) for name, frame, _ in FRAMES}
    assert seen == {
        name: (WHOLE_FRAME, ACT_SHOT) if mode in modes else (NOTHING, ACT_UNSPEC) for name, _, mode in FRAMES
    }


def test_the_order_of_modes_does_not_matter() -> None:
    assert tunnel_filter(("gre", "ipip"), PORT, 7, 1, 0) == tunnel_filter(("ipip", "gre"), PORT, 7, 1, 0)


def test_names(bpf_kernel: BpfKernel) -> None:
    with ExitStack() as stack:
        load_programs(MODES, PORT, [ip_address(HERE)], stack)
        assert [each.name for each in bpf_kernel.programs.values()] == [FILTER_NAME, GUARD_NAME]
        assert [each.name for each in bpf_kernel.maps.values()] == ["fastlb_outer"]


def test_a_key() -> None:
    assert key_of(ip_address(HERE)) == bytes(12) + bytes((192, 0, 2, 1)) + struct.pack("=I", 4)
    assert key_of(ip_address(HERE6)) == ip_address(HERE6).packed + struct.pack("=I", 6)


def test_too_many_addresses(bpf_kernel: BpfKernel) -> None:
    addresses = [ip_address(number) for number in range(MAX_ADDRESSES + 1)]
    with ExitStack() as stack, pytest.raises(KernelError, match="4097 addresses are more than 4096; choose with"):
        load_programs(MODES, PORT, addresses, stack)
