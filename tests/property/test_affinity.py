"""Client-IP affinity against a slow model of it: any sequence of new flows, pauses, drains, weights and reloads.

The model is a dict from a client's prefix to a backend of one of the group's services and a time. It has no opinion
about where a client goes that it does not remember, but that the backend takes new flows; nor which of several backends
at one address a client gets that comes from another service, but that it is always the same. Everything else must
follow.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastlb._core import AffinityMemory, FlowMemory, Pipeline
from tests.balancers import BACKENDS, KEY, VIP, Balancer, config, reply_to
from tests.frames import ACK, SYN, frame

CLIENTS = ("10.1.0.2", "10.1.0.9", "10.1.1.2", "10.1.1.9", "10.2.0.2")
PORTS = (80, 443)  # of the two services
TIMEOUT = 20.0
TRIAL = 12 * 0.256  # seconds that a client is remembered by a flow that is not established
TICKS = 0.6  # seconds by which a slot may outlive its timeout
WORKERS = 2
H1, H2, H3 = BACKENDS[4]
Backend = tuple[str, int]
HAVE: dict[int, list[Backend]] = {  # at each address one and two, two and two, one and one
    80: [(H1, 80), (H2, 80), (H2, 81), (H3, 80)],
    443: [(H1, 443), (H1, 444), (H2, 443), (H2, 444), (H3, 443)],
}


def some_weights(port: int) -> st.SearchStrategy[list[int | None]]:
    """None leaves a backend out."""
    count = len(HAVE[port])
    return st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=count, max_size=count)


schedulers = st.sampled_from(["rr", "wlc", "maglev", "random"])
backends = st.sampled_from([(port, backend) for port, listed in HAVE.items() for backend in listed])
steps = st.one_of(
    st.tuples(st.just("flow"), st.sampled_from(CLIENTS), st.sampled_from(PORTS)),
    st.tuples(st.just("flow"), st.sampled_from(CLIENTS), st.sampled_from(PORTS)),
    st.tuples(st.just("attempt"), st.sampled_from(CLIENTS), st.sampled_from(PORTS)),
    st.tuples(st.just("pause"), st.floats(0.1, 30.0, allow_nan=False)),
    st.tuples(st.just("drain"), backends),
    st.tuples(st.just("enable"), backends),
    st.tuples(st.just("weight"), backends, st.integers(0, 2)),
    st.tuples(st.just("reload"), some_weights(80), some_weights(443), schedulers),
)


def services(chosen: dict[int, list[int | None]], scheduler: str, prefix: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"s{port}", "vip": VIP[4], "port": port, "protocol": "tcp", "forward": "nat",
            "scheduler": scheduler, "affinity": {"group": "site", "timeout": TIMEOUT, "prefix": prefix},
            "backends": [{"address": host, "port": at, "weight": weight}
                         for (host, at), weight in zip(HAVE[port], chosen[port], strict=True) if weight is not None],
        }
        for port in PORTS
    ]  # fmt: skip


Name = tuple[int, Backend]  # the service's port, and the backend's address and port


class Site:
    """Two workers over one affinity table, and the model."""

    def __init__(self, prefix: int) -> None:
        self.prefix, self.now, self.sport = prefix, 1000.0, 1000
        self.remembered: dict[str, tuple[Name, float]] = {}
        self.drained: set[Name] = set()
        self.chosen: dict[Name, int] = {}
        self.hashed: dict[tuple[Any, ...], Name] = {}
        flows, affinity = FlowMemory(4096, KEY), AffinityMemory(1024)
        self.settings = config(*services({port: [1] * len(HAVE[port]) for port in PORTS}, "rr", prefix))
        self.workers = []
        for at in range(WORKERS):
            worker = Balancer(self.settings)
            worker.pipeline = Pipeline(flows, shards=range(at, 64, WORKERS), affinity=affinity)
            self.workers.append(worker)
        self.plan()

    def plan(self) -> None:
        for worker in self.workers:
            worker.plan(self.now)

    def weight(self, name: Name) -> int | None:
        """As it counts; None: not of the service."""
        port, backend = name
        service = self.settings.services[PORTS.index(port)]
        configured = next((each.weight for each in service.backends if (str(each.address), each.port) == backend), None)
        return None if configured is None else self.chosen.get(name, configured)

    def of(self, port: int, host: str = "") -> list[Name]:
        """The service's backends, perhaps only those at an address."""
        every = [(port, backend) for backend in HAVE[port] if host in ("", backend[0])]
        return [name for name in every if self.weight(name) is not None]

    def takers(self, port: int, known: Name) -> list[Name]:
        """Who takes a client of whom this is known: that backend itself, or those of the service at its address."""
        own = known[0] == port and self.weight(known) is not None
        there = [name for name in ([known] if own else self.of(port, known[1][0])) if name not in self.drained]
        return [name for name in there if self.weight(name)] or there

    def is_held(self, known: Name) -> bool:
        """Does only the memory of it tell which of several backends a client has?"""
        return self.weight(known) is not None and len(self.of(known[0], known[1][0])) > 1

    # --- steps

    def flow(self, client: str, port: int) -> None:
        """A connection that is established at once."""
        self.attempt(client, port, fails=False)

    def send(self, raw: bytes) -> tuple[str, bytes | None, str | None]:
        [taken] = [sent for worker in self.workers if (sent := worker.send(raw, self.now))[0] != "wrong_worker"]
        return taken

    def attempt(self, client: str, port: int, fails: bool = True) -> None:
        """A SYN, which nobody answers if it ``fails``."""
        self.sport += 1
        reason, sent, backend = self.send(frame(client, self.sport, VIP[4], port, flags=SYN))
        if sent is not None and not fails:
            self.send(reply_to(sent))
            self.send(frame(client, self.sport, VIP[4], port, flags=ACK))
        found = (port, (backend.rsplit(":", 1)[0], int(backend.rsplit(":", 1)[1]))) if backend else None
        client = str(ip_network(f"{ip_address(client)}/{self.prefix}", strict=False))
        known, until = self.remembered.get(client, (None, 0.0))
        assume(not until < self.now < until + TICKS)  # either is right
        takers = self.takers(port, known) if known and self.now <= until else []
        if known and takers:
            assert reason == "scheduled"
            assert found in takers
            weights = tuple((name, self.weight(name)) for name in takers)
            assert self.hashed.setdefault((client, weights), found) == found
            if not fails:
                self.remembered[client] = known if self.is_held(known) else found, self.now + TIMEOUT
            return
        candidates = [name for name in self.of(port) if self.weight(name) and name not in self.drained]
        if found is None:
            assert (reason, candidates) == ("no_backend", [])
        else:
            assert found in candidates
            self.remembered[client] = found, self.now + (TRIAL if fails else TIMEOUT)

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def drain(self, name: Name) -> None:
        if self.weight(name) is not None:
            self.drained.add(name)
            self.tell("drain", name)

    def enable(self, name: Name) -> None:
        if self.weight(name) is not None:
            self.drained.discard(name)
            self.chosen.pop(name, None)
            self.tell("enable", name, self.now)

    def set_weight(self, name: Name, weight: int) -> None:
        if self.weight(name) is not None:
            self.chosen[name] = weight
            self.tell("set_weight", name, weight, self.now)

    def tell(self, word: str, name: Name, *more: Any) -> None:
        port, (host, at) = name
        for worker in self.workers:
            getattr(worker.standings, word)((f"s{port}", f"{host}:{at}"), *more)
        self.plan()

    def reload(self, first: list[int | None], second: list[int | None], scheduler: str) -> None:
        """What the operator has said of a backend is forgotten with it, and one that comes back has another id, by
        which the hash goes."""
        self.settings = config(*services({80: first, 443: second}, scheduler, self.prefix))
        for worker in self.workers:
            worker.reload(self.settings, self.now)
        here = {*self.of(80), *self.of(443)}
        self.drained &= here
        self.chosen = {name: weight for name, weight in self.chosen.items() if name in here}
        self.hashed = {}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([16, 24, 32]), st.lists(steps, min_size=1, max_size=60))
def test_clients_follow_their_last_flow(prefix: int, todo: list[tuple[Any, ...]]) -> None:
    site = Site(prefix)
    for word, *arguments in todo:
        getattr(site, {"weight": "set_weight"}.get(word, word))(*arguments)
