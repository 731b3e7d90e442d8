"""What a data path tells about itself, and whether docs/counters.md tells all of it."""

from __future__ import annotations

import re
from pathlib import Path

from fastlb._core import Pipeline, reason_names
from fastlb.observe import status

ROOT = Path(__file__).resolve().parents[3]
RING_AND_TRANSMIT = {
    "transmitted", "transmitted_bytes", "transmitted_xdp", "tunnels_offloaded", "blocks_read", "read_early", "sleeps",
    "ring_packets", "ring_drops", "ring_freezes",
}  # fmt: skip


def documented(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    text = (ROOT / "docs/counters.md").read_text()
    table = text.split(f"\n## {section}")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


def test_every_reason_is_shown_once() -> None:
    split = status.split_counters(Pipeline(64).counters())
    shown = [*split["paths"], *split["passed"], *split["drops"]]
    assert sorted(shown) == sorted(reason_names())


def test_every_counter_is_documented() -> None:
    split = status.split_counters(Pipeline(64).counters())
    for section in ("paths", "passed", "drops"):
        assert documented(section) == set(split.pop(section)), section
    assert documented("events") == set(Pipeline(64).service_events(1))
    assert documented("Totals") == set(split) | RING_AND_TRANSMIT


def test_flows_and_their_memory() -> None:
    described = status.describe_flows(Pipeline(3000))
    assert described == {
        "active": 0,
        "entries": described["entries"],
        "hot_bytes": described["entries"] * 16,
        "cold_bytes": described["entries"] * 48,
        "source_ports": [],
    }
    assert described["entries"] >= 4000  # three quarters of them are 3,000
