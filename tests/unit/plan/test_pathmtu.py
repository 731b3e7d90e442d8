"""What routers say about tunnels' packets, written by dpkt."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import dpkt
import pytest

from fastlb.plan.pathmtu import FORGET_AFTER, PathMtus, Tunnelled

OURS, ROUTER = {4: "10.3.0.2", 6: "fd00:3::2"}, {4: "10.9.0.1", 6: "fd00:9::1"}
BACKEND = {4: "10.3.0.11", 6: "fd00:3::11"}
PORT = 6080
TUNNELS = {  # to each backend by every mode
    ip_address(backend): {
        Tunnelled(ip_network(OURS[version]), protocol, PORT if protocol == 17 else 0) for protocol in (4, 41, 47, 17)
    }
    for version, backend in BACKEND.items()
}
every_version = pytest.mark.parametrize("version", [4, 6])


def packed(text: str) -> bytes:
    return ip_address(text).packed


def error(
    version: int, mtu: int, protocol: int = 4, to: str | None = None, about: str | None = None, *,
    source: str | None = None, length: int = 1500, port: int = PORT,
) -> bytes:  # fmt: skip
    """As the kernel hands it over. ``to``: whom it came to; ``about``: whom the tunnel's packet was for."""
    to, about, source = to or OURS[version], about or BACKEND[version], source or OURS[version]
    rest = bytes(2) + port.to_bytes(2, "big") + bytes(4)
    if version == 6:
        quoted = dpkt.ip6.IP6(nxt=protocol, hlim=60, src=packed(source), dst=packed(about), plen=length - 40)
        return bytes((2, 0, 0, 0)) + mtu.to_bytes(4, "big") + bytes(quoted)[:40] + rest
    outer = dpkt.ip.IP(p=protocol, src=packed(source), dst=packed(about), len=length, df=1).pack_hdr()
    icmp = bytes((3, 4, 0, 0)) + mtu.to_bytes(4, "big") + outer + rest
    return bytes(dpkt.ip.IP(p=1, src=packed(ROUTER[4]), dst=packed(to), data=icmp))


@every_version
@pytest.mark.parametrize("protocol", [4, 41, 47, 17])
def test_heard_until_forgotten(version: int, protocol: int) -> None:
    heard = PathMtus()
    assert heard.hear(error(version, 1400, protocol), version, TUNNELS, 10.0) == ip_address(BACKEND[version])
    assert heard.known() == {ip_address(BACKEND[version]): 1400}
    assert not heard.forget(10.0 + FORGET_AFTER)
    assert heard.forget(10.1 + FORGET_AFTER)
    assert heard.known() == {}


@pytest.mark.parametrize("protocol", [4, 41, 47, 17])
def test_a_tunnel_s_own_fragments(protocol: int) -> None:
    """The first one tells; of a later one the ports are not known, nor whether it is longer."""
    whole = error(6, 1300, protocol)

    def fragment(offset: int) -> bytes:
        header = bytes((protocol, 0)) + (offset | 1).to_bytes(2, "big") + bytes(4)
        return whole[:14] + bytes((44,)) + whole[15:48] + header + whole[48:]

    assert PathMtus().hear(fragment(0), 6, TUNNELS, 0.0) == ip_address(BACKEND[6])
    assert PathMtus().hear(fragment(1448), 6, TUNNELS, 0.0) is None
    assert PathMtus().hear(fragment(0)[:52], 6, TUNNELS, 0.0) is None


@every_version
def test_only_narrower_counts_and_each_word_keeps_it(version: int) -> None:
    heard = PathMtus()
    heard.hear(error(version, 1400), version, TUNNELS, 0.0)
    assert heard.hear(error(version, 1450), version, TUNNELS, 500.0) is None
    assert list(heard.known().values()) == [1400]
    assert not heard.forget(FORGET_AFTER + 1)


@pytest.mark.parametrize(("version", "said", "kept"), [(4, 0, 552), (4, 68, 552), (6, 0, 1280), (6, 1000, 1280)])
def test_absurd_values_have_bounds(version: int, said: int, kept: int) -> None:
    heard = PathMtus()
    heard.hear(error(version, said), version, TUNNELS, 0.0)
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
        assert heard.hear(packet, version, TUNNELS, 0.0) is None
        assert heard.known() == {}


def test_an_error_that_did_not_go_to_the_sender_is_left() -> None:
    assert PathMtus().hear(error(4, 1400, to="10.3.0.3"), 4, TUNNELS, 0.0) is None


@every_version
def test_what_fastlb_never_sent_is_not_believed(version: int) -> None:
    """Another port, another sender, and packets that would have fitted."""
    stranger = {4: "10.3.0.3", 6: "fd00:3::3"}[version]
    for forged in (
        error(version, 1400, 17, port=53),
        error(version, 1400, to=stranger, source=stranger),
        error(version, 1400, length=1400),
        error(version, 1500),
        error(version, 9000),
    ):
        assert PathMtus().hear(forged, version, TUNNELS, 0.0) is None
    assert PathMtus().hear(error(version, 1399, length=1400), version, TUNNELS, 0.0) is not None


def test_each_backend_has_its_own() -> None:
    """A tunnel of another mode, or from another prefix, says nothing about this one."""
    one, other = ip_address("10.3.0.11"), ip_address("10.3.0.12")
    tunnels = {
        one: {Tunnelled(ip_network("10.9.0.0/24"), 47, 0)}, other: {Tunnelled(ip_network("10.3.0.2"), 4, 0)},
    }  # fmt: skip
    heard = PathMtus()
    for forged in (
        error(4, 1400, 4, about="10.3.0.11"),
        error(4, 1400, 47, about="10.3.0.11"),
        error(4, 1400, 47, about="10.3.0.12", source="10.9.0.7", to="10.9.0.7"),
    ):
        assert heard.hear(forged, 4, tunnels, 0.0) is None
    assert heard.hear(error(4, 1400, 47, about="10.3.0.11", source="10.9.0.7", to="10.9.0.7"), 4, tunnels, 0.0) == one
    assert heard.known() == {one: 1400}
