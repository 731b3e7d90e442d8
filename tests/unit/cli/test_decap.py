"""`fastlb decap`: from words to the receiver's options."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from fastlb.cli.main import main
from fastlb.daemon import decap
from fastlb.daemon.decap import Options

ADDRESSES = ("10.0.0.1", "2001:db8::1")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Options("eth0")),
        (["--mode", "gre,ipip,gre", "--key", "0x10"], Options("eth0", modes=("gre", "ipip"), key=16)),
        (["--tun", "tunnel", "--port", "7000"], Options("eth0", tun="tunnel", port=7000)),
        (
            [word for address in ADDRESSES for word in ("--address", address)],
            Options("eth0", addresses=tuple(map(ip_address, ADDRESSES))),
        ),
    ],
)
def test_options(words: list[str], expected: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(decap, "run", ran.append)
    assert main(["decap", "eth0", "--log-level", "error", *words]) == 0
    assert ran == [expected]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mode", "vxlan"], "'vxlan' is none of ipip, gre, gue"),
        (["--tun", "a name"], "'a name' is no name for an interface"),
        (["--tun", "sixteen-letters-"], "is no name for an interface"),
        (["--tun", "a/b"], "is no name for an interface"),
        (["--port", "0"], "0 is not in 1..65535"),
        (["--key", "none"], "invalid number value: 'none'"),
        (["--address", "here"], "'here' does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_what_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["decap", "eth0", *words])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
