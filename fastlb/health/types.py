"""The table of check types: what the ``type`` of a configuration's check names. A new type is a file and a row."""

from __future__ import annotations

from collections.abc import Mapping

from fastlb.health.http import HTTP
from fastlb.health.protocol import Conversation
from fastlb.health.tcp import TCP

CONVERSATIONS: Mapping[str, Conversation] = {"tcp": TCP, "http": HTTP}
