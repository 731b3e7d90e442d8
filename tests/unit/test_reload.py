"""A reload, whatever it changes, keeps every flow that the change does not concern: by `Datapath.reload`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from fastlb.embedding import Result
from tests.balancers import BACKENDS, CLIENT, VIP, config, datapath, reply_to, service
from tests.frames import ACK, frame

Services = dict[str, dict[str, Any]]
PORTS = {"web": 80, "api": 81, "dns": 82, "tun": 83}
CLIENT_PORTS = range(40000, 40030)
SETTINGS = {"snat": ["10.3.0.5"]}
GONE = BACKENDS[4][0]


def services() -> Services:
    made = (
        service("nat", name="web"),
        service("fullnat", name="api", scheduler="wlc"),
        service("dsr", protocol="udp", name="dns", scheduler="ketama"),
        service("ipip", name="tun", scheduler="rr", timeouts={"tcp_established": "2h"}),
    )
    return {each["name"]: each | {"port": PORTS[each["name"]]} for each in made}


def on(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Services], object]:
    return lambda listed: change(listed[name])


def reweigh(weight: int) -> Callable[[dict[str, Any]], object]:
    return lambda one: one["backends"][0].update(weight=weight)


ADDED = {"address": "10.3.0.14"}
MORE = service("nat", name="more", port=84)

# what is changed; how; the flows that it concerns: (service, backend's address), None for all of the service
CHANGES: dict[str, tuple[Callable[[Services], object], set[tuple[str, str | None]]]] = {
    "nothing": (lambda listed: None, set()),
    "a service more": (lambda listed: listed.update(more=MORE), set()),
    "services in another order": (
        lambda listed: listed.update({name: listed.pop(name) for name in ("dns", "web")}), set()),
    "a service more, in front": (
        lambda listed: listed.update({"more": MORE} | {name: listed.pop(name) for name in PORTS}), set()),
    "a service less": (lambda listed: listed.pop("web"), {("web", None)}),
    "a service of another name": (on("web", lambda one: one.update(name="shop")), {("web", None)}),
    "a service at another address": (on("web", lambda one: one.update(vip="203.0.113.99")), {("web", None)}),
    "two services that change their ports": (
        lambda listed: (listed["web"].update(port=83), listed["tun"].update(port=80)), {("web", None), ("tun", None)}),
    "a backend more": (on("web", lambda one: one["backends"].append(ADDED)), set()),
    "a backend more by ketama": (on("dns", lambda one: one["backends"].append(ADDED)), set()),
    "backends in another order": (on("web", lambda one: one["backends"].reverse()), set()),
    "a backend less": (on("web", lambda one: one["backends"].pop(0)), {("web", GONE)}),
    "a backend less in fullnat": (on("api", lambda one: one["backends"].pop(0)), {("api", GONE)}),
    "a backend less by ketama": (on("dns", lambda one: one["backends"].pop(0)), {("dns", GONE)}),
    "a backend less in a tunnel": (on("tun", lambda one: one["backends"].pop(0)), {("tun", GONE)}),
    "another port of a backend": (on("web", lambda one: one["backends"][0].update(port=9090)), {("web", GONE)}),
    "another weight": (on("web", reweigh(9)), set()),
    "weight 0": (on("web", reweigh(0)), set()),
    "weight 0 by turns": (on("tun", reweigh(0)), set()),
    "another scheduler": (on("web", lambda one: one.update(scheduler="p2c")), set()),
    "another scheduler, a hash": (on("api", lambda one: one.update(scheduler="source-hash")), set()),
    "another policy": (on("web", lambda one: one.update(on_leave="reset", on_down="keep")), set()),
    "a check and a slow start": (
        on("web", lambda one: one.update(check={"type": "tcp"}, slow_start={"window": 9})), set()),
    "timeouts": (on("web", lambda one: one.update(timeouts={"tcp_established": 99})), set()),
    "clamping": (on("web", lambda one: one.update(mss_clamp=True, no_backend="reset")), set()),
    "much at once": (
        lambda listed: (
            listed["web"]["backends"].pop(0), listed["web"]["backends"].append(ADDED), listed.update(more=MORE),
            listed["api"].update(scheduler="lc"), reweigh(5)(listed["dns"]), listed.pop("tun"),
        ),
        {("web", GONE), ("tun", None)},
    ),
}  # fmt: skip
COMMON: dict[str, dict[str, Any]] = {
    "timeouts": {"timeouts": {"udp": 50, "tcp_established": "1h"}},
    "seed": {"hash_seed": 7},
    "table size": {"maglev_size": 509},
    "echo": {"icmp_echo": False},
}


class Running:
    """A balancer with established flows of every service."""

    def __init__(self) -> None:
        self.balancer = datapath(*services().values(), **SETTINGS)
        self.balancer.set_neighbour(ADDED["address"], "02:00:00:00:00:14")
        self.opened = {(name, sport): self.packet(name, sport, 0.0) for name in PORTS for sport in CLIENT_PORTS}
        for (name, sport), opened in self.opened.items():
            assert opened.reason == "scheduled"
            if name in ("web", "api"):
                assert self.reply(opened, "SA") == "conntrack"
            self.packet(name, sport, 0.0, flags=ACK)

    def packet(self, name: str, sport: int, now: float, **more: Any) -> Result:
        protocol = "udp" if name == "dns" else "tcp"
        return self.balancer.process(frame(CLIENT[4], sport, VIP[4], PORTS[name], protocol, **more), now)

    def reply(self, opened: Result, letters: str, now: float = 0.0) -> str:
        return self.balancer.process(reply_to(opened.frames[0], letters), now).reason

    def reload(self, listed: Services, **settings: Any) -> None:
        self.balancer.reload(config(*listed.values(), **{**SETTINGS, **settings}), now=1.0)

    def check(self, concerned: set[tuple[str, str | None]]) -> None:
        """Flows that the change does not concern go on, both ways; of the others none is where it was."""
        for (name, sport), opened in self.opened.items():
            assert opened.backend is not None
            moves = {(name, None), (name, opened.backend.split(":")[0])} & concerned
            if name in ("web", "api") and not moves:
                assert self.reply(opened, "A", 1.0) == "conntrack"
            later = self.packet(name, sport, 1.0, flags=ACK)
            stayed = (later.reason, later.backend) == ("conntrack", opened.backend)
            assert stayed is not bool(moves), (name, sport)


@pytest.mark.parametrize("policy", ["rehash", None])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_services(change: str, policy: str | None) -> None:
    """Flows of a backend that left stay, unless another policy was chosen."""
    running = Running()
    apply, concerned = CHANGES[change]
    listed = deepcopy(services())
    apply(listed)
    if policy is not None:
        for each in listed.values():
            each.setdefault("on_leave", policy)
    running.reload(listed)
    running.check(concerned if policy else {(name, backend) for name, backend in concerned if backend is None})


@pytest.mark.parametrize("change", COMMON)
def test_a_change_of_what_is_common(change: str) -> None:
    running = Running()
    running.reload(services(), **COMMON[change])
    running.check(set())


@pytest.mark.parametrize("policy", ["keep", "rehash", "reset"])
def test_a_backend_less_by_policy(policy: str) -> None:
    """What `on_leave` says holds for the flows of the backend that goes, and for no other."""
    running = Running()
    listed = services()
    listed["web"] |= {"on_leave": policy, "backends": listed["web"]["backends"][1:]}
    running.reload(listed)
    running.check(set() if policy == "keep" else {("web", GONE)})
    shown = {row["backend"]: row for row in running.balancer.stats()["services"][0]["backends"]}
    if policy == "rehash":
        assert f"{GONE}:8080" not in shown
        return
    assert shown[f"{GONE}:8080"]["state"] == "removed"
    assert (shown[f"{GONE}:8080"]["active_flows"] > 0) == (policy == "keep")
    running.balancer.reload(config(*listed.values(), **SETTINGS), now=31.0)
    assert [row["state"] for row in running.balancer.stats()["services"][0]["backends"]] == (
        ["removed", "unchecked", "unchecked"] if policy == "keep" else ["unchecked", "unchecked"]
    )


def test_the_flows_are_spread_over_all_backends() -> None:
    """Else there would be none for a change to concern."""
    found = {(name, opened.backend) for (name, _), opened in Running().opened.items()}
    assert len(found) == len(PORTS) * len(BACKENDS[4])
