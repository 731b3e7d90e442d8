"""tun.py: what is said when there can be no TUN device; what one does, tests/netns/test_decap.py shows."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from fastlb.errors import KernelError
from fastlb.kernel import tun
from fastlb.kernel.tun import open_tun
from tests.fake_route import FakeRoute

REFUSALS = [
    (errno.ENOENT, "the kernel must have CONFIG_TUN, and /dev/net/tun must exist"),
    (errno.EPERM, "this needs root or CAP_NET_ADMIN"),
    (errno.EBUSY, "there is an interface of that name; choose another with --tun"),
    (errno.EINVAL, "is that a name for an interface?"),
]


@pytest.mark.parametrize(("code", "hint"), REFUSALS)
@pytest.mark.parametrize("call", ["open", "ioctl"])
def test_refusals(monkeypatch: pytest.MonkeyPatch, call: str, code: int, hint: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    null = os.open("/dev/null", os.O_RDWR)
    monkeypatch.setattr(tun.os, "open", refuse if call == "open" else lambda *_: null)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(KernelError) as raised, open_tun("fastlb0"):
        pass
    monkeypatch.undo()
    assert str(raised.value) == f"cannot make the TUN device fastlb0: {os.strerror(code)} ({hint})"
    if call == "open":
        os.close(null)
    else:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(null)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of that name alone, packets behind a virtio_net_hdr; it is set up, and goes when it is closed."""
    null, asked, set_up = os.open("/dev/null", os.O_RDWR), [], []
    monkeypatch.setattr(tun.os, "open", lambda *_: null)
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, argument: asked.append((fd, request, argument)))
    monkeypatch.setattr(tun, "set_up_tun", set_up.append)
    with open_tun("fastlb0") as fd:
        assert fd == null
    monkeypatch.undo()
    assert asked == [(null, 0x400454CA, struct.pack("16sH22x", b"fastlb0", 0x0001 | 0x1000 | 0x4000 | 0x8000))]
    assert set_up == ["fastlb0"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(null)


def test_a_device_that_has_gone_cannot_be_set_up(fake_route: FakeRoute) -> None:
    with pytest.raises(KernelError, match="cannot set no such device up: No such device"):
        tun.set_up_tun("no such device")
