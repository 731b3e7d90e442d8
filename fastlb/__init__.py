"""fastlb: a layer-4 load balancer for Linux hosts.

Four ways in: the ``fastlb`` command (`fastlb.cli.main`), embedding (`Datapath`), the tables themselves (`maglev_table`,
`flow_hash`), and the packet path for other extensions (`get_include`).
"""

from pathlib import Path

from fastlb.config import Config, load_config
from fastlb.embedding import Datapath, Result, Trace, Verdict, flow_hash
from fastlb.errors import ConfigError, ControlError, FastlbError, KernelError, Problem
from fastlb.plan.maglev import maglev_table
from fastlb.version import __version__

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
