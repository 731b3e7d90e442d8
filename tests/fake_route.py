"""A host's links, addresses and filters in the place of the kernel's, for what changes them by pyroute2."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest
from pyroute2 import NetlinkError

from fastlb.kernel import netlink

INGRESS, CLSACT_HANDLE, TCA_BPF_ID = 0xFFFF_FFF2, 0xFFFF_0000, 11


class Message(dict[str, Any]):
    """A message as pyroute2 presents it: fields by key, attributes by name."""

    def __init__(self, fields: dict[str, Any], **attributes: Any) -> None:
        super().__init__(fields)
        self._attributes = attributes

    def get_attr(self, name: str) -> Any:
        return self._attributes.get(name)


@dataclass
class Raw:
    """An attribute that pyroute2 does not know."""

    data: bytes
    kind: int
    offset: int = 0

    def __getitem__(self, key: str) -> dict[str, int]:
        assert key == "header"
        return {"type": self.kind}


@dataclass
class Filter:
    """A filter of traffic control."""

    index: int
    parent: int
    handle: int
    name: str
    program: int


@dataclass
class FakeRoute:
    """The host. ``refused``: errno by verb, "tc" or "addr" followed by what is asked."""

    links: dict[int, str] = field(default_factory=lambda: {1: "lo", 2: "eth0", 3: "eth1"})
    qdiscs: dict[int, str] = field(default_factory=dict)
    filters: list[Filter] = field(default_factory=list)
    addresses: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    knows_ids: bool = True
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeRoute:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def index(self, name: str) -> int:
        for index, each in self.links.items():
            if each == name:
                return index
        raise OSError("no interface with this name")  # as Python does, without a number

    def _check(self, what: str) -> None:
        self.asked.append(what)
        if what in self.refused:
            raise NetlinkError(self.refused[what], os.strerror(self.refused[what]))

    def tc(self, verb: str, kind: str = "", index: int = 0, **more: Any) -> None:
        self._check(f"tc {verb}")
        if verb == "add":
            if index in self.qdiscs:
                raise NetlinkError(errno.EEXIST, "File exists")
            self.qdiscs[index] = kind
        elif verb == "del":
            del self.qdiscs[index]
        else:
            place = index, more["parent"], more["handle"]
            self.filters = [each for each in self.filters if (each.index, each.parent, each.handle) != place]
            if verb == "replace-filter":
                self.filters.append(Filter(*place, more["name"], more["fd"]))

    def link(self, verb: str, **fields: Any) -> None:
        self._check(f"link {verb}")

    def get_links(self) -> list[Message]:
        return [Message({"index": index}, IFLA_IFNAME=name) for index, name in self.links.items()]

    def get_qdiscs(self) -> list[Message]:
        listed = [(index, CLSACT_HANDLE, kind) for index, kind in self.qdiscs.items()] + [(2, 0, "noqueue")]
        return [Message({"index": index, "handle": handle}, TCA_KIND=kind) for index, handle, kind in listed]

    def get_filters(self, index: int, parent: int) -> list[Message]:
        return [self._shown(each) for each in self.filters if (each.index, each.parent) == (index, parent)]

    def _shown(self, of: Filter) -> Message:
        raw = ("UNKNOWN", Raw(struct.pack("=HHI", 8, TCA_BPF_ID, of.program), TCA_BPF_ID))
        attributes = [("TCA_BPF_NAME", of.name), *([raw] if self.knows_ids else [])]
        options = Message({"attrs": attributes}, TCA_BPF_NAME=of.name)
        return Message({"handle": of.handle}, TCA_OPTIONS=options)

    def addr(self, verb: str, *, index: int, address: str, prefixlen: int, **options: Any) -> None:
        self._check(f"addr {verb}")
        if index not in self.links:
            raise NetlinkError(errno.ENODEV, "No such device")
        there = [each for each in self.addresses if (each["index"], each["address"]) == (index, address)]
        if verb == "add":
            if there:
                raise NetlinkError(errno.EEXIST, "File exists")
            self.addresses.append({"index": index, "address": address, "prefixlen": prefixlen, **options})
        elif not there:
            raise NetlinkError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        else:
            self.addresses.remove(there[0])

    def get_addr(self) -> list[Message]:
        return [
            Message({"index": each["index"]}, IFA_ADDRESS=each["address"], IFA_PROTO=each.get("proto"))
            for each in self.addresses
        ]

    def held(self, name: str) -> set[str]:
        """The addresses of an interface."""
        return {str(ip_address(each["address"])) for each in self.addresses if self.links[each["index"]] == name}


@pytest.fixture
def fake_route(monkeypatch: pytest.MonkeyPatch) -> FakeRoute:
    """A host in the place of the kernel's."""
    host = FakeRoute()
    monkeypatch.setattr(netlink, "IPRoute", lambda: host)
    monkeypatch.setattr(socket, "if_nametoindex", host.index)
    return host
