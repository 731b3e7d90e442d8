"""Writes frames.json: packets and what must become of them, computed with dpkt and without fastlb.

    python -m tests.golden.generate

The rows are stored so that a change of either side shows as a difference in the file, to be read before it is kept.
"""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tests.balancers import CLIENT, VIP, flags
from tests.frames import (
    ACK,
    BALANCER_MAC,
    DEST_OPTS,
    FRAGMENT,
    HOP_BY_HOP,
    PADDING4,
    ROUTING,
    SYN,
    checksum,
    frame,
    mac_bytes,
    mac_of,
)

VLAN, QINQ = (0x8100, 0x2005), (0x88A8, 100)
BACKEND = {4: "10.3.0.11", 6: "fd00:3::11"}
PORTS = {"nat": 80, "dsr": 81}
BACKEND_PORT = 8080

CONFIG: dict[str, Any] = {
    "flows": 64,
    "maglev_size": 251,
    "services": [
        {
            "name": f"{forward}{version}{protocol}", "vip": VIP[version], "port": port, "protocol": protocol,
            "forward": forward,
            "backends": [{"address": BACKEND[version]} | ({"port": BACKEND_PORT} if forward == "nat" else {})],
        }
        for version in (4, 6) for protocol in ("tcp", "udp") for forward, port in PORTS.items()
    ],
}  # fmt: skip

SHAPES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("SYN", 4, "tcp", {"tcp_options": bytes.fromhex("020405b4")}),
    ("SYN", 6, "tcp", {"tcp_options": bytes.fromhex("020405a0")}),
    ("data in mid-flow", 4, "tcp", {"flags": ACK, "payload": b"GET / HTTP/1.1\r\n\r\n", "seq": 1001, "ack": 5001}),
    ("data in mid-flow", 6, "tcp", {"flags": ACK, "payload": b"GET / HTTP/1.1\r\n\r\n", "seq": 1001, "ack": 5001}),
    ("datagram", 4, "udp", {"payload": b"odd"}),
    ("datagram", 6, "udp", {"payload": b"odd"}),
    ("datagram without checksum", 4, "udp", {"payload": b"none", "with_checksum": False}),
    ("datagram that may be fragmented", 4, "udp", {"payload": b"odd", "df": False}),
    ("IPv4 options", 4, "tcp", {"options": PADDING4 * 2}),
    ("extension headers", 6, "udp", {"extensions": ((HOP_BY_HOP, b""), (DEST_OPTS, bytes(14)))}),
    ("802.1Q", 4, "tcp", {"tags": (VLAN,)}),
    ("QinQ", 6, "tcp", {"tags": (QINQ, VLAN)}),
    ("last hop but one", 4, "udp", {"ttl": 2}),
    ("atomic fragment", 6, "udp", {"extensions": ((FRAGMENT, bytes(6)),)}),
]


def edited(raw: bytes, changes: dict[int, int]) -> bytes:
    """The frame with other bytes at some places."""
    return bytes(changes.get(at, byte) for at, byte in enumerate(raw))


NOT_FORWARDED: list[tuple[str, str, str, bytes]] = [
    ("part of ICMP", "PASS", "icmp_fragment", edited(frame(CLIENT[4], 40000, VIP[4], 80), {20: 0x20, 23: 1})),
    ("another port", "PASS", "no_service", frame(CLIENT[4], 40000, VIP[4], 82)),
    ("cut in the ports", "PASS", "truncated", frame(CLIENT[4], 40000, VIP[4], 80)[:37]),
    ("cut in the TCP header", "DROP", "ip_length", frame(CLIENT[4], 40000, VIP[4], 80)[:50]),
    ("SYN FIN", "DROP", "tcp_flags", frame(CLIENT[4], 40000, VIP[4], 80, flags=flags("SF"))),
    ("segments left", "DROP", "routing_header",
     frame(CLIENT[6], 40000, VIP[6], 80, extensions=((ROUTING, b"\x04\x01"),))),
]  # fmt: skip


def renumbered(left: bytes, source: str, target: str) -> bytes:
    """With the shift of the identification that rewrite.pxd gives to a pair of addresses, those that the packet had."""
    words = [int.from_bytes(ip_address(address).packed, "little") << 32 for address in (source, target)]
    product = (words[0] ^ 0x9E3779B97F4A7C15) * (words[1] ^ 0xD6E8FEB86659FD93)
    mixed = (product >> 64) ^ product % 2**64
    new = bytearray(left)
    number = int.from_bytes(new[18:20], "big") + (mixed >> 32 ^ mixed)
    new[18:20] = (number % 2**16).to_bytes(2, "big")
    new[24:26] = b"\0\0"
    new[24:26] = checksum(bytes(new[14:34])).to_bytes(2, "big")
    return bytes(new)


def forwarded(forward: str, name: str, version: int, protocol: str, shape: dict[str, Any]) -> dict[str, Any]:
    vip, port, client, backend = VIP[version], PORTS[forward], CLIENT[version], BACKEND[version]
    shape = {"df": True} | shape
    came = frame(client, 40000, vip, port, protocol, **shape)
    if forward == "nat":
        left = frame(client, 40000, backend, BACKEND_PORT, protocol, **shape | {"ttl": shape.get("ttl", 64) - 1})
        left = left if shape["df"] else renumbered(left, client, vip)
    else:
        left = came
    fresh = protocol == "udp" or shape.get("flags", SYN) == SYN
    return {
        "name": f"{forward} IPv{version} {protocol} {name}",
        "frames": [came.hex()],
        "verdict": "FORWARD",
        "reason": "scheduled" if fresh else "maglev",
        "sent": (mac_bytes(mac_of(backend)) + mac_bytes(BALANCER_MAC) + left[12:]).hex(),
        "backend": f"{f'[{backend}]' if version == 6 else backend}:{BACKEND_PORT if forward == 'nat' else port}",
    }


def replied(version: int, protocol: str, shape: dict[str, Any]) -> dict[str, Any]:
    vip, client, backend = VIP[version], CLIENT[version], BACKEND[version]
    opened = frame(client, 40000, vip, 80, protocol)
    came = frame(backend, BACKEND_PORT, client, 40000, protocol, **shape)
    left = frame(vip, 80, client, 40000, protocol, **shape | {"ttl": 63})
    if version == 4:
        left = renumbered(left, backend, client)
    return {
        "name": f"nat IPv{version} {protocol} reply",
        "frames": [opened.hex(), came.hex()],
        "verdict": "FORWARD",
        "reason": "conntrack",
        "sent": (mac_bytes(mac_of(client)) + mac_bytes(BALANCER_MAC) + left[12:]).hex(),
        "backend": f"{f'[{backend}]' if version == 6 else backend}:{BACKEND_PORT}",
    }


def rows() -> list[dict[str, Any]]:
    made = [forwarded(forward, *shape) for forward in PORTS for shape in SHAPES]
    made += [
        replied(version, protocol, {"flags": SYN | ACK, "payload": payload, "seq": 9, "ack": 1001})
        for version in (4, 6)
        for protocol, payload in (("tcp", b""), ("udp", b"answer"))
    ]
    for name, verdict, reason, raw in NOT_FORWARDED:
        made.append({"name": name, "frames": [raw.hex()], "verdict": verdict, "reason": reason, "sent": None})
    return made


if __name__ == "__main__":
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows())
    text = f'{{\n "config": {json.dumps(CONFIG)},\n "rows": [\n{lines}\n ]\n}}\n'
    (Path(__file__).parent / "frames.json").write_text(text)
