"""Golden rows: input frames, verdict, reason and the exact bytes that leave. tests/golden says where they come from."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from fastlb import Config, Datapath
from tests.balancers import CLIENT, HOSTS, VIP, datapath
from tests.frames import BALANCER_MAC, checksum, frame, mac_bytes, mac_of, take_apart
from tests.golden import generate
from tests.unit.dataplane.test_encap import tunnel, unwrap

FOLDER = Path(__file__).parents[2] / "golden"
FRAMES: dict[str, Any] = json.loads((FOLDER / "frames.json").read_text())
KATRAN: dict[str, Any] = json.loads((FOLDER / "katran.json").read_text())
ICMP: dict[str, Any] = json.loads((FOLDER / "icmp.json").read_text())


@pytest.mark.parametrize("row", FRAMES["rows"], ids=lambda row: row["name"])
def test_frames(row: dict[str, Any]) -> None:
    """The last of the row's frames, after the ones before it."""
    balancer = Datapath(Config.from_dict(FRAMES["config"]), mac=BALANCER_MAC)
    for host in HOSTS:
        balancer.set_neighbour(host, mac_of(host))
    out = balancer.process_batch([bytes.fromhex(raw) for raw in row["frames"]])[-1]
    assert (out.verdict.name, out.reason) == (row["verdict"], row["reason"])
    assert [sent.hex() for sent in out.frames] == ([row["sent"]] if row["sent"] else [])
    if row["sent"]:
        assert out.backend == row["backend"]


def test_the_rows_are_what_their_program_writes() -> None:
    assert json.loads(json.dumps(generate.rows())) == FRAMES["rows"]
    assert json.loads(json.dumps(generate.CONFIG)) == FRAMES["config"]


# --- another balancer's frames ------------------------------------------------

REAL_MAC = "00:00:de:ad:be:af"


@pytest.fixture(scope="module")
def katran() -> Datapath:
    """Its VIPs as dsr services; those that need IPv6 backends behind an IPv4 VIP cannot be."""
    services = [
        {
            "name": f"s{number}", "vip": vip["vip"], "port": vip["port"] or "any", "protocol": vip["proto"],
            "forward": "dsr", "backends": [{"address": real} for real in KATRAN[vip["reals"]]],
        }
        for number, vip in enumerate(KATRAN["vips"])
    ]  # fmt: skip
    balancer = Datapath(Config.from_dict({"flows": 256, "services": services}), mac="02:00:00:00:00:00")
    for real in KATRAN["reals4"] + KATRAN["reals6"]:
        balancer.set_neighbour(real, REAL_MAC)
    return balancer


@pytest.mark.parametrize("row", KATRAN["rows"], ids=lambda row: str(row["n"]))
def test_verdicts_agree_with_another_balancer(katran: Datapath, row: dict[str, Any]) -> None:
    """Where they do not, the row says why; what is forwarded keeps every byte behind the MAC addresses."""
    raw = bytes.fromhex(row["input"])
    out = katran.process(raw)
    assert out.verdict.name == row["verdict"]
    assert ("why" in row) == (row["verdict"] != row["katran"])
    forwarded = row["verdict"] == "FORWARD" and out.reason != "held"
    assert len(out.frames) == forwarded + ("fragmented" in row.get("why", ""))
    if out.reason == "echo":
        assert out.frames[0][54] == 129
        assert out.frames[0][58:] == raw[58:]
    elif len(out.frames) == 1:
        assert out.frames[0] == mac_bytes(REAL_MAC) + mac_bytes("02:00:00:00:00:00") + raw[12:]
        if out.reason != "icmp":  # the checksum of a row's ICMP is not in order
            take_apart(out.frames[0])


def test_one_flow_one_backend(katran: Datapath) -> None:
    """Vectors 2, 3 and 18 are one connection."""
    inputs = {row["n"]: bytes.fromhex(row["input"]) for row in KATRAN["rows"]}
    assert len({katran.process(inputs[number]).backend for number in (2, 3, 18)}) == 1


@pytest.fixture(scope="module")
def katran_tunnels() -> Datapath:
    """All its VIPs through IPIP, as it has them."""
    vips = [*KATRAN["vips"], KATRAN["tunnel_vip"]]
    services = [
        {
            "name": f"s{number}", "vip": vip["vip"], "port": vip["port"] or "any", "protocol": vip["proto"],
            "forward": "ipip", "backends": [{"address": real} for real in KATRAN[vip["reals"]]],
        }
        for number, vip in enumerate(vips)
    ]  # fmt: skip
    balancer = Datapath(Config.from_dict({"flows": 256, "services": services}))
    for real in KATRAN["reals4"] + KATRAN["reals6"]:
        balancer.set_neighbour(real, REAL_MAC)
    return balancer


WRAPPED = [
    row for row in KATRAN["rows"] + KATRAN["tunnel_rows"] if row["katran"] == "FORWARD" and "echo" not in row["name"]
]


@pytest.mark.parametrize("row", WRAPPED, ids=lambda row: str(row["n"]))
def test_wrapped_like_another_balancer_does(katran_tunnels: Datapath, row: dict[str, Any]) -> None:
    """The packet as it came; outside, one of the VIP's reals, the type of service, TTL 64, no "don't fragment"."""
    raw = bytes.fromhex(row["input"])
    out = katran_tunnels.process(raw)
    assert out.verdict.name == "FORWARD"
    outer = unwrap(out.frames[0])
    version = raw[14] >> 4
    assert outer.packet == raw[14:]
    assert outer.dst in KATRAN["reals4"] + KATRAN["reals6"]
    assert (outer.ttl, outer.df) == (64, False)
    assert outer.tos == (raw[15] if version == 4 else (raw[14] & 15) << 4 | raw[15] >> 4)


