"""What routers say about tunnels' packets, written by dpkt."""

from __future__ import annotations

from ipaddress import ip_address

import dpkt
import pytest

from fastlb.pathmtu import FORGET_AFTER, PathMtus

OURS, ROUTER = {4: "10.3.0.2", 6: "fd00:3::2"}, {4: "10.9.0.1", 6: "fd00:9::1"}
BACKEND = {4: "10.3.0.11", 6: "fd00:3::11"}
BACKENDS = {ip_address(backend) for backend in BACKEND.values()}
every_version = pytest.mark.parametrize("version", [4, 6])


def packed(text: str) -> bytes:
    return ip_address(text).packed


def error(version: int, mtu: int, protocol: int = 4, to: str | None = None, about: str | None = None) -> bytes:
    """As the kernel hands it over. ``to``: whom it came to; ``about``: whom the tunnel's packet was for."""
    to, about = to or OURS[version], about or BACKEND[version]
    if version == 6:
        quoted = dpkt.ip6.IP6(nxt=protocol, hlim=60, src=packed(OURS[6]), dst=packed(about), plen=1440)
        return bytes((2, 0, 0, 0)) + mtu.to_bytes(4, "big") + bytes(quoted)[:40] + bytes(8)
    outer = bytes(dpkt.ip.IP(p=protocol, src=packed(OURS[4]), dst=packed(about), len=1500, df=1))[:20]
    icmp = bytes((3, 4, 0, 0)) + mtu.to_bytes(4, "big") + outer + bytes(8)
    return bytes(dpkt.ip.IP(p=1, src=packed(ROUTER[4]), dst=packed(to), data=icmp))


@every_version
@pytest.mark.parametrize("protocol", [4, 41, 47, 17])
def test_heard_until_forgotten(version: int, protocol: int) -> None:
    heard = PathMtus()
    assert heard.hear(error(version, 1400, protocol), version, BACKENDS, 10.0) == ip_address(BACKEND[version])
    assert heard.known() == {ip_address(BACKEND[version]): 1400}
    assert not heard.forget(10.0 + FORGET_AFTER)
    assert heard.forget(10.1 + FORGET_AFTER)
    assert heard.known() == {}


@every_version
def test_only_narrower_counts_and_each_word_keeps_it(version: int) -> None:
    heard = PathMtus()
    heard.hear(error(version, 1400), version, BACKENDS, 0.0)
    assert heard.hear(error(version, 1450), version, BACKENDS, 500.0) is None
    assert list(heard.known().values()) == [1400]
    assert not heard.forget(FORGET_AFTER + 1)


@pytest.mark.parametrize(("version", "said", "kept"), [(4, 0, 552), (4, 68, 552), (6, 1000, 1280), (6, 1 << 31, 65535)])
def test_absurd_values_have_bounds(version: int, said: int, kept: int) -> None:
    heard = PathMtus()
    heard.hear(error(version, said), version, BACKENDS, 0.0)
    assert list(heard.known().values()) == [kept]


def unreachable(version: int) -> bytes:
    """Another error."""
    raw = bytearray(error(version, 1400))
    raw[1 if version == 6 else 21] = 1
    raw[0 if version == 6 else 20] = 1 if version == 6 else 3
    return bytes(raw)


@every_version
def test_what_is_not_about_our_tunnels_is_left(version: int) -> None:
    stranger = {4: "10.3.0.99", 6: "fd00:3::99"}[version]
    whole = error(version, 1400)
    cut = (whole[:size] for size in range(len(whole) - 8))
    for packet in (error(version, 1400, 6), error(version, 1400, about=stranger), unreachable(version), *cut):
        heard = PathMtus()
        assert heard.hear(packet, version, BACKENDS, 0.0) is None
        assert heard.known() == {}


def test_an_error_that_did_not_go_to_the_sender_is_left() -> None:
    assert PathMtus().hear(error(4, 1400, to="10.3.0.3"), 4, BACKENDS, 0.0) is None
