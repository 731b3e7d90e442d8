"""fastlb: a layer-4 load balancer for Linux hosts.

Three ways in: the ``fastlb`` command (`fastlb.cli`), embedding (`Datapath`), and the tables themselves
(`maglev_table`, `flow_hash`).
"""

from fastlb.config import Config, load_config
from fastlb.datapath import Datapath, Result, Trace, Verdict, flow_hash
from fastlb.errors import ConfigError, ControlError, FastlbError, KernelError, Problem
from fastlb.maglev import maglev_table

__version__ = "0.1.0"

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
    "flow_hash",
    "load_config",
    "maglev_table",
]