# What each has its own of: IPv4's identification, checksum and addresses; IPv6's flow label and addresses.
OWN = {4: {4, 5, *range(10, 20)}, 6: {1, 2, 3, *range(8, 40)}}


@pytest.mark.parametrize("row", [row for row in WRAPPED if "expected" in row], ids=lambda row: str(row["n"]))
def test_the_other_balancer_s_frames_byte_for_byte(katran_tunnels: Datapath, row: dict[str, Any]) -> None:
    """But for what is each one's own, and for its QUIC rows, which go to an IPv6 real that the connection id names."""
    theirs = bytes.fromhex(row["expected"])
    ours = katran_tunnels.process(bytes.fromhex(row["input"])).frames[0]
    version, outer = ours[14] >> 4, 40 if ours[14] >> 4 == 6 else 20
    if theirs[14] >> 4 != version:
        assert row["name"].startswith("QUIC")
        assert theirs[14 + 40 :] == ours[14 + outer :]
        return
    assert len(ours) == len(theirs)
    assert [at for at in range(14, len(ours)) if ours[at] != theirs[at] and at - 14 not in OWN[version]] == []
    if version == 6:  # of the first four bytes, the type of service is the packet's
        assert ours[15] >> 4 == theirs[15] >> 4


# --- ICMP, as others have it ---------------------------------------------------


@pytest.mark.parametrize("row", ICMP["icmp_nat"], ids=lambda row: row["name"])
def test_icmp_through_nat(row: dict[str, Any]) -> None:
    """Byte for byte, but for the TTL, which fastlb spends, and for what sums it up."""
    before, after = bytes.fromhex(row["before"])[14:], bytes.fromhex(row["after"])[14:]
    version = before[0] >> 4
    quoted = 28 if version == 4 else 48
    header = 20 if version == 4 else 40
    width, source, target = (4, 12, 16) if version == 4 else (16, 8, 24)

    def host(packet: bytes, at: int) -> str:
        return str(ip_address(packet[at : at + width]))

    vip, backend = host(before, target), host(after, target)
    vport, port = (int.from_bytes(packet[quoted + header : quoted + header + 2], "big") for packet in (before, after))
    protocol = "tcp" if before[quoted + (9 if version == 4 else 6)] == 6 else "udp"
    assert host(before, quoted + source) == vip
    balancer = datapath({
        "name": "s", "vip": vip, "port": vport, "protocol": protocol, "forward": "nat",
        "backends": [{"address": backend, "port": port}],
    })  # fmt: skip
    balancer.set_neighbour(backend, REAL_MAC)
    sent = bytearray(balancer.process(bytes.fromhex(row["before"])).frames[0][14:])
    hops = 8 if version == 4 else 7
    assert sent[hops] == before[hops] - 1
    sent[hops] = before[hops]
    if version == 4:
        sent[10:12] = bytes(2)
        sent[10:12] = checksum(bytes(sent[:20])).to_bytes(2, "big")
    assert sent.hex() == after.hex()


def test_the_mtu_that_a_client_is_told() -> None:
    """The link's, less what the tunnel takes; for IPv6 never below 1280, to which no sender would listen (RFC 8200)."""
    for version, taken in ((4, 20), (6, 40)):
        advertised = ICMP["link_mtu"] - taken
        assert advertised == ICMP["advertised"][f"ipip{version}"]
        balancer = datapath(tunnel("ipip", version, version), mtu=ICMP["link_mtu"])
        raw = frame(CLIENT[version], 40000, VIP[version], 80, payload=bytes(1221), df=version == 4)
        out = balancer.process(raw)
        assert out.reason == "too_big"
        seen = take_apart(out.frames[0])
        assert (seen.src, seen.dst) == (VIP[version], CLIENT[version])
        assert int.from_bytes(seen.segment[4:8], "big") == max(advertised, 1280 if version == 6 else 0)


@pytest.mark.parametrize("row", ICMP["too_big"], ids=lambda row: str(row["n"]))
def test_too_big_like_another_balancer(katran: Datapath, row: dict[str, Any]) -> None:
    """Its answer begins like ours, which quotes more. The IPv4 packet may be fragmented, which fastlb prefers."""
    raw, expected = bytearray(bytes.fromhex(row["input"])), bytes.fromhex(row["expected"])
    if raw[14] >> 4 == 4:
        raw[20] |= 0x40
        raw[24:26] = bytes(2)
        raw[24:26] = checksum(bytes(raw[14:34])).to_bytes(2, "big")
    out = katran.process(raw)
    assert out.reason == "too_big"
    ours, theirs = take_apart(out.frames[0]), take_apart(expected)
    assert (ours.src, ours.dst, ours.protocol) == (theirs.src, theirs.dst, theirs.protocol)
    assert (ours.segment[:2], ours.segment[4:8]) == (theirs.segment[:2], theirs.segment[4:8])
    assert ours.segment[8:] == raw[14 : 14 + len(ours.segment) - 8]
