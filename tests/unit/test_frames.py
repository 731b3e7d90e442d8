"""tests/frames.py against dpkt: frames are built as another library builds them, and what is broken is told apart."""

from __future__ import annotations

from ipaddress import ip_address

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frames import SYN, checksum, ethernet, frame, take_apart, text_of

ADDRESSES = [st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)]


def as_dpkt(source: str, target: str, payload: bytes, options: bytes, tos: int) -> bytes:
    """Return an IP packet with a TCP segment in it, all checksums by dpkt."""
    segment = dpkt.tcp.TCP(sport=4000, dport=80, flags=SYN, seq=1000, ack=7, opts=options, data=payload)
    segment.off = 5 + len(options) // 4
    addresses = {"src": ip_address(source).packed, "dst": ip_address(target).packed}
    if ":" in source:
        size = len(bytes(segment))
        return bytes(dpkt.ip6.IP6(**addresses, nxt=6, hlim=64, plen=size, fc=tos, data=segment))
    return bytes(dpkt.ip.IP(**addresses, p=6, ttl=64, id=0x1234, tos=tos, df=True, data=segment))


@given(
    st.one_of(*(st.tuples(each, each) for each in ADDRESSES)),
    st.binary(max_size=70),
    st.sampled_from([b"", b"\x02\x04\x05\xb4", b"\x01" * 40]),
    st.integers(0, 255),
)
def test_frames_are_as_dpkt_makes_them(ends: tuple[str, str], payload: bytes, options: bytes, tos: int) -> None:
    made = frame(ends[0], 4000, ends[1], 80, payload=payload, ack=7, tcp_options=options, tos=tos, df=True)
    assert made == ethernet(as_dpkt(*ends, payload, options, tos))
    seen = take_apart(made)
    assert (seen.src, seen.dst, seen.sport, seen.dport, seen.tcp.data) == (*ends, 4000, 80, payload)


@given(st.binary(max_size=90))
def test_a_checksum_is_dpkt_s(data: bytes) -> None:
    assert checksum(data) == dpkt.in_cksum(data)


@pytest.mark.parametrize("data", [b"", bytes(20), b"\xff" * 20, b"\xff\xfe\x00\x01", b"\x80"])
def test_sums_of_nothing_and_of_all_ones(data: bytes) -> None:
    assert checksum(data) == dpkt.in_cksum(data)


@given(st.ip_addresses())
def test_an_address_is_written_as_ipaddress_does(address: object) -> None:
    assert text_of(ip_address(str(address)).packed) == str(address)


@pytest.mark.parametrize("version", [4, 6])
def test_a_bit_that_is_wrong_is_found(version: int) -> None:
    """Any bit under a checksum: of addresses, ports, flags or data; and of IPv4's header."""
    client, vip = {4: ("10.1.0.2", "203.0.113.10"), 6: ("fd00::2", "2001:db8::10")}[version]
    good = frame(client, 4000, vip, 80, payload=b"data")
    for bit in range(8 * (14 if version == 4 else 14 + 8), 8 * len(good)):
        wrong = bytearray(good)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AssertionError):
            take_apart(bytes(wrong))
