"""embedding.py: by the names and shapes that programs rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fastlb
from fastlb import Datapath, Trace, Verdict
from tests.balancers import BACKENDS, CLIENT, VIP, config, datapath, service
from tests.frames import ACK, SYN, frame, mac_of, take_apart

YAML = """\
services:
  - name: web
    vip: 203.0.113.10
    port: 443
    protocol: tcp
    forward: nat
    backends:
      - {address: 10.0.0.11, weight: 10}
      - {address: 10.0.0.12, weight: 20}
"""


def test_from_a_file_as_in_the_manual(tmp_path: Path) -> None:
    file = tmp_path / "fastlb.yaml"
    file.write_text(YAML)
    dp = fastlb.Datapath(fastlb.load_config(file))
    dp.set_neighbour("10.0.0.11", "02:00:00:00:00:0b")
    dp.set_neighbour("10.0.0.12", "02:00:00:00:00:0c")
    raw = frame("198.51.100.7", 40000, "203.0.113.10", 443)
    out = dp.process(raw, now=0.0)
    assert out.verdict is fastlb.Verdict.FORWARD
    assert out.backend in ("10.0.0.11:443", "10.0.0.12:443")
    assert out.reason == "scheduled"
    (sent,) = out.frames
    assert isinstance(sent, bytes)
    assert take_apart(sent).dst == out.backend.removesuffix(":443")
    assert dp.process(raw).reason == "conntrack"
    assert dp.process(frame("198.51.100.7", 40000, "203.0.113.10", 444)).verdict is fastlb.Verdict.PASS


def test_without_a_neighbour() -> None:
    """Embedded, every address is on-link: its next hop is itself."""
    dp = Datapath(config(service("nat", backends=[{"address": BACKENDS[4][0]}])))
    raw = frame(CLIENT[4], 40000, VIP[4], 80)
    out = dp.process(raw)
    assert (out.verdict, out.frames, out.backend, out.reason) == (Verdict.DROP, [], "10.3.0.11:80", "no_neighbour")
    dp.set_neighbour(BACKENDS[4][0], mac_of(BACKENDS[4][0]))
    assert dp.process(raw).verdict is Verdict.FORWARD
    back = frame(BACKENDS[4][0], 80, CLIENT[4], 40000, flags=0x12)
    assert dp.process(back).reason == "no_neighbour"
    dp.set_neighbour(CLIENT[4], "02:00:00:00:00:99")
    assert dp.process(back).frames[0][:6] == bytes.fromhex("020000000099")
    dp.set_neighbour(CLIENT[4], "02:00:00:00:00:98")
    assert dp.process(back).frames[0][:6] == bytes.fromhex("020000000098")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_frames_are_bytes_like(kind: Any) -> None:
    raw = frame(CLIENT[4], 40000, VIP[4], 80)
    given = kind(raw)
    assert datapath(service("nat")).process(given).verdict is Verdict.FORWARD
    assert bytes(given) == raw


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ("text", TypeError, "bytes-like"),
        (None, TypeError, "bytes-like"),
        (memoryview(bytes(120))[::2], BufferError, "contiguous"),
        (bytes(65535 + 65), ValueError, "a frame has at most 65599 bytes, not 65600"),
    ],
)
def test_what_is_not_a_frame(raw: Any, error: type[Exception], message: str) -> None:
    dp = datapath(service("nat"))
    with pytest.raises(error, match=message):
        dp.process(raw)
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).verdict is Verdict.FORWARD


def test_the_largest_frame() -> None:
    assert datapath(service("nat")).process(bytes(65535 + 64)).reason == "not_ip"


def test_batches() -> None:
    dp = datapath(service("dsr"))
    assert dp.process_batch([]) == []
    made = (frame(CLIENT[4], 1000 + n, VIP[4], 80) for n in range(100))
    results = dp.process_batch(made, now=5.0)
    assert len(results) == 100
    assert {result.verdict for result in results} == {Verdict.FORWARD}
    assert dp.process_batch([frame(CLIENT[4], 1000, VIP[4], 80)], 5.0)[0].reason == "conntrack"


# --- trace --------------------------------------------------------------------


def test_trace_before_and_after() -> None:
    dp = datapath(service("nat", name="web"))
    before = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (before.service, before.why, before.state) == ("web", "maglev", None)
    assert before == dp.trace(CLIENT[4], 40000, VIP[4], 80, 6)
    assert dp.stats()["flows"]["active"] == 0  # asking changes nothing
    out = dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    after = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (after.backend, after.why, after.state) == (out.backend, "conntrack", "syn")
    assert (after.backend, after.flow_hash, after.slot) == (before.backend, before.flow_hash, before.slot)
    assert before.flow_hash == fastlb.flow_hash(CLIENT[4], 40000, VIP[4], 80, "tcp")


def test_trace_follows_a_drained_flow() -> None:
    chosen = service("dsr", backends=[{"address": BACKENDS[4][0]}])
    dp = datapath(chosen)
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    dp.reload(config(service("dsr", backends=[{"address": BACKENDS[4][0], "weight": 0}, {"address": BACKENDS[4][1]}])))
    assert dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp").backend == "10.3.0.11:80"
    assert dp.trace(CLIENT[4], 40001, VIP[4], 80, "tcp").backend == "10.3.0.12:80"
    dp.reload(config(service("dsr", backends=[{"address": BACKENDS[4][1]}], on_leave="rehash")))
    gone = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (gone.backend, gone.why, gone.state) == ("10.3.0.12:80", "maglev", None)


def test_trace_to_nowhere() -> None:
    dp = datapath(service("dsr", name="web", backends=[]))
    nothing = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (nothing.service, nothing.backend, nothing.why, nothing.slot) == ("web", None, "no_backend", None)
    assert (nothing.verdict, nothing.reason) == (Verdict.DROP, "no_backend")
    assert dp.trace(CLIENT[4], 40000, VIP[4], 81, "tcp") == Trace(
        None, None, "no service has this address, port and protocol"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 1, VIP[4], 80, "tcp"), "'host' does not appear to be an IPv4 or IPv6 address"),
        ((CLIENT[4], 65536, VIP[4], 80, "tcp"), "port 65536 is not in 0..65535"),
        ((CLIENT[4], 1, VIP[4], -1, "tcp"), "port -1 is not in 0..65535"),
        ((CLIENT[4], 1, VIP[4], 80, "icmp"), "neither"),
        ((CLIENT[6], 1, VIP[4], 80, "tcp"), "different IP versions"),
    ],
)
def test_trace_refuses_what_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datapath(service("dsr")).trace(*arguments)


# --- neighbours, reload, statistics -------------------------------------------


@pytest.mark.parametrize(
    "mac", ["", "02:00:00:00:00", "02:00:00:00:00:00:01", "2:0:0:0:0:1", "02:00:00:00:00:zz", "+2:00:00:00:00:01"]
)
def test_what_is_not_a_mac(mac: str) -> None:
    with pytest.raises(ValueError, match=r'is not a MAC address like "02:00:00:00:00:0b"'):
        datapath().set_neighbour(CLIENT[4], mac)


def test_the_balancer_s_own_mac() -> None:
    dp = Datapath(config(service("dsr", backends=[{"address": BACKENDS[4][0]}])), mac="02:00:00:00:00:77")
    dp.set_neighbour(BACKENDS[4][0], "02:00:00:00:00:0b")
    sent = dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).frames[0]
    assert sent[:12] == bytes.fromhex("02000000000b020000000077")


def test_reload_keeps_flows_and_neighbours() -> None:
    dp = datapath(service("nat"))
    opened = dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    dp.reload(config(service("nat"), service("dsr", vip="203.0.113.20")), now=1)
    later = dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK), now=1)
    assert (later.backend, later.reason) == (opened.backend, "conntrack")
    assert dp.process(frame(CLIENT[4], 40000, "203.0.113.20", 80), now=1).verdict is Verdict.FORWARD


def test_a_slow_start_goes_on_by_itself() -> None:
    """By the time that frames come with."""
    def plan(count: int) -> dict[str, Any]:
        backends = [{"address": address} for address in BACKENDS[4][:count]]
        return service("dsr", scheduler="wrr", slow_start={"window": "10s"}, backends=backends)

    balancer = datapath(plan(2))
    balancer.reload(config(plan(3)), now=10.0)
    ports = iter(range(1, 65536))
    for now, part in ((10.2, 0.1), (15.0, 0.5), (15.2, 0.5), (19.9, 0.95), (20.4, 1.0), (1000.0, 1.0)):
        rotation = round(200 * (2 + part))
        raw = [frame(CLIENT[4], next(ports), VIP[4], 80, flags=SYN) for _ in range(rotation)]
        placed = Counter(result.backend for result in balancer.process_batch(raw, now))
        assert placed[f"{BACKENDS[4][2]}:80"] == pytest.approx(200 * part, abs=1), now


def test_a_number_that_is_used_again_starts_from_zero() -> None:
    """Long after a backend left, another one gets its number: neither its counters nor its flows come with it."""
    leaving = {"on_leave": "rehash"}
    dp = datapath(service("dsr", backends=[{"address": BACKENDS[4][0]}]), timeouts={"tcp_established": "1h"})
    for flags in (2, ACK):
        dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=flags), now=0)
    alone = service("dsr", backends=[{"address": BACKENDS[4][1]}], **leaving)
    dp.reload(config(alone, timeouts={"tcp_established": "1h"}), now=1)
    both = [{"address": BACKENDS[4][1]}, {"address": BACKENDS[4][2]}]
    dp.reload(config(service("dsr", backends=both, **leaving), timeouts={"tcp_established": "1h"}), now=100)
    shown = dp.stats()["services"][0]["backends"]
    assert [(row["backend"], row["packets"], row["new_flows"], row["active_flows"]) for row in shown] == [
        ("10.3.0.12:80", 0, 0, 0),
        ("10.3.0.13:80", 0, 0, 0),
    ]
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=ACK), now=100).reason == "maglev"


def test_stats() -> None:
    dp = datapath(service("nat", name="web"), service("dsr", 6, "udp", name="dns", port="any"))
    out = dp.process(frame(CLIENT[4], 40000, VIP[4], 80))
    dp.process(frame(CLIENT[4], 40000, VIP[4], 81))
    dp.process(frame(CLIENT[4], 40000, VIP[4], 80, flags=3))
    stats = json.loads(json.dumps(dp.stats()))
    assert set(stats) == {"counters", "services", "flows", "affinity"}
    assert stats["counters"]["packets"] == 3
    assert stats["counters"]["forwarded"] == 1
    assert stats["counters"]["paths"] == {
        "conntrack": 0, "scheduled": 1, "overload": 0, "maglev": 0, "fragment": 0, "held": 0, "icmp": 0,
        "echo": 0, "too_big": 0, "time_exceeded": 0,
        "reset": 0, "rejected": 0,
    }  # fmt: skip
    assert stats["counters"]["passed"]["no_service"] == 1
    assert stats["counters"]["drops"]["tcp_flags"] == 1
    web, dns = stats["services"]
    assert {key: web[key] for key in ("name", "vip", "port", "protocol", "forward", "scheduler")} == {
        "name": "web", "vip": VIP[4], "port": 80, "protocol": "tcp", "forward": "nat", "scheduler": "maglev",
    }  # fmt: skip
    assert dns["port"] == "any"
    assert {row["backend"]: row["packets"] for row in web["backends"]} == {
        f"{address}:8080": int(f"{address}:8080" == out.backend) for address in BACKENDS[4]
    }
    assert stats["flows"]["active"] == 1
    assert stats["flows"]["entries"] >= 4096
    assert stats["flows"]["hot_bytes"] < stats["flows"]["cold_bytes"]


def test_every_reason_has_a_counter_and_one_verdict() -> None:
    counters = datapath().stats()["counters"]
    groups = [set(counters[group]) for group in ("paths", "passed", "drops")]
    assert groups[0] == {
        "conntrack", "scheduled", "overload", "maglev", "fragment", "icmp", "echo", "too_big", "time_exceeded",
        "rejected", "held", "reset",
    }  # fmt: skip
    assert {"no_service", "icmp_fragment", "not_ip"} <= groups[1]
    assert {"no_backend", "no_neighbour", "over_mtu", "ip_length", "tcp_header", "ring_hole"} <= groups[2]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert "?" not in set().union(*groups)


def test_it_needs_neither_root_nor_sockets() -> None:
    """As nobody, in a process that cannot make a socket."""
    program = """
