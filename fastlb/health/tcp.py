"""The check ``type: tcp``: a backend works if it takes a connection. Nothing is sent, and nothing waited for.

The server's kernel answers the SYN and gets a RST, as a rule before its application knows of the connection.
"""

from __future__ import annotations

from fastlb.health.protocol import Conversation

TCP = Conversation()
