"""Network namespaces for tests: each has a thread that lives in it, and every part is cleaned up.

    with Namespace("client") as client, Namespace("host") as host:
        veth(client, "c0", host, "h0")
        client.add_address("c0", "10.9.0.1/24")
        client.run(function, argument)

What ``run`` starts (sockets, processes) belongs to the namespace, wherever it is used afterwards.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from pyroute2 import IPRoute, netns
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

P = ParamSpec("P")
T = TypeVar("T")

_numbers = itertools.count()


class Namespace:
    """A fresh network namespace with lo up; addresses are usable at once (no IPv6 duplicate detection)."""

    def __init__(self, label: str = "ns") -> None:
        self.name = f"fastlb-test{os.getpid()}-{next(_numbers)}-{label}"

    def __enter__(self) -> Namespace:
        netns.create(self.name)
        self._thread = ThreadPoolExecutor(1, initializer=netns.setns, initargs=(self.name, 0, None, False))
        self.sysctl("net/ipv6/conf/default/accept_dad", 0)
        self.link_up("lo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        netns.remove(self.name)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in the namespace and return (or raise) what it does. Not from within itself."""
        return self.start(function, *args, **kwargs).result()

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Begin the call; what is run later waits for it."""
        return self._thread.submit(function, *args, **kwargs)

    def rtnl(self, function: Callable[[IPRoute], T]) -> T:
        """Call the function with a netlink socket of the namespace."""

        def call() -> T:
            with IPRoute() as ipr:
                return function(ipr)

        return self.run(call)

    def sysctl(self, path: str, value: int) -> None:
        """Write /proc/sys/<path>; what is under net/ belongs to the namespace."""
        self.run(Path("/proc/sys", path).write_text, str(value))

    def index(self, interface: str) -> int:
        """Index of an interface."""
        return self.run(socket.if_nametoindex, interface)

    def mac(self, interface: str) -> bytes:
        """Hardware address of an interface, 6 bytes."""
        link = self.rtnl(lambda ipr: ipr.get_links(ifname=interface)[0])
        return bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))

    def link_up(self, interface: str) -> None:
        """Set an interface up."""
        self.set_link(interface, state="up")

    def set_link(self, interface: str, **settings: Any) -> None:
        """Change an interface, e.g. ``mtu=9000``."""
        index = self.index(interface)
        self.rtnl(lambda ipr: ipr.link("set", index=index, **settings))

    def add_address(self, interface: str, address: str) -> None:
        """Give an interface an address, as "address/length", which can be bound at once."""
        ip, length = address.split("/")
        index, flags = self.index(interface), IFA_F_NODAD if ":" in ip else 0
        self.rtnl(lambda ipr: ipr.addr("add", index=index, address=ip, prefixlen=int(length), flags=flags))

    def add_route(self, prefix: str, gateway: str) -> None:
        """Route a prefix through a gateway."""
        self.rtnl(lambda ipr: ipr.route("add", dst=prefix, gateway=gateway))


def veth(left: Namespace, left_name: str, right: Namespace, right_name: str, queues: int = 1) -> None:
    """A cable between two namespaces, both ends up; ``queues`` receive and transmit queues at each."""
    ends: dict[str, Any] = {"num_tx_queues": queues, "num_rx_queues": queues}
    peer = {"ifname": right_name, "net_ns_fd": right.name, **ends}
    left.rtnl(lambda ipr: ipr.link("add", ifname=left_name, kind="veth", peer=peer, **ends))
    left.link_up(left_name)
    right.link_up(right_name)
