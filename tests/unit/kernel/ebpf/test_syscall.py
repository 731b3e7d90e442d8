"""syscall.py: what it refuses before it asks the kernel."""

from __future__ import annotations

import pytest

from fastlb.kernel.ebpf.syscall import HashMap


def test_a_name_that_the_kernel_would_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        HashMap("sixteen_letters_", 4, 4, 1)
