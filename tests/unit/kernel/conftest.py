"""A host without a kernel, for every test in here that asks for one."""

from __future__ import annotations

from tests.fake_route import fake_route

__all__ = ["fake_route"]
