"""source_ports.py: which source ports of full NAT the host may use itself."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fastlb.errors import FastlbError
from fastlb.kernel.source_ports import check_source_ports, ephemeral_ports, first_clash, parse_ports, reserved_ports
from fastlb.model.net import PortRange

SOURCE, OTHER = ip_address("10.3.0.5"), ip_address("10.3.0.6")


@pytest.mark.parametrize(("wanted", "reserved", "clash"), [
    ((1024, 32767), [], None), ((1024, 32768), [], 32768), ((61000, 65535), [], None), ((60999, 65535), [], 60999),
    ((40000, 40100), [], 40000), ((40000, 40100), [(40000, 40100)], None), ((40000, 40100), [(40000, 40050)], 40051),
    ((40000, 40100), [(40051, 50000), (39000, 40050)], None), ((1024, 65535), [(32768, 60999)], None),
])  # fmt: skip
def test_ports_of_the_host(wanted: tuple[int, int], reserved: list[tuple[int, int]], clash: int | None) -> None:
    ranges = [PortRange(*each) for each in reserved]
    assert first_clash(PortRange(*wanted), PortRange(32768, 60999), ranges) == clash


def test_only_on_an_address_of_the_host_can_they_collide() -> None:
    every, none = PortRange(1024, 65535), PortRange(1, 1)
    check_source_ports([SOURCE], every, [OTHER])
    check_source_ports([], every, [SOURCE])
    check_source_ports([SOURCE], none, [SOURCE])
    with pytest.raises(FastlbError, match=r"snat_ports: 1024-65535, but the kernel gives port \d+ of 10\.3\.0\.5 to"):
        check_source_ports([OTHER, SOURCE], every, [SOURCE])


@pytest.mark.parametrize(
    ("listed", "ranges"),
    [("\n", []), ("8080\n", [(8080, 8080)]), ("1-3,8080,9000-9100\n", [(1, 3), (8080, 8080), (9000, 9100)])],
)
def test_lists_of_a_sysctl(listed: str, ranges: list[tuple[int, int]]) -> None:
    assert parse_ports(listed) == ranges


def test_this_host_has_them() -> None:
    ephemeral = ephemeral_ports()
    assert 0 < ephemeral.first <= ephemeral.last < 65536
    assert all(held.first <= held.last for held in reserved_ports())
