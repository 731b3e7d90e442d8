"""VIPs that fastlb puts on an interface (`vip_address: interface`), so that the host answers ARP and ND for them.

They are marked as fastlb's own, so that after a crash the next process tells them from the administrator's.
Everything here acts on the network namespace of the calling thread and needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from ipaddress import ip_address

import structlog
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastlb.errors import KernelError
from fastlb.kernel.netlink import error_code, interface_index, iproute, run_in_thread
from fastlb.model.net import Address

VIP_PROTO = 0xFB
"""IFA_PROTO of the addresses that fastlb adds; the kernel's own values end at 3."""

log = structlog.get_logger()


class HeldVips:
    """The VIPs that one interface has from fastlb; at first those that a crash left there, which raises KernelError."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._held = {vip for name, vip in run_in_thread(marked_vips) if name == interface}

    def add(self, wanted: Collection[Address]) -> None:
        """Put what is missing of ``wanted`` on the interface. Raises KernelError."""
        for address in sorted(set(wanted) - self._held, key=str):
            if run_in_thread(add_vip, self._interface, address):
                self._held.add(address)  # else it is the administrator's, and stays his

    def drop(self, keep: Collection[Address] = ()) -> None:
        """Take back all but those to ``keep``; what cannot be taken back is logged."""
        for address in sorted(self._held - set(keep), key=str):
            self._held.discard(address)
            try:
                run_in_thread(remove_vip, self._interface, address)
            except KernelError as error:  # an interface that is gone took its addresses with it
                log.warning("VIP not removed", vip=str(address), error=str(error))

    def as_json(self) -> list[str]:
        """Return their addresses, in order."""
        return sorted(map(str, self._held))


def add_vip(link: int | str, address: Address) -> bool:
    """Give ``link`` (index or name) ``address`` as /32 or /128, so that the host answers ARP and ND for it.

    IPv6 goes without duplicate address detection, which would hold the VIP back for a second and fail in a
    fleet, and as deprecated, so that the host does not pick it as the source of its own connections
    (RFC 6724 section 5, rule 3). False: the link has the address already, so it is not ours to remove.
    The address is marked as ours: see `marked_vips`. Raises KernelError.
    """
    options = {"proto": VIP_PROTO}
    if address.version == 6:
        options |= {"flags": IFA_F_NODAD, "preferred_lft": 0}
    return _change_vip("add", link, address, errno.EEXIST, **options)


def remove_vip(link: int | str, address: Address) -> bool:
    """Take back what ``add_vip`` gave. False: the link no longer has it, or is gone. Raises KernelError."""
    return _change_vip("del", link, address, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO)


def marked_vips() -> list[tuple[str, Address]]:
    """Return (link, address) of every VIP that `add_vip` gave to a link of this namespace, by whichever process.

    Linux before 5.18 does not keep the mark, and shows none. Raises KernelError.
    """
    with iproute("cannot list the host's addresses") as route:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
        return [
            (names[message["index"]], ip_address(message.get_attr("IFA_ADDRESS")))
            for message in route.get_addr()
            if message.get_attr("IFA_PROTO") == VIP_PROTO and message["index"] in names
        ]


def _change_vip(verb: str, link: int | str, address: Address, *harmless: int, **options: int) -> bool:
    """Add or delete an address; False for a refusal with one of the errnos in ``harmless``."""
    with iproute(f"cannot {verb} the address {address} on {link}") as route:
        try:
            index = interface_index(link) if isinstance(link, str) else link
            route.addr(verb, index=index, address=str(address), prefixlen=address.max_prefixlen, **options)
        except (NetlinkError, OSError) as error:
            if error_code(error) in harmless:
                return False
            raise
    return True