import os, socket
from fastlb import Config, Datapath
if os.getuid() == 0:
    os.setgroups([])
    os.setuid(65534)
def refuse(*_):
    raise PermissionError("no sockets here")
socket.socket.__init__ = refuse
dp = Datapath(Config.from_dict({}))
print(dp.process(bytes(60)).reason)
"""
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert (ran.stdout, ran.returncode) == ("not_ip\n", 0), ran.stderr


def test_an_import_loads_nothing_that_talks_to_the_kernel() -> None:
    rooms = ("kernel", "workers", "health", "control", "daemon", "cli")
    unwanted = ("pyroute2", "asyncio", "structlog", *(f"fastlb.{room}" for room in rooms))
    program = f"import sys; from fastlb import *; print([name for name in sys.modules if name.startswith({unwanted})])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(("changes", "error", "problem"), [
    ({"config": {"services": []}}, TypeError, r"^config is what load_config or Config.from_dict returns, not dict$"),
    ({"mtu": 19}, ValueError, r"^an MTU is 20 to 65535 bytes, not 19$"),
    ({"mtu": -1}, ValueError, r"not -1$"),
    ({"addresses": ("192.0.2.1", "192.0.2.2")}, ValueError, r"^at most one address of each IP version"),
])  # fmt: skip
def test_what_makes_no_data_path(changes: dict[str, Any], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        Datapath(**{"config": config(service("dsr")), **changes})
