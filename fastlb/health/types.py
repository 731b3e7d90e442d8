"""The table of check types: what the ``type`` of a configuration's check names. A new type is a file and a row."""

from __future__ import annotations

from collections.abc import Mapping

from fastlb.health.http import HTTP
from fastlb.health.protocol import CheckType
from fastlb.health.tcp import TCP

CHECK_TYPES: Mapping[str, CheckType] = {"tcp": TCP, "http": HTTP}
