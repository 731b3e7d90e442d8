"""ICMP errors about flows, echo requests and time exceeded; every checksum of what comes out is summed anew.

What is quoted is built by dpkt from the packet that the complaint is about, as a router would quote it.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network
from typing import Any

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb import Datapath, Verdict
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests import tables
from tests.balancers import BACKENDS, CLIENT, VIP, Balancer, config, datapath, reply_to, service
from tests.frames import (
    ACK,
    BALANCER_MAC,
    FRAGMENT,
    Seen,
    checksum,
    ethernet,
    frame,
    ip4_packet,
    ip6_packet,
    mac_bytes,
    mac_of,
    pseudo_header,
    take_apart,
)  # fmt: skip
from tests.unit.dataplane.test_encap import unwrap
from tests.unit.dataplane.test_fragments import TUNNELS, balancer_of, cut, put_together, unbreakable

ROUTER = {4: "10.7.0.1", 6: "fd00:7::1"}
PROTO = {4: 1, 6: 58}
ERRORS = {  # (type, code) by what it says
    4: {"unreachable": (3, 1), "port": (3, 3), "too big": (3, 4), "time exceeded": (11, 0), "parameter": (12, 0)},
    6: {"unreachable": (1, 3), "port": (1, 4), "too big": (2, 0), "time exceeded": (3, 0), "parameter": (4, 0)},
}
KINDS = [(version, kind) for version in (4, 6) for kind in ERRORS[version]]
BACKENDS_OF_TWO = [{"address": address, "port": 8080} for address in BACKENDS[4][:2]]
every_error = pytest.mark.parametrize(("version", "kind"), KINDS)


def error(about: bytes, kind: str, source: str, *, target: str | None = None, quoted: int = 1 << 16) -> bytes:
    """An ICMP error about an IP packet, to its sender; ``quoted``: bytes behind the quoted IP header."""
    version = about[0] >> 4
    header = (about[0] & 15) * 4 if version == 4 else 40
    sender = dpkt.ip.IP(about).src if version == 4 else dpkt.ip6.IP6(about).src
    to = target or str(ip_address(sender))
    body = struct.pack("!BBHI", *ERRORS[version][kind], 0, 1400) + about[: header + quoted]
    return icmp_frame(version, source, to, body)


def icmp_frame(version: int, source: str, target: str, body: bytes, ttl: int = 60) -> bytes:
    """With its checksum."""
    pseudo = b"" if version == 4 else pseudo_header(ip_address(source).packed, ip_address(target).packed, 58, len(body))
    whole = body[:2] + checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    return ethernet((ip4_packet if version == 4 else ip6_packet)(source, target, PROTO[version], whole, ttl=ttl))


def quoted_of(seen: Seen) -> tuple[str, int, str, int, bytes]:
    """(source, its port, target, its port, transport header) of what an error quotes; its IP checksum is verified.

    A Fragment header is stepped over.
    """
    packet = seen.segment[8:]
    if seen.version == 4:
        ip = dpkt.ip.IP(packet)
        assert checksum(packet[:20]) == 0
        source, target, rest = ip.src, ip.dst, packet[20:]
    else:
        source, target, rest = packet[8:24], packet[24:40], packet[48 if packet[6] == FRAGMENT else 40 :]
    sport, dport = struct.unpack("!2H", rest[:4])
    return str(ip_address(source)), sport, str(ip_address(target)), dport, rest


def opened(forward: str, version: int, protocol: str = "tcp") -> tuple[Datapath, bytes, str]:
    """A balancer that knows a flow; what it sent to the backend, and the backend."""
    balancer = datapath(service(forward, version, protocol))
    sent = balancer.process(frame(CLIENT[version], 40000, VIP[version], 80, protocol, payload=b"hello")).frames[0]
    backend = next(host for host in BACKENDS[version] if mac_of(host) == take_apart(sent).eth_dst)
    return balancer, sent, backend


# ---- to the backend: about what it sent to a client


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("quoted", [8, 20, 1000])
@every_error
def test_about_a_reply_through_nat(version: int, kind: str, quoted: int, protocol: str) -> None:
    """The client's side complains to the VIP; the backend hears of the packet that it had sent itself."""
    balancer, sent, backend = opened("nat", version, protocol)
    answer = reply_to(sent, "SA", b"x" * 30)
    back = balancer.process(answer).frames[0]
    out = balancer.process(error(back[14:], kind, ROUTER[version], quoted=quoted))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    seen = take_apart(out.frames[0])
    assert (seen.src, seen.dst, seen.eth_dst, seen.ttl) == (ROUTER[version], backend, mac_of(backend), 59)
    assert seen.segment[:2] == bytes(ERRORS[version][kind])
    assert seen.segment[4:8] == (1400).to_bytes(4, "big")
    source, sport, target, dport, rest = quoted_of(seen)
    assert (source, sport, target, dport) == (backend, 8080, CLIENT[version], 40000)
    transport = take_apart(answer).segment
    assert rest == transport[: len(rest)], "as the backend had sent it, its checksum too where it is quoted"
    assert len(rest) == min(quoted, len(transport))


