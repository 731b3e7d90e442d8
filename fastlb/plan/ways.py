"""All that follows from the kernel's view of the host for a set of plans, computed together. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastlb._core import Routes
from fastlb.config.load import Config
from fastlb.model.hostview import KernelView, NextHop
from fastlb.model.net import Address
from fastlb.plan.pathmtu import Tunnels
from fastlb.plan.plan import Plan
from fastlb.plan.reachability import not_on_link
from fastlb.plan.routes import outgoing_links, routes_table, tunnel_links, tunnels, wanted_next_hops


@dataclass(frozen=True)
class Ways:
    """How packets reach backends and clients. Changes of backends' states do not matter for it."""

    routes: Routes  # of the data path
    next_hops: frozenset[NextHop]  # that must stay resolved
    links_out: frozenset[int]  # interfaces, by index, that frames may leave by
    tunnel_links: frozenset[int]  # those that tunnels' packets leave by; none when the kernel shall not cut for them
    tunnels: Tunnels  # what tunnels' packets look like, by backend
    unreachable: Sequence[str]  # lines about dsr backends that are not on-link


def find_ways(config: Config, plans: Sequence[Plan], view: KernelView, path_mtus: Mapping[Address, int]) -> Ways:
    """Return how packets reach all that the plans name; ``path_mtus``: by backend, as routers said."""
    return Ways(
        routes=routes_table(view, plans, path_mtus),
        next_hops=frozenset(wanted_next_hops(view, plans)),
        links_out=frozenset(outgoing_links(view, plans, config.interfaces)),
        tunnel_links=frozenset(tunnel_links(view, plans)) if config.tunnel_offload else frozenset(),
        tunnels=tunnels(view, plans),
        unreachable=not_on_link(view, plans),
    )
