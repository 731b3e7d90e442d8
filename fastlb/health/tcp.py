"""The check ``type: tcp``: a backend works if it takes a connection. Nothing is sent, and nothing waited for."""

from __future__ import annotations

from fastlb.health.protocol import Conversation

TCP = Conversation()