@pytest.mark.parametrize("forward", ["dsr", *TUNNELS])
@every_error
def test_about_a_reply_of_the_one_way_modes(version: int, kind: str, forward: str) -> None:
    balancer = balancer_of(forward, version, "tcp")
    sent = balancer.process(frame(CLIENT[version], 40000, VIP[version], 80)).frames[0]
    reply = frame(VIP[version], 80, CLIENT[version], 40000, flags=ACK, payload=bytes(20))
    raw = error(reply[14:], kind, ROUTER[version])
    out = balancer.process(raw)
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    if forward == "dsr":
        assert out.frames[0][12:] == raw[12:]
        assert out.frames[0][:6] == sent[:6]
    else:
        assert unwrap(out.frames[0]).packet == raw[14:]
        assert unwrap(out.frames[0]).dst == unwrap(sent).dst


def test_without_an_entry_the_maglev_table_knows() -> None:
    """Another balancer of the fleet placed the flow."""
    for forward in ("nat", "dsr"):
        _, _, backend = opened(forward, 4)
        reply = frame(VIP[4], 80, CLIENT[4], 40000, flags=ACK)
        out = datapath(service(forward)).process(error(reply[14:], "too big", ROUTER[4]))
        assert (out.reason, out.frames[0][:6].hex(":")) == ("icmp", mac_of(backend))


# ---- to the client: about what fastlb sent to a backend


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("quoted", [8, 20, 1000])
@pytest.mark.parametrize("by_backend", [True, False])
@every_error
def test_about_a_client_s_packet_through_nat(
    version: int, kind: str, by_backend: bool, quoted: int, protocol: str
) -> None:
    balancer, sent, backend = opened("nat", version, protocol)
    complainer = backend if by_backend else ROUTER[version]
    out = balancer.process(error(sent[14:], kind, complainer, quoted=quoted))
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    seen = take_apart(out.frames[0])
    expected = VIP[version] if by_backend else ROUTER[version]
    assert (seen.src, seen.dst, seen.eth_dst) == (expected, CLIENT[version], mac_of(CLIENT[version]))
    source, sport, target, dport, rest = quoted_of(seen)
    assert (source, sport, target, dport) == (CLIENT[version], 40000, VIP[version], 80)
    original = take_apart(frame(CLIENT[version], 40000, VIP[version], 80, protocol, payload=b"hello")).segment
    assert rest == original[: len(rest)]


def test_a_closed_port_after_a_restart() -> None:
    """Nobody remembers the flow, but the Maglev table explains it."""
    _, sent, backend = opened("nat", 4, "udp")
    out = datapath(service("nat", 4, "udp")).process(error(sent[14:], "port", backend))
    assert (out.reason, quoted_of(take_apart(out.frames[0]))[:4]) == ("icmp", (CLIENT[4], 40000, VIP[4], 80))


# ---- about fragments: of a big datagram, the first has the ports


