"""icmp_quotes.py: an error is asked about as the answer to what it quotes, an echo request by its address."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fastlb.kernel.ebpf.classifier import Classifier
from fastlb.kernel.ebpf.frame import WHOLE_FRAME
from fastlb.model.match import Key, Keys
from tests.ebpf_machine import BpfKernel
from tests.netns.test_classifier import (
    BACKEND,
    CLIENT,
    CLIENT6,
    ELSEWHERE,
    ELSEWHERE6,
    TCP,
    UDP,
    VIP,
    VIP6,
    icmp,
    ipv4,
    ipv6,
    part6,
)

KEYS = Keys(
    {Key(ip_address(VIP), 80, TCP), Key(ip_address(VIP6), 80, TCP), Key(ip_address(VIP), 0, 0)},
    {Key(ip_address(BACKEND), 8080, UDP)},
)
# What goes from us to a client is the answer of a VIP; what goes to a backend is not.
TO_CLIENT, TO_CLIENT6 = ipv4(VIP, 80, CLIENT, 40000), ipv6(VIP6, 80, CLIENT6, 40000)
FRAMES: list[tuple[str, bytes, bool]] = [
    *((f"type {kind}", icmp(ELSEWHERE, VIP, kind, TO_CLIENT), kind in (3, 11, 12)) for kind in range(20) if kind != 8),
    *((f"type {kind}, ipv6", icmp(ELSEWHERE6, VIP6, kind, TO_CLIENT6), kind in (1, 2, 3, 4)) for kind in range(6)),
    ("an error about another port", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 81, CLIENT, 40000)), False),
    ("an error about a client's packet", icmp(ELSEWHERE, CLIENT, 3, ipv4(CLIENT, 40000, VIP, 80)), False),
    ("an error about a packet to a backend", icmp(BACKEND, CLIENT, 3, ipv4(CLIENT, 9, BACKEND, 8080, UDP)), True),
    ("the same with tcp", icmp(BACKEND, CLIENT, 3, ipv4(CLIENT, 9, BACKEND, 8080, TCP)), False),
    ("options outside", icmp(ELSEWHERE, VIP, 3, TO_CLIENT, ihl=7), True),
    ("options inside", icmp(ELSEWHERE, VIP, 3, ipv4(VIP, 80, CLIENT, 40000, ihl=8)), True),
    ("a first fragment inside, ipv6", icmp(ELSEWHERE6, VIP6, 2, part6(VIP6, 80, CLIENT6, 9, TCP, 1, 7)), True),
    ("a later fragment inside, ipv6", icmp(ELSEWHERE6, VIP6, 2, part6(VIP6, 80, CLIENT6, 9, TCP, 8, 7)), False),
    ("eight bytes of what is inside", icmp(ELSEWHERE, VIP, 3, TO_CLIENT[: 14 + 28]), True),
    ("three bytes of it", icmp(ELSEWHERE, VIP, 3, TO_CLIENT[: 14 + 23]), False),
    ("an echo request", icmp(CLIENT, VIP, 8, bytes(40)), True),
    ("an echo request to an address that does not answer", icmp(CLIENT6, VIP6, 128, bytes(40)), False),
    ("an echo request to somebody else", icmp(CLIENT, ELSEWHERE, 8, bytes(40)), False),
]


@pytest.mark.parametrize(("frame", "ours"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
def test_frame(bpf_kernel: BpfKernel, frame: bytes, ours: bool) -> None:
    with Classifier() as classifier:
        classifier.replace(KEYS)
        assert (bpf_kernel.run(classifier.filter_fd, frame) == WHOLE_FRAME) is ours
