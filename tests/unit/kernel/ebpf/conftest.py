"""A kernel for eBPF without one, for every test in here."""

from __future__ import annotations

from tests.ebpf_machine import bpf_kernel

__all__ = ["bpf_kernel"]
