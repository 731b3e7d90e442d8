"""`fastlb trace` of new flows: by what each scheduler goes, and who takes none."""

from __future__ import annotations

import pytest

from fastlb import Datapath
from tests.balancers import BACKENDS, CLIENT, VIP, config, datapath, flags, reply_to, service
from tests.explanations import says
from tests.frames import frame, mac_of

# --- the scheduler ----------------------------------------------------------------------------------------------------

LEAST = "the least load at this moment, of equals the next in turn; 10.3.0.11:80 (0 + 1) / 1"
BY = {
    "maglev": "the flow's hash 0x",
    "ketama": "the flow's hash 0x",
    "source-hash": "the hash of 10.1.0.2 0x",
    "rr": "turn 1 of 3 of this worker, if no other flow comes first",
    "wrr": "turn 1 of 8 of this worker, if no other flow comes first",
    "random": "by lot, the next one of this worker, by weight 10.3.0.11:80 12.5%, 10.3.0.12:80 25.0%, ",
    "lc": LEAST + "; 10.3.0.12:80 (0 + 1) / 1",
    "wlc": LEAST + "; 10.3.0.12:80 (0 + 1) / 2",
    "lrt": LEAST + " x 0.06 ms",
    "p2c": "the better of two drawn by lot, if no other flow comes first; 10.3.0.11:80 (0 + 1) / 1 x 0.06 ms",
}
WEIGHTED = [{"address": address, "weight": weight} for address, weight in zip(BACKENDS[4], (1, 2, 5), strict=True)]


@pytest.mark.parametrize("scheduler", BY)
def test_by_what_the_scheduler_goes(scheduler: str) -> None:
    web = service("nat", scheduler=scheduler, backends=WEIGHTED)
    dp = datapath(web)
    assert says(dp, "scheduler").startswith(f"{scheduler}: {BY[scheduler]}")
    for port in range(40000, 40050):
        told = dp.trace(CLIENT[4], port, VIP[4], 80, "tcp")
        step = next(step for step in told.steps if step.stage == "scheduler")
        assert f"-> {step.facts['scheduled']}" in step.says
        other = Datapath(config(web))  # which knows none of the flows
        for host in BACKENDS[4]:
            other.set_neighbour(host, mac_of(host))
        picked_up = other.process(frame(CLIENT[4], port, VIP[4], 80, flags=flags("A")))
        assert step.facts["without_a_syn"] == picked_up.backend
        assert ("no SYN goes by hash" in step.says) == (picked_up.backend != step.facts["scheduled"])
        out = dp.process(frame(CLIENT[4], port, VIP[4], 80))
        assert (told.backend, told.reason, told.verdict) == (out.backend, out.reason, out.verdict)


@pytest.mark.parametrize("scheduler", BY)
def test_a_client_that_sticks_to_a_backend_without_weight(scheduler: str) -> None:
    """The only one: the scheduler has nobody to name."""
    web = service("nat", scheduler=scheduler, backends=WEIGHTED[:1], affinity={"timeout": "60s"})
    dp = datapath(web)
    dp.process(reply_to(dp.process(frame(CLIENT[4], 1000, VIP[4], 80)).frames[0]))
    dp.process(frame(CLIENT[4], 1000, VIP[4], 80, flags=flags("A")))
    dp.reload(config(web | {"backends": [WEIGHTED[0] | {"weight": 0}]}))
    assert says(dp, "scheduler").startswith("affinity: the client's last flow went to 10.3.0.11:80; remembered for 6")
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, "tcp")
    assert (told.reason, told.backend) == ("scheduled", "10.3.0.11:80")
    assert dp.process(frame(CLIENT[4], 40000, VIP[4], 80)).backend == told.backend
    assert dp.trace("10.1.0.3", 40000, VIP[4], 80, "tcp").reason == "no_backend"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("policy", "reason"), [("drop", "no_backend"), ("reset", "rejected")])
def test_nobody_takes_flows(policy: str, reason: str, protocol: str) -> None:
    backends = [{"address": BACKENDS[4][0], "weight": 0}]
    dp = datapath(service("nat", protocol=protocol, no_backend=policy, backends=backends))
    told = dp.trace(CLIENT[4], 40000, VIP[4], 80, protocol)
    out = dp.process(frame(CLIENT[4], 40000, VIP[4], 80, protocol))
    assert (told.verdict, told.reason, told.backend) == (out.verdict, reason, None)
    assert out.reason == reason
    assert says(dp, "scheduler", protocol=protocol) == "maglev: no backend takes new flows"
    assert says(dp, "backend", protocol=protocol) == "10.3.0.11:80 is unchecked, weight 0"