@pytest.mark.parametrize("forward", ["nat", "dsr", *TUNNELS])
@pytest.mark.parametrize("version", [4, 6])
def test_about_a_reply_in_fragments(version: int, forward: str) -> None:
    """A link to the client is too narrow for them: the backend must hear of it."""
    balancer = balancer_of(forward, version)
    sent = balancer.process(frame(CLIENT[version], 40000, VIP[version], 80, "udp")).frames[0]
    first, second = cut(frame(VIP[version], 80, CLIENT[version], 40000, "udp", payload=bytes(2000)), [1448])
    raw = error(first[14:], "too big", ROUTER[version], quoted=1000)
    out = balancer.process(raw)
    assert (out.verdict, out.reason) == (Verdict.FORWARD, "icmp")
    if forward in TUNNELS:
        assert (unwrap(out.frames[0]).packet, unwrap(out.frames[0]).dst) == (raw[14:], unwrap(sent).dst)
    elif forward == "dsr":
        assert (out.frames[0][12:], out.frames[0][:6]) == (raw[12:], sent[:6])
    else:
        backend = take_apart(sent).dst
        assert take_apart(out.frames[0]).dst == backend
        assert quoted_of(take_apart(out.frames[0]))[:4] == (backend, 8080, CLIENT[version], 40000)
    assert balancer.process(error(second[14:], "too big", ROUTER[version], quoted=1000)).reason == "icmp_quote"


@pytest.mark.parametrize("version", [4, 6])
def test_about_a_client_s_first_fragment_through_nat(version: int) -> None:
    balancer = datapath(service("nat", version, "udp"))
    first, _ = cut(frame(CLIENT[version], 40000, VIP[version], 80, "udp", payload=bytes(2000)), [1448])
    sent = balancer.process(first).frames[0]
    out = balancer.process(error(sent[14:], "too big", ROUTER[version], quoted=1000))
    seen = take_apart(out.frames[0])
    assert (out.reason, seen.src, seen.dst) == ("icmp", ROUTER[version], CLIENT[version])
    assert quoted_of(seen)[:4] == (CLIENT[version], 40000, VIP[version], 80)
    header = 20 if version == 4 else 48
    assert quoted_of(seen)[4] == first[14 + header :][: len(quoted_of(seen)[4])]


def test_a_quoted_fragment_header_that_is_cut() -> None:
    first, _ = cut(frame(VIP[6], 80, CLIENT[6], 40000, "udp", payload=bytes(2000)), [1448])
    balancer = datapath(service("nat", 6, "udp"))
    reasons = [balancer.process(error(first[14:], "too big", ROUTER[6], quoted=size)).reason for size in range(17)]
    assert reasons == ["icmp_quote"] * 12 + ["icmp_header"] * 4 + ["icmp"]


@pytest.mark.parametrize("forward", TUNNELS)
def test_an_error_of_full_length_passes_a_narrow_tunnel(forward: str) -> None:
    """ICMPv6 errors have up to 1,280 bytes: the backend must hear what its packets met beyond the client's router."""
    balancer = balancer_of(forward, 6, mtu=1296)
    about = frame(VIP[6], 80, CLIENT[6], 40000, "udp", payload=bytes(1400))[14:]
    out = balancer.process(error(about, "too big", ROUTER[6], quoted=1280 - 40 - 8 - 40))
    assert (out.reason, len(out.frames)) == ("icmp", 2)
    assert len(unwrap(ethernet(put_together([each[14:] for each in out.frames]))).packet) == 1280


# ---- what is not passed on


@pytest.mark.parametrize("version", [4, 6])
def test_flows_do_not_change(version: int) -> None:
    balancer, sent, backend = opened("nat", version)
    before = tables.flows(balancer.pipeline)
    for kind in ERRORS[version]:
        balancer.process(error(sent[14:], kind, backend))
        balancer.process(error(frame(VIP[version], 80, CLIENT[version], 999)[14:], kind, ROUTER[version]))
    assert tables.flows(balancer.pipeline) == before


