"""What a reload takes away: told when it is nearly all, whatever it is called."""

from __future__ import annotations

from typing import Any

import pytest

from fastlb.config import Config
from fastlb.observe.losses import describe_losses


def config(services: int, backends: int = 2, name: str = "web", **changes: Any) -> Config:
    return Config.from_dict({"services": [
        {
            "name": f"{name}-{number}", "vip": f"203.0.113.{number + 1}", "port": 80, "protocol": "tcp",
            "forward": "dsr", "backends": [{"address": f"10.0.{number}.{each + 1}"} for each in range(backends)],
        } | changes
        for number in range(services)
    ]})  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        (config(0), config(0), None),
        (config(0), config(9), None),
        (config(9), config(9), None),
        (config(9), config(9, name="shop"), None),
        (config(2), config(1), None),
        (config(3), config(1), None),
        (config(4), config(1), "3 of 4 services and 6 of 8 backends"),
        (config(1), config(0), "1 of 1 services and 2 of 2 backends"),
        (config(200), config(3), "197 of 200 services and 394 of 400 backends"),
        (config(4), config(4, backends=0), "0 of 4 services and 8 of 8 backends"),
        (config(4, backends=8), config(4), "0 of 4 services and 24 of 32 backends"),
        (config(4, backends=7), config(4), None),
        (config(4, backends=0), config(0), "4 of 4 services and 0 of 0 backends"),
        (config(4), config(4, port=8080), "4 of 4 services and 8 of 8 backends"),
        (config(4), config(4, protocol="udp"), "4 of 4 services and 8 of 8 backends"),
    ],
)
def test_losses(before: Config, after: Config, counts: str | None) -> None:
    rest = "are gone with this reload; if that is not meant, mend the file and reload again"
    assert describe_losses(before, after) == ([] if counts is None else [f"{counts} {rest}"])
