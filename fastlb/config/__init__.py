"""The configuration: what may be written, what it means, and everything that is wrong with what was written.

A YAML file (`load_config`) or a dict of the same shape (`Config.from_dict`) becomes an immutable `Config`, whose values
are parsed and whose rules hold, so that no other room checks them again. Whatever is wrong is reported at once, each
fault with its line, its key and what would be right. Read `load.py` first, which draws the way of a file; `schema.py`
has the models, `fields.py` the types of their values, and `rules.py` what fields demand of each other.
"""

from fastlb.config.fields import drain_time
from fastlb.config.load import Config, control_path, json_schema, load_config
from fastlb.config.schema import Affinity, Backend, Check, Service, SlowStart, Tunnel

__all__ = [
    "Affinity",
    "Backend",
    "Check",
    "Config",
    "Service",
    "SlowStart",
    "Tunnel",
    "control_path",
    "drain_time",
    "json_schema",
    "load_config",
]