@every_error
def test_of_no_flow(version: int, kind: str) -> None:
    balancer, _, backend = opened("nat", version)
    other = next(host for host in BACKENDS[version] if host != backend)
    stranger = frame(CLIENT[version], 40000, other, 8080, payload=b"x")
    assert balancer.process(error(stranger[14:], kind, other)).reason == "icmp_unknown"
    elsewhere = frame(CLIENT[version], 40000, "192.0.2.9" if version == 4 else "2001:db8::9", 8080)
    assert balancer.process(error(elsewhere[14:], kind, other)).reason == "no_service"
    empty = datapath(service("nat", version, backends=[]))
    reply = frame(VIP[version], 80, CLIENT[version], 40000)
    assert empty.process(error(reply[14:], kind, other)).reason == "icmp_unknown"


@every_error
def test_to_somebody_else_than_it_is_about(version: int, kind: str) -> None:
    """A forged error: it must not steer anything."""
    balancer, _, _ = opened("nat", version)
    reply = frame(VIP[version], 80, CLIENT[version], 40000)
    assert balancer.process(error(reply[14:], kind, ROUTER[version], target=CLIENT[version])).reason == "icmp_header"


@pytest.mark.parametrize("version", [4, 6])
def test_cut_short_and_nested(version: int) -> None:
    balancer, _, _ = opened("nat", version)
    reply = frame(VIP[version], 80, CLIENT[version], 40000)[14:]
    reasons = [balancer.process(error(reply, "port", ROUTER[version], quoted=size)).reason for size in range(9)]
    assert reasons == ["icmp_quote"] * 4 + ["icmp_header"] * 4 + ["icmp"]
    inner = error(reply, "port", VIP[version], target=CLIENT[version])[14:]
    assert balancer.process(error(inner, "port", ROUTER[version])).reason == "icmp_quote"


@pytest.mark.parametrize("beyond", [b"", b"\0" * 100])
@pytest.mark.parametrize("version", [4, 6])
def test_what_lies_behind_the_ip_packet_is_no_part_of_the_error(version: int, beyond: bytes) -> None:
    """A frame that is longer than its packet. Whatever is quoted there would be rewritten outside of any checksum."""
    balancer, _, _ = opened("nat", version)
    header = 20 if version == 4 else 40
    about = frame(VIP[version], 80, CLIENT[version], 40000)[14:]
    shortest = 8 + header + 8
    whole = error(about, "port", ROUTER[version])
    reasons = {}
    for length in range(4, shortest + 1):
        short = icmp_frame(version, ROUTER[version], VIP[version], whole[14 + header :][:length])
        reasons[length] = balancer.process(short + whole[len(short) :] + beyond).reason
    assert {length for length, reason in reasons.items() if reason == "icmp"} == {shortest}
    assert set(reasons.values()) == {"icmp", "icmp_header"}
    assert balancer.process(whole + beyond).reason == "icmp"


@pytest.mark.parametrize("version", [4, 6])
def test_an_echo_request_that_is_cut(version: int) -> None:
    balancer, _, _ = opened("nat", version)
    asked = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 1, 1)
    reasons = [
        balancer.process(icmp_frame(version, CLIENT[version], VIP[version], asked[:length]) + asked[length:]).reason
        for length in (4, 7, 8)
    ]
    assert reasons == ["icmp_header", "icmp_header", "echo"]


def test_no_answer_to_an_error() -> None:
    balancer, _, _ = opened("nat", 4)
    reply = frame(VIP[4], 80, CLIENT[4], 40000)
    body = struct.pack("!BBHI", 3, 1, 0, 0) + reply[14:]
    assert balancer.process(icmp_frame(4, ROUTER[4], VIP[4], body, ttl=1)).reason == "ttl_expired"
    assert balancer.process(icmp_frame(6, ROUTER[6], VIP[6], body, ttl=1)).verdict is not Verdict.FORWARD


@pytest.mark.parametrize("forward", TUNNELS)
@every_error
def test_errors_through_tunnels_are_not_answered(version: int, kind: str, forward: str) -> None:
    """One that is too long for the tunnel; and a tunnel spends no hop."""
    reply = frame(VIP[version], 80, CLIENT[version], 40000, "udp", payload=bytes(1400))[14:]
    raw = error(reply, kind, ROUTER[version])
    balancer = balancer_of(forward, version, mtu=1400)
    whole = unbreakable(raw)
    assert balancer.process(whole).reason == "over_mtu"
    dying = icmp_frame(version, ROUTER[version], VIP[version], take_apart(raw).segment[:100], ttl=1)
    assert unwrap(balancer.process(dying).frames[0]).packet == dying[14:]


