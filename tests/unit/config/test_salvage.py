"""Rules are checked on what is right in a file with faults."""

from __future__ import annotations

from pathlib import Path

from tests.unit.config.written import problems_in


def test_everything_at_once(tmp_path: Path) -> None:
    """Faults of YAML, of fields and between fields, in one file, in the order of its lines."""
    text = """\
interfaces: [eth0]
workers: -1
workers: 2
servcies: []
services:
  - name: one
    vip: 203.0.113.10
    port: 0123
    protocol: sctp
    forward: dsr
    backends:
      - {address: 10.0.0.1, port: 8080, weight: heavy}
      - {address: fd00::1}
  - name: one
    vip: 203.0.113.10
    protocol: tcp
    forward: fullnat
    backends:
      - {address: 203.0.113.10}
"""
    assert [(line, path) for line, path, _ in problems_in(text, tmp_path)] == [
        (3, "workers"),
        (4, "servcies"),
        (8, "services[0].port"),
        (9, "services[0].protocol"),
        (12, "services[0].backends[0].weight"),
        (12, "services[0].backends[0].port"),
        (13, "services[0].backends[1].address"),
        (14, "services[1].port"),
        (14, "services[1].name"),
        (17, "services[1].forward"),
        (19, "services[1].backends[0].address"),
    ]
