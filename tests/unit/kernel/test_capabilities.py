"""Which capabilities a balancer lacks, on kernels that have the newer ones and on those that do not."""

from __future__ import annotations

import pytest

from fastlb.kernel.capabilities import missing_capabilities, needed_capabilities

BITS = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
NETWORK = ("CAP_NET_ADMIN", "CAP_NET_RAW")
NEEDED = (*NETWORK, "CAP_BPF", "CAP_PERFMON")


def test_needed() -> None:
    assert needed_capabilities(40) == {name: BITS[name] for name in NEEDED}
    assert needed_capabilities(37) == {name: BITS[name] for name in (*NETWORK, "CAP_SYS_ADMIN")}


@pytest.mark.parametrize(
    ("given", "last", "missing"),
    [
        (BITS, 40, []),
        (NEEDED, 40, []),
        ((*NETWORK, "CAP_SYS_ADMIN"), 40, []),
        ((*NETWORK, "CAP_BPF"), 40, ["CAP_PERFMON"]),
        ((*NETWORK, "CAP_PERFMON"), 40, ["CAP_BPF"]),
        (NETWORK, 40, ["CAP_BPF", "CAP_PERFMON"]),
        (("CAP_SYS_ADMIN",), 40, ["CAP_NET_ADMIN", "CAP_NET_RAW"]),
        ((), 40, list(NEEDED)),
        ((*NETWORK, "CAP_SYS_ADMIN"), 37, []),
        (NETWORK, 37, ["CAP_SYS_ADMIN"]),
        ((), 37, ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN"]),
    ],
)
def test_missing(given: tuple[str, ...], last: int, missing: list[str]) -> None:
    assert missing_capabilities(sum(1 << BITS[name] for name in given), last) == missing
