"""fastlb: a layer-4 load balancer for Linux hosts.

Four ways in: the ``fastlb`` command (`fastlb.cli.main`), embedding (`Datapath`), the tables themselves (`maglev_table`,
`flow_hash`), and the packet path for other extensions (`get_include`).

A name is imported when it is first asked for: pydantic alone takes longer to import than `fastlb status` takes to run.
A program that gives up its privileges or its files afterwards asks for its names before (``from fastlb import``).
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlb.version import __version__

if TYPE_CHECKING:
    from fastlb.config import Config, load_config
    from fastlb.embedding import Datapath, Result, Trace, Verdict, flow_hash
    from fastlb.errors import ConfigError, ControlError, FastlbError, KernelError, Problem
    from fastlb.plan.maglev import maglev_table

__all__ = [
    "Config",
    "ConfigError",
    "ControlError",
    "Datapath",
    "FastlbError",
    "KernelError",
    "Problem",
    "Result",
    "Trace",
    "Verdict",
    "__version__",
    "flow_hash",
    "get_include",
    "load_config",
    "maglev_table",
]


def get_include() -> str:
    """Return the directory of C headers to compile an extension with that cimports ``fastlb._core``."""
    return str(Path(__file__).parent / "dataplane")


_LATER = {
    "fastlb.errors": ("ConfigError", "ControlError", "FastlbError", "KernelError", "Problem"),
    "fastlb.config": ("Config", "load_config"),
    "fastlb.embedding": ("Datapath", "Result", "Trace", "Verdict", "flow_hash"),
    "fastlb.plan.maglev": ("maglev_table",),
}


def __getattr__(name: str) -> Any:  # PEP 562
    """Import what has this name, and keep it."""
    for module, names in _LATER.items():
        if name in names:
            globals()[name] = value = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return all names, also those that nobody asked for yet."""
    return sorted({*globals(), *__all__})