@given(
    data=st.binary(max_size=120), kind=st.sampled_from(KINDS), at=st.integers(0, 60),
    forward=st.sampled_from(["nat", "dsr"]),
)  # fmt: skip
def test_anything_may_be_quoted(data: bytes, kind: tuple[int, str], at: int, forward: str) -> None:
    """Nothing breaks, and what is passed on has sound checksums."""
    version, name = kind
    reply = frame(VIP[version], 80, CLIENT[version], 40000)[14:]
    mixed = reply[:at] + data
    body = struct.pack("!BBHI", *ERRORS[version][name], 0, 0) + mixed
    out = datapath(service(forward, version)).process(icmp_frame(version, ROUTER[version], VIP[version], body))
    assert out.reason in ("icmp", "icmp_header", "icmp_unknown", "icmp_quote", "no_service")
    for sent in out.frames:
        take_apart(sent)


# ---- echo


@pytest.mark.parametrize("version", [4, 6])
def test_echo_is_answered_while_there_is_a_backend(version: int) -> None:
    asked = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 77, 3) + b"payload of a ping"
    raw = icmp_frame(version, CLIENT[version], VIP[version], asked)
    balancer = datapath(service("nat", version), service("dsr", version, "udp", backends=[]))
    out = balancer.process(raw)
    seen = take_apart(out.frames[0])
    assert (out.reason, seen.src, seen.dst, seen.ttl) == ("echo", VIP[version], CLIENT[version], 64)
    assert (seen.eth_dst, seen.eth_src) == (raw[6:12].hex(":"), BALANCER_MAC)
    assert seen.segment[:1] + seen.segment[4:] == bytes([0 if version == 4 else 129]) + asked[4:]
    weightless = [{"address": BACKENDS[version][0], "weight": 0}]
    assert datapath(service("nat", version, backends=weightless)).process(raw).reason == "no_backend"
    assert datapath(service("nat", version), icmp_echo=False).process(raw).reason == "no_service"
    elsewhere = icmp_frame(version, CLIENT[version], ROUTER[version], asked)
    assert balancer.process(elsewhere).reason == "no_service"


@pytest.mark.parametrize("version", [4, 6])
def test_echo_to_an_address_that_a_prefix_serves_as_well(version: int) -> None:
    """Another service has the address itself, without a backend."""
    asked = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 77, 3)
    raw = icmp_frame(version, CLIENT[version], VIP[version], asked)
    around = f"{ip_network(f'{VIP[version]}/{28 if version == 4 else 120}', strict=False)}"
    empty = service("dsr", version, "udp", backends=[])
    assert datapath(empty).process(raw).reason == "no_backend"
    assert datapath(empty, service("nat", version, vip=around)).process(raw).reason == "echo"
    assert datapath(empty, service("nat", version, vip=around, backends=[])).process(raw).reason == "no_backend"


def test_a_vip_is_silent_while_its_backends_are_down_or_drained() -> None:
    """As health and the operator say, not only the configuration."""
    asked = icmp_frame(4, CLIENT[4], VIP[4], struct.pack("!BBHHH", 8, 0, 0, 77, 3) + b"ping")
    settings = config(service("nat", backends=BACKENDS_OF_TWO, check={"type": "tcp", "rise": 1, "fall": 1}))
    [checked] = settings.services
    one, two = (checked.key(backend) for backend in checked.backends)
    standings = BackendStates()
    standings.apply_config(settings, 0.0)
    known = Balancer(settings)

    def answered() -> str:
        plans = plan_services(settings, known.ids, 0.0, standings)
        known.pipeline.publish(services_table(settings, plans), known.routes())
        return known.send(asked)[0]

    assert answered() == "echo", "not checked yet"
    standings.checked(checked, one, 0.01, "", 1.0)
    standings.checked(checked, two, None, "refused", 1.0)
    assert answered() == "echo"
    standings.drain((checked.name, one))
    assert answered() == "no_backend", "one is draining, the other down"
    standings.enable((checked.name, one), 2.0)
    assert answered() == "echo"
    standings.checked(checked, one, None, "refused", 3.0)
    assert answered() == "no_backend"


