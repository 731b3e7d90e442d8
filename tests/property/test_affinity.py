"""Client-IP affinity against a slow model of it: any sequence of new flows, pauses, drains, weights and reloads.

The model is a dict from a client's prefix to a backend's address and a time, one for both services of the group. It has
no opinion about where a client goes that it does not remember, but that the backend takes new flows; everything else
must follow.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastlb._core import AffinityMemory, FlowMemory, Pipeline
from tests.balancers import BACKENDS, KEY, VIP, Balancer, config
from tests.frames import SYN, frame

CLIENTS = ("10.1.0.2", "10.1.0.9", "10.1.1.2", "10.1.1.9", "10.2.0.2")
PORTS = (80, 443)  # of the two services
TIMEOUT = 20.0
TICKS = 0.6  # seconds by which a slot may outlive its timeout
WORKERS = 2
HOSTS = BACKENDS[4]

weights = st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=len(HOSTS), max_size=len(HOSTS))
schedulers = st.sampled_from(["rr", "wlc", "maglev", "random"])
steps = st.one_of(
    st.tuples(st.just("flow"), st.sampled_from(CLIENTS), st.sampled_from(PORTS)),
    st.tuples(st.just("flow"), st.sampled_from(CLIENTS), st.sampled_from(PORTS)),
    st.tuples(st.just("pause"), st.floats(0.1, 30.0, allow_nan=False)),
    st.tuples(st.just("drain"), st.sampled_from(PORTS), st.sampled_from(HOSTS)),
    st.tuples(st.just("enable"), st.sampled_from(PORTS), st.sampled_from(HOSTS)),
    st.tuples(st.just("weight"), st.sampled_from(PORTS), st.sampled_from(HOSTS), st.integers(0, 2)),
    st.tuples(st.just("reload"), weights, weights, schedulers),
)


def services(first: list[int | None], second: list[int | None], scheduler: str, prefix: int) -> list[dict[str, Any]]:
    """None leaves a backend out."""
    return [
        {
            "name": f"s{port}", "vip": VIP[4], "port": port, "protocol": "tcp", "forward": "dsr",
            "scheduler": scheduler, "affinity": {"group": "site", "timeout": TIMEOUT, "prefix": prefix},
            "backends": [{"address": host, "weight": weight} for host, weight in zip(HOSTS, chosen, strict=True)
                         if weight is not None],
        }
        for port, chosen in zip(PORTS, (first, second), strict=True)
    ]  # fmt: skip


class Site:
    """Two workers over one affinity table, and the model."""

    def __init__(self, prefix: int) -> None:
        self.prefix, self.now, self.sport = prefix, 1000.0, 1000
        self.remembered: dict[str, tuple[str, float]] = {}
        self.drained: set[tuple[int, str]] = set()
        self.chosen: dict[tuple[int, str], int] = {}
        flows, affinity = FlowMemory(4096, KEY), AffinityMemory(1024)
        self.settings = config(*services([1, 1, 1], [1, 1, 1], "rr", prefix))
        self.workers = []
        for at in range(WORKERS):
            worker = Balancer(self.settings)
            worker.pipeline = Pipeline(flows, shards=range(at, 64, WORKERS), affinity=affinity)
            self.workers.append(worker)
        self.plan()

    def plan(self) -> None:
        for worker in self.workers:
            worker.plan(self.now)

    def weight(self, port: int, host: str) -> int | None:
        """As it counts; None: not of the service."""
        service = self.settings.services[PORTS.index(port)]
        configured = next((each.weight for each in service.backends if str(each.address) == host), None)
        return None if configured is None else self.chosen.get((port, host), configured)

    def takes_clients(self, port: int, host: str) -> bool:
        return self.weight(port, host) is not None and (port, host) not in self.drained

    def takes_new(self, port: int, host: str) -> bool:
        return self.takes_clients(port, host) and self.weight(port, host) != 0

    # --- steps

    def flow(self, client: str, port: int) -> None:
        self.sport += 1
        raw = frame(client, self.sport, VIP[4], port, flags=SYN)
        [(reason, backend)] = [
            (reason, backend) for worker in self.workers
            for reason, _, backend in [worker.send(raw, self.now)] if reason != "wrong_worker"
        ]  # fmt: skip
        host = backend.rsplit(":", 1)[0] if backend else None
        name = str(ip_network(f"{ip_address(client)}/{self.prefix}", strict=False))
        known, until = self.remembered.get(name, ("", 0.0))
        assume(not until < self.now < until + TICKS)  # either is right
        if known and self.now <= until and self.takes_clients(port, known):
            assert (reason, host) == ("scheduled", known)
            self.remembered[name] = known, self.now + TIMEOUT
            return
        candidates = [each for each in HOSTS if self.takes_new(port, each)]
        if host is None:
            assert (reason, candidates) == ("no_backend", [])
        else:
            assert host in candidates
            self.remembered[name] = host, self.now + TIMEOUT

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def drain(self, port: int, host: str) -> None:
        if self.weight(port, host) is not None:
            self.drained.add((port, host))
            self.tell("drain", port, host)

    def enable(self, port: int, host: str) -> None:
        if self.weight(port, host) is not None:
            self.drained.discard((port, host))
            self.chosen.pop((port, host), None)
            self.tell("enable", port, host, self.now)

    def set_weight(self, port: int, host: str, weight: int) -> None:
        if self.weight(port, host) is not None:
            self.chosen[port, host] = weight
            self.tell("set_weight", port, host, weight, self.now)

    def tell(self, word: str, port: int, host: str, *more: Any) -> None:
        for worker in self.workers:
            getattr(worker.standings, word)((f"s{port}", f"{host}:{port}"), *more)
        self.plan()

    def reload(self, first: list[int | None], second: list[int | None], scheduler: str) -> None:
        """What the operator has said of a backend is forgotten with it."""
        self.settings = config(*services(first, second, scheduler, self.prefix))
        for worker in self.workers:
            worker.reload(self.settings, self.now)
        here = {(port, host) for port in PORTS for host in HOSTS if self.weight(port, host) is not None}
        self.drained &= here
        self.chosen = {name: weight for name, weight in self.chosen.items() if name in here}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([16, 24, 32]), st.lists(steps, min_size=1, max_size=60))
def test_clients_follow_their_last_flow(prefix: int, todo: list[tuple[Any, ...]]) -> None:
    site = Site(prefix)
    for word, *arguments in todo:
        getattr(site, {"weight": "set_weight"}.get(word, word))(*arguments)
