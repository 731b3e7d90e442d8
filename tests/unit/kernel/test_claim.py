"""claim.py: one holder of an interface's name at a time."""

from __future__ import annotations

import os

import pytest

from fastlb.errors import KernelError
from fastlb.kernel.claim import claim, is_claimed

NAME = f"test{os.getpid()}"  # of no interface: names are claimed, whatever they are


def test_one_at_a_time() -> None:
    assert not is_claimed(NAME)
    with claim(NAME):
        assert is_claimed(NAME)
        with pytest.raises(KernelError, match=f"another fastlb is running on interface {NAME}"):
            claim(NAME)
        with claim(NAME + "x"):
            pass
    assert not is_claimed(NAME)


def test_looking_takes_nothing() -> None:
    is_claimed(NAME)
    claim(NAME).close()
