"""Golden rows: input frames, verdict, reason and the exact bytes that leave. tests/golden says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlb import Config, Datapath
from tests.balancers import HOSTS
from tests.frames import BALANCER_MAC, mac_bytes, mac_of, take_apart
from tests.golden import generate

FOLDER = Path(__file__).parents[1] / "golden"
FRAMES: dict[str, Any] = json.loads((FOLDER / "frames.json").read_text())
KATRAN: dict[str, Any] = json.loads((FOLDER / "katran.json").read_text())


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