def test_an_echo_of_zeros_has_a_checksum_too() -> None:
    """The reply is all zeros, whose checksum is all ones: zeros would not sum up."""
    asked = bytes.fromhex("0800f7ff00000000")
    header = bytes.fromhex("4500001c00010000400100000a010002cb00710a")
    raw = mac_bytes(BALANCER_MAC) + mac_bytes(mac_of(CLIENT[4])) + b"\x08\x00" + header + asked
    out = datapath(service("nat")).process(raw)
    assert out.reason == "echo"
    assert out.frames[0][34:42] == bytes.fromhex("0000ffff00000000")


def test_echo_with_a_tag_and_options() -> None:
    asked = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"x" * 9
    whole = asked[:2] + checksum(asked).to_bytes(2, "big") + asked[4:]
    packet = ip4_packet(CLIENT[4], VIP[4], 1, whole, options=b"\x94\x04\0\0")
    out = datapath(service("nat")).process(ethernet(packet, tags=((0x8100, 5),)))
    seen = take_apart(out.frames[0])
    assert (seen.tags, seen.src, seen.segment[0]) == (((0x8100, 5),), VIP[4], 0)


# ---- time exceeded


@pytest.mark.parametrize("version", [4, 6])
def test_a_hop_limit_of_one_is_answered_in_nat(version: int) -> None:
    balancer = datapath(service("nat", version), service("dsr", version, port=81))
    raw = frame(CLIENT[version], 40000, VIP[version], 80, ttl=1)
    out = balancer.process(raw)
    seen = take_apart(out.frames[0])
    assert (out.reason, seen.src, seen.dst) == ("time_exceeded", VIP[version], CLIENT[version])
    assert seen.segment[:2] == bytes([11 if version == 4 else 3, 0])
    assert raw[14:].startswith(seen.segment[8:16])
    assert balancer.process(frame(CLIENT[version], 40000, VIP[version], 81, ttl=1)).reason == "scheduled"


@pytest.mark.parametrize(("protocol", "how"), [("udp", {}), ("tcp", {}), ("tcp", {"df": True})])
@pytest.mark.parametrize("leg", ["client", "reply"])
@pytest.mark.parametrize("forward", ["nat", "fullnat"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_hop_limit_of_one_counts_before_the_length(
    version: int, forward: str, leg: str, protocol: str, how: dict[str, Any]
) -> None:
    """One that would have been cut, too: the answer is one packet, complete."""
    changes = {"mss_clamp": True} if protocol == "tcp" else {}
    balancer = datapath(service(forward, version, protocol, **changes), mtu=1400, snat=["10.3.0.5", "fd00:3::5"])
    sent = take_apart(balancer.process(frame(CLIENT[version], 40000, VIP[version], 80, protocol)).frames[0])
    ends = (CLIENT[version], 40000, VIP[version], 80)
    if leg == "reply":
        ends = (sent.dst, sent.dport, sent.src, sent.sport)
    raw = frame(*ends, protocol, payload=bytes(1440), ttl=1, **how)
    out = balancer.process(raw)
    assert (out.reason, len(out.frames)) == ("time_exceeded", 1)
    seen = take_apart(out.frames[0])
    assert (seen.src, seen.dst) == (ends[2], ends[0])
    assert raw[14:].startswith(seen.segment[8:])
    assert len(out.frames[0]) == 14 + (576 if version == 4 else 1280)


def test_time_exceeded_is_limited() -> None:
    balancer = datapath(service("nat"))
    reasons = [balancer.process(frame(CLIENT[4], 40000, VIP[4], 80, ttl=1)).reason for _ in range(1001)]
    assert (reasons.count("time_exceeded"), reasons.count("reject_limit")) == (1000, 1)

