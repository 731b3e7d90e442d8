"""`fastlb stop`: it returns when the other one has ended, and says what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastlb.cli.main import main
from fastlb.cli.stop import describe_kept
from tests.control_sockets import serving

FILE = "/dev/shm/fastlb-1"


@pytest.mark.parametrize(
    ("vips", "flow_file", "flows", "expected"),
    [
        ([], None, 0, "the guard on eth0, eth1; no flow"),
        ([], FILE, 1, f"the guard on eth0, eth1; 1 flow in {FILE}"),
        (["203.0.113.10", "203.0.113.11"], FILE, 20,
         f"the guard on eth0, eth1; VIPs 203.0.113.10, 203.0.113.11; 20 flows in {FILE}"),
    ],
)  # fmt: skip
def test_what_is_kept(vips: list[str], flow_file: str | None, flows: int, expected: str) -> None:
    kept = {"interfaces": ["eth0", "eth1"], "vips": vips, "flow_file": flow_file, "flows": flows}
    assert describe_kept(kept) == expected


@pytest.mark.parametrize(
    ("words", "handover", "expected"),
    [([], False, "stopped\n"), (["--handover"], True, "stopped; kept for the next run: the guard on eth0; no flow\n")],
)
def test_it_waits_for_the_end(
    words: list[str], handover: bool, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fastlb.sock"
    requests = []

    def stop(request: Any) -> dict[str, Any]:
        requests.append(request["handover"])
        path.unlink()  # as a fastlb does when it has taken everything down
        return {"interfaces": ["eth0"], "vips": [], "flow_file": None, "flows": 0} if request["handover"] else {}

    with serving(path, {"stop": stop}):
        assert main(["stop", "--socket", str(path), *words]) == 0
    assert (requests, capsys.readouterr().out) == ([handover], expected)
